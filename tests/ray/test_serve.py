"""The endpoint on a real Ray Serve, over real HTTP, with real (small) models."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from tiny import sentences, train_here

from benchmarks.serve_chaos import KEY, Trial, soak
from benchmarks.serving import Load, Serving, environment, expected_of, wait_until
from emoray import Classifier
from emoray.on_ray import haproxy

pytestmark = pytest.mark.ray

CLIENT = "the-key-of-a-mere-client"
QUICK = [
    "replicas.target_queued_tokens=50",
    "replicas.upscale_delay_s=0.5",
    "replicas.downscale_delay_s=3",
    "limits.max_body_bytes=100000",
]
TEXTS = [*sentences("glad")[:10], *sentences("sad")[40:50]]


@pytest.fixture(scope="module")
def models(trained_run: Path, tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the same name that differ in their seed."""
    folder = tmp_path_factory.mktemp("other")
    overrides = [*tiny_overrides, "run.name=tiny", f"run.storage_path={folder}", "training.seed=7"]
    mine = shutil.copytree(trained_run, folder / "first" / "tiny")  # serving exports beside a model
    return [mine, train_here(overrides)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def keys_file(folder: Path) -> Path:
    path = folder / "keys"
    lines = [f"admin boss {hashlib.sha256(KEY.encode()).hexdigest()}"]
    lines.append(f"someone {hashlib.sha256(CLIENT.encode()).hexdigest()}")
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def settings(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="et-", ignore_cleanup_errors=True) as name:
        settings = environment(folder, name, HOME=name)
        del settings["RAY_AUTH_MODE"]  # as a user has it: Ray makes a token, and a second `emoray serve` must find it
        yield settings


@pytest.fixture(scope="module")
def serving(models: list[Path], folder: Path, keys_file: Path, settings: dict[str, str]) -> Iterator[Serving]:
    """One endpoint of one to three replicas, with keys."""
    overrides = ["http.port=0", "replicas.max=3", "replicas.num_cpus=0.3", f"auth.keys_file={keys_file}", "engine=onnx"]
    overrides += QUICK
    with Serving(models[0], folder / "serve.log", settings, *overrides) as serving:
        yield serving


@pytest.fixture
def trial(serving: Serving, models: list[Path]) -> Trial:
    return Trial(serving, TEXTS, models)


def post(serving: Serving, path: str, content: Any, key: str = CLIENT, **options: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {key}", **options.pop("headers", {})}
    return requests.post(serving.url + path, json=content, headers=headers, timeout=60, **options)


def test_it_says_where_it_is(serving: Serving, models: list[Path]) -> None:
    assert serving.ready["url"].startswith("http://127.0.0.1:") and serving.ready["needs_key"] is True
    assert serving.ready["model"] == expected_of(models[0], TEXTS[:1])[0]
    assert serving.ready["dashboard"].startswith("http://")
    assert serving.info(KEY)["engine"] == "onnx" and (models[0] / "best/onnx/fp32/model.onnx").exists()
    listening = serving.listening()
    assert {host for host, _ in listening} == {"127.0.0.1"}
    assert int(serving.url.rsplit(":", 1)[1]) in {port for _, port in listening}
    if haproxy.is_there():
        assert len(listening) >= 5, "HAProxy and its two pages on statistics, the proxy behind it, a replica"


def test_the_same_text_gets_the_same_answer(serving: Serving, models: list[Path]) -> None:
    want = Classifier.load(models[0])(TEXTS)
    together = post(serving, "/v1/classify", {"texts": TEXTS}).json()["predictions"]
    for text, prediction, batched in zip(TEXTS, want, together, strict=True):
        single = post(serving, "/v1/classify", {"texts": [text]}).json()["predictions"][0]
        for answer in (batched, single):
            assert answer["label"] == prediction.label
            assert answer["scores"] == pytest.approx(prediction.scores, abs=1e-5)


def test_clients_that_nobody_here_wrote(serving: Serving, models: list[Path]) -> None:
    import tritonclient.http as triton
    from huggingface_hub import InferenceClient
    from tritonclient.http.auth import BasicAuth

    want = Classifier.load(models[0])(TEXTS[:2])
    client = InferenceClient(serving.url, token=CLIENT)
    assert client.text_classification(TEXTS[0], top_k=2)[0].label == want[0].label
    for binary in (True, False):
        v2 = triton.InferenceServerClient(serving.url.removeprefix("http://"))
        v2.register_plugin(BasicAuth("anyone", CLIENT))
        assert v2.is_server_ready() and v2.is_model_ready("tiny")
        tensor = triton.InferInput("text", [2], "BYTES")
        tensor.set_data_from_numpy(np.array(TEXTS[:2], object), binary_data=binary)
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("label", "scores")]
        result = v2.infer("tiny", [tensor], outputs=outputs)
        labels = [label.decode() if isinstance(label, bytes) else label for label in result.as_numpy("label")]
        assert labels == [prediction.label for prediction in want]
        v2.close()
    tei = post(serving, "/predict", {"inputs": [[text] for text in TEXTS[:2]], "raw_scores": False}).json()
    infinity = post(serving, "/classify", {"model": "tiny", "input": TEXTS[:2]}).json()["data"]
    assert [found[0]["label"] for found in tei] == [found[0]["label"] for found in infinity] == labels


def test_keys_and_errors_keep_their_shape_behind_the_proxy(serving: Serving) -> None:
    for key, path, content, status in (
        ("wrong-key-of-nobody", "/v1/classify", {"texts": ["a"]}, 401),
        (CLIENT, "/v1/classify", {"texts": [""]}, 422),
        (CLIENT, "/v1/classify", {"texts": ["a"] * 2000}, 413),
        (CLIENT, "/v1/classify", {"texts": ["a" * 200_000]}, 413),
        (CLIENT, "/nowhere", {}, 404),
        (CLIENT, "/health", {}, 405),
    ):
        answer = post(serving, path, content, key)
        assert (answer.status_code, answer.json().keys()) == (status, {"error", "error_type"})
        assert len(answer.raw.headers.getlist("x-request-id")) == 1
    put = requests.put(
        f"{serving.url}/v1/model", json={"model": "x"}, headers={"Authorization": f"Bearer {CLIENT}"}, timeout=60
    )
    assert put.status_code == 403
    assert requests.get(f"{serving.url}/health", timeout=60).status_code == 200


def test_keys_are_kept_as_sums_and_texts_are_not_logged(serving: Serving, settings: dict[str, str]) -> None:
    secret = "my-most-private-feeling"
    assert post(serving, "/v1/classify", {"texts": [secret]}).status_code == 200
    logs = list(Path(settings["RAY_TMPDIR"]).rglob("emoray_access_*.log"))
    wait_until(lambda: '"route": "/v1/classify"' in "".join(log.read_text() for log in logs), "the access log")
    written = "".join(path.read_text(errors="replace") for path in Path(settings["RAY_TMPDIR"]).rglob("*.log"))
    assert secret not in written and KEY not in written and CLIENT not in written
    line = next(line for log in logs for line in log.read_text().splitlines() if '"/v1/classify"' in line)
    assert json.loads(line)["route"] == "/v1/classify"


def test_a_model_that_can_not_be_loaded_leaves_the_old_one(serving: Serving, models: list[Path], folder: Path) -> None:
    damaged = folder / "damaged"
    shutil.copytree(models[1] / "best", damaged)
    (damaged / "model.safetensors").write_bytes(b"x" * (damaged / "model.safetensors").stat().st_size)
    before = serving.info(KEY)["model"]
    answer = requests.put(
        f"{serving.url}/v1/model", json={"model": str(damaged)}, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    )
    assert answer.status_code == 202
    wait_until(lambda: serving.info(KEY)["swap"]["state"] == "failed", "the refusal")
    assert "sha256 differs" in serving.info(KEY)["swap"]["error"]
    assert post(serving, "/v1/classify", {"texts": ["a"]}).json()["model"] == before


def three_replicas(trial: Trial) -> None:
    """So much that it queues: this small model is quicker than any proxy."""
    done = threading.Event()

    def many() -> None:
        while not done.is_set():
            answer = post(trial.serving, "/v1/classify", {"texts": TEXTS * 10}, KEY)
            assert answer.status_code in (200, 429), answer.text

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(many) for _ in range(3)]
        try:
            trial.until_replicas(3)
        finally:
            done.set()
        for work in asking:
            work.result()


def test_nothing_is_lost_while_replicas_are_killed_scaled_and_changed(trial: Trial) -> None:
    """The short one of `make chaos`."""
    trial.under_load("a replica of one is killed", lambda: trial.kill_replicas(1))
    trial.under_load("1 -> 3 replicas", lambda: three_replicas(trial), clients=8)
    trial.under_load("changed", lambda: trial.change_models(2), clients=8)
    trial.under_load("a replica of three is killed", lambda: trial.kill_replicas(1), clients=8)
    trial.under_load("3 -> 1 replicas", lambda: trial.until_replicas(1), clients=1, pause=0.3)
    for name, came in trial.rows:
        assert came.failed == came.wrong == 0 and came.requests > 0, (name, came.problems)
    assert len(trial.rows[2][1].models) == 2, "both models were met"
    info = trial.serving.info(KEY)
    assert info["model"] == expected_of(trial.models[0], TEXTS[:1])[0], "the last of two changes"
    assert info["swap"]["texts"] == 12 and info["swap"]["same_labels"] is True


def test_metrics_have_their_names(serving: Serving, settings: dict[str, str], models: list[Path]) -> None:
    serving.change_model(models[0], KEY)
    assert post(serving, "/v1/classify", {"texts": ["a"]}).status_code == 200
    found = list(Path(settings["RAY_TMPDIR"]).rglob("prom_metrics_service_discovery.json"))
    assert found, "no list of metrics addresses"
    address = json.loads(found[0].read_text())[0]["targets"]

    def scraped() -> str:
        return "".join(requests.get(f"http://{target}/metrics", timeout=30).text for target in address)

    names = ("requests_total", "request_seconds_bucket", "queue_seconds_bucket", "batch_tokens_bucket")
    names += ("model_seconds_bucket", "predictions_total", "confidence_bucket", "model_info", "swaps_total")
    wait_until(lambda: all(f"ray_emoray_{name}" in scraped() for name in names), "all metrics")


def test_emoray_serve_again_with_another_model_is_a_change(
    serving: Serving, models: list[Path], keys_file: Path, settings: dict[str, str]
) -> None:
    port = serving.url.rsplit(":", 1)[1]
    load = Load(serving.url, TEXTS, dict(expected_of(model, TEXTS) for model in models), KEY)
    overrides = [f"http.port={port}", "replicas.max=3", "replicas.num_cpus=0.3", f"auth.keys_file={keys_file}"]
    overrides += [*QUICK, "engine=onnx"]

    def again(model: Path, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "emoray.cli", "serve", str(model), "--json", *overrides, *more]
        return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=240)

    async def both() -> subprocess.CompletedProcess[str]:
        asking = asyncio.create_task(load.closed(2))
        try:
            return await asyncio.to_thread(again, models[1])
        finally:
            load.stop()
            await asking

    pids = {process.pid for process in serving.replicas}
    ran = asyncio.run(both())
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["model"] == expected_of(models[1], TEXTS[:1])[0] and said["is_here"] is False
    assert load.came.failed == load.came.wrong == 0, load.came.problems
    assert {process.pid for process in serving.replicas} & pids, "no replica had to be started anew"
    refused = again(models[0], "gate.at_least=1.5")
    assert refused.returncode == 1 and "below 1.5000" in refused.stderr and "serves on" in refused.stderr
    assert post(serving, "/v1/classify", {"texts": ["a"]}).json()["model"] == said["model"]
    serving.change_model(models[0], KEY)  # a change that was refused leaves the gate as it was, too


@pytest.mark.slow
def test_overload_and_soak_in_short(serving: Serving, trial: Trial) -> None:
    came = asyncio.run(Load(serving.url, TEXTS, {}, KEY).open(400, 4))
    assert set(came.statuses) <= {200, 429, 503} and came.statuses[200] > 0, came.problems
    trial.until_replicas(1)  # one that is still being loaded grows
    assert soak(serving, TEXTS, 5)


def test_a_first_model_that_is_none_is_one_message(folder: Path, settings: dict[str, str], models: list[Path]) -> None:
    command = [sys.executable, "-m", "emoray.cli", "serve", str(models[0].parent / "nothing"), "http.port=0"]
    ran = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 1 and "no such folder" in ran.stderr and "Traceback" not in ran.stderr
