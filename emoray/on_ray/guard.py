"""Middleware in Ray Serve's HTTP proxies: sends requests of dead replicas again, and refuses more than can be answered.

Proxies are the processes that hold the clients' connections.

Ray Serve 2.60 sends a request to another replica where one refuses it, but gives up one whose replica dies: the client
gets a bare 500. And its own answers (no replica, time out) are plain text. Here, before an answer is begun:

- a request to one of emoray's routes whose replica dies is sent again, to another replica or to the next that comes;
- more requests than the replicas have shown to answer in time are refused at once, before they cost a proxy's work;
- Ray Serve's own answers get the endpoint's one shape of errors.

`emoray serve` sets RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=emoray.on_ray.guard:middlewares where it starts Ray Serve;
where something else does, the cluster's environment must.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from emoray.http.errors import RequestError, no_answer_in_time, no_replica, replica_ended, replicas_full, too_many
from emoray.http.exchange import Message, Receive, Scope, Send
from emoray.on_ray import direct_ingress
from emoray.serve_config import LimitsConfig

_VARIABLE = "EMORAY_GUARD"
"""Settings as JSON, for proxies that are started later."""
AGAIN = re.compile(r"/(|predict|classify|v1/classify|v2/models/[^/]+(/versions/[^/]+)?/infer)")
"""Routes that compute and change nothing: they may be sent again."""
_TRIES = 3
"""A text that ends its replica must not end all of them."""
_WINDOW_S = 2.0
_AT_LEAST = 64
"""Requests under way that are always taken on: too few to tell how fast replicas are."""


@dataclass(frozen=True)
class Settings:
    """What the proxies must know of the endpoint.

    Attributes:
        max_requests: under way at once, at the most.
        max_queue_s: seconds that a request may wait for its turn.
        max_body_bytes: larger bodies are not kept, so their requests are not sent again.
    """

    max_requests: int
    max_queue_s: float
    max_body_bytes: int

    @staticmethod
    def of(limits: LimitsConfig) -> Settings:
        return Settings(2 * limits.max_queued_requests, limits.max_queue_s, limits.max_body_bytes)


def environment(limits: LimitsConfig) -> dict[str, str]:
    """What Ray Serve's controller must find in its environment, and hands on to its proxies."""
    return {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:middlewares",
        _VARIABLE: json.dumps(Settings.of(limits).__dict__),
    }


def middlewares() -> list[Any]:
    """For Ray Serve: called in each proxy when it starts, and behind HAProxy in each replica."""
    from starlette.middleware import Middleware

    if direct_ingress.is_replica():
        return [Middleware(direct_ingress.DirectIngress)]
    given = os.environ.get(_VARIABLE)
    settings = Settings(**json.loads(given)) if given else Settings.of(LimitsConfig())
    return [Middleware(Guard, settings=settings)]


class Pace:
    """How many requests may be under way: as many as were answered in the time that one may wait (Little's law)."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._answered: deque[float] = deque(maxlen=100_000)
        self.under_way = 0

    def limit(self) -> int:
        now = time.monotonic()
        while self._answered and self._answered[0] < now - _WINDOW_S:
            self._answered.popleft()
        a_second = len(self._answered) / _WINDOW_S
        return min(self._settings.max_requests, max(_AT_LEAST, int(a_second * self._settings.max_queue_s)))

    def answered(self) -> None:
        self._answered.append(time.monotonic())

    def admit(self) -> Callable[[], None]:
        """Take a request on; call what comes back when it is answered.

        Raises:
            RequestError: `overloaded`.
        """
        if self.under_way >= self.limit():
            raise too_many(self.under_way)
        self.under_way += 1
        left = [1]

        def release() -> None:
            self.under_way -= left[0]
            left[0] = 0

        return release


class Guard:
    """ASGI middleware; see the module."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._pace = Pace(self._settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        computes = scope["method"] == "POST" and AGAIN.fullmatch(scope["path"]) is not None
        tries = _TRIES if computes or scope["method"] in ("GET", "HEAD") else 1
        try:
            release = self._pace.admit() if computes else _nothing
            try:
                await self._carry(scope, receive, send, tries, release)
            finally:
                release()
        except RequestError as error:
            await _refuse(error, send)

    async def _carry(self, scope: Scope, receive: Receive, send: Send, tries: int, release: Callable[[], None]) -> None:
        """Send a request on until something answers."""
        body = _Body(receive, self._settings.max_body_bytes)
        for left in range(tries - 1, -1, -1):
            answer = _Answer(send, release)
            # The inner layers may add headers to the scope: each try gets its own.
            await self._app({**scope, "headers": list(scope.get("headers", []))}, body.replay(), answer)
            if answer.begun or body.gone:
                if answer.status < 500 and answer.status != 429:
                    self._pace.answered()
                return
            if not body.kept:
                break
            if left:
                await asyncio.sleep(0.05)
        raise replica_ended()


def _nothing() -> None:
    pass


class _Body:
    """A request's messages, kept so that they can be received again."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._most = receive, most
        self._messages: list[Message] = []
        self._size = 0
        self._pending: asyncio.Task[Message] | None = None
        self.kept, self.gone = True, False

    def replay(self) -> Receive:
        """A `receive` that begins with the first message again."""
        place = 0

        async def receive() -> Message:
            nonlocal place
            if place < len(self._messages):
                place += 1
                return self._messages[place - 1]
            message = await self._next()
            place = len(self._messages)
            return message

        return receive

    async def _next(self) -> Message:
        # One task for a message, whoever waits: a try that is cancelled must not take a message with it.
        if self._pending is None:
            self._pending = asyncio.ensure_future(self._receive())
        message = await asyncio.shield(self._pending)
        self._pending = None
        if message["type"] == "http.disconnect":
            self.gone = True
            return message
        self._size += len(message.get("body", b""))
        if self._size > self._most:
            self.kept = False
            self._messages.clear()
        elif self.kept:
            self._messages.append(message)
        return message


class _Answer:
    """A `send` that notes whether an answer was begun, and gives Ray Serve's own ones the endpoint's shape.

    Args:
        done: called when the answer is complete; Ray Serve still has to tidy up then, and the client may ask again.
    """

    def __init__(self, send: Send, done: Callable[[], None]) -> None:
        self._send, self._done = send, done
        self._replaced = False
        self.begun, self.status = False, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun, self.status = True, message["status"]
            headers = _without_doubles(message.get("headers", []))
            error = _own_words(self.status, dict(headers))
            if error is not None:
                self._replaced = True
                await _refuse(error, self._send)
                return
            message = {**message, "headers": headers}
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._done()
        if not self._replaced:
            await self._send(message)


def _without_doubles(headers: Any) -> list[tuple[bytes, bytes]]:
    """Ray Serve adds the request's id, which the endpoint has set already."""
    seen, kept = False, []
    for name, value in headers:
        if name.lower() == b"x-request-id":
            if seen:
                continue
            seen = True
        kept.append((name, value))
    return kept


def _own_words(status: int, headers: dict[bytes, bytes]) -> RequestError | None:
    """The error that stands for an answer of Ray Serve's own; None for one of the application's."""
    if status < 400 or not headers.get(b"content-type", b"text/plain").startswith(b"text/plain"):
        return None
    if status == 408:
        return no_answer_in_time()
    if status == 429:
        return replicas_full()
    return no_replica()


async def _refuse(error: RequestError, send: Send) -> None:
    body = error.body()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *error.all_headers(),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
