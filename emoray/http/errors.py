"""The one error body, `{"error": ..., "error_type": ...}`, and the table of statuses.

Everything that can go wrong with a request is a `RequestError`, which knows its status, body and headers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic_core import to_json

from emoray.errors import EmorayError


@dataclass(frozen=True)
class Kind:
    """A row of the table.

    Attributes:
        status: of HTTP.
        meaning: for OpenAPI.
    """

    status: int
    meaning: str


KINDS = {
    "malformed": Kind(400, "The body is not JSON in UTF-8, or its binary part does not fit its header."),
    "unauthorized": Kind(401, "Keys are set, and the request has none or an unknown one."),
    "forbidden": Kind(403, "The key is a client's; this route needs an admin's."),
    "not_found": Kind(404, "No such route, or no such model."),
    "method_not_allowed": Kind(405, "The route has no such method; `Allow` lists those it has."),
    "slow_body": Kind(408, "The body did not arrive within the time limit."),
    "conflict": Kind(409, "Another model is being loaded."),
    "too_large": Kind(413, "The body, or the number of texts, is over the limit."),
    "unsupported_media_type": Kind(415, "The body's content type or encoding is not one that this route reads."),
    "validation": Kind(422, "Well-formed JSON of the wrong shape; the sentence names the field."),
    "overloaded": Kind(429, "The queue is full; try again after `Retry-After` seconds."),
    "internal": Kind(500, "A fault of the server; its log has the cause under the request's id."),
    "model": Kind(500, "The model failed on this request's texts."),
    "unavailable": Kind(503, "Starting, stopping, or no replica; try again after `Retry-After` seconds."),
    "timeout": Kind(504, "The request's time ran out before it had an answer."),
}
"""error_type -> status."""


class RequestError(EmorayError):
    """A request that gets an error for an answer.

    Args:
        kind: key of KINDS; becomes `error_type`.
        sentence: for a person; never holds a text that was sent.
        retry_after: seconds after which the same request may succeed.
        headers: more of them, e.g. Allow.
    """

    def __init__(
        self,
        kind: str,
        sentence: str,
        *,
        retry_after: float | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(sentence)
        self.kind, self.sentence, self.retry_after, self.headers = kind, sentence, retry_after, headers

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword arguments would be lost between processes otherwise.
        return _rebuild, (self.kind, self.sentence, self.retry_after, self.headers)

    @property
    def status(self) -> int:
        return KINDS[self.kind].status

    def body(self) -> bytes:
        return to_json({"error": self.sentence, "error_type": self.kind})

    def all_headers(self) -> list[tuple[bytes, bytes]]:
        """Its own, and Retry-After in whole seconds where the request may be tried again."""
        if self.retry_after is None:
            return list(self.headers)
        seconds = max(1, math.ceil(self.retry_after))
        return [*self.headers, (b"retry-after", str(seconds).encode())]


def _rebuild(
    kind: str, sentence: str, retry_after: float | None, headers: tuple[tuple[bytes, bytes], ...]
) -> RequestError:
    return RequestError(kind, sentence, retry_after=retry_after, headers=headers)


def invalid(sentence: str) -> RequestError:
    return RequestError("validation", sentence)


def overloaded(sentence: str, retry_after: float) -> RequestError:
    return RequestError("overloaded", sentence, retry_after=retry_after)


def unavailable(sentence: str, retry_after: float = 1.0) -> RequestError:
    return RequestError("unavailable", sentence, retry_after=retry_after)


def too_many(under_way: int) -> RequestError:
    return overloaded(f"{under_way} requests are under way, and no more may: try again soon", 1)


def no_such(what: str, served: str) -> RequestError:
    return RequestError("not_found", f"no such {what} here; this endpoint serves '{served}'")


def busy() -> RequestError:
    return RequestError("conflict", "a model is being loaded: look at /info, and try again when it is done")


def timed_out(seconds: float) -> RequestError:
    return RequestError("timeout", f"no answer within {seconds:.3g} s: send fewer texts, or try again later")


# What proxies before the replicas answer by themselves


def replicas_full() -> RequestError:
    return overloaded("the replicas are full: try again soon", 1)


def replica_ended() -> RequestError:
    return unavailable("the replica that computed this ended before its answer: try again")


def no_replica() -> RequestError:
    return unavailable("no replica can answer now: try again soon", 2)


def no_answer_in_time() -> RequestError:
    return RequestError("timeout", "no replica answered in time: try again later")
