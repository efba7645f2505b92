"""A worker's side of the channel: it hears that it is to stop or about to be taken away, and tells what happens."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import ray

from emoray.on_ray import ray_train
from emoray.on_ray.train_metrics import TrainMetrics
from emoray.training import Wish

_ASK_EVERY_S = 0.2
_LAST_CALL_S = 10.0


class Leaving:
    """Says, once for each notice, that this worker is about to be taken away: SIGTERM, or its node is drained."""

    def __init__(self) -> None:
        self._told = False
        self._last_call = False

    def announced(self) -> str | None:
        """A sentence at the first look after a notice, and once more shortly before the deadline that came with it."""
        if ray_train.terminated.is_set():
            ray_train.terminated.clear()
            return "A worker got SIGTERM: saving a checkpoint"
        notice = ray_train.preemption()
        if notice is None:
            return None
        left = notice.deadline_ms / 1000 - time.time() if notice.deadline_ms else None
        if not self._told:
            self._told = True
            self._last_call = left is not None and left < _LAST_CALL_S
            when = "" if left is None else f" in {max(left, 0):.0f} s"
            return f"A node of this run will be taken away{when}: saving a checkpoint"
        if not self._last_call and left is not None and left < _LAST_CALL_S:
            self._last_call = True
            return "The node will be taken away any moment: saving a checkpoint once more"
        return None


class WorkerControl:
    """The training loop's control inside a worker; nothing here waits for the actor.

    Args:
        channel: handle of the actor.
        asks: whether this worker is the one that asks the actor (worker 0).
        leaving: tells whether this worker's process or node is about to be taken away.
        metrics: counts what worker 0 tells.
    """

    def __init__(self, channel: Any, asks: bool, leaving: Leaving, metrics: TrainMetrics) -> None:
        self._channel, self._asks, self._leaving, self._metrics = channel, asks, leaving, metrics
        self._answer: Any = None
        self._asked_at = 0.0

    def wish(self) -> Wish:
        if self._asks and self._stop_wished():
            return Wish.STOP
        notice = self._leaving.announced()
        if notice is None:
            return Wish.GO_ON
        if self._asks:  # all workers see it
            self.tell({"kind": "note", "text": notice})
        return Wish.SAVE

    def _stop_wished(self) -> bool:
        """The answer to the last question, once it is there; a lost actor wishes nothing."""
        with contextlib.suppress(ray.exceptions.RayError):
            if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
                answer, self._answer = self._answer, None
                return bool(ray.get(answer))
            if self._answer is None and time.monotonic() - self._asked_at >= _ASK_EVERY_S:
                self._asked_at = time.monotonic()
                self._answer = self._channel.stopping.remote()
        return False

    def tell(self, event: dict[str, Any]) -> None:
        self._metrics.event(event)
        if event["kind"] == "checkpoint":  # nothing that a person must hear of each time
            return
        with contextlib.suppress(ray.exceptions.RayError):
            self._channel.tell.remote(event)
