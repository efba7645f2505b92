"""Jobs on a running cluster with token authentication: submitted, lost sight of, lost, stopped, refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from ray.job_submission import JobStatus
from tiny import train_here

from benchmarks.disturb import Bench, Command, steps_in
from benchmarks.job_server import ROOT, TOKEN, JobServer, free_ports
from emoray import checkpoint
from emoray.quickstart import config_path

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def server(bench: Bench) -> Iterator[JobServer]:
    with JobServer(bench.environment) as server:
        yield server


def submit(bench: Bench, server: JobServer, name: str, *arguments: str, steps: int = 120) -> Command:
    """`emoray submit` of a small run."""
    run = ["train", str(config_path()), *bench.overrides(name, f"training.max_steps={steps}")]
    command = Command(
        ["submit", "--address", server.dashboard, "--working-dir", str(ROOT), *arguments, "--", *run],
        bench.folder / "runs" / name,
        bench.folder / f"{name}.log",
        server.environment,
    )
    bench.commands.append(command)
    return command


def job_of(command: Command) -> str:
    command.wait_until(lambda: " runs `" in command.output, "the job")
    return command.output.split("Job ")[1].split(" ")[0]


def test_without_the_token_nothing_is_taken(bench: Bench, server: JobServer) -> None:
    """Jobs, the dashboard's API, a second driver."""
    post = {"entrypoint": "touch /tmp/no"}
    for headers in ({}, {"Authorization": "Bearer some-other-token"}):
        refused = requests.post(f"{server.dashboard}/api/jobs/", json=post, headers=headers, timeout=60)
        looked = requests.get(f"{server.dashboard}/api/cluster_status", headers=headers, timeout=60)
        assert {refused.status_code, looked.status_code} <= {401, 403}
    mine = {"Authorization": f"Bearer {TOKEN}"}
    assert requests.get(f"{server.dashboard}/api/cluster_status", headers=mine, timeout=60).status_code == 200
    assert server.client().list_jobs() == []

    run = ["train", str(config_path()), *bench.overrides("refused")]
    by_job = ["submit", "--address", server.dashboard, "--", *run]
    tried = [
        subprocess.Popen(
            [sys.executable, "-m", "emoray.cli", *command],
            env={**server.environment, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": token, "RAY_ADDRESS": server.address},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for mode, token, command in (("token", "some-other-token", run), ("disabled", "", by_job))
    ]
    for process in tried:
        said = process.communicate(timeout=240)[1]
        assert process.returncode == 1 and "RAY_AUTH_MODE" in said and "Traceback" not in said, said
    assert not (bench.folder / "runs" / "refused" / "history.jsonl").exists()


@pytest.mark.slow
def test_a_submitter_that_is_killed_leaves_the_job_alone(bench: Bench, server: JobServer) -> None:
    submitter = submit(bench, server, "left-alone")
    job = job_of(submitter)
    submitter.wait_until(lambda: submitter.step >= 3, "step 3")
    submitter.process.kill()
    again = subprocess.run(
        [sys.executable, "-m", "emoray.cli", "submit", "--address", server.dashboard, "--follow", job],
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert again.returncode == 0, again.stderr
    assert "succeeded" in again.stderr and "Training on 1 worker" in again.stdout, "the log from its beginning"
    assert steps_in(submitter.run / "history.jsonl") == list(range(1, 121))
    assert json.loads((submitter.run / "results.json").read_text())["best"]["step"] > 0


@pytest.mark.slow
def test_a_driver_that_is_lost_is_given_again_and_a_stop_is_no_failure(bench: Bench, server: JobServer) -> None:
    submitter = submit(bench, server, "lost", "--retries", "1", steps=100_000)
    kept = submitter.run / checkpoint.FOLDER
    submitter.wait_until(lambda: any(kept.glob(f"step-*/{checkpoint.MANIFEST}")), "a checkpoint")
    (driver,) = server.drivers()
    driver.kill()
    submitter.wait_until(lambda: "submitted again" in submitter.output, "the second job")
    submitter.wait_until(lambda: submitter.restarts, "the second job's start")
    assert submitter.restarts[0] >= 7, "from a checkpoint"
    submitter.wait_for_step(submitter.restarts[0] + 5, restarts=1)
    client = server.client()
    (running,) = [job for job in client.list_jobs() if job.status == JobStatus.RUNNING]
    client.stop_job(running.submission_id)
    assert submitter.status() == 3, submitter.output
    assert "was stopped" in submitter.output
    steps = steps_in(submitter.run / "history.jsonl")
    assert steps == list(range(1, len(steps) + 1))
    assert (submitter.run / f"checkpoints/step-{len(steps):08d}").is_dir(), "a stop saves first"


@pytest.mark.slow
def test_an_endpoint_on_a_cluster_takes_another_model(
    server: JobServer, trained_run: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """A second `emoray serve` there finds its port held by the very endpoint that it is to change."""
    other = train_here([*tiny_overrides, "run.name=other", f"run.storage_path={tmp_path}", "training.seed=7"])
    (port,) = free_ports(1)

    def serve(model: Path) -> str:
        arguments = [str(model), f"http.port={port}", "engine=torch", "--json"]
        environment = {**server.environment, "RAY_ADDRESS": server.address}
        command = [sys.executable, "-m", "emoray.cli", "serve", *arguments]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert ran.returncode == 0, ran.stderr
        body = requests.post(f"http://127.0.0.1:{port}/v1/classify", json={"texts": ["i feel fine"]}, timeout=60)
        assert body.json()["model"] == json.loads(ran.stdout)["model"]
        return str(body.json()["model"])

    assert serve(trained_run) != serve(other)
