"""A small actor between the driver and the workers: events one way, the wish to stop the other."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import ray

from emoray.on_ray import ray_train
from emoray.training import Wish

_ASK_EVERY_S = 0.2


@ray.remote(num_cpus=0, max_restarts=0)
class Channel:
    """Keeps what the workers tell until the driver fetches it."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._stop = False

    def tell(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def fetch(self) -> list[dict[str, Any]]:
        """The events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        """Have the workers save a checkpoint and stop."""
        self._stop = True

    def stopping(self) -> bool:
        return self._stop


class Leaving:
    """Says, once for each notice, that this worker is about to be taken away: SIGTERM, or its node is drained."""

    def __init__(self) -> None:
        self._told = False
        self._last_call = False

    def announced(self) -> bool:
        """True at the first look after a notice, and once more shortly before the deadline that came with it."""
        if ray_train.terminated.is_set():
            ray_train.terminated.clear()
            return True
        notice = ray_train.preemption()
        if notice is None:
            return False
        if not self._told:
            self._told = True
            return True
        if not self._last_call and notice.deadline_ms and notice.deadline_ms / 1000 - time.time() < 10:
            self._last_call = True
            return True
        return False


class WorkerControl:
    """The training loop's control inside a worker; nothing here waits for the actor.

    Args:
        channel: handle of the actor.
        asks: whether this worker is the one that asks the actor (worker 0).
        leaving: tells whether this worker's process or node is about to be taken away.
    """

    def __init__(self, channel: Any, asks: bool, leaving: Leaving) -> None:
        self._channel, self._asks, self._leaving = channel, asks, leaving
        self._answer: Any = None
        self._asked_at = 0.0

    def wish(self) -> Wish:
        if self._asks and self._stop_wished():
            return Wish.STOP
        return Wish.SAVE if self._leaving.announced() else Wish.GO_ON

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
        with contextlib.suppress(ray.exceptions.RayError):
            self._channel.tell.remote(event)
