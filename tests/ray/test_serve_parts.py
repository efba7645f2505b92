"""What of serving on Ray can be judged without a cluster: the proxies' guard, the verdict on a change, scaling."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from emoray.classifier import locate_model
from emoray.http.service import Answer
from emoray.on_ray import direct_ingress, haproxy, serve_command, shares
from emoray.on_ray.autoscaling import BUSY, QUEUED, ByQueuedTokens
from emoray.on_ray.board import judge
from emoray.on_ray.direct_ingress import DirectIngress, set_app
from emoray.on_ray.guard import AGAIN, Guard, Settings
from emoray.prediction import Prediction
from emoray.serve_config import LimitsConfig

Sent = list[dict[str, Any]]
DEFAULTS = Settings.of(LimitsConfig())


def request(
    app: Any, path: str = "/v1/classify", method: str = "POST", body: tuple[bytes, ...] = (b"ab", b"cd")
) -> Sent:
    return asyncio.run(_request(Guard(app, replace(DEFAULTS, max_body_bytes=100)), path, method, body))


async def _request(guard: Guard, path: str, method: str, body: tuple[bytes, ...]) -> Sent:
    sent: Sent = []
    messages = [{"type": "http.request", "body": part, "more_body": i < len(body) - 1} for i, part in enumerate(body)]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await guard({"type": "http", "method": method, "path": path, "headers": []}, receive, send)
    return sent


def test_the_note_of_an_endpoint_that_is_gone_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that was killed and started again keeps it, and often the process's number too."""
    monkeypatch.setattr(serve_command, "private_folder", lambda: tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    note = tmp_path / "serve-8000.json"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        note.write_text(json.dumps({"address": address, "auth": "disabled"}))
        assert serve_command._join_own(8000) and os.environ["RAY_ADDRESS"] == address
    monkeypatch.delenv("RAY_ADDRESS")
    assert not serve_command._join_own(8000) and not serve_command._join_own(8001)
    assert "RAY_ADDRESS" not in os.environ


def test_this_machine_is_asked_past_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import http.server, threading; from emoray import local_http\n"
        "server = http.server.HTTPServer(('127.0.0.1', 0), http.server.SimpleHTTPRequestHandler)\n"
        "threading.Thread(target=server.serve_forever, daemon=True).start()\n"
        "with local_http.get(f'http://127.0.0.1:{server.server_port}/', 5) as answer: print(answer.status)\n"
    )
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert ran.stdout == "200\n", ran.stderr


class Inner:
    """Ray Serve's proxy, as seen from its middleware: an app that ends without a word where the replica died.

    Args:
        deaths: so many tries end so, each after it has read some of the body.
    """

    def __init__(self, deaths: int, status: int = 200, content_type: bytes = b"application/json") -> None:
        self.deaths, self.status, self.content_type = deaths, status, content_type
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["headers"].append((b"x-request-id", b"7"))
        assert len(scope["headers"]) == 1, "each try must get the request as it came"
        message = await receive()
        if len(self.bodies) < self.deaths:
            self.bodies.append(message["body"])
            return
        body = message["body"]
        while message["more_body"]:
            message = await receive()
            body += message["body"]
        self.bodies.append(body)
        headers = [(b"content-type", self.content_type), (b"x-request-id", b"1"), (b"X-Request-ID", b"1")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"said"})


def test_a_request_whose_replica_dies_is_sent_again_whole() -> None:
    inner = Inner(deaths=2)
    sent = request(inner)
    assert inner.bodies == [b"ab", b"ab", b"abcd"]
    assert sent[0]["status"] == 200 and sent[1]["body"] == b"said"
    assert [name.lower() for name, _ in sent[0]["headers"]].count(b"x-request-id") == 1


@pytest.mark.parametrize(
    ("deaths", "change"),
    [
        (3, {}),  # a text that ends every replica
        (1, {"path": "/v1/model", "method": "PUT"}),  # it changes something
        (1, {"path": "/of/another/app"}),
        (1, {"body": (b"a" * 60, b"b" * 60)}),  # too large to be kept; read to its end
    ],
)
def test_what_is_not_sent_again_gets_a_503_in_json(deaths: int, change: dict[str, Any]) -> None:
    class Reads(Inner):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            first = await receive()
            if first["more_body"] and len(first["body"]) > 50:
                await receive()
                return
            if len(self.bodies) >= self.deaths:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            self.bodies.append(b"")

    sent = request(Reads(deaths), **change)
    assert sent[0]["status"] == 503 and json.loads(sent[1]["body"])["error_type"] == "unavailable"
    assert dict(sent[0]["headers"])[b"retry-after"]


@pytest.mark.parametrize(
    ("status", "content_type", "becomes", "kind"),
    [
        (503, b"text/plain; charset=utf-8", 503, "unavailable"),
        (408, b"text/plain", 504, "timeout"),
        (404, b"text/plain", 503, "unavailable"),  # no application (yet)
        (503, b"application/json", 503, None),
        (200, b"text/plain", 200, None),
    ],
)
def test_ray_serves_own_answers_get_our_shape(status: int, content_type: bytes, becomes: int, kind: str | None) -> None:
    sent = request(Inner(0, status, content_type))
    assert sent[0]["status"] == becomes and len(sent) == 2
    if kind:
        assert json.loads(sent[1]["body"])["error_type"] == kind
        assert "error" in json.loads(sent[1]["body"])
    else:
        assert sent[1]["body"] == b"said"


def test_more_requests_than_can_wait_are_refused_at_once() -> None:
    async def scenario() -> list[int]:
        go = asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await go.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        guard = Guard(slow, replace(DEFAULTS, max_requests=5))
        waiting = [asyncio.create_task(_request(guard, "/predict", "POST", (b"",))) for _ in range(5)]
        await asyncio.sleep(0)
        refused = await _request(guard, "/predict", "POST", (b"",))
        health = asyncio.create_task(_request(guard, "/health", "GET", (b"",)))
        go.set()
        return [refused[0]["status"], (await health)[0]["status"], *[(await task)[0]["status"] for task in waiting]]

    assert asyncio.run(scenario()) == [429, 200, 200, 200, 200, 200, 200]


def test_the_guard_knows_every_route_that_computes() -> None:
    from emoray.http.routes import ROUTES

    for route in ROUTES:
        path = route.path.replace("{name}", "emotion").replace("{version}", "0123456789ab")
        computes = route.method == "POST"
        assert (AGAIN.fullmatch(path) is not None) or not computes, path
    assert not AGAIN.fullmatch("/v1/model")


A, B, BAD = {"model": "e@1"}, {"model": "e@2"}, {"error": "damaged"}


@pytest.mark.parametrize(
    ("votes", "alive", "verdict"),
    [
        ({}, "x", None),
        ({"x": A}, "x", A),
        ({"x": A}, "xy", None),
        ({"x": A, "y": BAD}, "xyz", BAD),
        ({"x": A, "dead": A}, "x", A),
    ],
)
def test_the_verdict_on_a_change(votes: Any, alive: str, verdict: Any) -> None:
    assert judge(votes, dict.fromkeys(alive)) == verdict


def test_replicas_that_find_different_models_change_nothing() -> None:
    verdict = judge({"x": A, "y": B}, {"x": 0, "y": 0})
    assert verdict is not None and "e@1, e@2" in verdict["error"]


def wanted(busy: list[float], queued: float, requests: float = 1.0) -> float:
    metrics = {BUSY: dict(enumerate(busy)), QUEUED: {0: queued}} if busy else {}
    context = SimpleNamespace(aggregated_metrics=metrics, total_num_requests=requests, target_num_replicas=len(busy))
    return ByQueuedTokens(1000)(context)[0]


def test_replicas_wanted() -> None:
    assert wanted([0.5], 0) < 1 < wanted([1.0], 0) < 2 < wanted([1.0], 1000)
    assert 2 < wanted([0.9, 0.9, 0.9], 0) < 4, "short queues are no reason to stop replicas that are busy"
    assert wanted([0.0], 0, requests=0) == 0 < wanted([0.0], 0, requests=0.2) <= 1


def test_where_a_model_is(tmp_path: Any) -> None:
    (tmp_path / "runs" / "emotion").mkdir(parents=True)
    (tmp_path / "models").mkdir()

    def expect(location: str) -> str:
        return locate_model(location, str(tmp_path))

    assert expect("s3://bucket/run") == "s3://bucket/run" and expect("/a/b") == "/a/b"
    assert expect("emotion") == str(tmp_path / "runs/emotion") and expect("models") == str(tmp_path / "models")
    assert expect("nowhere") == str(tmp_path / "nowhere")
    assert expect("~/model") == str(Path.home() / "model")


@pytest.mark.skipif(not haproxy.is_there(), reason="no HAProxy for this platform")
def test_haproxy_listens_on_this_machine_alone_and_speaks_json(tmp_path: Path) -> None:
    """The script that stands for HAProxy, on what Ray Serve's own template writes."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    lines = [line for line in HAPROXY_CONFIG_TEMPLATE.splitlines() if "{%" not in line]
    values = {"config.metrics_port": 9101, "config.stats_port": 8404, "config.error_file_path": "/of/ray/500.http"}
    written = "\n".join(lines)
    for name, value in values.items():
        written = written.replace("{{ " + name + " }}", str(value))
    config = tmp_path / "haproxy.cfg"
    config.write_text(written)
    assert "bind :9101" in written and "bind *:8404" in written and "errorfile 503 /of/ray" in written
    script = haproxy.write_wrapper(tmp_path / "front", "/bin/true", (9101, 8404), 256)
    subprocess.run([str(script), "-db", "-f", str(config)], check=True, timeout=60)
    mended = config.read_text()
    assert "frontend http_frontend\n    http-request disable-l7-retry if METH_PUT\n    http-after-response" in mended
    assert "backend default_backend\n    http-request return status 503 default-errorfiles\n" in mended
    assert "bind 127.0.0.1:9101" in mended and "bind 127.0.0.1:8404" in mended
    assert "/of/ray" not in mended and not re.search("^ *log ", mended, re.MULTILINE)
    assert len(re.findall("^ *server .* check maxconn 256( |$)", mended, re.MULTILINE)) >= 2
    assert "defaults\n    timeout http-request 10s\n" in mended
    assert "    http-request return status 429 default-errorfiles if METH_POST" in mended
    for status in (429, 502, 503, 504):
        page = tmp_path / "front" / f"{status}.http"
        assert f"errorfile {status} {page}" in mended
        head, _, body = page.read_bytes().partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head and json.loads(body).keys() == {"error", "error_type"}


class Written(asyncio.Transport):
    """A connection that keeps what is written to it, write by write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


@pytest.mark.parametrize("server", ["httptools", "h11"])
@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_an_answer_is_one_write(monkeypatch: pytest.MonkeyPatch, server: Any, connection: str) -> None:
    """So that a replica that is killed has sent all of an answer or nothing, which HAProxy asks for again."""
    uvicorn = pytest.importorskip("uvicorn")
    server_state = pytest.importorskip("uvicorn.server").ServerState

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else b"body"})

    async def answers(method: str) -> tuple[list[bytes], bool]:
        config = uvicorn.Config(DirectIngress(app), http=server, lifespan="off", log_config=None)
        config.load()
        protocol = config.http_protocol_class(config=config, server_state=server_state(), app_state={})
        transport = Written()
        protocol.connection_made(transport)
        protocol.data_received(f"{method} / HTTP/1.1\r\nhost: a\r\nconnection: {connection}\r\n\r\n".encode())
        for _ in range(20):
            await asyncio.sleep(0)
        closed = transport.closed
        protocol.connection_lost(None)
        return transport.writes, closed

    async def scenario(method: str) -> tuple[list[bytes], bool]:
        set_app(app)
        direct_ingress.open_for_requests()
        return await answers(method)

    monkeypatch.setattr(direct_ingress, "_here", {"app": None, "loop": None})
    for method, body in (("GET", b"body"), ("HEAD", b"")):
        (write,), closed = asyncio.run(scenario(method))
        assert write.startswith(b"HTTP/1.1 200") and write.partition(b"\r\n\r\n")[2] == body
        assert closed is (connection == "close")


def test_behind_haproxy_requests_go_straight_into_the_app(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> list[str]:
        went: list[str] = []

        def app(name: str) -> Any:
            async def call(scope: Any, receive: Any, send: Any) -> None:
                went.append(f"{name} {scope['path']}")

            return call

        middleware = DirectIngress(app("ray"))
        assert not direct_ingress.is_replica()
        set_app(app("emoray"))
        assert direct_ingress.is_replica()
        await middleware({"type": "http", "path": "/early"}, None, None)
        direct_ingress.open_for_requests()
        for path in ("/v1/classify", "/-/healthz", "/"):
            await middleware({"type": "http", "path": path}, None, None)
        direct_ingress._here["loop"] = None  # Ray Serve runs the app in a thread of its own
        await middleware({"type": "http", "path": "/v1/classify"}, None, None)
        return went

    monkeypatch.setattr(direct_ingress, "_here", {"app": None, "loop": None})
    assert asyncio.run(scenario()) == [
        "ray /early",
        "emoray /v1/classify",
        "ray /-/healthz",
        "emoray /",
        "ray /v1/classify",
    ]


def test_a_large_request_is_shared_among_replicas() -> None:
    texts = [f"text {i} " + "x" * (i % 50) for i in range(1000)]
    for count in (1, 2, 3, 7, 50):
        parts = shares.shares(texts, count)
        assert [text for part in parts for text in texts[part]] == texts
        assert all(part.stop - part.start >= shares.LEAST for part in parts) and len(parts) == min(count, 7)
    assert shares.shares(texts[:255], 4) == [slice(0, 255)]
    assert len(shares.shares(["x" * 100_000, *texts], 2)) == 2


@pytest.mark.parametrize("other", ["same", "dead", "changed"])
def test_shares_come_back_as_one_answer_whatever_happens_elsewhere(other: str) -> None:
    here_texts: list[str] = []

    def scored(texts: Any, model: str) -> Answer:
        predictions = [Prediction(text, 1.0, {text: 1.0}, False, 3) for text in texts]
        return Answer(model, ("a",), predictions, np.array([[float(text)] for text in texts], np.float32))

    async def here(texts: Any, deadline: float) -> Answer:
        here_texts.extend(texts)
        return scored(texts, "m@1")

    async def elsewhere(texts: Any, seconds: float) -> Answer:
        if other == "dead":
            raise RuntimeError("the actor died")
        return scored(texts, "m@1" if other == "same" else "m@2")

    texts = [str(i) for i in range(512)]
    answer = asyncio.run(shares.classify(texts, time.monotonic() + 60, 2, here, elsewhere))
    assert answer.model == "m@1" and [p.label for p in answer.predictions] == texts
    assert answer.logits[:, 0].tolist() == [float(text) for text in texts]
    assert len(here_texts) < 512 if other == "same" else here_texts == texts


@pytest.mark.parametrize("server", ["httptools", "h11"])
def test_a_client_that_asks_before_it_sends_is_told_to_go_on(monkeypatch: pytest.MonkeyPatch, server: Any) -> None:
    uvicorn = pytest.importorskip("uvicorn")
    server_state = pytest.importorskip("uvicorn.server").ServerState

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": body})

    async def scenario() -> list[bytes]:
        set_app(app)
        direct_ingress.open_for_requests()
        config = uvicorn.Config(DirectIngress(app), http=server, lifespan="off", log_config=None)
        config.load()
        protocol = config.http_protocol_class(config=config, server_state=server_state(), app_state={})
        transport = Written()
        protocol.connection_made(transport)
        protocol.data_received(b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
        for _ in range(20):
            await asyncio.sleep(0)
        before = list(transport.writes)
        protocol.data_received(b"ab")
        for _ in range(20):
            await asyncio.sleep(0)
        protocol.connection_lost(None)
        return [*before, b"|", *transport.writes[len(before) :]]

    monkeypatch.setattr(direct_ingress, "_here", {"app": None, "loop": None})
    told = asyncio.run(scenario())
    assert told[0].startswith(b"HTTP/1.1 100") and told[1] == b"|" and told[2].endswith(b"\r\n\r\nab")
