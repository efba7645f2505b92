"""Where a run's time goes, part by part: laps that leave no second out."""

from __future__ import annotations

import time


class Stopwatch:
    """Adds up seconds by part: each lap is the time since the one before.

    Times are those of the process. A GPU works on behind it, so its time shows in the part that waits for it.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._at = time.perf_counter()

    def lap(self, part: str) -> None:
        """What was done since the last lap was that part."""
        now = time.perf_counter()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._at
        self._at = now

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken
