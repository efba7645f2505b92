"""A real Prometheus, started by `emoray monitor`, on a real run, sweep and endpoint: every query has its data."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.disturb import Bench
from benchmarks.job_server import JobServer, free_ports
from benchmarks.serving import wait_until
from emoray import monitor
from emoray.quickstart import SENTENCES, config_path

pytestmark = [pytest.mark.ray, pytest.mark.slow]

GPUS = re.compile(r"ray_node_(gpus|gram|gpu)_")


@contextmanager
def prometheus(environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """`emoray monitor`, and where it says to look."""
    command = [sys.executable, "-m", "emoray.cli", "monitor", "--port", str(free_ports(1)[0]), "--json"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        assert process.wait(60) == 143


def has_data(url: str, query: str) -> bool:
    answer = requests.get(f"{url}/api/v1/query", params={"query": query}, timeout=60).json()
    assert answer["status"] == "success", (query, answer)
    return any(series["value"][1] != "NaN" for series in answer["data"]["result"])


def wanted(where: dict[str, str]) -> set[str]:
    """Every query of the dashboard that needs no GPU, and every metric of the alerts."""
    panels = json.loads(Path(where["dashboard"]).read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    filled = {re.sub(r"\$(cluster|run)\b", ".*", query).replace("$__rate_interval", "2m") for query in queries}
    alerts = (monitor.files() / "alerts.yaml").read_text()
    metrics = {f"count({name})" for name in re.findall(r"\bray_[a-z_]+", alerts) if name != "ray_io_cluster"}
    events = {
        'ray_emoray_failures_total{kind="overloaded"}',
        "max by (ray_io_cluster, run) (max_over_time(ray_emoray_train_not_finite[10m])) == 1",
    }
    return {query for query in filled if not GPUS.search(query)} | metrics | events


@contextmanager
def load(url: str) -> Iterator[set[int]]:
    """Clients enough for a queue of one to be full; the statuses that they got."""
    statuses: set[int] = set()
    done = threading.Event()

    def ask(_: int) -> None:
        while not done.wait(0.2):
            body = {"texts": list(SENTENCES) * 20}
            statuses.add(requests.post(f"{url}/v1/classify", json=body, timeout=60).status_code)

    with ThreadPoolExecutor(6) as clients:
        asking = [clients.submit(ask, n) for n in range(6)]
        try:
            yield statuses
        finally:
            done.set()
            for client in asking:
                client.result()


def test_every_query_of_dashboard_and_alerts_has_data(trained_run: Path, tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    with Bench(tmp_path) as bench, JobServer(bench.environment, cpus=4) as server:
        bench.environment = server.environment
        (port,) = free_ports(1)
        overrides = [f"http.port={port}", "replicas.max=1", "replicas.num_cpus=0.2", "limits.max_queued_requests=1"]
        serving = bench.start("endpoint", ["serve", str(trained_run), "--json", *overrides], server.address)
        assert serving.status() == 0, serving.output
        look(bench, server, f"http://127.0.0.1:{port}")


def look(bench: Bench, server: JobServer, url: str) -> None:
    often = ("training.max_steps=100000", "training.evaluations_per_epoch=10", "run.name=watched")
    endless = bench.train("watched", *often, address=server.address)
    endless.wait_for_step(1)
    path = bench.folder / "watched.yaml"
    path.write_text(f"base: {config_path()}\nsearch: {{training.learning_rate: {{choice: [1.0e-3, 5.0e-4]}}}}\n")
    tune = ["tune", str(path), *bench.overrides("sweep", "training.max_steps=60", "tune.num_trials=2")]
    with prometheus(server.environment) as where, load(url) as statuses:
        assert Path(where["targets"]).exists() and where["prometheus"].startswith("http://127.0.0.1:")
        lost = bench.train("lost", "training.adam_epsilon=1e-300", address=server.address)
        missing = wanted(where)
        sweep: list[Any] = []

        def all_seen() -> bool:
            if not sweep and lost.process.poll() is not None:
                sweep.append(bench.start("sweep", [*tune, "tune.max_concurrent=1"], server.address))
            missing.difference_update({query for query in missing if has_data(where["prometheus"], query)})
            return not missing

        try:
            wait_until(all_seen, "data for all queries")
        except AssertionError:
            outputs = [command.output[-1500:] for command in (endless, lost, *sweep)]
            pytest.fail("\n".join(["without data:", *sorted(missing), *outputs]))
        assert lost.status() == 1 and "The loss is nan" in lost.output
        endless.terminate()
        assert endless.status() == 143
    assert statuses == {200, 429}
