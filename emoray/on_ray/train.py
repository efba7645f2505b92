"""`emoray train` on Ray Train: check everything, start the workers, show what happens, resume what is left."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig

from emoray import model, run
from emoray.config import TrainConfig
from emoray.errors import EmorayError, InterruptedRunError, RunError, RunExistsError
from emoray.on_ray import cluster, ray_train
from emoray.on_ray.channel import Channel
from emoray.on_ray.cluster import Placement
from emoray.on_ray.worker import run_worker
from emoray.storage import Storage, absolute, is_uri
from emoray.task import Task, prepare

_POLL_S = 0.2
_GRACE_S = 60.0
"""How long a stop may take to save a checkpoint before the workers are ended."""

_ELASTIC_WAIT_S = 600.0
"""How long an elastic run that lost its nodes waits for the smallest number of workers."""

# Threads of the C allocator keep what they freed: with texts of all lengths, giving memory back to the kernel and
# asking for it again takes a sixth of a step (measured; see docs/decisions.md).
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "67108864",
}


class Watcher(Protocol):
    """Shows a person, or a log, what happens."""

    def say(self, line: str) -> None:
        """A sentence."""

    def row(self, row: dict[str, Any], total_steps: int) -> None:
        """A row of the history, now and then."""

    def evaluation(self, entry: dict[str, Any]) -> None:
        """A line of the results table."""


def train(config: TrainConfig, watcher: Watcher) -> dict[str, Any]:
    """Train, or go on training, to the end of the run.

    Args:
        config: as loaded; paths may be relative to the current folder.

    Returns:
        The content of results.json; of a run that was finished already, what it holds.

    Raises:
        EmorayError: whatever a person must mend; nothing was started where it comes before the first step.
    """
    config = with_absolute_paths(config)
    folder = run.open_run(config)
    if config.run.on_existing == "fail" and folder.exists():
        raise RunExistsError(f"{folder.location}: exists, and run.on_existing is fail: choose another run.name")
    task = prepare(config, watcher.say)
    if config.run.on_existing != "replace":
        run.refuse_changed(folder, task.identity)
        done = run.results(folder)
        if done is not None:
            watcher.say(f"{folder.location} is finished; run.on_existing=replace would train it anew.")
            return done
    watcher.say(f"Loading {config.model.pretrained}")
    weights = model.load(config.model, task.labels, config.training.seed)
    with _ray(watcher) as dashboard:
        placement = cluster.place(config.workers, watcher.say)
        _say_placement(watcher, placement, dashboard)
        if config.run.on_existing == "replace":
            folder.delete("")
        attempt = run.Attempt.begin(folder, task.identity)
        attempt.write(run.CONFIG, config.to_yaml())
        state = {name: tensor.numpy() for name, tensor in weights.state_dict().items()}
        return _Fit(task, state, folder, attempt.number, placement, watcher).run()


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The config with paths that mean the same in every process: workers run in other folders."""
    storage = absolute(config.run.storage_path)
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"storage_path": storage}),
            "model": config.model.model_copy(update={"pretrained": _absolute_if_here(config.model.pretrained)}),
            "data": config.data.model_copy(update={"dataset": _absolute_if_here(config.data.dataset)}),
        }
    )


def _absolute_if_here(name: str) -> str:
    expanded = os.path.expanduser(name)
    return name if is_uri(name) or name == "quickstart" or not os.path.exists(expanded) else absolute(expanded)


@contextmanager
def _ray(watcher: Watcher) -> Iterator[str | None]:
    """Ray for the time of a run: joined, or started here and ended afterwards. Gives the dashboard's address."""
    watcher.say("Connecting to Ray")
    started = cluster.connect()
    try:
        yield cluster.dashboard()
    finally:
        if started:
            cluster.shutdown()


def _say_placement(watcher: Watcher, placement: Placement, dashboard: str | None) -> None:
    count = str(placement.max_workers)
    if placement.min_workers < placement.max_workers:
        count = f"{placement.min_workers} to {placement.max_workers}"
    watcher.say(f"Training on {count} worker{'s' * (placement.max_workers > 1)} {placement.each}")
    if dashboard:
        watcher.say(f"Ray dashboard: {dashboard}")


class _Fit:
    """One call of Ray Train, watched from the main thread, so that signals stop it in good order."""

    def __init__(
        self, task: Task, state: dict[str, Any], folder: Storage, attempt: int, placement: Placement, watcher: Watcher
    ) -> None:
        self.watcher, self.folder = watcher, folder
        self.max_failures = task.config.workers.max_failures
        self.channel: Any = Channel.remote()  # type: ignore[attr-defined]
        self.results: dict[str, Any] | None = None
        self.stopped: str | None = None
        self.error: BaseException | None = None
        self.workers: dict[int, str] = {}
        self.step = 0
        self.signal: int | None = None
        failures = FailureConfig(max_failures=self.max_failures, controller_failure_limit=2)
        job = {
            "task": ray.put(task),
            "state": ray.put(state),
            "run": folder.location,
            "attempt": attempt,
            "channel": self.channel,
            "cpus": placement.cpus,
        }
        elastic = placement.min_workers < placement.max_workers
        self.trainer = ray_train.Trainer(
            run_worker,
            train_loop_config=job,
            torch_config=TorchConfig(backend="nccl" if placement.use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=(placement.min_workers, placement.max_workers) if elastic else placement.max_workers,
                use_gpu=placement.use_gpu,
                resources_per_worker=placement.resources,
            ),
            run_config=RunConfig(
                name=f"{task.config.run.name}-{attempt}",
                # Ray's own marker file goes here; checkpoints are ours, in the run's folder.
                storage_path=tempfile.mkdtemp(prefix="emoray-ray-"),
                failure_config=failures,
                worker_runtime_env={"env_vars": _ALLOCATOR},
                callbacks=[
                    ray_train.CatchSigterm(),
                    ray_train.Whereabouts(self.channel),
                    ray_train.Brake(_ELASTIC_WAIT_S),
                ],
            ),
        )
        self.trainer.policy = ray_train.Failures(failures, self.channel)

    def run(self) -> dict[str, Any]:
        thread = threading.Thread(target=self._fit, daemon=True, name="ray-train")
        with self._signals():
            thread.start()
            asked_at: float | None = None
            while thread.is_alive():
                thread.join(_POLL_S)
                self._show()
                if self.signal is not None and asked_at is None:
                    asked_at = time.monotonic()
                    self.watcher.say("Stopping: saving a checkpoint first (once more to stop at once)")
                    self.channel.stop.remote()
                if asked_at is not None and (time.monotonic() - asked_at > _GRACE_S or self.signal == -1):
                    self.trainer.end()
                    break
            self._show()
        return self._outcome()

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:  # handed to the main thread
            self.error = error

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a stop; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _: object) -> None:
            self.signal = number if self.signal is None else -1

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _show(self) -> None:
        try:
            events = ray.get(self.channel.fetch.remote(), timeout=10)
        except (ray.exceptions.RayError, TimeoutError):
            return
        for event in events:
            for kind, value in event.items():
                handler: Callable[[Any, dict[str, Any]], None] | None = getattr(self, f"_on_{kind}", None)
                if handler is not None:
                    handler(value, event)

    def _on_note(self, value: str, _: dict[str, Any]) -> None:
        self.watcher.say(value)

    def _on_workers(self, value: dict[int, str], _: dict[str, Any]) -> None:
        self.workers = value

    def _on_start(self, value: int, event: dict[str, Any]) -> None:
        """The workers are about to take the step after `value`."""
        self.step = value
        count = event["workers"]
        if value:
            self.watcher.say(f"Going on from step {value} with {count} worker{'s' * (count > 1)}")

    def _on_row(self, value: dict[str, Any], event: dict[str, Any]) -> None:
        self.step = value["step"]
        self.watcher.row(value, event["total_steps"])

    def _on_evaluation(self, value: dict[str, Any], _: dict[str, Any]) -> None:
        self.watcher.evaluation(value)

    def _on_failure(self, value: dict[str, Any], event: dict[str, Any]) -> None:
        if event["final"]:
            return
        rank = value["rank"]
        who = "The run" if rank is None else f"Worker {rank} on {self.workers.get(rank, 'an unknown node')}"
        then = (
            f"attempt {event['failures'] + 1} of {self.max_failures + 1} follows"
            if event["retry"]
            else "no attempt is left"
        )
        self.watcher.say(f"{who} failed after step {self.step}: {value['reason']}; {then}")

    def _on_stopped(self, value: str, _: dict[str, Any]) -> None:
        self.stopped = value

    def _on_results(self, value: dict[str, Any], _: dict[str, Any]) -> None:
        self.results = value

    def _outcome(self) -> dict[str, Any]:
        if self.results is not None:
            return self.results
        if self.signal is not None:
            error = InterruptedRunError(self.stopped or "Stopped; the same command goes on from the last checkpoint.")
            error.signal = signal.SIGINT if self.signal == -1 else self.signal
            raise error
        mendable = ray_train.user_error(self.error) if self.error is not None else None
        if isinstance(self.error, EmorayError):
            mendable = self.error
        if mendable is not None:
            raise mendable
        if self.error is None and (done := run.results(self.folder)) is not None:
            return done  # the actor that carries the results was lost
        raise RunError(
            f"The run failed {self.max_failures + 1} time{'s' * (self.max_failures > 0)} and is given up: "
            f"{ray_train.summary(self.error, self.workers)}. "
            "The same command goes on from the last checkpoint."
        ) from self.error
