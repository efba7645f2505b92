"""Signals are noted within the block alone, and in the main thread alone."""

from __future__ import annotations

import os
import signal
import threading

from emoray import signals


def test_signals_are_noted_and_handlers_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    called: list[int] = []
    with signals.noted(then=lambda: called.append(len(seen))) as seen:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert seen == [signal.SIGTERM, signal.SIGINT] and called == [1, 2], "told after each"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_notes_nothing_and_does_not_fail() -> None:
    found: list[list[int]] = []

    def work() -> None:
        with signals.noted() as seen:
            found.append(seen)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[]]
