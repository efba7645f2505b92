"""What a run's workers tell its driver, put into words for whoever watches, and what is known of the run from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from emoray.on_ray.train_metrics import DriverMetrics
from emoray.wording import count

_SILENCE_S = 300.0
"""After so long without a word from the workers, that is told, in seconds."""


class Watcher(Protocol):
    """Shows a person, or a log, what happens."""

    def say(self, line: str) -> None:
        """A sentence."""

    def row(self, row: dict[str, Any], total_steps: int) -> None:
        """A row of the history, now and then."""

    def evaluation(self, entry: dict[str, Any]) -> None:
        """A line of the results table."""

    def begin(self, facts: dict[str, Any]) -> None:
        """Workers start: `step`, `total_steps`, the `evaluations` so far, and the `optimizer` that worker 0 made."""


class RunEvents:
    """Takes the workers' events in order.

    Args:
        metrics: counts starts of workers.
        max_failures: `workers.max_failures`, for words on what follows a failure.

    Attributes:
        step: the last one that was heard of.
        results: content of results.json, once the run has ended.
        stopped: in words, why the workers stopped before the end.
        failure: the last failure's event.
    """

    def __init__(self, watcher: Watcher, metrics: DriverMetrics, max_failures: int) -> None:
        self._watcher, self._metrics, self._max_failures = watcher, metrics, max_failures
        self._heard_at = time.monotonic()
        self.step = 0
        self.results: dict[str, Any] | None = None
        self.stopped: str | None = None
        self.failure: dict[str, Any] | None = None

    def take(self, events: Sequence[dict[str, Any]]) -> None:
        """Tell what has happened since the last call; or, now and then, that nothing has."""
        for event in events:
            getattr(self, f"_on_{event['kind']}")(event)
        now = time.monotonic()
        if events:
            self._heard_at = now
        elif now - self._heard_at > _SILENCE_S:
            self._heard_at = now
            self._watcher.say(
                f"No word from the workers for {_SILENCE_S / 60:g} min; the last one was of step {self.step}"
            )

    def _on_note(self, event: dict[str, Any]) -> None:
        self._watcher.say(event["text"])

    def _on_start(self, event: dict[str, Any]) -> None:
        self.step, self.stopped = event["step"], None
        self._watcher.begin(event)
        self._metrics.started(self.step)
        workers = count(event["workers"], "worker")
        if self.step:
            self._watcher.say(f"Going on from step {self.step} with {workers}")
        elif self.failure is not None:
            self._watcher.say(f"Starting again from step 0 with {workers}, since no checkpoint had been written")

    def _on_row(self, event: dict[str, Any]) -> None:
        self.step = event["row"]["step"]
        self._watcher.row(event["row"], event["total_steps"])

    def _on_evaluation(self, event: dict[str, Any]) -> None:
        self._watcher.evaluation(event["entry"])

    def _on_failure(self, event: dict[str, Any]) -> None:
        self.failure = event
        if event["final"]:
            return
        if not event["retry"]:
            then = "no attempt is left" if event["spent"] else "it is given up"
        elif event["spent"]:
            then = f"attempt {event['attempt'] + 1} of {self._max_failures + 1} follows"
        else:
            then = "the run is taken up again, no attempt is spent"
        self._watcher.say(f"{event['who']} failed after step {self.step}: {event['reason']}; {then}")

    def _on_stopped(self, event: dict[str, Any]) -> None:
        self.stopped = event["text"]

    def _on_results(self, event: dict[str, Any]) -> None:
        self.results = event["results"]
