"""A small actor between the driver and the workers: events one way, the wish to stop the other.

An event is a dict; its `kind` says what else is in it:

    start       workers, step, total_steps, batch_size,               training: workers have begun, or begun again
                evaluations, optimizer
    row         row, steps, parts, total_steps                        training: a line of the history, and its time
    evaluation  entry                                                 training: a line of the results table
    checkpoint  step, seconds                                         training: one was written
    note        text                                                  anyone: a sentence for whoever watches
    stopped     text                                                  worker: why it stopped before the end of the run
    results     results                                               worker: the content of results.json
    failure     who, reason, retry, spent, attempt, final             failures: workers have failed, and what follows

Its process, and Ray Train's controller, load this module before training starts: it must not bring torch along.
"""

from __future__ import annotations

from typing import Any

import ray

from emoray.on_ray.cluster import on_this_node


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
