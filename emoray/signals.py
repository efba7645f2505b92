"""Signals that ask a command to stop: noted while it works, so that it can save what it has first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def noted(then: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Within this, SIGINT and SIGTERM are appended to the list that it gives, instead of ending the process.

    Outside the main thread, where Python lets no one handle signals, the list stays empty.

    Args:
        then: called after each.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number: int, _: object) -> None:
        seen.append(number)
        then()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
