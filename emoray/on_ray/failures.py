"""What happens after a failure of a run on Ray Train: which worker it was, of what, and whether it is tried again."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError

from emoray.errors import EmorayError, StorageError
from emoray.wording import first_line

_UNDECIDED_S = 25.0
"""How long a node that doesn't answer may stay undecided; Ray itself takes about 15 s to call it dead."""


_ENDED = "its process ended without a word (killed, out of memory, or a crash)"


@dataclass(frozen=True)
class Failure:
    """What is told of a failure.

    Attributes:
        who: the worker and its place, e.g. `Worker 1 on node 10.0.0.7 (process 4711)`, or what else failed.
        reason: of what, as a clause.
        attempt: number of the attempt that failed, from 1.
        retry: whether the run is taken up again.
        spent: whether that costs one of `workers.max_failures`.
        final: whether a person must mend it first.
    """

    who: str
    reason: str
    attempt: int
    retry: bool
    spent: bool
    final: bool


class Failures(FailurePolicy):
    """Decides after a failure, and tells the driver of it.

    What a person must mend is not tried again. A node that was taken away, with notice or without, costs no attempt;
    nor does the wait for room that follows. All else counts against `workers.max_failures`.

    Args:
        channel: handle of the actor that the driver listens to.
        room_wait_s: how long a run that has lost workers may wait for room, in seconds.
    """

    controller: Any = None
    """Ray's controller, which runs this policy; set by it."""

    def __init__(self, config: FailureConfig, channel: Any, room_wait_s: float) -> None:
        super().__init__(config)
        self._channel, self._room_wait_s = channel, room_wait_s
        self._failed = 0
        self._roomless_since: float | None = None

    def make_decision(self, training_failed_error: Any) -> Any:
        failure = self._judge(training_failed_error)
        with contextlib.suppress(Exception):  # a message must never end a run
            self._channel.tell.remote({"kind": "failure", **asdict(failure)})
        return FailureDecision.RETRY if failure.retry else FailureDecision.RAISE

    def _judge(self, error: Any) -> Failure:
        cause = getattr(error, "controller_failure", error)
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            return self._no_room(cause)
        self._roomless_since = None
        workers = self._workers()
        places = {rank: _place(worker) for rank, worker in workers.items()}
        who, reason = describe(error, places)
        attempt = self._failed + 1
        mendable = user_error(error)
        if mendable is not None and not (isinstance(mendable, StorageError) and mendable.passing):
            return Failure(who, reason, attempt, retry=False, spent=True, final=True)
        announced = is_preempted(error)
        lost = [] if announced else self._on_lost_nodes(workers)
        if lost or announced:
            who = _names(lost, places) if lost else who
            return Failure(who, "its node was taken away", attempt, retry=True, spent=False, final=False)
        self._failed += 1
        can = isinstance(error, WorkerGroupError) or isinstance(cause, WorkerGroupStartupFailedError)
        retry = can and self._failed <= self.failure_config.max_failures
        return Failure(who, reason, attempt, retry=retry, spent=True, final=False)

    def _no_room(self, error: WorkerGroupStartupTimeoutError) -> Failure:
        now = time.monotonic()
        self._roomless_since = self._roomless_since or now
        waited = now - self._roomless_since
        return Failure(
            "The run",
            f"the cluster has no room for {error.num_workers} workers",
            self._failed + 1,
            retry=waited < self._room_wait_s,
            spent=False,
            final=False,
        )

    def _workers(self) -> dict[int, Any]:
        """The workers of the group that failed, by rank; none where it failed while it was started."""
        with contextlib.suppress(Exception):
            return {w.distributed_context.world_rank: w for w in self.controller.get_worker_group().get_workers()}
        return {}

    def _on_lost_nodes(self, workers: dict[int, Any]) -> list[int]:
        """Ranks of the workers whose nodes are gone.

        What fails first says little: with a lost node's worker the others fail too, in the middle of a sum, and often
        they are noticed before it. So each node must answer, unless Ray calls one dead first; a run that is taken up
        before that would be placed on the dead node. The driver's own node needn't: this runs there.
        """
        asked = {node: _ask(node) for node in {w.metadata.node_id for w in workers.values()} - {_here()}}
        deadline = time.monotonic() + _UNDECIDED_S
        while asked:
            lost = asked.keys() - {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            if lost:
                return sorted(rank for rank, worker in workers.items() if worker.metadata.node_id in lost)
            asked = {node: answer for node, answer in asked.items() if not _answers(answer)}
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        return []


def _death(error: Any) -> Any:
    """The end of a worker's process, as Ray puts it; None where the process lives."""
    return error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else None


def _here() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _ask(node_id: str) -> Any:
    """Send a task to a node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(_nothing).options(scheduling_strategy=there).remote()


def _answers(answer: Any) -> bool:
    """Whether a node has done what it was asked."""
    try:
        ray.get(answer, timeout=0)
    except (ray.exceptions.RayError, TimeoutError):
        return False
    return True


def _nothing() -> None:
    pass


def _place(worker: Any) -> str:
    return f"node {worker.metadata.node_ip} (process {worker.metadata.pid})"


def is_preempted(error: Any) -> bool:
    """Whether a node was taken away as announced."""
    deaths = [_death(e) for e in getattr(error, "worker_failures", {}).values()]
    return isinstance(error, PreemptionError) or any(getattr(death, "preempted", False) for death in deaths)


def user_error(error: Any) -> EmorayError | None:
    """The error among a failure's that a person must mend, if there is one."""
    for failure in getattr(error, "worker_failures", {}).values():
        for link in (failure, getattr(failure, "cause", None), getattr(failure, "__cause__", None)):
            if isinstance(link, EmorayError):
                return link
    return None


def describe(error: Any, places: dict[int, str]) -> tuple[str, str]:
    """Who failed, and of what.

    Args:
        places: where each worker ran, by rank, as far as known.
    """
    if isinstance(error, PreemptionError):
        return _names(sorted(error.preemption_info.preempted_ranks), places), "its node was taken away"
    if isinstance(error, ray.exceptions.RayActorError):  # beside the driver, and all workers went with it
        return "Ray Train's controller", _ENDED
    failures = dict(getattr(error, "worker_failures", {}))
    if not failures:
        cause = getattr(error, "controller_failure", error)
        if isinstance(cause, WorkerGroupStartupFailedError):
            return "A worker", "its process ended while it was being started"
        return "The run", first_line(cause)
    # When one worker dies the others fail too, in the middle of a sum: the dead one is the cause.
    dead = {rank: failure for rank, failure in failures.items() if _death(failure) is not None}
    rank, failure = min((dead or failures).items())
    return f"Worker {rank} on {places.get(rank, 'an unknown node')}", _reason(failure)


def _names(ranks: list[int], places: dict[int, str]) -> str:
    who = " and ".join(f"worker {rank} on {places.get(rank, 'its node')}" for rank in ranks)
    return who[:1].upper() + who[1:] or "The run"


def _reason(failure: Any) -> str:
    death = _death(failure)
    if death is None:
        text = str(failure).strip()
        return f"{type(failure).__name__}: {text.splitlines()[-1] if 'Traceback' in text else first_line(failure)}"
    if "SIGTERM" in str(death):
        return "its process was ended by SIGTERM"
    return _ENDED
