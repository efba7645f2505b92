"""A run that is stopped, broken or killed anywhere ends with the weights of one that was not, to the last bit."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import (
    STEPS_PER_EPOCH,
    Configure,
    Death,
    Ending,
    Outcome,
    Script,
    begin,
    configure_from,
    folder_of,
    learner_of,
    litter,
    outcome,
    run_to_the_end,
    run_training,
    run_workers,
)
from torch import Tensor

from emoray import Classifier, checkpoint, run, training
from emoray.config import TrainConfig
from emoray.errors import CheckpointError, FencedError, InterruptedRunError, ModelError, NotFiniteError, StorageError
from emoray.learner import Learner
from emoray.run import Attempt, open_run, read_history
from emoray.saving import Saver
from emoray.storage import Storage
from emoray.training import Wish, find_start
from emoray.world import World

Undisturbed = Callable[..., Outcome]
PACKINGS = ["training.packing='on'", "training.packing='off'"]
LAST = 2 * STEPS_PER_EPOCH


def stop_after(config: TrainConfig, steps: int) -> Path:
    """Go on for so many steps, then stop as Ctrl-C does."""
    with pytest.raises(InterruptedRunError, match="the same command goes on from there"):
        run_training(config, Script({steps: Wish.STOP}))
    return folder_of(config)


def steps_of(folder: Path) -> list[int]:
    return checkpoint.steps(Storage(str(folder)))


# --- stopped and broken -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
def test_stopped_again_and_again(packing: str, configure: Configure, undisturbed: Undisturbed) -> None:
    config = configure(packing)
    for steps in (1, 2, 4, 4, 6):  # after steps 1, 3, 7, 11 (an epoch's end) and 17
        folder = stop_after(config, steps)
    assert steps_of(folder)[-1] == 17
    assert outcome(run_training(config)) == undisturbed(1, packing)


def test_saved_on_request(configure: Configure, undisturbed: Undisturbed) -> None:
    """What SIGTERM and drained nodes ask for: a checkpoint off the plan, and training goes on."""
    config = configure("training.keep_checkpoints=50")
    folder = run_training(config, Script({3: Wish.SAVE, 5: Wish.SAVE, 18: Wish.SAVE}))
    assert steps_of(folder) == [3, 5, 9, 11, 15, 18, 22]  # four steps after the last one, epochs' ends, and requests
    assert outcome(folder) == undisturbed(1)


@pytest.mark.parametrize("logging_steps", [1, 3, 1000])
def test_broken_in_the_middle_of_a_step(
    logging_steps: int, configure: Configure, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are there and weights half updated when the exception comes: nothing of it may survive."""
    config = configure(f"training.logging_steps={logging_steps}")
    for step in (0, 6, 9, 10, 13, 21):
        with monkeypatch.context() as patch:
            patch.setattr(Learner, "_update", breaking_at(step))
            with pytest.raises(ZeroDivisionError):
                run_training(config)
    assert outcome(run_training(config)) == undisturbed(1)


def breaking_at(step: int) -> Callable[[Learner, int], None]:
    original = Learner._update

    def update(self: Learner, now: int) -> None:
        if now == step:
            with torch.no_grad():
                next(self.model.parameters()).add_(1.0)
            raise ZeroDivisionError
        original(self, now)

    return update


def test_finished_run_trains_no_more(configure: Configure, undisturbed: Undisturbed) -> None:
    config = configure()
    run_training(config)
    control = Script()
    assert outcome(run_training(config, control)) == undisturbed(1)
    assert control.starts == [LAST] and control.asked == 0


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["training.max_steps=15"], 15),
        (["training.max_steps=30", "training.num_epochs=1"], 30),
        (["training.lr_scheduler_type=cosine", "training.warmup_ratio=0.3"], LAST),
        (["training.compact_vocabulary='off'"], LAST),
        (["training.max_grad_norm=0", "training.weight_decay=0.01"], LAST),
        (["training.micro_batch_tokens=128", "training.class_weights=balanced"], LAST),
        (["model.freeze_embeddings=true", "training.label_smoothing=0.1"], LAST),
    ],
)
def test_other_recipes(overrides: list[str], steps: int, configure: Configure) -> None:
    whole = outcome(run_training(configure(*overrides)))
    config = configure(*overrides)
    for more in (3, 9):
        stop_after(config, more)
    assert outcome(run_training(config)) == whole
    assert len(whole.losses) == steps == whole.results["epochs"][-1]["step"]


def test_early_stopping(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations are part of what is kept, so patience is counted over all attempts."""
    scripted(monkeypatch, {11: 0.5, 22: 0.9, 33: 0.7, 44: 0.9, 55: 0.95})
    overrides = ["training.num_epochs=5", "training.early_stopping_patience=2"]
    whole = outcome(run_training(configure(*overrides)))
    assert len(whole.losses) == 44 and whole.results["best"]["step"] == 22
    config = configure(*overrides)
    for more in (25, 8, 11):  # after 25, 33 and 44: in an epoch, at the end of one, and where patience ends
        stop_after(config, more)
    control = Script()
    assert outcome(run_training(config, control)) == whole
    assert control.starts == [44] and control.asked == 0


def scripted(monkeypatch: pytest.MonkeyPatch, f1: dict[int, float]) -> None:
    """Let evaluations find the given F1 at each step."""
    compute, evaluate = training.metrics.compute, training._Loop._evaluate

    def at_this_step(loop: training._Loop) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(training.metrics, "compute", lambda *given: {**compute(*given), "f1": f1[loop.progress.step]})
            evaluate(loop)

    monkeypatch.setattr(training._Loop, "_evaluate", at_this_step)


@pytest.mark.parametrize(
    ("keep", "f1", "expected"),
    [
        (1, {11: 0.9, 22: 0.5, 33: 0.7}, [11, 33]),
        (2, {11: 0.5, 22: 0.9, 33: 0.7}, [22, 30, 33]),
        (2, {11: 0.5, 22: 0.6, 33: 0.7}, [30, 33]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    keep: int, f1: dict[int, float], expected: list[int], configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, f1)
    folder = run_training(configure("training.num_epochs=3", f"training.keep_checkpoints={keep}"))
    best = max(f1, key=lambda step: f1[step])
    assert steps_of(folder) == expected
    assert json.loads((folder / "results.json").read_text())["best"]["step"] == best
    kept = folder / checkpoint.name_of(best) / "model.safetensors"
    assert (folder / "best" / "model.safetensors").read_bytes() == kept.read_bytes()
    assert not litter(folder)


# --- killed -------------------------------------------------------------------------------------------------------

# What is called where things are half done: a step, an epoch's evaluation, and each stage of writing.
STEP, UPDATE = "emoray.learner:Learner.step", "emoray.learner:Learner._update"
TENSORS, SUMS, SYNC = "emoray.progress:save_file", "emoray.checkpoint:_sha256", "emoray.storage:_sync"
DELETE, HISTORY, RENAME = "emoray.storage:Storage.delete", "emoray.run:History.append", "os:replace"
CARD, REPORT = "emoray.model_card:render", "emoray.report:render"


@pytest.mark.parametrize(
    ("size", "packing"),
    [
        (1, PACKINGS[1]),
        (2, PACKINGS[0]),
        pytest.param(1, PACKINGS[0], marks=pytest.mark.slow),
        pytest.param(2, PACKINGS[1], marks=pytest.mark.slow),
    ],
)
def test_killed(size: int, packing: str, configure: Configure, undisturbed: Undisturbed) -> None:
    config = configure(packing)
    deaths = [Death(STEP, 6, rank=size - 1), Death(TENSORS, 2), Death(SYNC, 9), Death(DELETE, 1), Death(REPORT, 1)]
    assert run_to_the_end(config, size, deaths) == len(deaths)
    assert outcome(folder_of(config)) == undisturbed(size, packing)
    assert not litter(folder_of(config))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_every_stage(size: int, configure: Configure, undisturbed: Undisturbed) -> None:
    """At each of the first calls of all that writes, in one long chain of attempts."""
    stages = [(STEP, 5), (UPDATE, 3), (TENSORS, 1), (TENSORS, 2), (HISTORY, 1), (HISTORY, 2), (RENAME, 1), (CARD, 1)]
    deaths = [Death(where, call) for where, call in stages]
    deaths += [Death(SUMS, call) for call in (1, 4, 8)] + [Death(SYNC, call) for call in range(1, 14)]
    deaths += [Death(DELETE, 1), Death(DELETE, 2), Death(REPORT, 1)]
    random.Random(size).shuffle(deaths)
    config = configure("training.num_epochs=4")
    run_to_the_end(config, size, deaths, at_most=60)
    assert outcome(folder_of(config)) == undisturbed(size, "training.num_epochs=4")
    assert not litter(folder_of(config))


def test_killed_at_any_moment(configure: Configure, undisturbed: Undisturbed) -> None:
    kill_at_random(configure, undisturbed, size=1, kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_many_moments(size: int, packing: str, configure: Configure, undisturbed: Undisturbed) -> None:
    for seed in range(3):
        kill_at_random(configure, undisturbed, size, 6, seed, packing, "training.checkpoint_every_steps=2")


def kill_at_random(
    configure: Configure, undisturbed: Undisturbed, size: int, kills: int, seed: int, *overrides: str
) -> None:
    whole = run_workers(configure(*overrides), size).seconds
    config, draw = configure(*overrides), random.Random(seed)
    run_to_the_end(config, size, [draw.uniform(0.1, 1.0) * whole for _ in range(kills)])
    assert outcome(folder_of(config)) == undisturbed(size, *overrides)
    assert not litter(folder_of(config))


# --- damaged ------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [truncate, flip, Path.unlink]
FILES = [
    "config.json",
    "emoray.json",
    "manifest.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training/optimizer.safetensors",
    "training/progress.json",
]


@pytest.fixture(scope="module")
def halfway(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after step 10, with checkpoints of 4, 8 and 10; tests work on copies."""
    config = configure_from(material, tmp_path_factory.mktemp("halfway"), "training.keep_checkpoints=5")
    return stop_after(config, 10)


@pytest.fixture
def stopped(halfway: Path, configure: Configure) -> tuple[TrainConfig, Path]:
    """A copy of it, and the config that goes on with it."""
    config = configure("training.keep_checkpoints=5")
    shutil.copytree(halfway, folder_of(config))
    return config, folder_of(config)


def notes_and_start(folder: Path) -> tuple[list[str], str | None]:
    """What is told before training goes on, and the checkpoint that is gone on from."""
    control = Script()
    start = find_start(Storage(str(folder)), World(), control, "f1")
    return control.notes, None if start is None else start.name


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(name: str, damage: Callable[[Path], None], stopped: tuple[TrainConfig, Path]) -> None:
    _, folder = stopped
    assert sorted(checkpoint.sums(folder / checkpoint.name_of(10)).keys() | {"manifest.json"}) == FILES
    assert notes_and_start(folder) == ([], "step-00000010")
    damage(folder / checkpoint.name_of(10) / name)
    notes, start = notes_and_start(folder)
    assert len(notes) == 1 and name in notes[0] and "step-00000010" in notes[0]
    assert start == "step-00000008"


@pytest.mark.parametrize(("damaged", "start"), [([10], 8), ([8, 10], 4), ([4, 8, 10], 0), ([8], 10)])
def test_the_last_good_checkpoint_is_used(
    damaged: list[int], start: int, stopped: tuple[TrainConfig, Path], undisturbed: Undisturbed
) -> None:
    config, folder = stopped
    for step, name in zip(damaged, itertools.cycle(["model.safetensors", "training/optimizer.safetensors"])):
        flip(folder / checkpoint.name_of(step) / name)
    control = Script()
    run_training(config, control)
    assert control.starts == [start]
    assert len(control.notes) == sum(step > start for step in damaged)
    for step in damaged:
        if step < start:  # never looked at: nothing went on from it
            shutil.rmtree(folder / checkpoint.name_of(step), ignore_errors=True)
    assert outcome(folder) == undisturbed(1)


def test_damaged_checkpoints_take_no_place_of_good_ones(
    stopped: tuple[TrainConfig, Path], undisturbed: Undisturbed
) -> None:
    """Newer by their number, they would otherwise be kept instead of what is written now."""
    config, folder = stopped
    config = config.model_copy(update={"training": config.training.model_copy(update={"keep_checkpoints": 1})})
    for step in (8, 10):
        flip(folder / checkpoint.name_of(step) / "model.safetensors")
    stop_after(config, 2)
    assert notes_and_start(folder)[1] == "step-00000006"
    assert outcome(run_training(config)) == undisturbed(1)


def test_a_damaged_best_checkpoint_is_made_again(
    configure: Configure, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is over its best evaluation, whose checkpoint is what the run ends with: it must be there."""
    f1 = {11: 0.9, 22: 0.5}
    scripted(monkeypatch, f1)
    whole = outcome(run_training(configure()))
    config = configure("training.keep_checkpoints=9")
    folder = stop_after(config, 17)
    flip(folder / checkpoint.name_of(11) / "model.safetensors")
    control = Script()
    assert outcome(run_training(config, control)) == whole
    assert control.starts == [8] and "step-00000011/model.safetensors" in control.notes[0]


@pytest.mark.parametrize("damage", DAMAGES)
def test_inference_refuses_a_damaged_model(
    damage: Callable[[Path], None], stopped: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    _, folder = stopped
    model = folder / checkpoint.name_of(10)
    assert len(Classifier.load(str(model))(["bal bel"])) == 1
    for name in FILES:
        copy = tmp_path / "copy"
        shutil.copytree(model, copy)
        damage(copy / name)
        with pytest.raises(CheckpointError, match=name):
            Classifier.load(str(copy))
        shutil.rmtree(copy)


# --- full disks, losses that are no numbers -----------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of its own for `runs`, which holds one checkpoint but not two."""
    folder = tmp_path / "runs"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mount.returncode != 0:
        pytest.skip(f"can't mount a tmpfs here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def free(folder: Path) -> int:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def fill_up(folder: Path, leave: int) -> None:
    """Leave so many bytes of a disk free."""
    with (folder / "filler").open("wb") as stream:
        stream.write(bytes(max(free(folder) - leave, 0)))


class Filling(Script):
    """Fills the disk after some steps."""

    def __init__(self, folder: Path, after: int, leave: int) -> None:
        super().__init__()
        self.folder, self.after, self.leave = folder, after, leave

    def wish(self) -> Wish:
        wish = super().wish()
        if self.asked == self.after:
            fill_up(self.folder, self.leave)
        return wish


@pytest.mark.parametrize("leave", [0, 8192, 100_000, 300_000])
def test_a_full_disk_leaves_the_run_resumable(
    leave: int, small_disk: Path, configure: Configure, undisturbed: Undisturbed
) -> None:
    """Full before step 8's checkpoint: at its first byte, in its weights, or in its optimizer."""
    config = configure("training.logging_steps=2")
    with pytest.raises(StorageError, match="No space left"):
        run_training(config, Filling(small_disk, 7, leave))
    folder = folder_of(config)
    assert steps_of(folder) == [4]
    assert not litter(folder)
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    control = Script()
    assert outcome(run_training(config, control)) == undisturbed(1)
    assert control.starts == [4]


def test_a_file_that_may_not_grow(configure: Configure, undisturbed: Undisturbed) -> None:
    """Quotas and limits end a write in the middle too."""
    config = configure()
    ending = run_workers(config, 1, limit_file_bytes=50_000)
    assert (ending.reports[0].error or "").startswith("StorageError")
    assert not litter(folder_of(config)) and not steps_of(folder_of(config))
    assert outcome(run_training(config)) == undisturbed(1)


def poisoned_at(step: int, factor: float, gradient_only: bool = False) -> Callable[[Learner, int], None]:
    """`Learner.step` that multiplies the loss of one step, or its gradient alone, by a factor."""
    original = Learner.step

    def poisoned(self: Learner, now: int) -> Tensor:
        loss = original
        if now == step and gradient_only:
            hook = next(self.model.parameters()).register_hook(lambda gradient: gradient * factor)
            found = loss(self, now)
            hook.remove()
            return found
        return loss(self, now) * (factor if now == step else 1.0)

    return poisoned  # type: ignore[return-value]


@pytest.mark.parametrize("logging_steps", [1, 4, 1000])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(
    factor: float, logging_steps: int, configure: Configure, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(f"training.logging_steps={logging_steps}")
    task, *_ = begin(config)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", poisoned_at(9, factor))
        with pytest.raises(NotFiniteError) as caught:
            run_training(config)
    rows = task.parts["train"].rows[learner_of(config).plan.samples(9)]
    said = str(caught.value)
    assert f"The loss is {factor} at step 10, on the training rows {', '.join(map(str, rows[:8]))}, ...;" in said
    assert "the checkpoint of step 8 is kept" in said
    assert steps_of(folder_of(config)) == [4, 8]
    assert len(read_history(open_run(config.run))) <= 9
    assert outcome(run_training(config)) == undisturbed(1)


def test_weights_that_are_no_numbers_are_never_saved(
    configure: Configure, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite and the gradient is not: the weights are lost before any loss shows it."""
    config = configure()
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", poisoned_at(7, float("inf"), gradient_only=True))
        with pytest.raises(NotFiniteError, match="after step 8"):
            run_training(config)
    assert steps_of(folder_of(config)) == [4]
    assert outcome(run_training(config)) == undisturbed(1)


# --- two attempts at once, and waiting ----------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lease_s", [0.0, 1000.0])
def test_an_older_attempt_stops_and_writes_no_more(
    lease_s: float, configure: Configure, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It notices within seconds; and where it doesn't, at the next thing that it wants to write."""
    monkeypatch.setattr(run, "_LOOK_EVERY_S", lease_s)
    config = configure()
    folder = folder_of(config)
    before: dict[str, bytes] = {}

    class Overtaken(Script):
        def wish(self) -> Wish:
            wish = super().wish()
            if self.asked == 6:
                while steps_of(folder) != [4] or litter(folder):  # written in the background
                    time.sleep(0.01)
                begin(config)
                before.update(contents(folder))
            return wish

    control = Overtaken()
    with pytest.raises(FencedError, match="attempt 1 stops, since attempt 2 took the run over"):
        run_training(config, control)
    assert control.asked <= (6 if lease_s == 0 else STEPS_PER_EPOCH)
    after = contents(folder)
    if lease_s > 0:  # lines of the history are no matter: the newer attempt replaces the file
        del before["history.jsonl"], after["history.jsonl"]
    assert after == before
    assert outcome(run_training(config)) == undisturbed(1)


def test_two_attempts_at_once(configure: Configure, undisturbed: Undisturbed) -> None:
    """The second takes the run over while the first is in the middle of it: one finishes, the other gives way."""
    config = configure("training.num_epochs=8", "training.checkpoint_every_steps=2", "training.logging_steps=1")
    endings: dict[int, Ending] = {}
    first = threading.Thread(target=lambda: endings.update({1: run_workers(config, 1)}))
    first.start()
    while not (folder_of(config) / "checkpoints").is_dir():
        first.join(0.01)
        assert first.is_alive()
    endings[2] = run_workers(config, 1)
    first.join()
    assert endings[2].finished
    assert (endings[1].reports[0].error or "").startswith("FencedError")
    assert outcome(folder_of(config)) == undisturbed(1, "training.num_epochs=8")
    assert not litter(folder_of(config))


def test_training_goes_on_while_a_checkpoint_is_written(
    configure: Configure, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of step 4 isn't let go before step 7 is done: a loop that waited for it would stand still."""
    let_go, seen = threading.Event(), []
    write = training.write_checkpoint

    def slow(task: Any, progress: Any, *rest: Any) -> None:
        if progress.step == 4:
            seen.append(let_go.wait(60))
        write(task, progress, *rest)

    class Releasing(Script):
        def wish(self) -> Wish:
            wish = super().wish()
            if self.asked == 7:
                let_go.set()
            return wish

    monkeypatch.setattr(training, "write_checkpoint", slow)
    config = configure()
    assert outcome(run_training(config, Releasing())) == undisturbed(1)
    assert seen == [True]


def test_a_saver_copies_what_training_goes_on_to_change() -> None:
    saver, tensor, go, found = Saver(), torch.zeros(3), threading.Event(), []

    def write(tensors: Any) -> None:
        go.wait(60)
        found.append(tensors["x"].clone())

    saver.save({"x": tensor}, write)
    tensor += 1
    go.set()
    saver.wait()
    saver.close()
    assert found[0].tolist() == [0, 0, 0]


def test_a_failed_write_shows_at_the_next_call() -> None:
    saver = Saver()

    def write(_: Any) -> None:
        raise StorageError("full")

    saver.save({}, write)
    with pytest.raises(StorageError, match="full"):
        saver.wait()
    saver.wait()
    saver.close()


def test_a_storage_that_is_away_for_a_moment_ends_no_run(
    configure: Configure, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_LOOK_EVERY_S", 0.0)
    check, calls = Attempt.check, [0]

    def now_and_then(attempt: Attempt) -> None:
        calls[0] += 1
        if sys._getframe(1).f_code.co_name == "_wish" and calls[0] % 2:
            raise StorageError("the storage is away")
        check(attempt)

    monkeypatch.setattr(Attempt, "check", now_and_then)
    assert outcome(run_training(configure())) == undisturbed(1)
    assert calls[0] > STEPS_PER_EPOCH


def test_a_resumed_learner_keeps_no_file_of_its_checkpoint(configure: Configure) -> None:
    """On NFS a file that is mapped can't be deleted, and the checkpoint's folder with it."""
    config = configure("training.max_steps=6", "training.checkpoint_every_steps=3")
    folder = run_training(config)
    learner = learner_of(configure("training.max_steps=6"))
    learner.load(folder / checkpoint.name_of(6), 6)
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("only Linux tells what is mapped")
    assert str(folder) not in mapped.read_text()
    assert learner.tensors()


def test_packing_and_compact_vocabulary_that_are_asked_for_and_cannot_be(configure: Configure) -> None:
    with pytest.raises(ModelError, match=r"compact_vocabulary is on, .*: set it to auto"):
        learner_of(configure("training.compact_vocabulary='on'", "model.freeze_embeddings=true"))
