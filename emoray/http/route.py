"""What a route is: enough to answer it, and enough to describe it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from emoray.http.errors import unavailable
from emoray.http.exchange import Exchange, Reply
from emoray.http.service import Answer, Service
from emoray.serve_config import ServeConfig


@dataclass(frozen=True)
class Endpoint:
    """What handlers need beside the request."""

    service: Service
    config: ServeConfig
    openapi: dict[str, Any]

    async def classify(
        self, exchange: Exchange, texts: Sequence[str], truncate: bool = True, explain: bool = False
    ) -> Answer:
        """What the model says of a request's texts, within the request's limits; which model is noted for its log."""
        exchange.need_texts(texts)
        work = self.service.classify(texts, exchange.deadline, truncate=truncate, explain=explain)
        scored = await exchange.within_time(work)
        exchange.facts["model"] = scored.model
        return scored

    def must_be_ready(self) -> None:
        """Raises RequestError where it can't answer yet, or no more."""
        if self.service.state != "ready":
            raise unavailable(f"not ready: {self.service.state}", 2)


Handler = Callable[[Exchange, Endpoint], Awaitable[Reply]]


@dataclass(frozen=True)
class Route:
    """One method of one path.

    Attributes:
        path: template; `{name}` stands for one segment.
        handler: answers it.
        summary: one line for people; `about` is more of it, in Markdown.
        tag: the group it is shown in.
        request: model of the JSON body; None takes no body. `example` is one such body.
        response: type of the JSON answer (a model, or a list of them), or "text/html".
        is_open: needs no key.
        is_admin: needs an admin's.
        binary: bodies may also be of KServe's binary form.
        status: of a good answer.
        errors: kinds of errors.KINDS beside those that every route of its sort has.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    tag: str
    response: Any
    request: Any = None
    example: Any = None
    about: str = ""
    is_open: bool = False
    is_admin: bool = False
    binary: bool = False
    status: int = 200
    errors: tuple[str, ...] = ()


class Table:
    """Routes by path."""

    def __init__(self, routes: tuple[Route, ...]) -> None:
        self._exact: dict[str, dict[str, Route]] = {}
        self._templates: dict[int, list[tuple[list[str], dict[str, Route]]]] = {}
        paths: dict[str, dict[str, Route]] = {}
        for route in routes:
            paths.setdefault(route.path, {})[route.method] = route
        for path, methods in paths.items():
            if "{" in path:
                segments = path.split("/")
                self._templates.setdefault(len(segments), []).append((segments, methods))
            else:
                self._exact[path] = methods

    def find(self, path: str) -> tuple[dict[str, Route], dict[str, str]] | None:
        """The methods of a path, and what its template matched."""
        methods = self._exact.get(path)
        if methods is not None:
            return methods, {}
        segments = path.split("/")
        for template, candidates in self._templates.get(len(segments), []):
            pairs = list(zip(template, segments, strict=True))
            if all(want == have or (want[:1] == "{" and have) for want, have in pairs):
                return candidates, {want[1:-1]: have for want, have in pairs if want[:1] == "{"}
        return None
