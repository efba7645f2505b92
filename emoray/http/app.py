"""The endpoint as an ASGI app: `make_app(service, config)`, for uvicorn, Ray Serve or any other server.

Plain ASGI without a framework's layers, because they would cost more than the rest of a request's way. Every request
takes the same steps: find the route, check the key, answer, log one line, count.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid

from emoray.http import keys as api_keys
from emoray.http import openapi
from emoray.http.errors import RequestError, too_many
from emoray.http.exchange import JSON, ClientGone, Exchange, Receive, Reply, Scope, Send
from emoray.http.keys import Keys
from emoray.http.metrics import Metrics, Silent
from emoray.http.route import Endpoint, Route, Table
from emoray.http.routes import ROUTES
from emoray.http.service import Service
from emoray.serve_config import ServeConfig

access_log = logging.getLogger("emoray.http.access")
"""One JSON object a request, without any text that was sent."""
_log = logging.getLogger("emoray.http")

CLIENT_GONE = 499
"""nginx's status for a client that went away before its answer; only logs and metrics see it."""
_BODIES_A_PLACE = 2
"""Requests with a body that are taken on for each place in the queue: some of them are still being read."""
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


def make_app(service: Service, config: ServeConfig, *, keys: Keys | None = None, metrics: Metrics | None = None) -> App:
    """The whole endpoint over a service.

    Args:
        keys: None reads them as `config.auth` says.

    Raises:
        ConfigError: the keys can't be read.
    """
    return App(service, config, api_keys.load(config.auth.keys_file) if keys is None else keys, metrics or Silent())


class App:
    """Made by `make_app`."""

    def __init__(self, service: Service, config: ServeConfig, keys: Keys, metrics: Metrics) -> None:
        self._service, self._metrics = service, metrics
        self._table = Table(ROUTES)
        self._bodies = 0
        self.reconfigure(config, keys)

    def reconfigure(self, config: ServeConfig, keys: Keys) -> None:
        """Take over other limits and keys, from the next request on."""
        self._endpoint = Endpoint(self._service, config, openapi.describe(ROUTES, config, bool(keys)))
        self._keys = keys
        self._most_bodies = _BODIES_A_PLACE * config.limits.max_queued_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1003})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self._endpoint.service.start()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self._endpoint.service.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        config = self._endpoint.config
        exchange = Exchange(scope, receive, config.limits, _request_id(scope), log_texts=config.logging.texts)
        status, route = CLIENT_GONE, "unmatched"
        try:
            found, reply = await self._answer(exchange)
            route = found.path if found else route
            status = reply.status
            await _send(reply, exchange, send)
        except ClientGone:
            status = CLIENT_GONE
        finally:
            seconds = time.perf_counter() - start
            self._metrics.request(route, status, seconds)
            _write_log(exchange, route, status, seconds)

    async def _answer(self, exchange: Exchange) -> tuple[Route | None, Reply]:
        """The route and its answer; an error is an answer too."""
        route: Route | None = None
        try:
            route = self._find(exchange)
            if not route.is_open:
                key = self._keys.check(exchange.headers, admin=route.is_admin)
                if key is not None:
                    exchange.facts["key"] = key
            return route, await self._handle(route, exchange)
        except RequestError as error:
            exchange.facts["error"] = error.kind
            return route, _failure(error)
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception as error:
            _log.error("request %s failed", exchange.request_id, exc_info=error)
            exchange.facts["error"] = "internal"
            sentence = f"a fault of the server; its log has more under the id {exchange.request_id}"
            return route, _failure(RequestError("internal", sentence))

    async def _handle(self, route: Route, exchange: Exchange) -> Reply:
        """The route's answer, with a bound on the bodies that are in memory at once."""
        if route.request is None:
            return await route.handler(exchange, self._endpoint)
        if self._bodies >= self._most_bodies:
            raise too_many(self._bodies)
        self._bodies += 1
        try:
            return await route.handler(exchange, self._endpoint)
        finally:
            self._bodies -= 1

    def _find(self, exchange: Exchange) -> Route:
        scope = exchange.scope
        path: str = scope["path"]
        root = scope.get("root_path", "")
        if root and path.startswith(root):  # where the app is mounted below a prefix
            path = path[len(root) :] or "/"
        found = self._table.find(path)
        if found is None:
            raise RequestError("not_found", "no such route; /docs lists them")
        methods, exchange.parts = found
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in methods:
            allowed = ", ".join(sorted(methods))
            raise RequestError(
                "method_not_allowed",
                f"this route takes {allowed}, not {method[:20]}",
                headers=((b"allow", allowed.encode()),),
            )
        return methods[method]


def _failure(error: RequestError) -> Reply:
    return Reply(error.body(), error.status, JSON, tuple(error.all_headers()))


async def _send(reply: Reply, exchange: Exchange, send: Send) -> None:
    headers = [
        (b"content-type", reply.content_type),
        (b"content-length", str(len(reply.body)).encode()),
        (b"x-request-id", exchange.request_id.encode()),
        (b"x-content-type-options", b"nosniff"),
        *reply.headers,
    ]
    body = b"" if exchange.scope["method"] == "HEAD" else reply.body
    try:
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
    except OSError:
        raise ClientGone from None


def _request_id(scope: Scope) -> str:
    """The client's X-Request-Id where it is harmless in a log, else a new one."""
    for name, value in scope.get("headers", []):
        if name.lower() == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return uuid.uuid4().hex


def _write_log(exchange: Exchange, route: str, status: int, seconds: float) -> None:
    if not access_log.isEnabledFor(logging.INFO):
        return
    client = exchange.scope.get("client")
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "request_id": exchange.request_id,
        "client": client[0] if client else None,
        "method": exchange.scope["method"][:20],
        "route": route,
        "status": status,
        "ms": round(seconds * 1000, 2),
        **exchange.facts,
    }
    access_log.info(json.dumps(line))
