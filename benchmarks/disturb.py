"""Commands of emoray in processes of their own: followed, disturbed, compared. For tests/ray and `make chaos`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from emoray import checkpoint
from emoray.quickstart import config_path, make_encoder
from emoray.storage import Storage

PATIENCE_S = 180.0
"""The longest wait for anything; generous, for machines that are busy with other things."""

SHORT = "training.max_steps=90"
"""Override for runs that still leave room for several kills."""

TRAINING, SCORING = "RayTrainWorker", "MapWorker"
"""What the names of actors' processes hold: of `emoray train` and `emoray predict`."""

_RESTART = re.compile(r"^(?:Going on|Starting again) from step (\d+)", re.MULTILINE)

# The quickstart's sentences and a small BERT, with dropout; steps in several pieces, so that they take some time; a
# checkpoint every seven steps, and each step in the history at once, so that whoever looks there knows the step.
_OVERRIDES = (
    "model.from_scratch=true",
    "model.dropout=0.1",
    "training.learning_rate=5e-4",
    "training.micro_batch_tokens=128",
    "training.checkpoint_every_steps=7",
    "training.checkpoint_every_minutes=null",
    "training.logging_steps=1",
    "workers.cpus_per_worker=1",
    "workers.use_gpu=false",
)


class Command:
    """One command of emoray's under way.

    Args:
        arguments: of `emoray`, the command's name first.

    Attributes:
        run: the run's folder.
        process: the driver.
        patience_s: the longest wait for what it does.
    """

    patience_s = PATIENCE_S

    def __init__(self, arguments: list[str], run: Path, log: Path, environment: dict[str, str]) -> None:
        self.run, self._log = run, log
        self._seen: dict[int, psutil.Process] = {}
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "emoray.cli", *arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=log.parent,
            )

    @property
    def output(self) -> str:
        """Both streams, so far."""
        return self._log.read_text(errors="replace")

    @property
    def step(self) -> int:
        """The last step in the run's history."""
        return max(steps_in(self.run / "history.jsonl"), default=0)

    @property
    def restarts(self) -> list[int]:
        """The steps that workers of this command went on from."""
        return [int(step) for step in _RESTART.findall(self.output)]

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """Return when the condition holds.

        Raises:
            AssertionError: with the output, where the command ended first or patience did.
        """
        deadline = time.monotonic() + self.patience_s
        while not condition():
            ended = self.process.poll() is not None
            if (ended and not condition()) or time.monotonic() > deadline:
                state = f"ended with {self.process.returncode}" if ended else f"took {self.patience_s:g} s"
                raise AssertionError(f"waiting for {what}, but the command {state}:\n{self.output}")
            time.sleep(0.005)

    def wait_for_step(self, step: int, restarts: int = 0) -> None:
        """Return when that step is done, by workers that were started again so many times."""
        self.wait_until(lambda: len(self.restarts) >= restarts and self.step >= step, f"step {step}")

    def status(self) -> int:
        """The exit status, once there is one; negative where a signal ended it."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(self.patience_s)
        raise AssertionError(f"the command didn't end in {self.patience_s:g} s:\n{self.output}")

    def kill(self) -> None:
        """SIGKILL to the driver; returns when its workers are gone too."""
        workers = workers_below(self.process.pid)
        self._remember()
        self.process.kill()
        self.process.wait()
        wait_for_end(workers)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Nothing that this command started lives on."""
        self._remember()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in self._seen.values():
            with suppress(psutil.NoSuchProcess):  # psutil knows a process by its start time too, so none by chance
                process.kill()

    def _remember(self) -> None:
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
            self._seen.update({child.pid: child for child in children})


class Bench:
    """A place for runs: a small encoder, and Ray clusters that no one else is in.

    Use it as a context manager; at its end nothing runs and nothing is left but the folder.

    Args:
        folder: for the runs and their output.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commands: list[Command] = []
        self.encoder = folder / "encoder"

    def __enter__(self) -> Bench:
        if not self.encoder.exists():
            make_encoder(self.encoder)
        self.ray_folder = tempfile.mkdtemp(prefix="er-")  # short: the names of sockets have at most 107 characters
        self.environment = {
            **os.environ,
            "RAY_TMPDIR": self.ray_folder,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # it is 15 by default, and whatever else runs here would go first
            "EMORAY_CACHE": str(self.folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "300",
        }
        return self

    def __exit__(self, *_: object) -> None:
        for command in self.commands:
            command.end()
        shutil.rmtree(self.ray_folder, ignore_errors=True)

    def overrides(self, name: str, *more: str) -> list[str]:
        """What turns the quickstart's config into that of a run of this name here."""
        places = (f"model.pretrained={self.encoder}", f"run.storage_path={self.folder / 'runs'}", f"run.name={name}")
        return [*places, *_OVERRIDES, *more]

    def train(self, name: str, *overrides: str, address: str = "local") -> Command:
        """Start `emoray train` on a run of that name.

        Args:
            address: of the cluster to join; `local` starts one for this command alone.
        """
        return self.start(name, ["train", str(config_path()), *self.overrides(name, *overrides)], address)

    def start(self, name: str, arguments: list[str], address: str = "local") -> Command:
        """Start any command on the run of that name."""
        command = Command(
            arguments,
            self.folder / "runs" / name,
            self.folder / f"{len(self.commands):03d}-{name}.log",
            {**self.environment, "RAY_ADDRESS": address},
        )
        self.commands.append(command)
        return command

    def cluster(self) -> SmallCluster:
        """A cluster on this machine, to be used as a context manager: a head without CPUs."""
        return SmallCluster(self.environment)


class SmallCluster:
    """`ray.cluster_utils.Cluster`: a head without CPUs, and nodes that come and go."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = {key: environment[key] for key in environment if key.startswith("RAY_")}

    def __enter__(self) -> SmallCluster:
        self._saved = {key: os.environ.get(key) for key in self._environment}
        os.environ.update(self._environment)
        from ray.cluster_utils import Cluster

        # A dead node is known after some seconds, not after a quarter of a minute.
        checks = {"health_check_period_ms": 1000, "health_check_timeout_ms": 5000, "health_check_failure_threshold": 3}
        self._cluster = Cluster()
        self._add(num_cpus=0, _system_config=checks)
        return self

    def _add(self, **options: Any) -> Any:
        handler = signal.getsignal(signal.SIGTERM)
        node = self._cluster.add_node(include_dashboard=False, **options)
        signal.signal(signal.SIGTERM, handler)  # Ray takes it, for the case that this process were a node
        return node

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()
        for key, value in self._saved.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @contextmanager
    def node(self, cpus: int = 1) -> Iterator[Any]:
        """A new node that the cluster knows; taken away at the end, where that hasn't happened before."""
        node = self._add(num_cpus=cpus)
        try:
            yield node
        finally:
            if node in self._cluster.worker_nodes:
                self.remove(node)

    def remove(self, node: Any) -> None:
        """End all of a node's processes at once, as a power cut would: none has time to say so or to save."""
        for raylet in _raylets(node):
            raylet.suspend()  # it would report the end of its workers, and they have a last word when it ends
            for process in raylet.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def announce(self, node: Any, seconds: float) -> None:
        """Tell the cluster that a node will be taken away, as a cloud's notice of preemption does."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        accepted, why = GcsClient(address=self.address).drain_node(node.node_id, reason, "taken away", deadline)
        assert accepted, why

    def settle(self) -> None:
        """Return when Ray itself knows the nodes that there are, and no other."""
        self._cluster.wait_for_nodes(PATIENCE_S)

    @property
    def nodes(self) -> list[Any]:
        """All nodes but the head."""
        return list(self._cluster.worker_nodes)

    def workers(self, node: Any = None, kind: str = TRAINING) -> list[psutil.Process]:
        """The training workers on a node, or on all nodes; or another kind of actor."""
        nodes = self.nodes if node is None else [node]
        return [worker for n in nodes for raylet in _raylets(n) for worker in workers_below(raylet.pid, kind)]


def _raylets(node: Any) -> list[psutil.Process]:
    """The one process that all workers of a node descend from."""
    return [psutil.Process(info.process.pid) for info in node.all_processes["raylet"]]


def workers_below(pid: int, kind: str = TRAINING) -> list[psutil.Process]:
    """The training workers, or another kind of actor, among all that a process started."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if kind in " ".join(process.cmdline()):
                    found.append(process)
    return found


def wait_for_end(processes: list[psutil.Process]) -> None:
    """Return when all of them are gone."""
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
    assert not alive, f"still running: {alive}"


def steps_in(history: Path) -> list[int]:
    """The steps of a history that may be being written."""
    steps = []
    with suppress(FileNotFoundError):
        for line in history.read_text().splitlines():
            with suppress(ValueError):
                steps.append(int(json.loads(line)["step"]))
    return steps


@dataclass(frozen=True)
class Left:
    """What a finished run left, to be compared.

    Attributes:
        sums: sha256 of the weights in best/ and in the last checkpoint, and of the last optimizer state.
        losses: of all steps, in order.
        results: the content of results.json.
    """

    sums: dict[str, str]
    losses: list[float]
    results: dict[str, Any]


def left_by(run: Path) -> Left:
    """Read a finished run.

    Raises:
        AssertionError: where a step is missing from the history or there twice, or something lies half-written.
        CheckpointError: where a checkpoint is damaged.
    """
    lines = (run / "history.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row["step"] for row in rows]
    assert steps == list(range(1, len(steps) + 1)), f"steps in the history: {steps}"
    litter = [path.name for path in run.rglob(".*")]
    assert not litter, f"left half-written: {litter}"
    saved = checkpoint.steps(Storage(str(run)))
    for step in saved:
        checkpoint.verify(run / checkpoint.name_of(step))
    checkpoint.verify(run / "best")
    last = run / checkpoint.name_of(saved[-1])
    files = {
        "best": run / "best" / "model.safetensors",
        "last": last / "model.safetensors",
        "optimizer": last / "training" / "optimizer.safetensors",
    }
    return Left(
        {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()},
        [row["loss"] for row in rows],
        json.loads((run / "results.json").read_text()),
    )
