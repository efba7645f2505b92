"""The way of a request behind HAProxy, in the replica: from its HTTP server straight into the endpoint's app.

Ray Serve 2.60 puts its own accounting between the two (a task for the call and one for the client's going away,
metrics, a log record), which costs more than the whole of the app. The app has all of these itself. What Ray Serve
must still answer, its health checks, goes its way. A replica that is to stop waits for its HTTP server's requests too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from emoray.http.exchange import Message, Receive, Scope, Send

App = Callable[[Scope, Receive, Send], Any]

_here: dict[str, Any] = {"app": None, "loop": None}


def set_app(app: App) -> None:
    """Called in a replica, before its HTTP server is started."""
    _here["app"] = app


def open_for_requests() -> None:
    """Called once the app can be asked, on the event loop that it runs on."""
    _here["loop"] = asyncio.get_running_loop()


def is_replica() -> bool:
    """Whether this process has an app of its own."""
    return _here["app"] is not None


class DirectIngress:
    """ASGI middleware; see the module."""

    def __init__(self, app: App) -> None:
        self._around = app

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["path"].startswith("/-/")
            or _here["loop"] is not asyncio.get_running_loop()  # where Ray Serve runs the app in a thread of its own
        ):
            await self._around(scope, receive, send)
            return
        await _here["app"](scope, receive, _in_one_write(send))


def _in_one_write(send: Send) -> Send:
    """An answer's head with its body, in one write to the socket.

    uvicorn writes the head alone. A replica that is killed between the two leaves a client with half an answer, which
    HAProxy can't ask for again: it has the head. What is one write the system sends, even if the replica ends then.
    """
    cycle: Any = getattr(send, "__self__", None)  # uvicorn's RequestResponseCycle, of httptools or h11
    if not hasattr(cycle, "transport"):
        return send
    held = cycle.transport = _Held(cycle.transport)

    async def sent(message: Message) -> None:
        await send(message)
        if message["type"] == "http.response.body":
            held.flush()

    return sent


class _Held:
    """A connection's transport that writes when it is told to, or closed."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, part: bytes) -> None:
        if part.startswith(b"HTTP/1.1 100 "):  # the client sends its body only then
            self._transport.write(part)
        else:
            self._parts.append(part)

    def flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():
            self._transport.write(b"".join(parts))

    def close(self) -> None:
        self.flush()
        self._transport.close()
