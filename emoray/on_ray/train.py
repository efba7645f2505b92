"""`emoray train` on Ray Train: check everything, start the workers, show what happens, resume what is left."""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig

from emoray import run, signals
from emoray.config import TrainConfig
from emoray.errors import EmorayError, InterruptedRunError, NotFiniteError, RunError
from emoray.on_ray import cluster, elastic, ray_train
from emoray.on_ray.channel import open_channel
from emoray.on_ray.cluster import Placement
from emoray.on_ray.failures import Failures, describe, user_error
from emoray.on_ray.run_events import RunEvents, Watcher
from emoray.on_ray.train_metrics import DriverMetrics
from emoray.on_ray.worker import run_worker
from emoray.process import WORKER_ENVIRONMENT
from emoray.storage import Storage
from emoray.task import Task, prepare, with_absolute_paths
from emoray.wording import count

_POLL_S = 0.2
_GRACE_S = 60.0
"""How long a stop may take to save a checkpoint before the workers are ended."""

_ANSWER_S = 15.0
"""After so long without an answer a cluster is taken to be gone, in seconds."""

_ROOM_WAIT_S = 600.0
"""How long a run that lost its nodes waits for room for its workers, in seconds."""


@dataclass(frozen=True)
class Stint:
    """A part of a run, for whoever trains many runs on the same data.

    Attributes:
        task: the run's input, prepared before; its config is replaced.
        state: reference to the encoder's weights before the first step, arrays by name.
        pause_after: the evaluation to pause after, the first being 1; None trains to the end.
        stop: set it, and the run saves a checkpoint and stops.
    """

    task: Task
    state: Any
    pause_after: int | None
    stop: threading.Event


def train(config: TrainConfig, watcher: Watcher, stint: Stint | None = None) -> dict[str, Any]:
    """Train, or go on training, to the end of the run.

    Args:
        config: as loaded; paths may be relative to the current folder.
        stint: what is given already, and how far to train; None prepares everything and trains to the end.

    Returns:
        The content of results.json; of a run that was finished already, what it holds.

    Raises:
        InterruptedRunError: it was asked to stop, or has reached the end of its stint.
        EmorayError: whatever a person must mend; nothing was started where it comes before the first step.
    """
    config = with_absolute_paths(config)
    folder = run.open_run(config.run)
    run.refuse_existing(folder, config.run.on_existing)
    folder.must_be_writable()
    cluster.warn_of_lost_storage(folder.location, watcher.say)
    task = prepare(config, watcher.say) if stint is None else replace(stint.task, config=config)
    if config.run.on_existing != "replace":
        run.refuse_changed(folder, task.identity)
        done = run.results(folder)
        if done is not None:
            watcher.say(f"{folder.location} is finished; run.on_existing=replace would train it anew.")
            return done
    if stint is None:
        from emoray import model  # transformers takes seconds, and a trial's driver has no use for it

        watcher.say(f"Loading {config.model.pretrained}")
        weights = model.as_arrays(model.load(config.model, task.labels, config.training.seed))
    with cluster.session(watcher.say) as dashboard:
        placement = cluster.place(config.workers)
        _say_placement(watcher, placement, dashboard)
        if config.run.on_existing == "replace":
            run.clear(folder)
        # Before there is room: an older attempt at this run may hold it, and lets go when it sees this one.
        attempt = run.Attempt.begin(folder, task.identity)
        attempt.write(run.CONFIG, config.to_yaml())
        cluster.wait_for_room(config.workers, placement, watcher.say)
        if stint is None:
            stint = Stint(task, ray.put(weights), None, threading.Event())
        with tempfile.TemporaryDirectory(prefix="emoray-ray-", ignore_cleanup_errors=True) as scratch:
            return _Fit(replace(stint, task=task), folder, attempt.number, placement, scratch, watcher).run()


def _say_placement(watcher: Watcher, placement: Placement, dashboard: str | None) -> None:
    at_least = f"{placement.min_workers} to " if placement.elastic else ""
    watcher.say(f"Training on {at_least}{count(placement.max_workers, 'worker')} {placement.each}")
    if dashboard:
        watcher.say(f"Ray dashboard: {dashboard}")


class _Fit:
    """One call of Ray Train, watched from the main thread, so that signals stop it in good order."""

    def __init__(
        self, stint: Stint, folder: Storage, attempt: int, placement: Placement, scratch: str, watcher: Watcher
    ) -> None:
        config = stint.task.config
        self.watcher, self.folder, self.wished_stop = watcher, folder, stint.stop
        self.max_failures = config.workers.max_failures
        self.metrics = DriverMetrics(folder.location)
        self.events = RunEvents(watcher, self.metrics, self.max_failures)
        self.channel = open_channel()
        job = {
            "task": ray.put(stint.task),
            "state": stint.state,
            "pause_after": stint.pause_after,
            "run": folder.location,
            "attempt": attempt,
            "channel": self.channel,
            "cpus": placement.cpus,
        }
        self.trainer = _trainer(job, config, placement, scratch)
        self.error: BaseException | None = None
        self.answered_at = time.monotonic()
        self.signals: list[int] = []
        self.asked_at: float | None = None

    def run(self) -> dict[str, Any]:
        thread = threading.Thread(target=self._fit, daemon=True, name="ray-train")
        with signals.noted(then=self._mind_ray) as self.signals:
            thread.start()
            while thread.is_alive():
                thread.join(_POLL_S)
                self._show()
                self.answered_at = time.monotonic()
                if (self.signals or self.wished_stop.is_set()) and self._stop():
                    self.trainer.end()
                    break
            self._show()
            self.answered_at = math.inf
        try:
            return self._outcome()
        finally:
            self.metrics.ended(finite=not isinstance(user_error(self.error), NotFiniteError))

    def _stop(self) -> bool:
        """Ask for a checkpoint and a stop; True once there was time enough for it, or a second signal."""
        if self.asked_at is None:
            self.asked_at = time.monotonic()
            self.watcher.say("Stopping: saving a checkpoint first (once more to stop at once)")
        self.channel.stop.remote()  # each time, for an actor that was started anew has forgotten it
        return len(self.signals) > 1 or time.monotonic() - self.asked_at > _GRACE_S

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:  # handed to the main thread
            self.error = error

    def _mind_ray(self) -> None:
        threading.Thread(target=self._leave_where_ray_is_gone, daemon=True).start()

    def _leave_where_ray_is_gone(self) -> None:
        """End the process where the signal went to Ray's processes too: its calls hang for a minute then.

        The workers got the signal as well, and have saved a checkpoint.
        """
        while time.monotonic() - self.answered_at < _ANSWER_S:
            time.sleep(0.5)
        self.watcher.say("Stopped together with Ray; the same command goes on from the last checkpoint.")
        os._exit(128 + self.signals[0])

    def _show(self) -> None:
        """Tell what has happened since the last call."""
        try:
            events = ray.get(self.channel.fetch.remote(), timeout=_ANSWER_S)
        except (ray.exceptions.RayError, TimeoutError):
            return  # the actor is being started anew
        self.events.take(events)

    def _outcome(self) -> dict[str, Any]:
        if self.events.results is not None:
            return self.events.results
        mendable = self.error if isinstance(self.error, EmorayError) else user_error(self.error)
        if mendable is not None:  # also where a stop was asked for: it may have kept that from saving
            raise mendable
        if self.signals or self.wished_stop.is_set() or (self.events.stopped and self.error is None):
            said = self.events.stopped or "Stopped; the same command goes on from the last checkpoint."
            raise InterruptedRunError(said, self.signals)
        if self.error is None and (done := run.results(self.folder)) is not None:
            return done  # the actor that carries the results was lost
        raise RunError(
            f"The run is given up ({self._last_failure()}; workers.max_failures={self.max_failures}). "
            "The same command goes on from the last checkpoint."
        ) from self.error

    def _last_failure(self) -> str:
        if self.events.failure is not None:
            return f"{self.events.failure['who']}: {self.events.failure['reason']}"
        return ": ".join(describe(self.error, {})) if self.error is not None else "Ray Train ended without a result"


def _trainer(job: dict[str, Any], config: TrainConfig, placement: Placement, scratch: str) -> ray_train.Trainer:
    """Ray Train, ready to run `run_worker(job)` on each worker.

    Args:
        scratch: folder for Ray's own marker file; checkpoints are ours, in the run's folder.
    """
    failures = FailureConfig(max_failures=config.workers.max_failures)
    room_wait_s = max(_ROOM_WAIT_S, config.workers.wait_for_nodes_s)
    channel = job["channel"]
    return ray_train.Trainer(
        run_worker,
        policy=Failures(failures, channel, room_wait_s),
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if placement.use_gpu else "gloo"),
        scaling_config=_scaling(placement),
        run_config=RunConfig(
            name=f"{config.run.name}-{job['attempt']}",
            storage_path=scratch,
            failure_config=failures,
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
            callbacks=[
                ray_train.CatchSigterm(),
                elastic.SaveBeforeResize(channel),
                elastic.Brake(channel, room_wait_s),
            ],
        ),
    )


def _scaling(placement: Placement) -> ScalingConfig:
    return ScalingConfig(
        num_workers=(placement.min_workers, placement.max_workers) if placement.elastic else placement.max_workers,
        use_gpu=placement.use_gpu,
        resources_per_worker=placement.resources,
        **({"elastic_resize_monitor_interval_s": elastic.RESIZE_EVERY_S} if placement.elastic else {}),
    )
