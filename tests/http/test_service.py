"""The service behind the routes: loading, changing the model, logs, metrics, and the same answer as everywhere."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from serving import LABELS, Dummy, load_dummy, serving
from tiny import sentences

from emoray import Classifier
from emoray.errors import CheckpointError
from emoray.http.app import make_app
from emoray.http.errors import RequestError
from emoray.http.keys import Key, Keys
from emoray.http.local import LocalModel
from emoray.serve_config import GateConfig, ServeConfig

ADMIN = "the-key-of-an-admin"
KEYS = Keys((Key("boss", hashlib.sha256(ADMIN.encode()).digest(), admin=True),))
HEADERS = {"Authorization": f"Bearer {ADMIN}"}


def test_the_same_text_gets_the_same_answer(trained_run: Path) -> None:
    """A real model: endpoint against classifier, single and batched, over every dialect's way."""
    texts = [*sentences("glad")[:12], *sentences("sad")[40:52], "x", "word " * 200]
    with serving(load=None, model=str(trained_run), engine="torch") as server:
        together = server.post("/v1/classify", {"texts": texts}).json()
        alone = [server.post("/v1/classify", {"texts": [text]}).json()["predictions"][0] for text in texts]
    for want, batched, single in zip(Classifier.load(trained_run)(texts), together["predictions"], alone, strict=True):
        assert batched["label"] == single["label"] == want.label
        assert batched["truncated"] == single["truncated"] == want.truncated
        assert batched["tokens"] == single["tokens"] == want.tokens
        for name, score in want.scores.items():
            assert batched["scores"][name] == pytest.approx(score, abs=2e-6)
            assert single["scores"][name] == pytest.approx(score, abs=2e-6)
    assert together["model"].startswith("tiny@") and len(together["model"]) == len("tiny@") + 12


def test_a_model_that_fails_on_any_text_is_known_from_one_that_fails_on_some() -> None:
    """The first is for Ray Serve to replace; the second would fail again."""

    async def ask(service: LocalModel, text: str) -> bool:
        with suppress(RequestError):
            await service.classify([text], time.monotonic() + 10)
        return await service.is_broken()

    async def main() -> list[bool]:
        model = Dummy()
        service = LocalModel(ServeConfig(), lambda location: model)
        service.adopt(await service.bring_up("dummy", GateConfig()))
        found = [await ask(service, "fine"), await ask(service, "boom")]
        model.forward = lambda tokens: 1 / 0  # type: ignore[assignment,method-assign]
        found += [await ask(service, "fine")]
        del model.forward
        found += [await ask(service, "fine")]
        await service.close()
        return found

    assert asyncio.run(main()) == [False, False, True, False]


def test_it_is_alive_but_not_ready_while_it_loads() -> None:
    may_load = threading.Event()

    def load(location: str) -> Dummy:
        may_load.wait(10)
        return load_dummy(location)

    with serving(load=load, wait=False) as server:
        assert server.get("/health").status_code == server.get("/v2/health/live").status_code == 200
        assert server.get("/info").json()["state"] == "starting"
        for path in ("/ready", "/v2/health/ready", "/v2/models/emotion/ready"):
            answer = server.get(path)
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        answer = server.post("/v1/classify", {"texts": ["a"]})
        assert answer.status_code == 503 and answer.json()["error_type"] == "unavailable"
        may_load.set()
        server.wait_until_ready()
        assert server.post("/v1/classify", {"texts": ["a"]}).status_code == 200


def test_a_model_that_can_not_be_loaded_is_told_in_info() -> None:
    def load(location: str) -> Dummy:
        raise CheckpointError(f"{location}: no such folder")

    with serving(load=load, wait=False) as server:
        until = time.monotonic() + 10
        while server.get("/info").json()["state"] != "failed":
            assert time.monotonic() < until
        assert "no such folder" in server.get("/info").json()["swap"]["error"]
        assert server.get("/ready").status_code == server.post("/v1/classify", {"texts": ["a"]}).status_code == 503


def load_any(location: str) -> Dummy:
    if location == "broken":
        raise CheckpointError("broken: its sha256 differs\nsecond line")
    if location == "nan":
        model = Dummy()
        model.shift = float("nan")
        return model
    return Dummy(shift=float(len(location)), fingerprint=f"{len(location):012d}")


def wait_for_swap(server: Any, state: str) -> dict[str, Any]:
    until = time.monotonic() + 10
    while True:
        swap = server.get("/info", headers=HEADERS).json()["swap"]
        if swap["state"] == state:
            return swap
        assert time.monotonic() < until, swap
        time.sleep(0.01)


@pytest.mark.parametrize("location", ["broken", "nan"])
def test_a_bad_model_leaves_the_old_one_serving(location: str) -> None:
    with serving(load=load_any, keys=KEYS) as server:
        assert (
            server.session.put(server.url + "/v1/model", json={"model": location}, headers=HEADERS).status_code == 202
        )
        assert "second line" not in wait_for_swap(server, "failed")["error"]
        assert server.get("/ready").status_code == 200
        answer = server.post("/v1/classify", {"texts": ["a"]}, headers=HEADERS).json()
        assert answer["model"] == "emotion@000000000005"


def test_five_changes_under_load_lose_nothing() -> None:
    with serving(load=load_any, keys=KEYS) as server:
        failures: list[Any] = []
        models: set[str] = set()
        stop = threading.Event()

        def ask() -> None:
            with requests.Session() as session:
                while not stop.is_set():
                    answer = session.post(
                        server.url + "/v1/classify", json={"texts": ["a", "b c d"]}, headers=HEADERS, timeout=20
                    )
                    if answer.status_code != 200:
                        failures.append((answer.status_code, answer.text))
                    else:
                        models.add(answer.json()["model"])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for length in range(6, 11):
            put = server.session.put(server.url + "/v1/model", json={"model": "m" * length}, headers=HEADERS)
            assert put.status_code == 202
            assert wait_for_swap(server, "idle")["to"] == f"emotion@{length:012d}"
            time.sleep(0.05)
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == [] and len(models) >= 5


def test_a_served_name_stays_when_the_model_changes() -> None:
    """Clients of Triton and others name the model in each request."""
    with serving(load=load_any, keys=KEYS, served_name="emotions") as server:
        put = server.session.put(server.url + "/v1/model", json={"model": "m" * 7}, headers=HEADERS)
        assert put.status_code == 202 and wait_for_swap(server, "idle")["to"] == "emotions@000000000007"
        assert server.get("/v2/models/emotions/ready", headers=HEADERS).status_code == 200
        answer = server.post("/v1/classify", {"texts": ["a"]}, headers=HEADERS).json()
        assert answer["model"] == "emotions@000000000007"


def test_logs_are_json_without_texts(caplog: pytest.LogCaptureFixture) -> None:
    secret = "my-most-private-feeling"
    with caplog.at_level(logging.DEBUG), serving(keys=KEYS) as server:
        server.post("/v1/classify", {"texts": [secret]}, headers={**HEADERS, "X-Request-Id": "seven"})
        server.post("/predict", {"inputs": [secret, secret]}, headers=HEADERS)
        server.post("/v1/classify", {"texts": [f"{secret} boom"]}, headers=HEADERS)
        server.get(f"/{secret}", headers=HEADERS)
    lines = [json.loads(r.message) for r in caplog.records if r.name == "emoray.http.access"]
    line = next(line for line in lines if line["request_id"] == "seven")
    assert line.items() >= {"route": "/v1/classify", "status": 200, "texts": 1, "key": "boss"}.items()
    assert line["ms"] > 0 and line["bytes"] > 0 and line["model"] == "emotion@0123456789ab"
    assert {(line["route"], line["status"]) for line in lines} >= {("/predict", 422), ("unmatched", 404)}
    ours = "".join(r.getMessage() + (r.exc_text or "") for r in caplog.records if r.name.startswith("emoray"))
    assert secret not in ours and ADMIN not in ours


def test_metrics_are_told() -> None:
    told: list[tuple[Any, ...]] = []

    class Notes:
        def request(self, route: str, status: int, seconds: float) -> None:
            told.append(("request", route, status))

        def waited(self, seconds: float) -> None:
            told.append(("waited",))

        def batch(self, texts: int, tokens: int, padding: int, seconds: float) -> None:
            told.append(("batch", texts, tokens))

        def failure(self, kind: str) -> None:
            told.append(("failure", kind))

        def prediction(self, label: str, score: float) -> None:
            told.append(("prediction", label))
            assert label in LABELS and 0 < score <= 1

        def model(self, model: str) -> None:
            told.append(("model", model))

        def swap(self, outcome: str) -> None:
            told.append(("swap", outcome))

    with serving(metrics=Notes()) as server:
        server.post("/v1/classify", {"texts": ["a", "b"]})
    assert ("request", "/v1/classify", 200) in told and ("batch", 2, 6) in told
    assert sum(item[0] == "prediction" for item in told) == 2
    assert ("model", "emotion@0123456789ab") in told


def call(app: Any, body: bytes, gone_after: float | None = None) -> list[dict[str, Any]]:
    """One POST /v1/classify straight on ASGI; the client may go away after some seconds."""

    async def scenario() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.sleep(3600 if gone_after is None else gone_after)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await app(
            {"type": "http", "method": "POST", "path": "/v1/classify", "headers": [], "root_path": ""}, receive, send
        )
        return sent

    return asyncio.run(scenario())


class Stub:
    """A service that does what it is told."""

    state = "ready"
    identity = None

    def __init__(self, work: Any) -> None:
        self.work = work
        self.cancelled = False

    async def classify(self, *_: Any, **__: Any) -> Any:
        try:
            return await self.work()
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    def info(self) -> dict[str, Any]:
        return {}


async def forever() -> None:
    await asyncio.sleep(3600)


async def bug() -> None:
    raise KeyError("a secret of the code")


def test_a_client_that_goes_away_stops_its_work() -> None:
    stub = Stub(forever)
    app = make_app(stub, ServeConfig(), keys=Keys())  # type: ignore[arg-type]
    assert call(app, b'{"texts": ["a"]}', gone_after=0.01) == []
    assert stub.cancelled


def test_a_service_that_never_answers_is_a_504() -> None:
    stub = Stub(forever)
    config = ServeConfig.model_validate({"limits": {"timeout_s": 0.05}})
    sent = call(make_app(stub, config, keys=Keys()), b'{"texts": ["a"]}')  # type: ignore[arg-type]
    assert sent[0]["status"] == 504 and stub.cancelled


def test_a_fault_of_ours_shows_nothing_but_the_requests_id(caplog: pytest.LogCaptureFixture) -> None:
    app = make_app(Stub(bug), ServeConfig(), keys=Keys())  # type: ignore[arg-type]
    sent = call(app, b'{"texts": ["a"]}')
    body = json.loads(sent[1]["body"])
    assert sent[0]["status"] == 500 and body["error_type"] == "internal" and "secret" not in body["error"]
    assert dict(sent[0]["headers"])[b"x-request-id"].decode() in body["error"]
    assert "a secret of the code" in caplog.text


def test_stopping_answers_what_is_under_way() -> None:
    async def scenario() -> list[Any]:
        service = LocalModel(ServeConfig(), load_dummy)
        service.adopt(await service.bring_up("dummy", GateConfig()))
        asked = [asyncio.create_task(service.classify([f"nap {n}"], time.monotonic() + 10)) for n in range(3)]
        await asyncio.sleep(0.05)
        await service.close()
        late = await asyncio.gather(service.classify(["a"], time.monotonic() + 10), return_exceptions=True)
        return [*await asyncio.gather(*asked), *late]

    *answers, late = asyncio.run(scenario())
    assert all(len(answer.predictions) == 1 for answer in answers) and late.status == 503


def test_there_is_a_bound_on_the_requests_that_are_being_read() -> None:
    config = ServeConfig.model_validate({"limits": {"max_queued_requests": 2}})
    app = make_app(Stub(forever), config, keys=Keys())  # type: ignore[arg-type]

    async def scenario() -> list[Any]:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(3600)
            return {}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message.get("status"))

        scope = {"type": "http", "method": "POST", "path": "/v1/classify", "headers": []}
        tasks = [asyncio.create_task(app(dict(scope), receive, send)) for _ in range(5)]
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return sent

    assert asyncio.run(scenario()) == [429, None]
