"""The training loop, plain torch: steps, evaluations and checkpoints, from wherever the run was left."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from emoray import checkpoint, metrics
from emoray.errors import CheckpointError, FencedError, InterruptedRunError, NotFiniteError, StorageError
from emoray.learner import Learner
from emoray.progress import Progress, write_checkpoint
from emoray.run import Attempt, History, Lease
from emoray.saving import Saver
from emoray.storage import Storage
from emoray.task import Task
from emoray.world import World


class Wish(IntEnum):
    """What is to happen after a step; the strongest wish of any worker holds for all."""

    GO_ON = 0
    SAVE = 1
    STOP = 2
    """Save, then stop."""
    YIELD = 3
    """Stop and write no more: a newer attempt owns the run."""


class Control(Protocol):
    """How the loop talks to whoever started it."""

    def wish(self) -> Wish:
        """Asked after each step, on every worker; must not block."""

    def tell(self, event: dict[str, Any]) -> None:
        """What happened; must not block. Events are described in `on_ray/channel.py`."""


class Alone:
    """A control that wishes nothing and tells no one."""

    def wish(self) -> Wish:
        return Wish.GO_ON

    def tell(self, event: dict[str, Any]) -> None:
        pass


def train(
    task: Task,
    state: Mapping[str, Tensor],
    world: World,
    attempt: Attempt,
    control: Control,
    pause_after: int | None = None,
) -> tuple[Learner, Progress]:
    """Train to the end of the run, from its last good checkpoint.

    Args:
        state: the encoder's weights before the first step, by name.
        pause_after: stop after that evaluation, the first being 1, where the run doesn't end there.

    Returns:
        The learner, with the weights of the best checkpoint, and what the run has behind it.

    Raises:
        InterruptedRunError: a stop was wished, or `pause_after` was reached; a checkpoint of the last step lies in the
            run's folder.
        FencedError: a newer attempt owns the run.
        NotFiniteError: the loss is NaN or infinite.
        StorageError: the run's folder can't be written.
    """
    if world.writes:
        attempt.check()
        attempt.run.sweep()
    folder = find_start(attempt.run, world, control, task.config.training.metric_for_best_model)
    progress, learner = Progress(), Learner(task, state, world)
    if folder is not None:
        progress = Progress.read(folder)
        learner.load(folder, progress.step)
        checkpoint.release(attempt.run, folder)
    if world.writes:
        control.tell({"kind": "start", "workers": world.size, **_facts(learner, progress)})
    loop = _Loop(learner, progress, attempt, control, pause_after)
    try:
        loop.run()
    finally:
        loop.close()
    best = progress.best(task.config.training.metric_for_best_model)
    assert best is not None
    if best["step"] != progress.step:
        folder = checkpoint.fetch(attempt.run, checkpoint.name_of(best["step"]))
        learner.load_weights(folder)
        checkpoint.release(attempt.run, folder)
    return learner, progress


def _facts(learner: Learner, progress: Progress) -> dict[str, Any]:
    """What training begins with, as the learner holds it: whoever asked for it can see whether it got there."""
    first = learner.optimizer.param_groups[0]
    return {
        "step": progress.step,
        "total_steps": learner.total_steps,
        "evaluations": list(progress.evaluations),
        "batch_size": learner.plan.batch_size,
        "optimizer": {name: first[name] for name in ("lr", "betas", "eps", "weight_decay")},
    }


def evaluates(step: int, steps_per_epoch: int, per_epoch: int) -> bool:
    """Whether an evaluation follows that many steps: `per_epoch` times an epoch, as evenly as steps allow."""
    place = (step - 1) % steps_per_epoch + 1
    return place * per_epoch // steps_per_epoch > (place - 1) * per_epoch // steps_per_epoch


def find_start(run: Storage, world: World, control: Control, metric: str) -> Path | None:
    """A local folder with the checkpoint to go on from, on each worker; None where the run begins.

    Args:
        metric: the one that picks the best checkpoint.
    """
    folder, damaged = _last_good(run, metric) if world.writes else (None, [])
    for sentence in damaged:
        control.tell({"kind": "note", "text": f"Not used: {sentence}"})
    step = world.broadcast(None if folder is None else Progress.read(folder).step)
    if step is None or world.writes:
        return folder
    name = checkpoint.name_of(step)
    if run.local_path is None:
        return checkpoint.fetch(run, name)
    if not (run.local_path / name).is_dir():
        raise StorageError(
            f"{world.host} can't see {run.local_path / name}, which another node wrote: run.storage_path must be shared"
        )
    return run.local_path / name


def _last_good(run: Storage, metric: str) -> tuple[Path | None, list[str]]:
    """The last checkpoint that is whole, and what is wrong with others.

    The run may end with the weights of an evaluation that lies behind: where that checkpoint is damaged, it is made
    again from one before it. (Object stores keep sums of their own, and it would have to be downloaded to be read.)
    """
    damaged: list[str] = []
    below: int | None = None
    while True:
        folder, found = checkpoint.newest_good(run, below)
        damaged += found
        if folder is None or run.local_path is None:
            return folder, damaged
        progress = Progress.read(folder)
        best = progress.best(metric)
        if best is None or best["step"] == progress.step:
            return folder, damaged
        try:
            checkpoint.fetch(run, checkpoint.name_of(best["step"]))
        except CheckpointError as error:
            damaged.append(str(error))
            below = best["step"]
        else:
            return folder, damaged


class _Loop:
    """One attempt's way through the steps that are left."""

    def __init__(
        self, learner: Learner, progress: Progress, attempt: Attempt, control: Control, pause_after: int | None
    ) -> None:
        self.pause_after = pause_after
        self.learner, self.progress, self.attempt, self.control = learner, progress, attempt, control
        self.world, self.config = learner.world, learner.task.config.training
        self.history = History(attempt, progress.step) if self.world.writes else None
        self.saver, self.clock = Saver(), learner.clock
        self.losses: list[Tensor] = []
        self.lease = Lease(attempt)
        self.logged_at = self.saved_at = time.monotonic()
        self.saved_step = self.start = progress.step
        self.written: set[int] = set()

    def run(self) -> None:
        progress, plan, total = self.progress, self.learner.plan, self.learner.total_steps
        while progress.step < total and not self._stalled():
            if self.pause_after is not None and len(progress.evaluations) >= self.pause_after:
                self._rest(f"Paused after step {progress.step} of {total}, as asked for; the run goes on from there.")
            self.losses.append(self.learner.step(progress.step))
            progress.step += 1
            often = self.config.evaluations_per_epoch
            evaluate = evaluates(progress.step, plan.steps_per_epoch, often) or progress.step == total
            wish = self._wish()
            self.clock.lap("agree")
            if wish == Wish.YIELD:
                self.attempt.check()
                raise FencedError(f"{self.attempt.run.location}: a newer attempt took the run over")
            save = evaluate or bool(wish) or progress.step - self.saved_step == self.config.checkpoint_every_steps
            if save or len(self.losses) == self.config.logging_steps:
                self._log()  # before saving: a run that goes on from there has no other way to know these losses
            if evaluate:
                self._evaluate()
            if save:
                self._save()
            if wish == Wish.STOP and progress.step < total:
                self._rest(f"Stopped after step {progress.step} of {total}; the same command goes on from there.")
        self._settle()

    def _rest(self, why: str) -> NoReturn:
        """Stop where a checkpoint was just saved."""
        self._settle()
        raise InterruptedRunError(why)

    def _settle(self) -> None:
        """Wait, on all workers, until worker 0 has written all: others may read it next, or end its process."""
        self.saver.wait()
        self.world.barrier()

    def close(self) -> None:
        """Let go of the threads and files; whatever was being written is finished first."""
        self.saver.close()
        if self.history is not None:
            self.history.close()

    def _stalled(self) -> bool:
        return self.progress.stalled(self.config.metric_for_best_model, self.config.early_stopping_patience)

    def _wish(self) -> Wish:
        """What all workers do now: clocks and signals differ between them, so it is agreed on."""
        wish, now = self.control.wish(), time.monotonic()
        minutes = self.config.checkpoint_every_minutes
        if self.world.writes and minutes is not None and now - self.saved_at >= 60 * minutes:
            wish = max(wish, Wish.SAVE)
        if self.world.writes:
            try:
                self.lease.look()
            except FencedError:
                wish = Wish.YIELD
        return Wish(self.world.max(int(wish)))

    def _log(self) -> None:
        """Read the losses back, add them up over workers, write a line for each step."""
        parts = np.array([float(loss) for loss in self.losses])
        losses = self.world.sum(parts)
        end, plan = self.progress.step, self.learner.plan
        steps = range(end - len(losses), end)
        self.losses = []
        for step, loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                self.saver.wait()  # what it says of the last checkpoint goes first
                raise NotFiniteError(self._not_finite(step, float(loss)))
        self.clock.lap("read")
        now = time.monotonic()
        seconds, self.logged_at = now - self.logged_at, now
        self.progress.seconds += seconds
        tokens = sum(int(plan.lengths[plan.samples(step)].sum()) for step in steps)
        rows = [
            {
                "step": step + 1,
                "epoch": round((step + 1) / plan.steps_per_epoch, 4),
                "loss": float(loss),
                "learning_rate": self.learner.learning_rate(step),
                "tokens_per_s": round(tokens / seconds, 1),
            }
            for step, loss in zip(steps, losses, strict=True)
        ]
        if self.history is not None:
            self.history.append(rows)
            last = {"row": rows[-1], "total_steps": self.learner.total_steps}
            self.control.tell({"kind": "row", **last, "steps": len(rows), "parts": self.clock.take()})

    def _not_finite(self, step: int, loss: float) -> str:
        rows = self.learner.task.parts["train"].rows[self.learner.plan.samples(step)]
        shown = ", ".join(str(row) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
        kept = (
            f"the checkpoint of step {self.saved_step} is kept" if self.saved_step else "no checkpoint was written yet"
        )
        return (
            f"The loss is {loss} at step {step + 1}, on the training rows {shown}; {kept}. "
            "Lower training.learning_rate, set training.max_grad_norm, or look at these rows."
        )

    def _evaluate(self) -> None:
        """Score the validation split; all workers learn the figures, for the best one decides when to stop."""
        logits = self.learner.scores("validation")
        entry: dict[str, Any] | None = None
        if logits is not None:
            figures = metrics.compute(logits, self.learner.task.parts["validation"].targets)
            epoch = self.progress.step / self.learner.plan.steps_per_epoch
            entry = {
                "epoch": int(epoch) if epoch == int(epoch) else round(epoch, 4),
                "step": self.progress.step,
                **{column: figures[name] for column, name in metrics.EVALUATED.items()},
            }
        entry = self.world.broadcast(entry)
        assert entry is not None
        self.progress.evaluations.append(entry)
        if self.world.writes:
            self.control.tell({"kind": "evaluation", "entry": entry})
        self.clock.lap("evaluation")
        self.logged_at = time.monotonic()  # evaluation isn't training time

    def _save(self) -> None:
        """Have a checkpoint of this step written in the background."""
        self.saved_at, self.saved_step = time.monotonic(), self.progress.step
        if not self.world.writes:
            return
        progress = Progress(self.progress.step, list(self.progress.evaluations), round(self.progress.seconds, 3))
        self.saver.save(self.learner.tensors(), partial(self._write, progress))
        self.clock.lap("checkpoint")  # what training waited for; the writing itself goes on beside it

    def _write(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        started = time.monotonic()
        if self.history is not None:
            self.history.settle()
        weights, moments = self.learner.as_files(tensors)
        self._must_be_finite(progress.step, weights)
        write_checkpoint(self.learner.task, progress, weights, moments, self.attempt)
        self.written.add(progress.step)
        self._prune(progress)
        self.control.tell({"kind": "checkpoint", "step": progress.step, "seconds": time.monotonic() - started})

    def _must_be_finite(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """A gradient can overflow where the loss did not: the last good checkpoint must not be pushed out by that."""
        lost = next((name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())), None)
        if lost is not None:
            good = checkpoint.steps(self.attempt.run)[-1:]
            kept = f"the checkpoint of step {good[0]} is kept" if good else "no checkpoint was written yet"
            raise NotFiniteError(
                f"{lost} holds NaN or infinite weights after step {step}, although the losses before were finite; "
                f"{kept}. Lower training.learning_rate or set training.max_grad_norm."
            )

    def _prune(self, progress: Progress) -> None:
        """Delete all checkpoints but the newest few and the best one.

        Those after the step that this attempt went on from are damaged, unless it wrote them itself.
        """
        self.attempt.check()
        best = progress.best(self.config.metric_for_best_model)
        found = checkpoint.steps(self.attempt.run)
        kept = [step for step in found if step <= self.start or step in self.written][-self.config.keep_checkpoints :]
        for step in found:
            if step not in kept and (best is None or step != best["step"]):
                self.attempt.run.delete(checkpoint.name_of(step))
