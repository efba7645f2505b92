"""Training's metrics over `ray.util.metrics`: Prometheus sees each name with `ray_` in front of it.

From worker 0, whenever it reads losses back (`training.logging_steps`):

emoray_train_step, _total_steps, _epoch{run}      how far it is
emoray_train_loss, _learning_rate{run}            of that step
emoray_train_tokens_per_s{run}                    real tokens, over all workers
emoray_train_part_seconds_total{run, part}        worker 0's time by part; its rate is a share, all parts make 1:
                                                  batch, forward, backward, update: the step (both passes are "backward"
                                                  where they are one CUDA graph); agree, read: waits for other workers
                                                  and for the device; evaluation; checkpoint: waits for it
emoray_train_steps_total{run}                     steps done, those that were done again included
emoray_train_checkpoint_seconds{run}              a checkpoint's writing, beside training
emoray_train_last_step_timestamp_seconds{run}     when worker 0 last did one, in seconds since 1970
emoray_train_validation{run, metric}              of the last evaluation: validation_loss, accuracy, f1, macro_f1

From the driver:

emoray_train_running{run}                         1 while the command runs
emoray_train_restarts{run}                        how often its workers were started again, after a failure or a resize
emoray_train_not_finite{run}                      1 where it ended with a loss that is not finite
emoray_sweep_trials{run, state}                   trials of a sweep
emoray_sweep_best{run, metric}                    the best evaluation so far

A sweep's trials have runs like `sweep/0003`. Gauges of processes that are gone vanish within a minute.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter as Tally
from collections.abc import Mapping
from typing import Any, get_args

from ray.util.metrics import Counter, Gauge, Histogram

from emoray.metrics import EVALUATED
from emoray.storage import split_options
from emoray.sweep import TRIALS, State, Sweep

_AGAIN_S = 1.0
_SECONDS = [0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300]


def run_name(location: str) -> str:
    """What a run is called in metrics: its folder's name, in a sweep after the sweep's."""
    parts = split_options(location)[0].split("/")
    *_, sweep, folder, name = ["", "", *parts]
    return f"{sweep}/{name}" if sweep and folder == TRIALS else name


class _Kept:
    """Gauges that keep their values: Ray 2.60 hands on only what was set since it last did, and forgets the rest."""

    def __init__(self) -> None:
        self._values: dict[tuple[Gauge, tuple[tuple[str, str], ...]], float] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._work, name="emoray-metrics", daemon=True).start()

    def set(self, gauge: Gauge, value: float, **tags: str) -> None:
        with self._lock:
            self._values[gauge, tuple(tags.items())] = float(value)
            gauge.set(float(value), tags=tags)

    def end(self) -> None:
        """Let them vanish."""
        self._ended.set()

    def _work(self) -> None:
        while not self._ended.wait(_AGAIN_S):
            with self._lock:
                for (gauge, tags), value in self._values.items():
                    gauge.set(value, tags=dict(tags))


class TrainMetrics:
    """Worker 0's: takes the loop's events.

    Args:
        location: the run's folder.
    """

    def __init__(self, location: str) -> None:
        self._run = {"run": run_name(location)}
        self._kept = _Kept()
        self._gauges = {
            name: Gauge(f"emoray_train_{name}", text, ("run",))
            for name, text in (
                ("step", "Steps done"),
                ("total_steps", "Steps of the whole run"),
                ("epoch", "Epochs done"),
                ("loss", "Training loss"),
                ("learning_rate", "Learning rate"),
                ("tokens_per_s", "Real tokens a second over all workers"),
                ("last_step_timestamp_seconds", "When the last step was done"),
            )
        }
        self._validation = Gauge("emoray_train_validation", "Figures of the last evaluation", ("run", "metric"))
        self._parts = Counter("emoray_train_part_seconds_total", "Worker 0's time by part", ("run", "part"))
        self._steps = Counter("emoray_train_steps_total", "Steps done", ("run",))
        self._checkpoints = Histogram(
            "emoray_train_checkpoint_seconds", "A checkpoint's writing", boundaries=_SECONDS, tag_keys=("run",)
        )

    def event(self, event: Mapping[str, Any]) -> None:
        """Count what the loop tells; other kinds of events are nothing to count."""
        take = getattr(self, f"_on_{event['kind']}", None)
        if take is not None:
            take(event)

    def _on_start(self, event: Mapping[str, Any]) -> None:
        self._set(step=event["step"], total_steps=event["total_steps"], last_step_timestamp_seconds=time.time())

    def _on_row(self, event: Mapping[str, Any]) -> None:
        row = event["row"]
        self._set(**{name: row[name] for name in ("step", "epoch", "loss", "learning_rate", "tokens_per_s")})
        self._set(last_step_timestamp_seconds=time.time())
        self._steps.inc(event["steps"], tags=self._run)
        for part, seconds in event["parts"].items():
            if seconds > 0:
                self._parts.inc(seconds, tags={**self._run, "part": part})

    def _on_evaluation(self, event: Mapping[str, Any]) -> None:
        for name in EVALUATED:
            self._kept.set(self._validation, event["entry"][name], **self._run, metric=name)

    def _on_checkpoint(self, event: Mapping[str, Any]) -> None:
        self._checkpoints.observe(max(event["seconds"], 1e-3), tags=self._run)

    def _set(self, **values: float) -> None:
        for name, value in values.items():
            self._kept.set(self._gauges[name], value, **self._run)


class DriverMetrics:
    """The driver's, of a run.

    Args:
        location: the run's folder.
    """

    def __init__(self, location: str) -> None:
        self._run = {"run": run_name(location)}
        self._running = Gauge("emoray_train_running", "1 while the command runs", ("run",))
        self._restarts = Gauge("emoray_train_restarts", "Further starts of workers", ("run",))
        self._not_finite = Gauge("emoray_train_not_finite", "1 where the loss was not finite", ("run",))
        self._starts = 0
        self._kept = _Kept()
        for gauge, value in ((self._running, 1), (self._restarts, 0), (self._not_finite, 0)):
            self._kept.set(gauge, value, **self._run)

    def started(self, step: int) -> None:
        """Workers begin at that step."""
        self._starts += 1 if self._starts or not step else 2  # a run that goes on was started before
        self._kept.set(self._restarts, self._starts - 1, **self._run)

    def ended(self, finite: bool) -> None:
        self._kept.set(self._running, 0, **self._run)
        self._kept.set(self._not_finite, 0 if finite else 1, **self._run)
        self._kept.end()


class SweepMetrics:
    """The driver's, of a sweep.

    Args:
        location: the sweep's folder.
    """

    def __init__(self, location: str) -> None:
        self._run = {"run": run_name(location)}
        self._trials = Gauge("emoray_sweep_trials", "Trials of a sweep", ("run", "state"))
        self._best = Gauge("emoray_sweep_best", "The best evaluation so far", ("run", "metric"))

    def show(self, sweep: Sweep) -> None:
        """Trials by state, and the best figure so far."""
        count = Tally(trial.state for trial in sweep.trials)
        for state in get_args(State):
            self._trials.set(float(count[state]), tags={**self._run, "state": state})
        best = max((sweep.score(trial) for trial in sweep.search), default=-math.inf)
        if math.isfinite(best):
            self._best.set(sweep.plan.sign * best, tags={**self._run, "metric": sweep.plan.column})
