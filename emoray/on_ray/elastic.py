"""Runs that grow and shrink with the cluster: how many workers fit, and a checkpoint before the number changes."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from emoray.wording import count

RESIZE_EVERY_S = 10.0
"""How often a running group is compared with what the cluster has; each change costs a restart of some seconds."""

_SAVING_S = 60.0
"""How long a checkpoint before a resize may take."""

_WAITING_STATES = {"InitializingState", "RestartingState", "ReschedulingState"}


class FreeResources(ElasticScalingPolicy):
    """Counts the workers for which there is room now.

    Ray's own count is up to 20 s old and takes all that nodes have for free, whoever uses it: a lost node, or another
    job, then costs a minute's wait for workers that can't be placed.
    """

    controller: Any = None
    """Ray's controller, which runs this policy; set by it."""

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        """What each living node has free, with what this run's own workers hold there."""
        try:
            free: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
            leaving = ray._private.state.state.get_draining_nodes()
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        except (ray.exceptions.RayError, RuntimeError):
            return None
        group = self.controller.get_worker_group() if self.controller is not None else None
        for worker in group.get_workers() if group is not None else []:
            node = free.setdefault(worker.metadata.node_id, {})
            for name, amount in self.scaling_config._resources_per_worker_not_none.items():
                node[name] = node.get(name, 0) + amount
        return {node: amounts for node, amounts in free.items() if node in alive and node not in leaving}


class Brake(ControllerCallback):
    """Ends the wait of an elastic run for its smallest number of workers, which Ray would spin on for ever.

    Args:
        channel: handle of the actor that the driver listens to.
        limit_s: the longest wait, in seconds.
    """

    def __init__(self, channel: Any, limit_s: float) -> None:
        self._channel, self._limit_s = channel, limit_s
        self._since = time.monotonic()
        self._told = False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if type(previous_state) is not type(current_state):
            self._since, self._told = time.monotonic(), False
        elif type(current_state).__name__ in _WAITING_STATES:
            time.sleep(0.2)  # the controller asks again without a pause
            waited = time.monotonic() - self._since
            if waited > 3 and not self._told:
                self._told = True
                self._channel.tell.remote({"kind": "note", "text": "Waiting for room for the workers"})
            if waited > self._limit_s:
                raise RuntimeError(f"the cluster had no room for the workers for {self._limit_s:g} s")


class SaveBeforeResize(ControllerCallback):
    """Has the workers save a checkpoint and rest before a group of another size takes their place.

    Ray gives them no notice; without this the steps since the last checkpoint would be done twice.
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._running = False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        self._running = type(previous_state).__name__ == "ResizingState"

    def before_controller_execute_resize_decision(self, decision: Any) -> None:
        if not self._running:
            return
        with contextlib.suppress(Exception):  # then the steps since the last checkpoint are done again
            text = f"The cluster now has room for {count(decision.num_workers, 'worker')}"
            self._channel.tell.remote({"kind": "note", "text": text})
            deadline = time.monotonic() + _SAVING_S
            ray.get(self._channel.pause.remote())
            while time.monotonic() < deadline and not ray.get(self._channel.resting.remote(), timeout=5):
                time.sleep(0.05)
        with contextlib.suppress(Exception):
            ray.get(self._channel.go_on.remote(), timeout=5)
