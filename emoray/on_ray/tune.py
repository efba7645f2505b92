"""`emoray tune` on Ray Tune: trials are runs of `emoray train`, a stint at a time; killed anywhere, it goes on."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from dataclasses import replace
from typing import Any, Protocol

import ray
from ray import tune

from emoray import model, run, signals
from emoray.errors import EmorayError, FencedError, InterruptedRunError, RunError
from emoray.on_ray import cluster
from emoray.on_ray.stints import Course, Library, Stints
from emoray.on_ray.train_metrics import SweepMetrics
from emoray.on_ray.trial import TrialRun
from emoray.on_ray.tune_search import must_have_optuna
from emoray.run import Attempt, Lease
from emoray.sweep import RESULTS, TRIALS, Sweep, read_records
from emoray.sweep_results import finish
from emoray.task import Task, prepare, with_absolute_paths
from emoray.tune_config import Plan
from emoray.wording import count

_POLL_S = 0.2
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # each trial is a run with a history of its own
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # a stop saves checkpoints first, and is asked for here
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # its banner would go to stdout, where the answer goes
    "TUNE_MAX_PENDING_TRIALS_PG": "64",
}


class SweepWatcher(Protocol):
    """Shows a person, or a log, what happens."""

    def say(self, line: str) -> None:
        """A sentence."""

    def show(self, sweep: Sweep) -> None:
        """The trials as they are now; called a few times a second."""


def sweep_on_ray(plan: Plan, watcher: SweepWatcher) -> dict[str, Any]:
    """Run a sweep, or go on with it, to its end.

    Returns:
        The content of sweep.json; of a sweep that was finished already, what it holds.

    Raises:
        InterruptedRunError: it was stopped, or its budget is spent; the same command goes on.
        EmorayError: whatever a person must mend; no trial was started where it comes before the first one.
    """
    plan = replace(plan, base=with_absolute_paths(plan.base))
    folder = run.open_run(plan.config.run)
    run.refuse_existing(folder, plan.config.run.on_existing)
    folder.must_be_writable()
    cluster.warn_of_lost_storage(folder.location, watcher.say)
    task = prepare(plan.base, watcher.say)
    identity = {**task.identity, "recipe": plan.recipe()}
    if plan.config.run.on_existing != "replace":
        run.refuse_changed(folder, identity)
        if folder.exists(RESULTS):
            watcher.say(f"{folder.location} is finished; run.on_existing=replace would begin it anew.")
            return run.read_json(folder, RESULTS, "delete it, and the same command writes it anew")
    weights = model.load(plan.base.model, task.labels, plan.base.training.seed)
    if plan.config.tune.searcher == "optuna":
        must_have_optuna()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with cluster.session(watcher.say):
        tuned = plan.config.tune
        most = None if tuned.max_concurrent == "auto" else tuned.max_concurrent
        placement, at_once = cluster.place_side_by_side(plan.base.workers, most)
        if plan.config.run.on_existing == "replace":
            for name in folder.names(TRIALS):
                run.clear(folder / f"{TRIALS}/{name}")  # an older sweep's workers may still train there
            run.clear(folder, but=TRIALS)
        attempt = Attempt.begin(folder, identity)
        attempt.write(run.CONFIG, plan.to_config().to_yaml())
        plan, lag = _same_workers(plan, attempt, placement, at_once)
        placement, room = cluster.place_side_by_side(plan.base.workers, most)
        at_once = min(room, lag)
        sweep = Sweep(plan, plan.points() or [])
        read_records(folder, sweep)
        _say_beginning(watcher, sweep, placement, at_once)
        _Driver(sweep, attempt, watcher, at_once, lag, task, ray.put(model.as_arrays(weights))).run()
        return finish(sweep, attempt, watcher.say)


def _same_workers(plan: Plan, attempt: Attempt, placement: cluster.Placement, at_once: int) -> tuple[Plan, int]:
    """What the first command of a sweep found out about the cluster holds for all: threads decide the last bits.

    Returns:
        The plan with its workers, and how many trials were at once then, on which suggested values depend.
    """
    name = "workers.json"
    if attempt.run.exists(name):
        kept = run.read_json(attempt.run, name, "set run.on_existing=replace to begin the sweep anew")
    else:
        kept = {"cpus_per_worker": placement.cpus, "use_gpu": placement.use_gpu, "at_once": at_once}
        attempt.write(name, json.dumps(kept))
    workers = plan.base.workers.model_copy(
        update={"cpus_per_worker": kept["cpus_per_worker"], "use_gpu": kept["use_gpu"]}
    )
    return replace(plan, base=plan.base.model_copy(update={"workers": workers})), int(kept["at_once"])


def _say_beginning(watcher: SweepWatcher, sweep: Sweep, placement: cluster.Placement, at_once: int) -> None:
    tuned = sweep.plan.config.tune
    over = sum(trial.over for trial in sweep.search)
    known = f", {over} of them over already" if over else ""
    workers = f"{count(placement.max_workers, 'worker')} {placement.each}"
    watcher.say(
        f"{sweep.planned} trials{known} ({tuned.searcher}, {tuned.scheduler}, {tuned.metric}), "
        f"{at_once} at once on {workers} each"
    )


class _Driver:
    """One command's part of a sweep: Ray Tune works on a thread, signals and budgets are minded on the main one."""

    def __init__(
        self, sweep: Sweep, attempt: Attempt, watcher: SweepWatcher, at_once: int, lag: int, task: Task, state: Any
    ) -> None:
        self.sweep, self.watcher = sweep, watcher
        self.course = Course(sweep, attempt)
        self.metrics = SweepMetrics(attempt.run.location)
        self.signals: list[int] = []
        self.started = time.monotonic()
        self.searcher = Stints(self.course, Library(sweep.plan, task, state, most=max(4, at_once)), at_once, lag)

    def run(self) -> None:
        """Return when no trial has anything left to do.

        Raises:
            InterruptedRunError, FencedError, RunError.
        """
        settled = self.sweep.settle() if self.sweep.over else []  # which may add the repeats, so that it isn't over
        if settled or not self.sweep.over:
            thread = threading.Thread(target=self._fit, daemon=True, name="ray-tune")
            with signals.noted() as self.signals:
                thread.start()
                self._mind(thread)
        if self.course.error is not None:
            raise self.course.error
        self._show()
        if self.course.stopping is not None and not self.sweep.over:
            said = f"{self.course.stopping}; the same command goes on with the sweep."
            raise InterruptedRunError(said, self.signals)
        if lost := [trial for trial in self.sweep.trials if not trial.over]:
            raise RunError(f"Ray Tune ended with trials left over: {', '.join(trial.name for trial in lost)}")

    def _show(self) -> None:
        self.watcher.show(self.sweep)
        self.metrics.show(self.sweep)

    def _mind(self, thread: threading.Thread) -> None:
        lease = Lease(self.course.attempt)
        while thread.is_alive():
            thread.join(_POLL_S)
            self._show()
            try:
                lease.look()
            except FencedError as error:
                self.course.error, self.course.stopping = error, "A newer command took the sweep over"
                self.searcher.stop()
            if self.course.stopping is None and (why := self._why_stop()):
                self.course.stopping = why
                self.searcher.stop()
                self.watcher.say(f"{why}: trials save their checkpoints (Ctrl-C to stop at once)")
            if len(self.signals) > 1:
                self.watcher.say("Stopped at once; the same command goes on from the last checkpoints.")
                os._exit(128 + self.signals[0])

    def _why_stop(self) -> str | None:
        tuned = self.sweep.plan.config.tune
        if self.signals:
            return "Stopping"
        if tuned.max_minutes is not None and time.monotonic() - self.started > 60 * tuned.max_minutes:
            return f"tune.max_minutes={tuned.max_minutes:g} is over"
        if tuned.max_gpu_hours is not None and self._gpu_hours() > tuned.max_gpu_hours:
            return f"tune.max_gpu_hours={tuned.max_gpu_hours:g} is spent (a higher one lets the sweep go on)"
        return None

    def _gpu_hours(self) -> float:
        workers = self.sweep.plan.base.workers
        each = workers.max_workers * (workers.gpus_per_worker if workers.use_gpu is True else 1.0)
        return sum(trial.seconds for trial in self.sweep.trials) * each / 3600

    def _fit(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="emoray-tune-", ignore_cleanup_errors=True) as scratch:
                self._tuner(scratch).fit()
        except BaseException as error:  # handed to the main thread
            while error.__cause__ is not None and not isinstance(error, EmorayError):
                error = error.__cause__
            self.course.error = self.course.error or error

    def _tuner(self, scratch: str) -> tune.Tuner:
        # Drivers take no CPU, and stay on this node: the loss of another one must not take them along.
        here = {"CPU": 0, f"node:{ray.util.get_node_ip_address()}": 0.0001}
        trainable = tune.with_parameters(TrialRun, shelf=self.searcher.shelf)
        return tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory([here])),
            tune_config=tune.TuneConfig(search_alg=self.searcher, num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,  # Ray Tune's own notes; all that a sweep needs to go on is in its folder
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
