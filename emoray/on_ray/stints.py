"""What Ray Tune trains next in a sweep, and what is learnt from it: a stint of a trial, on shared data and weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.tune.search import Searcher

from emoray import checkpoint, model
from emoray.config import TrainConfig
from emoray.errors import ClusterError, ConfigError, EmorayError, FencedError, StorageError
from emoray.on_ray import cluster
from emoray.on_ray.trial import open_shelf
from emoray.on_ray.tune_search import Suggestions
from emoray.run import Attempt
from emoray.storage import below
from emoray.sweep import TRIALS, Sweep, Trial, write_record
from emoray.task import Task, prepare
from emoray.tune_config import Plan, evaluations

_LOST_ACTORS = 3
"""How often the process that drives a trial may be lost before the trial is given up."""

# What no values of a trial bring about: it would end the others too, so the sweep stops, and can be given again.
_NOT_OF_VALUES = {kind.__name__: kind for kind in (ClusterError, FencedError, StorageError)}


@dataclass
class Course:
    """What the threads of a sweep's driver share.

    Attributes:
        attempt: this command's, which lets it write.
        stopping: why nothing more is begun; None while the sweep goes on.
        error: what ends the sweep.
    """

    sweep: Sweep
    attempt: Attempt
    stopping: str | None = None
    error: BaseException | None = None


class Library:
    """Data and weights that trials share, in Ray's object store: the base's stay, others as long as few are newer.

    Args:
        most: of each kind that are kept beside the base's; those of trials that run are among them.
    """

    def __init__(self, plan: Plan, task: Task, state: Any, most: int) -> None:
        self._most = most
        self._tasks = {self._task_key(plan.base): ray.put(task)}
        self._states = {self._state_key(plan.base): state}
        self._labels = task.labels

    def _task_key(self, config: TrainConfig) -> str:
        return f"{config.data.model_dump_json()} {config.model.model_dump_json()}"

    def _state_key(self, config: TrainConfig) -> str:
        return f"{config.model.model_dump_json(exclude={'dropout', 'max_length'})} {config.training.seed}"

    def of(self, config: TrainConfig) -> dict[str, Any]:
        """References to a trial's task and weights."""

        def weights() -> Any:
            return ray.put(model.as_arrays(model.load(config.model, self._labels, config.training.seed)))

        return {
            "task": self._kept(self._tasks, self._task_key(config), lambda: ray.put(prepare(config))),
            "state": self._kept(self._states, self._state_key(config), weights),
        }

    def _kept(self, entries: dict[str, Any], key: str, make: Callable[[], Any]) -> Any:
        """What lies under a key, as the newest now; the base's is the first, and never makes room."""
        if key not in entries:
            entries[key] = make()
        if key != next(iter(entries)):
            entries[key] = entries.pop(key)
        for oldest in list(entries)[1 : max(1, len(entries) - self._most)]:
            del entries[oldest]
        return entries[key]


class Stints(Searcher):
    """Names to Ray Tune what is to be trained next, and learns from it what came of it.

    Ray Tune's trials are stints here: a trial that passes a rung comes back with a further one, which goes on from its
    checkpoint. All conclusions are those of `Sweep`.

    Args:
        at_once: trials at once.
        lag: of `Suggestions`.
    """

    def __init__(self, course: Course, library: Library, at_once: int, lag: int) -> None:
        super().__init__(metric=None, mode=None)
        self._course, self._library, self._at_once = course, library, at_once
        self._sweep, self._suggestions = course.sweep, Suggestions(course.sweep, lag)
        self.shelf = open_shelf(cluster.on_this_node())
        self._live: dict[str, Trial] = {}
        self._spent: dict[str, float] = {}
        self._lost: dict[str, int] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Stints:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Searcher, ()  # Ray Tune keeps a copy for its own way of going on; a sweep goes on from its folder

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass

    def stop(self) -> None:
        """Have all that runs save a checkpoint and end."""
        self.shelf.stop.remote(list(self._live))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        with self._errors_end_the_sweep():
            return self._suggest(trial_id)
        return str(Searcher.FINISHED)

    def _suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._course.stopping is not None:
            return str(Searcher.FINISHED)
        if len(self._live) >= self._at_once:
            return None
        self._conclude()
        while (found := self._next()) is not None:
            trial, until = found
            try:
                config = self._sweep.plan.trial(trial.name, self._trials, trial.values)
                pause_after = int(until) if until < evaluations(config) else None
                job = {"config": config, "pause_after": pause_after, **self._library.of(config)}
            except EmorayError as error:
                self._end(trial, "failed", _reason(error))
                self._conclude()
                continue
            ray.get(self.shelf.put.remote(trial_id, job))
            trial.state, self._live[trial_id], self._spent[trial_id] = "running", trial, trial.seconds
            if self._course.stopping is not None:  # said by the main thread in between
                self.stop()
            return {"job": trial_id, "trial": trial.name, **trial.values}
        return str(Searcher.FINISHED) if self._sweep.over else None

    @property
    def _trials(self) -> str:
        return below(self._course.attempt.run.location, TRIALS)

    def _next(self) -> tuple[Trial, float] | None:
        found = next(self._sweep.ready(), None)
        if found is None and self._suggestions.add():
            write_record(self._sweep.search[-1], self._course.attempt)  # else one that ends later could take its name
            found = next(self._sweep.ready(), None)
        return found

    @contextmanager
    def _errors_end_the_sweep(self) -> Iterator[None]:
        """End the sweep with an error's own words: Ray Tune would hand on its traceback, as text."""
        try:
            yield
        except EmorayError as error:
            self._course.error = self._course.error or error
            self._course.stopping = self._course.stopping or str(error)
            self.stop()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        with self._errors_end_the_sweep():
            self._learn(trial_id, result)
            self._conclude()

    def _learn(self, trial_id: str, result: dict[str, Any]) -> dict[str, Any]:
        """Take over what a stint told."""
        news: dict[str, Any] = json.loads(result.get("news", "{}"))
        trial = self._live[trial_id]
        trial.seconds = self._spent[trial_id] + news.get("seconds", 0.0)
        if "total_steps" in news:  # its workers have begun
            for name in ("step", "epoch", "left_s", "total_steps", "optimizer"):
                setattr(trial, name, news[name])
        if trial.state == "running" and len(news.get("evaluations", [])) > len(trial.evaluations):
            trial.evaluations = list(news["evaluations"])
        return news

    def _conclude(self) -> None:
        """Draw conclusions, keep them, and clear away what they make needless."""
        running = {id(trial): trial_id for trial_id, trial in self._live.items()}
        for trial in self._sweep.settle():
            if id(trial) in running:
                self.shelf.stop.remote([running[id(trial)]])
            else:
                self._end(trial, "stopped", trial.reason)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._live[trial_id]
        news = self._learn(trial_id, result or {})
        del self._live[trial_id]
        with self._errors_end_the_sweep():
            self._complete(trial, news, error)

    def _complete(self, trial: Trial, news: dict[str, Any], error: bool) -> None:
        outcome = news.get("outcome")
        if trial.state == "stopped":
            self._end(trial, "stopped", trial.reason)
        elif error and self._lost_again(trial):
            self._end(trial, "failed", "the process that drives it was lost again and again (out of memory?)")
        elif outcome == "finished":
            self._end(trial, "finished", "")
        elif outcome == "failed" and news["error"] not in _NOT_OF_VALUES:
            self._end(trial, "failed", news["reason"])
        elif outcome == "failed":
            trial.rest()
            self._course.error = _NOT_OF_VALUES[news["error"]](f"Trial {trial.name}: {news['reason']}")
            self._course.stopping = f"Trial {trial.name} met what would end the others too"
            self.stop()
        else:  # paused at a rung, or stopped with the sweep
            trial.rest()
            if trial.evaluations:
                write_record(trial, self._course.attempt)
        self._conclude()

    def _lost_again(self, trial: Trial) -> bool:
        self._lost[trial.name] = self._lost.get(trial.name, 0) + 1
        return self._lost[trial.name] > _LOST_ACTORS

    def _end(self, trial: Trial, state: Any, reason: str) -> None:
        """Nothing more happens to a trial: keep its record, and of its folder what may be wanted."""
        trial.state, trial.reason, trial.left_s = state, reason, None
        attempt = self._course.attempt
        write_record(trial, attempt)
        attempt.check()
        attempt.run.delete(f"{trial.folder}/{checkpoint.FOLDER}")
        kept = self._sweep.kept()
        for other in self._sweep.trials:
            if other.over and other.name not in kept:
                attempt.run.delete(f"{other.folder}/{checkpoint.BEST}")


def _reason(error: EmorayError) -> str:
    return "; ".join(error.problems) if isinstance(error, ConfigError) else str(error)
