"""The endpoint about itself: health, facts, documentation, and the page for people."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

from emoray import __version__
from emoray.http.exchange import Exchange, Reply, reply
from emoray.http.route import Endpoint, Route
from emoray.http.schemas import Health, Info

HTML = b"text/html; charset=utf-8"


async def health(exchange: Exchange, endpoint: Endpoint) -> Reply:
    return reply({"status": "ok"})


async def ready(exchange: Exchange, endpoint: Endpoint) -> Reply:
    endpoint.must_be_ready()
    return reply({"status": "ready"})


async def info(exchange: Exchange, endpoint: Endpoint) -> Reply:
    service, limits = endpoint.service, endpoint.config.limits
    identity, facts = service.identity, service.info()
    return reply(
        {
            "model": str(identity) if identity else None,
            "model_id": identity.name if identity else None,
            "fingerprint": identity.fingerprint if identity else None,
            "labels": identity.labels if identity else [],
            "state": service.state,
            **facts,
            "limits": {
                "max_texts": limits.max_texts,
                "max_body_bytes": limits.max_body_bytes,
                "max_length": facts.get("max_length"),
                "timeout_s": limits.timeout_s,
            },
            "versions": {**facts.get("versions", {}), "emoray": __version__},
        }
    )


async def openapi(exchange: Exchange, endpoint: Endpoint) -> Reply:
    return reply(endpoint.openapi)


async def page(exchange: Exchange, endpoint: Endpoint) -> Reply:
    return _html("page.html")


async def docs(exchange: Exchange, endpoint: Endpoint) -> Reply:
    return _html("docs.html")


@functools.cache
def _html(name: str) -> Reply:
    """A page of the package, with a policy that lets it load and run nothing but itself."""
    body = resources.files("emoray.http").joinpath(name).read_bytes()
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; script-src {_hashes(body, 'script')}; "
        f"style-src {_hashes(body, 'style')}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = (
        (b"content-security-policy", policy.encode()),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-cache"),
    )
    return Reply(body, content_type=HTML, headers=headers)


def _hashes(body: bytes, tag: str) -> str:
    """The sums by which a policy knows the page's own scripts or styles."""
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), body, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(c).digest()).decode()}'" for c in contents)


_TAG = "About"

ROUTES = (
    Route("GET", "/health", health, "Is the server up?", _TAG, Health, is_open=True),
    Route("GET", "/ready", ready, "Will it answer?", _TAG, Health, is_open=True, errors=("unavailable",)),
    Route("GET", "/info", info, "Model, labels, limits, versions, and the state of a model change", _TAG, Info),
    Route("GET", "/openapi.json", openapi, "This description", _TAG, dict[str, object]),
    Route("GET", "/docs", docs, "This description, for people", _TAG, "text/html", is_open=True),
    Route("GET", "/", page, "A page that classifies what you type", _TAG, "text/html", is_open=True),
)
