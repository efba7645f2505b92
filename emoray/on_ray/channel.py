"""A small actor between the driver and the workers: events one way, the wish to stop the other."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import ray

from emoray.on_ray import ray_train
from emoray.on_ray.cluster import on_this_node
from emoray.training import Wish

_ASK_EVERY_S = 0.2
_LAST_CALL_S = 10.0


class Channel:
    """Keeps what the workers tell until the driver fetches it.

    An actor that dies is started anew and has forgotten everything; the run goes on all the same.
    """

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._stop = self._pause = self._rest = False

    def tell(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        if event["kind"] in {"start", "stopped", "results"}:
            self._rest = event["kind"] != "start"

    def fetch(self) -> list[dict[str, Any]]:
        """The events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        """Have the workers save a checkpoint and stop."""
        self._stop = True

    def pause(self) -> None:
        """As `stop`, until `go_on`: other workers will take the place of these."""
        self._pause = True

    def go_on(self) -> None:
        self._pause = False

    def stopping(self) -> bool:
        return self._stop or self._pause

    def resting(self) -> bool:
        """Whether the workers have done their last step, all saved."""
        return self._rest


def open_channel() -> Any:
    """The handle of a new channel. It lives on the driver's node: the loss of another node must not take it along."""
    actor = ray.remote(num_cpus=0, max_restarts=-1, label_selector=on_this_node())(Channel)
    return actor.remote()


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
    """

    def __init__(self, channel: Any, asks: bool, leaving: Leaving) -> None:
        self._channel, self._asks, self._leaving = channel, asks, leaving
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
        with contextlib.suppress(ray.exceptions.RayError):
            self._channel.tell.remote(event)
