"""What a person at a terminal, or a job's log, sees: sentences, a bar that moves, errors, the answer itself."""

from __future__ import annotations

import sys
import time
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from emoray.wording import clock

LOG_EVERY_S = 10.0
"""A job's log gets a line of progress this often, in seconds."""


class Meter:
    """How far something is: a live bar on a terminal, in a log a plain line at a steady pace.

    Args:
        title: beside the bar.
        unit: of what is counted, in a log.
    """

    def __init__(self, console: Console, title: str, unit: str) -> None:
        self._console, self._title, self._unit = console, title, unit
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._logged_at = 0.0
        self._first: tuple[float, int] | None = None

    def show(self, done: int, total: int, figures: str) -> None:
        if self._console.is_terminal:
            self._draw(done, total, figures)
        elif time.monotonic() - self._logged_at >= LOG_EVERY_S or done == total:
            self._logged_at = time.monotonic()
            line = f"{self._unit} {done}/{total}  {figures}  {self._time_left(done, total)}"
            self._console.print(line.rstrip(), markup=False, soft_wrap=True)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _draw(self, done: int, total: int, figures: str) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(self._title, total=total, completed=done, figures="")
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=done, figures=figures)

    def _time_left(self, done: int, total: int) -> str:
        now = time.monotonic()
        if self._first is None or done < self._first[1]:
            self._first = now, done
        started, first = self._first
        if done == first:
            return ""
        left = (now - started) / (done - first) * (total - done)
        return f"{clock(left)} left"


_D = TypeVar("_D", bound="Display")


class Display:
    """Sentences, and what is live on a terminal; in a log plain lines at a steady pace.

    Use it as a context manager.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _stderr()

    def __enter__(self: _D) -> _D:
        return self

    def __exit__(self, *_: object) -> None:
        """What is live ends with the block."""

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)


class _MeterDisplay(Display):
    """Sentences, and a bar."""

    def __init__(self, what: str, unit: str) -> None:
        super().__init__()
        self._meter = Meter(self.console, what, unit)

    def __exit__(self, *_: object) -> None:
        self._meter.stop()


class TrainingDisplay(_MeterDisplay):
    """A run's steps and evaluations."""

    def __init__(self) -> None:
        super().__init__("Training", "step")

    def begin(self, facts: dict[str, Any]) -> None:
        """Nothing that a person must know beyond what is said."""

    def evaluation(self, entry: dict[str, Any]) -> None:
        self.say(
            f"Epoch {entry['epoch']}, step {entry['step']}: validation loss {entry['validation_loss']:.4f}, "
            f"accuracy {entry['accuracy']:.4f}, F1 {entry['f1']:.4f}"
        )

    def row(self, row: dict[str, Any], total_steps: int) -> None:
        self._meter.show(row["step"], total_steps, _figures(row))


def _figures(row: dict[str, Any]) -> str:
    return (
        f"epoch {row['epoch']:.2f}  loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  "
        f"{row['tokens_per_s']:,.0f} tokens/s"
    )


class ScoringDisplay(_MeterDisplay):
    """Rows that are scored."""

    def __init__(self) -> None:
        super().__init__("Scoring", "row")
        self._first: tuple[float, int] | None = None

    def rows(self, done: int, total: int, faults: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
        started, first = self._first
        speed = f"{(done - first) / (now - started):,.0f} rows/s" if done > first else ""
        self._meter.show(done, total, f"{speed}{f'  {faults:,} with an error' if faults else ''}")


def say(line: str) -> None:
    """A line about what is going on, on stderr."""
    _stderr().print(line, markup=False, soft_wrap=True)


def fail(message: str) -> None:
    """One clear message on stderr."""
    _stderr().print(f"[bold red]error[/]: {escape(message)}", soft_wrap=True)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)


def out(text: str) -> None:
    """A line of the answer itself, on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
