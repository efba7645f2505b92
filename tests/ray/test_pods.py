"""The manifests' own pods, as namespaces of this machine: their commands, ports, environment, files and hooks.

A RayJob runs to its end, is lost and goes on; a RayService answers while its head is killed and comes back from Redis.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from benchmarks.disturb import steps_in
from benchmarks.pods import ROOT, Network, Pod, RayPods, why_not
from benchmarks.serving import wait_until
from emoray.quickstart import SENTENCES, make_encoder

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PASSWORD = "the-password-of-redis"
KEY = "the-key-of-a-client-of-the-pods"


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    """The overlay for small clusters, as it would be applied."""
    if why := why_not():
        pytest.skip(f"no pods here: {why}")
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    command = ["kubectl", "kustomize", str(ROOT / "k8s" / "overlays" / "cpu-small")]
    found = yaml.safe_load_all(subprocess.check_output(command, text=True))
    return {f"{thing['kind']}/{thing['metadata']['name']}": thing for thing in found}


@pytest.fixture(scope="module")
def volumes(objects: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the pods share. Of the configs only what is no network's is other: encoder, data, and few steps."""
    folder = tmp_path_factory.mktemp("volumes")
    mounted = {name: folder / name for name in ("emoray", "configs", "keys")}
    for path in mounted.values():
        path.mkdir()
    make_encoder(mounted["emoray"] / "encoder")
    for name, text in objects["ConfigMap/emoray-configs"]["data"].items():
        (mounted["configs"] / name).write_text(text)
    training = yaml.safe_load((mounted["configs"] / "train.yaml").read_text())
    training["model"] = {"pretrained": "/mnt/emoray/encoder", "from_scratch": True}
    training["data"] = {"dataset": "quickstart"}
    training["training"] |= {"max_steps": 60, "learning_rate": 1e-3, "checkpoint_every_steps": 10, "logging_steps": 1}
    (mounted["configs"] / "train.yaml").write_text(yaml.safe_dump(training))
    (mounted["keys"] / "keys").write_text(f"client {hashlib.sha256(KEY.encode()).hexdigest()}\n")
    return mounted


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Network]:
    with Network(tmp_path / "net") as net:
        yield net


def submit(pods: RayPods, entrypoint: str, name: str) -> str:
    """As the operator does in HTTPMode."""
    answer = pods.request("POST", "/api/jobs/", {"entrypoint": entrypoint, "submission_id": name})
    assert answer.status_code == 200, answer.text
    return name


def job(pods: RayPods, name: str) -> dict[str, Any]:
    return dict(pods.request("GET", f"/api/jobs/{name}").json())


def log_of(pods: RayPods, name: str) -> str:
    return str(pods.request("GET", f"/api/jobs/{name}/logs").json()["logs"])


def finished(pods: RayPods, name: str) -> bool:
    return job(pods, name)["status"] in ("SUCCEEDED", "FAILED", "STOPPED")


def test_the_rayjob_runs_is_lost_and_goes_on(objects: dict[str, Any], volumes: dict[str, Path], net: Network) -> None:
    thing = objects["RayJob/emoray-train"]
    pods = RayPods(net, thing, volumes)
    pods.start(1)
    for token in (None, "some-other-token"):
        refused = pods.request("POST", "/api/jobs/", {"entrypoint": "true"}, token=token)
        assert refused.status_code in (401, 403)
    assert pods.head is not None
    entrypoint, run = thing["spec"]["entrypoint"], volumes["emoray"] / "runs" / "emotion"

    lost = submit(pods, entrypoint, "emoray-train-1")
    wait_until(lambda: max(steps_in(run / "history.jsonl"), default=0) >= 15, "step 15")
    for driver in pods.head.processes("emoray train"):
        driver.kill()
    wait_until(lambda: finished(pods, lost), "the end of the job that is lost")
    assert job(pods, lost)["status"] == "FAILED"

    again = submit(pods, entrypoint, "emoray-train-2")  # what backoffLimit does, on the storage that all share
    wait_until(lambda: finished(pods, again), "the end")
    log = log_of(pods, again)
    assert job(pods, again)["status"] == "SUCCEEDED", log
    step = int(log.split("Going on from step ")[1].split()[0])
    assert step >= 10 and steps_in(run / "history.jsonl") == list(range(1, 61))
    assert json.loads((run / "results.json").read_text())["best"]["step"] == 60

    endless = submit(pods, f"{entrypoint} run.name=other training.max_steps=100000", "emoray-train-3")
    other = volumes["emoray"] / "runs" / "other" / "history.jsonl"
    wait_until(lambda: max(steps_in(other), default=0) >= 5, "step 5 of another run")
    worker = pods.workers[0]
    (group,) = pods.spec["workerGroupSpecs"]
    hook = group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[:2] == ["bash", "-c"]
    gone = worker.exec(hook[2])
    assert gone.returncode == 0, gone.stderr
    wait_until(lambda: "will be taken away" in log_of(pods, endless), "the notice")


def ask(pod: Pod, key: str | None = KEY) -> requests.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return requests.post(
        f"http://{pod.ip}:8000/v1/classify", json={"texts": list(SENTENCES)}, headers=headers, timeout=60
    )


class Asking:
    """Clients of the service: both workers' pods by turns, as Kubernetes' Service does; every answer must be one."""

    def __init__(self, pods: list[Pod]) -> None:
        self.problems: list[str] = []
        self.answers = 0
        self._pods, self._done = pods, threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._done.wait(0.1):
            pod = self._pods[self.answers % len(self._pods)]
            self.answers += 1
            try:
                answer = ask(pod)
            except requests.RequestException as error:
                self.problems.append(f"{time.strftime('%X')} {pod.name}: {error}")
                continue
            if answer.status_code != 200:
                self.problems.append(f"{time.strftime('%X')} {pod.name}: {answer.status_code} {answer.text[:200]}")


def test_the_rayservice_answers_while_its_head_is_lost(
    objects: dict[str, Any], volumes: dict[str, Path], net: Network, trained_run: Path, tmp_path: Path
) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    runs = volumes["emoray"] / "runs"
    for name in ("emotion", "newer"):
        shutil.rmtree(runs / name, ignore_errors=True)
        shutil.copytree(trained_run, runs / name)
    thing = objects["RayService/emoray"]
    net.redis(objects["StatefulSet/emoray-redis"], PASSWORD, tmp_path / "redis")
    pods = RayPods(net, thing, volumes, PASSWORD)
    pods.start(2)
    config = yaml.safe_load(thing["spec"]["serveConfigV2"])
    path = "/api/serve/applications/"
    assert pods.request("PUT", path, config, token=None).status_code in (401, 403)
    assert pods.request("PUT", path, config).status_code == 200

    def state() -> str:
        return str(pods.request("GET", path).json()["applications"].get("emoray", {}).get("status"))

    wait_until(lambda: state() == "RUNNING", "the application")
    probe = "wget --tries 1 -T 10 -q -O- http://localhost:8000/-/healthz | grep success"
    for worker in pods.workers:
        wait_until(lambda worker=worker: worker.exec(probe).returncode == 0, f"{worker.name}'s proxy")
        assert ask(worker, None).status_code == ask(worker, "some-other-key-of-nobody").status_code == 401
        wait_until(lambda worker=worker: ask(worker).status_code == 200, f"{worker.name}'s answer")

    assert pods.head is not None
    with Asking(pods.workers) as asking:
        time.sleep(3)
        pods.head.kill()
        time.sleep(10)
        while_away = asking.answers
        pods.start_head()
        wait_until(lambda: state() == "RUNNING", "the application after the head's return")
        time.sleep(5)
    assert asking.problems == []
    assert asking.answers > while_away > 20

    before = {process["pid"] for process in replicas(pods)}
    assert len(before) == 2 and len({process["node_ip"] for process in replicas(pods)}) == 2, "on different nodes"
    (endpoint,) = config["applications"][0]["deployments"]
    endpoint["user_config"]["model"] = "/mnt/emoray/runs/newer"
    assert pods.request("PUT", path, config).status_code == 200
    with Asking(pods.workers) as asking:
        headers = {"Authorization": f"Bearer {KEY}"}
        info = f"http://{pods.workers[0].ip}:8000/info"

        def swapped() -> bool:
            swap = requests.get(info, headers=headers, timeout=60).json()["swap"]
            return swap.get("change", 0) >= 2 and swap["state"] == "idle"

        wait_until(swapped, "the other model")
    assert asking.problems == []
    assert {process["pid"] for process in replicas(pods)} == before, "no replica was started anew"


def replicas(pods: RayPods) -> list[dict[str, Any]]:
    application = pods.request("GET", "/api/serve/applications/").json()["applications"]["emoray"]
    return [r for r in application["deployments"]["endpoint"]["replicas"] if r["state"] == "RUNNING"]
