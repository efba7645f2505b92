"""What a person at a terminal, or a job's log, sees of a sweep: a live table, or a line where something happens."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

from emoray.console import LOG_EVERY_S, Display
from emoray.search_space import short, shown
from emoray.sweep import Sweep, Trial
from emoray.wording import clock, first_line

_ROWS = 24
"""A terminal's window: of more trials, those that run and the best are shown."""

_COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red"}


class SweepDisplay(Display):
    """A sweep's trials."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._live: Live | None = None
        self._told: dict[str, tuple[str, int]] = {}
        self._logged_at = 0.0
        self._last_line = ""

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, sweep: Sweep) -> None:
        if self.console.is_terminal:
            if self._live is None:
                self._live = Live(console=self.console, auto_refresh=False)
                self._live.start()
            self._live.update(_table(sweep), refresh=True)
            return
        for trial in sweep.trials:
            self._tell_changes(sweep, trial)
        if time.monotonic() - self._logged_at < 3 * LOG_EVERY_S:
            return
        self._logged_at = time.monotonic()
        running = [trial for trial in sweep.trials if trial.state == "running" and trial.total_steps]
        line = "; ".join(_progress(trial) for trial in running)
        if line and line != self._last_line:
            self._last_line = line
            self.say(line)

    def _tell_changes(self, sweep: Sweep, trial: Trial) -> None:
        """A line for a new state or a new evaluation."""
        now = trial.state, len(trial.evaluations)
        before = self._told.get(trial.name, ("pending", 0))
        self._told[trial.name] = now
        if now == before or now[0] == "pending":
            return
        values = ", ".join(f"{short(key)} {shown(value)}" for key, value in trial.values.items())
        if now[0] != before[0]:
            reason = f": {first_line(trial.reason)}" if trial.reason else ""
            self.say(f"Trial {trial.name} {trial.state}{reason}  ({values}){_figure(sweep, trial)}")
        else:
            self.say(f"Trial {trial.name} epoch {trial.evaluations[-1]['epoch']:g}{_figure(sweep, trial)}")


def _figure(sweep: Sweep, trial: Trial) -> str:
    if not trial.evaluations:
        return ""
    return f"  {sweep.plan.config.tune.metric} {trial.evaluations[-1][sweep.plan.column]:.4f}"


def _progress(trial: Trial) -> str:
    return f"Trial {trial.name} step {trial.step}/{trial.total_steps}  {_left(trial)}"


def _left(trial: Trial) -> str:
    if trial.state != "running" or trial.left_s is None:
        return ""
    return f"{clock(trial.left_s)} left"


def _table(sweep: Sweep) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("Trial")
    for domain in sweep.plan.domains:
        table.add_column(short(domain.key), justify="right")
    for name in ("Epoch", sweep.plan.config.tune.metric):
        table.add_column(name, justify="right")
    table.add_column("State")
    table.add_column("", justify="right")
    for trial in _most_telling(sweep):
        score = f"{sweep.plan.sign * sweep.score(trial):.4f}" if trial.evaluations else ""
        epoch = trial.epoch if trial.state == "running" else (trial.evaluations or [{"epoch": 0}])[-1]["epoch"]
        table.add_row(
            trial.name,
            *(shown(trial.values.get(domain.key)) for domain in sweep.plan.domains),
            f"{epoch:.2f}",
            score,
            trial.state if trial.state != "failed" else f"failed: {first_line(trial.reason)[:60]}",
            _left(trial),
            style=_COLOURS.get(trial.state, ""),
        )
    return table


def _most_telling(sweep: Sweep) -> list[Trial]:
    """All trials, or those that run and the best ones, in the order of their numbers."""
    wanted = sorted(sweep.trials, key=lambda trial: (trial.state != "running", -sweep.score(trial)))[:_ROWS]
    return [trial for trial in sweep.trials if trial in wanted]
