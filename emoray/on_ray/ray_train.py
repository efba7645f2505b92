"""Ray Train as emoray needs it: a controller that can be ended, SIGTERM and preemption noticed, no leak at a start.

What leans on Ray Train's internals is here, in failures.py and in elastic.py; pyproject.toml pins Ray's minor version
because of them.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from emoray.on_ray.cluster import on_this_node
from emoray.on_ray.elastic import FreeResources
from emoray.on_ray.failures import Failures

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


class _WorkerGroup(WorkerGroup):
    """A group of which nothing is left where a worker dies while its training function is being launched.

    Ray 2.60 leaks the other workers and their resources then, and doesn't try again.
    """

    def _start(self) -> None:
        try:
            super()._start()
        except Exception as error:
            if self.has_started():
                with contextlib.suppress(Exception):
                    self.shutdown()
            if isinstance(error, ray.exceptions.RayActorError):
                raise WorkerGroupStartupFailedError("a worker died while it was being started") from error
            raise


class _Controller(TrainController):
    """A controller whose policies can see its workers."""

    worker_group_cls = _WorkerGroup

    def __init__(self, *args: Any, scaling_policy: Any, failure_policy: Any, **kwargs: Any) -> None:
        scaling_policy.controller = failure_policy.controller = self
        super().__init__(*args, scaling_policy=scaling_policy, failure_policy=failure_policy, **kwargs)


class Trainer(TorchTrainer):
    """A TorchTrainer whose controller can be ended from outside, and whose failure policy is given."""

    def __init__(self, *args: Any, policy: Failures, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.controller: Any = None
        self._policy = policy

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        environment = get_env_vars_to_propagate()
        environment.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")
        kwargs["failure_policy"] = self._policy
        if isinstance(kwargs["scaling_policy"], ElasticScalingPolicy):
            kwargs["scaling_policy"] = FreeResources(self.scaling_config)
        options = {"num_cpus": 0, "runtime_env": {"env_vars": environment}, "label_selector": on_this_node()}
        self.controller = ray.remote(**options)(_Controller).remote(**kwargs)
        ray.get(self.controller.run.remote())
        return ray.get(self.controller.get_result.remote())

    def end(self) -> None:
        """End the run at once, in whatever state: the workers die with their owner."""
        if self.controller is not None:
            ray.kill(self.controller)
