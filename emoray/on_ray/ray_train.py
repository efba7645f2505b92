"""Ray Train as emoray needs it: a controller that can be ended, failures told, SIGTERM and preemption noticed.

All that leans on Ray Train's internals is in this file; pyproject.toml pins Ray's minor version because of it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import ray
from ray.train import FailureConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

from emoray.errors import EmorayError

terminated = threading.Event()
"""Set in a worker process that got SIGTERM (Ray itself sends one at a run's normal end)."""


class CatchSigterm(WorkerCallback):
    """Turns SIGTERM to a worker into an event. Training runs in a thread, where no handler can be installed."""

    def after_init_train_context(self) -> None:
        import signal

        signal.signal(signal.SIGTERM, lambda *_: terminated.set())


def preemption() -> Any:
    """Ray's notice that a node of this run is going away, or None; free to ask (`get_preemption_info` is a barrier)."""
    return get_train_context().preemption_context.preemption_info


class Whereabouts(WorkerGroupCallback):
    """Remembers which worker runs where, for messages: Ray's errors don't say."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def after_worker_group_start(self, worker_group: Any) -> None:
        with contextlib.suppress(Exception):  # a message must never end a run
            places = {
                w.distributed_context.world_rank: f"node {w.metadata.node_ip} (process {w.metadata.pid})"
                for w in worker_group.get_workers()
            }
            self._channel.tell.remote({"workers": places})


class Brake(ControllerCallback):
    """Ends the wait of an elastic run for its smallest number of workers, which Ray would spin on for ever.

    Args:
        limit_s: the longest wait, in seconds.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since = 0.0

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if type(previous_state) is not type(current_state):
            self._since = time.monotonic()
        elif type(current_state).__name__ in {"InitializingState", "RestartingState", "ReschedulingState"}:
            time.sleep(0.2)  # the controller asks again without a pause
            if time.monotonic() - self._since > self._limit_s:
                raise RuntimeError(f"the cluster had no room for the workers for {self._limit_s:g} s")


class Failures(DefaultFailurePolicy):
    """Decides after a failure, and tells of it: what a person must mend is not tried again."""

    def __init__(self, config: FailureConfig, channel: Any) -> None:
        super().__init__(config)
        self._channel = channel
        self._count = 0

    def make_decision(self, training_failed_error: Any) -> Any:
        final = user_error(training_failed_error)
        decision = FailureDecision.RAISE if final else super().make_decision(training_failed_error)
        with contextlib.suppress(Exception):
            preempted = type(training_failed_error).__name__ == "PreemptionError"
            self._count += not preempted
            self._channel.tell.remote(
                {
                    "failure": describe(training_failed_error),
                    "failures": self._count,
                    "retry": decision == FailureDecision.RETRY,
                    "final": final is not None,
                }
            )
        return decision


def user_error(error: Any) -> EmorayError | None:
    """The error among a failure's that a person must mend, if there is one."""
    for failure in getattr(error, "worker_failures", {}).values():
        for link in (failure, getattr(failure, "cause", None), getattr(failure, "__cause__", None)):
            if isinstance(link, EmorayError):
                return link
    return None


def describe(error: Any) -> dict[str, Any]:
    """Which worker failed, and of what, as far as Ray knows: rank (or None) and a reason."""
    failures = dict(getattr(error, "worker_failures", {}))
    if not failures:
        return {"rank": None, "reason": _first_line(str(error)) or type(error).__name__}
    # When one worker dies the others fail too, in the middle of a sum: the dead one is the cause.
    dead = {rank: e for rank, e in failures.items() if isinstance(e, WorkerHealthCheckFailedError)}
    rank, failure = min((dead or failures).items())
    if not dead:
        return {"rank": rank, "reason": f"{type(failure).__name__}: {_first_line(_cause_text(failure))}"}
    text = str(getattr(failure, "health_check_failure", failure))
    if "SIGTERM" in text:
        reason = "its process was ended by SIGTERM"
    elif "node" in text.lower() and "died" in text.lower() and "node died" in text.lower():
        reason = "its node is gone"
    else:
        reason = "its process ended without a word (killed, out of memory, or a crash)"
    return {"rank": rank, "reason": reason}


def summary(error: BaseException | None, workers: dict[int, str]) -> str:
    """The last failure in one clause: who, where, of what."""
    if error is None:
        return "Ray Train ended without a result"
    told = describe(error)
    if told["rank"] is None:
        return str(told["reason"])
    return f"worker {told['rank']} on {workers.get(told['rank'], 'an unknown node')}: {told['reason']}"


def _cause_text(failure: BaseException) -> str:
    return str(failure).strip().split("\n")[-1] if "Traceback" in str(failure) else str(failure)


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if lines else ""


class Trainer(TorchTrainer):
    """A TorchTrainer whose controller can be ended from outside, and whose failure policy is given."""

    controller: Any = None
    policy: DefaultFailurePolicy | None = None

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        from ray.train.v2._internal.constants import get_env_vars_to_propagate
        from ray.train.v2._internal.execution.controller import TrainController

        environment = get_env_vars_to_propagate()
        environment.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")
        if self.policy is not None:
            kwargs["failure_policy"] = self.policy
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        remote = ray.remote(num_cpus=0, runtime_env={"env_vars": environment}, label_selector=here)(TrainController)
        self.controller = remote.remote(**kwargs)
        ray.get(self.controller.run.remote())
        return ray.get(self.controller.get_result.remote())

    def end(self) -> None:
        """End the run at once, in whatever state: the workers die with their owner."""
        if self.controller is not None:
            ray.kill(self.controller)
