"""What a person at a terminal, or a job's log, sees of a run."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LOG_EVERY_S = 10.0
"""A job's log gets a line of progress this often, in seconds."""


class TrainingDisplay:
    """A live bar on a terminal; in a log a plain line at a steady pace.

    Use it as a context manager.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._logged_at = 0.0
        self._first: tuple[float, int] | None = None

    def __enter__(self) -> TrainingDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def evaluation(self, entry: dict[str, Any]) -> None:
        self.say(
            f"Epoch {entry['epoch']}, step {entry['step']}: validation loss {entry['validation_loss']:.4f}, "
            f"accuracy {entry['accuracy']:.4f}, F1 {entry['f1']:.4f}"
        )

    def row(self, row: dict[str, Any], total_steps: int) -> None:
        if self.console.is_terminal:
            self._draw(row, total_steps)
        elif time.monotonic() - self._logged_at >= LOG_EVERY_S or row["step"] == total_steps:
            self._logged_at = time.monotonic()
            self.say(f"step {row['step']}/{total_steps}  {_figures(row)}  {self._time_left(row['step'], total_steps)}")

    def _draw(self, row: dict[str, Any], total_steps: int) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("Training", total=total_steps, completed=row["step"], figures="")
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=row["step"], figures=_figures(row))

    def _time_left(self, step: int, total_steps: int) -> str:
        now = time.monotonic()
        if self._first is None or step < self._first[1]:
            self._first = now, step
        started, first = self._first
        if step == first:
            return ""
        left = (now - started) / (step - first) * (total_steps - step)
        return f"{int(left) // 60}:{int(left) % 60:02d} left"


def _figures(row: dict[str, Any]) -> str:
    return (
        f"epoch {row['epoch']:.2f}  loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  "
        f"{row['tokens_per_s']:,.0f} tokens/s"
    )


def fail(message: str) -> None:
    """One clear message on stderr."""
    Console(stderr=True, highlight=False).print(f"[bold red]error[/]: {_escaped(message)}", soft_wrap=True)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def out(text: str) -> None:
    """A line of the answer itself, on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
