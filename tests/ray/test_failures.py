"""What is decided and told after a failure; without a cluster, on errors as Ray gives them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from emoray.errors import ClusterError, StorageError
from emoray.on_ray import failures, jobs, train
from emoray.on_ray.failures import Failures


class Judge:
    """A policy with two workers on two nodes, and what it told."""

    def __init__(self, max_failures: int = 1, room_wait_s: float = 60.0) -> None:
        self.told: list[dict[str, Any]] = []
        channel = SimpleNamespace(tell=SimpleNamespace(remote=self.told.append))
        self._policy = Failures(FailureConfig(max_failures=max_failures), channel, room_wait_s)
        workers = [
            SimpleNamespace(
                distributed_context=SimpleNamespace(world_rank=rank),
                metadata=SimpleNamespace(node_id=f"node{rank}", node_ip=f"10.0.0.{rank}", pid=100 + rank),
            )
            for rank in range(2)
        ]
        group = SimpleNamespace(get_workers=lambda: workers)
        self._policy.controller = SimpleNamespace(get_worker_group=lambda: group)

    def retries(self, error: Any) -> bool:
        return bool(self._policy.make_decision(error) == FailureDecision.RETRY)


def dead(text: str = "Worker unexpectedly exits", preempted: bool = False) -> WorkerHealthCheckFailedError:
    death = ray.exceptions.RayActorError(None, text, False, preempted)
    return WorkerHealthCheckFailedError("health check failed", death)


def group_error(**ranks: Exception) -> WorkerGroupError:
    return WorkerGroupError("failed", {int(rank[1:]): error for rank, error in ranks.items()})


@pytest.fixture(autouse=True)
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The nodes that Ray calls alive; all that are asked answer."""
    alive = ["node0", "node1"]
    monkeypatch.setattr(failures, "_here", lambda: "head")
    monkeypatch.setattr(failures, "_ask", str)
    monkeypatch.setattr(failures, "_answers", lambda node: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": node, "Alive": True} for node in alive])
    return alive


def test_failures_are_counted_and_the_dead_worker_is_blamed() -> None:
    judge = Judge(max_failures=1)
    error = group_error(r0=RuntimeError("gloo: connection closed by peer"), r1=dead())
    assert judge.retries(error)
    assert not judge.retries(error)
    first, second = judge.told
    assert first["who"] == "Worker 1 on node 10.0.0.1 (process 101)"
    assert first["reason"] == "its process ended without a word (killed, out of memory, or a crash)"
    assert (first["attempt"], first["retry"], first["spent"]) == (1, True, True)
    assert (second["attempt"], second["retry"]) == (2, False)


def test_what_a_person_must_mend_is_not_tried_again() -> None:
    judge = Judge()
    assert not judge.retries(group_error(r1=StorageError("Node b (10.0.0.1): can't see the run's folder /runs/x")))
    assert judge.told[0]["final"]


def test_a_storage_that_may_come_back_costs_an_attempt() -> None:
    judge = Judge(max_failures=1)
    error = group_error(r0=StorageError("s3://b/runs/x: can't be written: AWS Error NETWORK_CONNECTION", passing=True))
    assert judge.retries(error) and not judge.retries(error)
    assert [(event["final"], event["spent"]) for event in judge.told] == [(False, True)] * 2


def test_an_error_of_the_program_is_told_with_its_words() -> None:
    judge = Judge()
    assert judge.retries(group_error(r0=ZeroDivisionError("division by zero")))
    assert judge.told[0]["reason"] == "ZeroDivisionError: division by zero"


def test_a_node_that_is_taken_away_costs_no_attempt(nodes: list[str]) -> None:
    judge = Judge(max_failures=0)
    assert judge.retries(group_error(r1=dead(preempted=True)))
    nodes.remove("node1")
    assert judge.retries(group_error(r1=dead()))
    assert [event["spent"] for event in judge.told] == [False, False]
    assert judge.told[1]["reason"] == "its node was taken away"
    # Often the others fail before the lost node's own worker is missed.
    assert judge.retries(group_error(r0=RuntimeError("gloo: connection closed by peer")))
    assert judge.told[2]["who"] == "Worker 1 on node 10.0.0.1 (process 101)" and not judge.told[2]["spent"]


@pytest.mark.parametrize("answers", [True, False])
def test_a_node_that_does_not_answer_is_waited_for(
    answers: bool, nodes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray calls a node dead only a quarter of a minute after its end; until then its workers are just unavailable."""
    judge = Judge(max_failures=0)
    asked = []

    def ask(node: str) -> bool:
        asked.append(node)
        if not answers and node == "node1":
            nodes.remove(node)  # Ray finds out
        return answers or node == "node0"

    monkeypatch.setattr(failures, "_answers", ask)
    unavailable = WorkerHealthCheckFailedError("failed", ray.exceptions.ActorUnavailableError("gone", b"0" * 16))
    assert judge.retries(group_error(r1=unavailable)) == (not answers)
    assert set(asked) == {"node0", "node1"}


def test_the_wait_for_room_costs_no_attempt_but_ends() -> None:
    no_room = ControllerError(WorkerGroupStartupTimeoutError(2))
    patient, impatient = Judge(max_failures=0), Judge(max_failures=5, room_wait_s=0.0)
    assert patient.retries(no_room)
    assert patient.retries(no_room)
    assert patient.told[0]["reason"] == "the cluster has no room for 2 workers"
    assert not impatient.retries(no_room)


def test_an_error_of_the_controller_is_not_tried_again() -> None:
    assert not Judge(max_failures=5).retries(ControllerError(ValueError("a bug")))


class Server:
    """A job server whose agent isn't there for so many calls."""

    def __init__(self, calls: float) -> None:
        self.calls = calls

    def submit_job(self, **_: Any) -> str:
        self.calls -= 1
        if self.calls >= 0:
            raise RuntimeError("Request failed with status code 500: No available agent to submit job, ...")
        return "a-job"

    def get_address(self) -> str:
        return "http://head:8265"


def test_a_cluster_that_has_just_started_gets_its_job_a_moment_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_AGAIN_S", 0.01)
    said: list[str] = []
    assert jobs._submit(Server(3), ["runs"], {}, said.append) == "a-job"
    assert said == ["Waiting for the cluster's job agent"]
    monkeypatch.setattr(jobs, "_AGENT_S", 0.05)
    with pytest.raises(ClusterError, match="start this one with --dashboard-agent-listen-port"):
        jobs._submit(Server(float("inf")), ["runs"], {}, said.append)


def test_a_stop_does_not_hide_what_kept_it_from_saving() -> None:
    fit = train._Fit.__new__(train._Fit)
    fit.events = SimpleNamespace(results=None, stopped=None, failure=None)  # type: ignore[assignment]
    fit.error, fit.signals = StorageError("/runs/a: can't be written: No space left on device"), [2]
    with pytest.raises(StorageError, match="No space left"):
        fit._outcome()
