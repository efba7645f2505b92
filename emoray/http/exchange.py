"""One request and its answer on ASGI: the body within its limits, JSON into a checked model, work within its time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from emoray.http.errors import RequestError, invalid, timed_out
from emoray.http.sentences import findings, sentence
from emoray.serve_config import LimitsConfig

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

JSON = b"application/json"
_DRAIN_S, _DRAIN_BYTES = 2.0, 64 << 20
"""How much of a refused body is still read and thrown away, so that a client that only sends can read its answer."""


_LAST_S = 0.1
"""A service ends its own work at the deadline; one that has not by so much later is cut off."""


class ClientGone(Exception):
    """The client closed the connection before its answer."""


@dataclass(frozen=True)
class Reply:
    """An answer: status, content type, body, and further headers."""

    body: bytes
    status: int = 200
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


def reply(content: object, status: int = 200) -> Reply:
    """An answer in JSON."""
    return Reply(to_json(content), status)


@dataclass
class Exchange:
    """A request that is being answered.

    Attributes:
        limits: of the endpoint.
        request_id: the client's own, or one of ours.
        deadline: seconds of time.monotonic by which there must be an answer.
        parts: what the route's template matched, e.g. {"name": "emotion"}.
        facts: what the access log says of it beside route, status and time.
        log_texts: its texts are among them.
    """

    scope: Scope
    receive: Receive
    limits: LimitsConfig
    request_id: str
    parts: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    log_texts: bool = False

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.limits.timeout_s
        # A header given twice counts once, as its last; nothing here is read from a list of them.
        self.headers: dict[bytes, bytes] = {name.lower(): value for name, value in self.scope.get("headers", [])}

    async def json(self, model: type[M]) -> M:
        """The body as JSON of a model's shape.

        Raises:
            RequestError: `unsupported_media_type`, `too_large`, `slow_body`, `malformed`, `validation`.
        """
        self.need_type(JSON)
        return parse(await self.body(), model)

    def need_type(self, *accepted: bytes) -> bytes:
        """The request's content type, without its parameters. None at all counts as the first of those accepted."""
        given = self.headers.get(b"content-type", accepted[0]).partition(b";")[0].strip().lower()
        if given not in accepted:
            names = " or ".join(name.decode() for name in accepted)
            raise RequestError("unsupported_media_type", f"the content type must be {names}")
        if self.headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
            raise RequestError("unsupported_media_type", "the body must not be compressed: leave out Content-Encoding")
        return given

    async def body(self) -> bytes:
        """The whole body, never more of it in memory than the limit."""
        most = self.limits.max_body_bytes
        announced = self.headers.get(b"content-length", b"")
        if announced.isdigit() and (len(announced) > 18 or int(announced) > most):
            await self._refuse_body()
        chunks, size = [], 0
        async for chunk in self._chunks(self.deadline):
            size += len(chunk)
            if size > most:
                await self._refuse_body()
            chunks.append(chunk)
        self.facts["bytes"] = size
        return b"".join(chunks)

    async def _chunks(self, until: float) -> Any:
        more = True
        while more:
            try:
                message = await asyncio.wait_for(self.receive(), max(0.0, until - time.monotonic()))
            except asyncio.TimeoutError:
                raise RequestError(
                    "slow_body",
                    f"the body did not arrive within {self.limits.timeout_s:g} s",
                    headers=((b"connection", b"close"),),
                ) from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            more = message.get("more_body", False)
            yield message.get("body", b"")

    async def _refuse_body(self) -> NoReturn:
        if b"expect" not in self.headers:  # one that asks first has sent nothing yet
            size = 0
            try:
                async for chunk in self._chunks(time.monotonic() + _DRAIN_S):
                    size += len(chunk)
                    if size > _DRAIN_BYTES:
                        break
            except RequestError:
                pass
        raise RequestError(
            "too_large",
            f"the body is over the limit of {self.limits.max_body_bytes} bytes: send it in several requests",
            headers=((b"connection", b"close"),),
        )

    def need_texts(self, texts: Sequence[str]) -> None:
        """Refuse more texts than a request may have."""
        count = self.facts["texts"] = len(texts)
        if count > self.limits.max_texts:
            raise RequestError(
                "too_large", f"{count} texts, and {self.limits.max_texts} is the limit: send them in several requests"
            )
        if self.log_texts:
            self.facts["inputs"] = list(texts)

    async def within_time(self, work: Coroutine[Any, Any, T]) -> T:
        """The outcome of some work, unless the client goes away or the time runs out first: then it is cancelled.

        Raises:
            ClientGone: nobody is there to be answered.
            RequestError: `timeout`, or what the work raised.
        """
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait(
                {task, gone},
                timeout=max(0.0, self.deadline + _LAST_S - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if task.done():
                return task.result()
            if gone.done():
                raise ClientGone
            raise timed_out(self.limits.timeout_s)
        finally:
            task.cancel()
            gone.cancel()

    async def _gone(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass


def parse(body: bytes, model: type[M]) -> M:
    """JSON of a model's shape; half surrogate pairs in escapes become U+FFFD, as browsers do.

    Raises:
        RequestError: `malformed` or `validation`.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        found = findings(error)
        if found[0]["type"] != "json_invalid":
            raise invalid(sentence(found, model)) from None
    try:
        # The quick decoder refuses what half an emoji becomes when JavaScript cuts a string: this one reads it.
        content = _whole(json.loads(body.decode("utf-8"), parse_constant=_no_constant))
        return model.model_validate(content)
    except ValidationError as error:
        raise invalid(sentence(findings(error), model)) from None
    except UnicodeDecodeError as error:
        raise RequestError("malformed", f"the body is not UTF-8: byte {error.start} can't be decoded") from None
    except RecursionError:
        raise RequestError("malformed", "the body is nested too deeply") from None
    except ValueError as error:
        where = f": line {error.lineno} column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError("malformed", f"the body is not JSON{where}") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _whole(content: Any) -> Any:
    """The same tree with half surrogate pairs in strings replaced by U+FFFD."""
    if isinstance(content, str):
        return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(content, list):
        return [_whole(item) for item in content]
    if isinstance(content, dict):
        return {_whole(key): _whole(value) for key, value in content.items()}
    return content
