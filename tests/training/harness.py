"""Whole training runs without Ray, in this process or in others, and what they leave behind."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from emoray import checkpoint, model
from emoray import config as cfg
from emoray.checkpoint import OPTIMIZER, WEIGHTS
from emoray.config import TrainConfig
from emoray.cuda_graphs import GraphedPasses
from emoray.finish import finish
from emoray.forward import Forward
from emoray.learner import Learner
from emoray.model import as_tensors
from emoray.run import Attempt, open_run, read_history, refuse_changed
from emoray.storage import Storage
from emoray.task import Task, prepare
from emoray.training import Alone, Control, Wish, train
from emoray.world import World

SHARED = Path(__file__).parents[3] / "shared"
LABELS = ("calm", "glad", "sad")
TRAIN_ROWS, BATCH = 163, 16  # 11 steps an epoch, the last one with 3 rows: fewer than 4 workers
STEPS_PER_EPOCH = 11

# --- material -----------------------------------------------------------------------------------------------------


def write_material(folder: Path) -> None:
    """A tiny BERT (config and tokenizer) in `encoder`, and labelled nonsense of many lengths in `data`.

    The vocabulary has rows that no text uses, and rows that only validation and test use.
    """
    from transformers import BertConfig, BertTokenizer

    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrs"]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    BertTokenizer(vocab=vocabulary, do_lower_case=True).save_pretrained(folder / "encoder")
    BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    ).save_pretrained(folder / "encoder")
    draw = random.Random(0)
    (folder / "data").mkdir()
    for split, size in {"train": TRAIN_ROWS, "validation": 41, "test": 37}.items():
        extra = [] if split == "train" else words[150:170]
        lines = []
        for row in range(size):
            label = row % len(LABELS)
            own = words[label * 40 : label * 40 + 40]
            length = min(1 + int(draw.expovariate(0.15)), 30)
            text = " ".join(draw.choice(own if draw.random() < 0.7 else words[:150] + extra) for _ in range(length))
            lines.append(json.dumps({"text": text, "label": LABELS[label]}))
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2; the test is skipped where it can't be had."""
    given = os.environ.get("EMORAY_TEST_MINILM")
    if given:
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emoray-tests" / "minilm"
    script = SHARED / "tools" / "get_minilm.sh"
    if not (cache / "model.safetensors").exists():
        if not script.exists():
            pytest.skip("no all-MiniLM-L6-v2: set EMORAY_TEST_MINILM to its folder")
        done = subprocess.run(["sh", str(script), str(cache)], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"no all-MiniLM-L6-v2: {script.name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return cache


def real_data() -> Path:
    """The folder of the emotion data set; the test is skipped where it isn't there."""
    folder = SHARED / "data" / "emotion"
    if not folder.is_dir():
        pytest.skip("no ../shared/data/emotion")
    return folder


# --- runs in this process -----------------------------------------------------------------------------------------


class Script(Alone):
    """A control that wishes what it was told to: the key is the number of steps that this attempt has done."""

    def __init__(self, wishes: dict[int, Wish] | None = None) -> None:
        self.wishes = wishes or {}
        self.asked = 0
        self.events: list[dict[str, Any]] = []

    def wish(self) -> Wish:
        self.asked += 1
        return self.wishes.get(self.asked, Wish.GO_ON)

    def tell(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    @property
    def notes(self) -> list[str]:
        return [event["text"] for event in self.events if event["kind"] == "note"]

    @property
    def starts(self) -> list[int]:
        """The steps that training went on from."""
        return [event["step"] for event in self.events if event["kind"] == "start"]


def begin(config: TrainConfig) -> tuple[Task, dict[str, Tensor], Attempt]:
    """What the driver does before the workers start."""
    task = prepare(config)
    run = open_run(config.run)
    refuse_changed(run, task.identity)
    weights = model.load(config.model, task.labels, config.training.seed)
    return task, dict(weights.state_dict()), Attempt.begin(run, task.identity)


def run_training(config: TrainConfig, control: Control | None = None) -> Path:
    """Train here, alone, to the end of the run. Gives the run's folder."""
    task, state, attempt = begin(config)
    learner, progress = train(task, state, World(), attempt, control or Alone())
    finish(learner, progress, attempt)
    assert attempt.run.local_path is not None
    return attempt.run.local_path


def learner_of(config: TrainConfig) -> Learner:
    """A learner before its first step, without a run's folder."""
    task = prepare(config)
    return Learner(task, model.load(config.model, task.labels, config.training.seed).state_dict(), World())


def weights_of(learner: Learner) -> dict[str, Tensor]:
    """The whole weights, with a compact vocabulary put back."""
    return {name: tensor.clone() for name, tensor in learner.as_files(learner.tensors())[0].items()}


def sha256_of(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- what a run leaves --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """All that two runs of one recipe must have in common, to the last bit."""

    sums: dict[str, str]
    losses: list[float]
    learning_rates: list[float]
    results: dict[str, Any]


def folder_of(config: TrainConfig) -> Path:
    return Path(config.run.storage_path) / config.run.name


def outcome(folder: Path) -> Outcome:
    """Read a finished run; every step is in the history exactly once, and every checkpoint is whole."""
    run = Storage(str(folder))
    history = read_history(run)
    assert [row["step"] for row in history] == list(range(1, len(history) + 1))
    assert len((folder / "history.jsonl").read_text().splitlines()) == len(history)
    for step in checkpoint.steps(run):
        checkpoint.verify(folder / checkpoint.name_of(step))
    checkpoint.verify(folder / "best")
    last = folder / checkpoint.name_of(checkpoint.steps(run)[-1])
    files = {"last weights": last / WEIGHTS, "last optimizer": last / OPTIMIZER, "best": folder / "best" / WEIGHTS}
    return Outcome(
        {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()},
        [row["loss"] for row in history],
        [row["learning_rate"] for row in history],
        json.loads((folder / "results.json").read_text()),
    )


def last_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a run's last checkpoint."""
    run = Storage(str(folder))
    return load_file(folder / checkpoint.name_of(checkpoint.steps(run)[-1]) / WEIGHTS)


def litter(folder: Path) -> list[str]:
    """Half-written things below a run's folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


# --- runs in other processes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Death:
    """SIGKILL to one worker, by its own hand, right before the given call of a function.

    Attributes:
        where: `module:attribute` of what is called.
        call: 1 for the first call in that process.
        rank: the worker that dies.
    """

    where: str
    call: int
    rank: int = 0

    def arm(self) -> None:
        module, _, path = self.where.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original, calls = getattr(owner, name), itertools.count(1)

        def dying(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, dying)


@dataclass(frozen=True)
class Job:
    """What a worker process is given, as Ray would."""

    task: Task
    state: dict[str, NDArray[np.float32]]
    run: str
    attempt: int
    size: int
    scratch: str
    death: Death | None = None
    wishes: dict[int, Wish] = field(default_factory=dict)
    spy: bool = False
    limit_file_bytes: int | None = None
    as_on_gpu: bool = False


@dataclass(frozen=True)
class Report:
    """What a worker process saw.

    Attributes:
        error: the name of the exception that ended it, with its message; None where there was none.
        events: what it told its control.
        rows: the training rows of each step, where the job asked for them.
        scored: the rows that each scoring of a split dealt to this worker, where the job asked for them.
        unsynchronised: backward passes whose gradients were not sent at once, where the job asked for them.
    """

    error: str | None
    events: list[dict[str, Any]]
    rows: list[list[int]]
    scored: list[list[int]]
    unsynchronised: int


def _work(job: Job, rank: int) -> None:
    torch.set_num_threads(1)
    if job.limit_file_bytes is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit is then an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.limit_file_bytes, resource.RLIM_INFINITY))
    if job.death is not None and job.death.rank == rank:
        job.death.arm()
    if job.as_on_gpu:
        compute_as_on_gpu()
    spy = _Spy()
    if job.spy:
        spy.watch()
    control, error = Script(job.wishes), None
    try:
        if job.size > 1:
            dist.init_process_group("gloo", f"file://{job.scratch}/meet", rank=rank, world_size=job.size)
        world = World(rank, job.size)
        learner, progress = train(
            job.task, as_tensors(job.state), world, Attempt(Storage(job.run), job.attempt), control
        )
        finish(learner, progress, Attempt(Storage(job.run), job.attempt))
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
        Path(job.scratch, f"traceback-{rank}").write_text(traceback.format_exc())
    report = Report(error, control.events, spy.rows, spy.scored, spy.unsynchronised)
    Path(job.scratch, f"report-{rank}").write_bytes(pickle.dumps(report))
    if job.size > 1 and error is None:
        dist.destroy_process_group()
    # Not through the interpreter's end: gloo's threads may still wait for a worker that is dead.
    os._exit(0 if error is None else 1)


def compute_as_on_gpu() -> None:
    """From here on this process's workers take the way of CUDA graphs, whose passes are called where GPUs replay."""
    import emoray.learner as module

    class Repeated(GraphedPasses):
        def _capture(self, passes: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
            loss = torch.zeros_like(passes())
            return lambda: loss.copy_(passes()), loss

    module.GraphedPasses = Repeated  # type: ignore[misc]
    Forward.can_be_captured = property(lambda self: self.packed)  # type: ignore[assignment]


class _Spy:
    """Notes what a worker computes; see Report."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.scored: list[list[int]] = []
        self.unsynchronised = 0

    def watch(self) -> None:
        import emoray.learner as module

        step, batch, score, no_sync = Learner.step, Learner._batch, module.score, DistributedDataParallel.no_sync

        def spied_step(learner: Learner, number: int) -> Tensor:
            self.rows.append([])
            return step(learner, number)

        def spied_batch(learner: Learner, number: int, rows: NDArray[np.int64]) -> Any:
            if len(learner.plan.share(len(self.rows) - 1, learner.world.rank, learner.world.size)):
                self.rows[-1].extend(rows.tolist())  # else it is a stand-in whose loss counts nothing
            return batch(learner, number, rows)

        def spied_score(forward: Any, tokens: Any, rows: NDArray[np.int64], most: int) -> NDArray[np.float32]:
            self.scored.append(rows.tolist())
            return score(forward, tokens, rows, most)

        def spied_no_sync(parallel: DistributedDataParallel) -> Any:
            self.unsynchronised += 1
            return no_sync(parallel)

        Learner.step, Learner._batch, module.score = spied_step, spied_batch, spied_score  # type: ignore[method-assign]
        DistributedDataParallel.no_sync = spied_no_sync  # type: ignore[method-assign]


os.environ.setdefault("AWS_ACCESS_KEY_ID", "any")  # for test_s3.py: what is forked sees what is set by now
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "any")
_PROCESSES = multiprocessing.get_context("forkserver")
# Imported once in a process that has run no tensor operation yet: from there a worker is forked in milliseconds.
_PROCESSES.set_forkserver_preload(
    ["emoray.finish", "transformers.models.bert.modeling_bert", "torch.nn.parallel", "matplotlib.figure", "jinja2"]
)


@dataclass(frozen=True)
class Ending:
    """How an attempt's processes ended: exit codes (negative: by that signal), and reports by rank."""

    codes: list[int]
    reports: dict[int, Report]
    seconds: float

    @property
    def finished(self) -> bool:
        return set(self.codes) == {0}


def run_workers(config: TrainConfig, size: int = 1, kill_after: float | None = None, **changes: Any) -> Ending:
    """One attempt at a run, in processes of its own.

    Args:
        size: number of workers.
        kill_after: seconds after which one of them is killed with SIGKILL.
        changes: fields of `Job`.
    """
    task, state, attempt = begin(config)
    with tempfile.TemporaryDirectory() as scratch:
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        job = Job(task, arrays, attempt.run.location, attempt.number, size, scratch, **changes)
        processes = [_PROCESSES.Process(target=_work, args=(job, rank), daemon=True) for rank in range(size)]
        start = time.monotonic()
        for process in processes:
            process.start()
        _watch(processes, kill_after)
        reports = {
            rank: pickle.loads(path.read_bytes())
            for rank in range(size)
            if (path := Path(scratch, f"report-{rank}")).exists()
        }
        for path in sorted(Path(scratch).glob("traceback-*")):
            print(path.read_text(), file=sys.stderr)
    return Ending([int(process.exitcode or 0) for process in processes], reports, time.monotonic() - start)


def _watch(processes: Sequence[Any], kill_after: float | None, patience_s: float = 240.0) -> None:
    """Wait for all; where one was killed, end the others, as Ray does."""
    start = time.monotonic()
    while any(process.is_alive() for process in processes):
        now = time.monotonic() - start
        if kill_after is not None and now >= kill_after:
            processes[-1].kill()
        killed = any((process.exitcode or 0) < 0 for process in processes)
        if killed or now > patience_s:
            for process in processes:
                process.kill()
        time.sleep(0.01)
    for process in processes:
        process.join()


def run_to_the_end(config: TrainConfig, size: int, deaths: Iterable[Death | float], at_most: int = 40) -> int:
    """Start the run again and again, each time with the next death, then without one.

    Args:
        deaths: a death, or after how many seconds to kill.

    Returns:
        The number of attempts that were killed.
    """
    for killed, death in enumerate(itertools.chain(deaths, itertools.repeat(None, at_most))):
        if isinstance(death, float):
            ending = run_workers(config, size, kill_after=death)
        else:
            ending = run_workers(config, size, death=death)
        if ending.finished:
            return killed
        assert any(code == -signal.SIGKILL for code in ending.codes), ending
    raise AssertionError("the run never came to its end")


Configure = Callable[..., TrainConfig]


def configure_from(folder: Path, runs: Path, *overrides: str) -> TrainConfig:
    """A config for the tiny material: 2 epochs of 11 steps, a checkpoint every 4."""
    return cfg.load(
        None,
        [
            f"run.storage_path={runs}",
            f"model.pretrained={folder / 'encoder'}",
            "model.from_scratch=true",
            "model.max_length=32",
            f"data.dataset={folder / 'data'}",
            "training.learning_rate=3e-3",
            f"training.global_batch_size={BATCH}",
            "training.checkpoint_every_steps=4",
            "training.checkpoint_every_minutes=null",
            "workers.use_gpu=false",
            *overrides,
        ],
    )
