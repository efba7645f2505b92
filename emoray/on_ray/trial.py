"""A trial of a sweep: a stint of `emoray train`, inside an actor of Ray Tune that takes no CPU from the workers."""

from __future__ import annotations

import json
import threading
import time
import traceback
from typing import Any

import ray
from ray import tune

from emoray.config import TrainConfig
from emoray.errors import EmorayError, InterruptedRunError
from emoray.on_ray.train import Stint, train
from emoray.task import Task

_TELL_EVERY_S = 1.0
"""How often the sweep hears of a trial that has nothing new but steps, in seconds."""

_STOP_S = 90.0
"""How long a stop may take to save a checkpoint and end the workers, in seconds."""


class Shelf:
    """An actor on the driver's node: stints fetch there what they need, and learn whether they are to stop."""

    def __init__(self) -> None:
        self._jobs: dict[str, dict[str, Any]] = {}
        self._stopped: set[str] = set()

    def put(self, name: str, job: dict[str, Any]) -> None:
        self._jobs[name] = job

    def take(self, name: str) -> dict[str, Any]:
        return self._jobs.pop(name)

    def stop(self, names: list[str]) -> None:
        self._stopped |= set(names)

    def stopped(self, name: str) -> bool:
        return name in self._stopped


class TrialRun(tune.Trainable):
    """Trains one stint in a thread; each `step` of Ray Tune's tells how far it has come.

    Args:
        config: `job`, the name on the shelf of `{"config", "task", "state", "pause_after"}`.
        shelf: handle of the actor that has it.
    """

    def setup(self, config: dict[str, Any], shelf: Any = None) -> None:
        self._shelf, self._name = shelf, config["job"]
        job = ray.get(shelf.take.remote(self._name))
        task: Task = ray.get(job["task"])
        self._news = _News()
        self._stop = threading.Event()
        stint = Stint(task, job["state"], job["pause_after"], self._stop)
        self._thread = threading.Thread(target=self._train, args=(job["config"], stint), daemon=True, name="stint")
        self._thread.start()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The same process takes the next stint: importing torch takes longer than some of them."""
        self.setup(new_config)  # Ray Tune fills in the shelf
        return True

    def _train(self, config: TrainConfig, stint: Stint) -> None:
        self._news.end(_outcome(config, self._news, stint))

    def step(self) -> dict[str, Any]:
        if ray.get(self._shelf.stopped.remote(self._name)):
            self._stop.set()
        news = self._news.wait()
        # As one text: Ray Tune takes nested results apart.
        return {"news": json.dumps(news), "done": "outcome" in news}

    def cleanup(self) -> None:
        """The workers save a checkpoint and end before this actor does."""
        self._stop.set()
        self._thread.join(_STOP_S)


def _outcome(config: TrainConfig, news: _News, stint: Stint) -> dict[str, Any]:
    """Train a stint; what came of it, as Ray Tune can carry it."""
    try:
        results = train(config, news, stint)
    except InterruptedRunError:
        return {"outcome": "stopped" if stint.stop.is_set() else "paused"}
    except EmorayError as error:
        return {"outcome": "failed", "error": type(error).__name__, "reason": str(error)}
    except Exception as error:  # a bug, or Ray's: told as this trial's failure, and the sweep goes on
        traceback.print_exc()
        return {"outcome": "failed", "error": type(error).__name__, "reason": f"{type(error).__name__}: {error}"}
    return {"outcome": "finished", "results": results}


class _News:
    """Watches a run; keeps what was last heard of it until Ray Tune asks."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._began: float | None = None  # when workers were first heard of: until then there may be no room for them
        self._first: tuple[float, int] | None = None
        self._last: dict[str, Any] = {"evaluations": [], "step": 0, "epoch": 0.0, "left_s": None}
        self._urgent = False

    def say(self, line: str) -> None:
        pass  # the sweep's table says it

    def begin(self, facts: dict[str, Any]) -> None:
        with self._changed:
            self._began = self._began or time.monotonic()
            self._first = None
            epoch = facts["evaluations"][-1]["epoch"] if facts["evaluations"] else 0.0
            self._last.update(evaluations=facts["evaluations"], step=facts["step"], total_steps=facts["total_steps"])
            self._last.update(epoch=epoch, left_s=None)
            self._last["optimizer"] = {**facts["optimizer"], "batch_size": facts["batch_size"]}

    def evaluation(self, entry: dict[str, Any]) -> None:
        with self._changed:
            self._last["evaluations"] = [*self._last["evaluations"], entry]
            self._urgent = True
            self._changed.notify()

    def row(self, row: dict[str, Any], total_steps: int) -> None:
        with self._changed:
            now, step = time.monotonic(), row["step"]
            self._first = self._first or (now, step)
            since, first = self._first
            left = (now - since) / (step - first) * (total_steps - step) if step > first else None
            self._last.update(step=step, epoch=row["epoch"], total_steps=total_steps, left_s=left)

    def end(self, outcome: dict[str, Any]) -> None:
        with self._changed:
            if outcome["outcome"] == "finished":  # also where the run was finished before, and nothing was told
                self._last["evaluations"] = outcome["results"]["epochs"]
            self._last.update(outcome)
            self._urgent = True
            self._changed.notify()

    def wait(self) -> dict[str, Any]:
        """What is known, after a second or as soon as there is an evaluation or the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._urgent, _TELL_EVERY_S)
            self._urgent = False
            return {**self._last, "seconds": time.monotonic() - self._began if self._began else 0.0}


def open_shelf(selector: dict[str, str]) -> Any:
    """Handle of a new shelf on the nodes that the label selector names."""
    return ray.remote(num_cpus=0, label_selector=selector)(Shelf).remote()
