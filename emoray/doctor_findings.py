"""What `emoray doctor` hands around: a finding, and what the checks know of the case so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from emoray.config import TrainConfig
    from emoray.data import Dataset
    from emoray.task import Task

Status = Literal["ok", "warning", "problem"]
GIB = 2.0**30


@dataclass(frozen=True)
class Finding:
    """A row of the answer.

    Attributes:
        name: what was checked.
        status: `problem` where a run would fail, `warning` where it would be slow, fragile or not as tested.
        found: what there is.
        remedy: what to do about it; empty where all is well.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Finding:
    return Finding(name, "ok", found)


def warning(name: str, found: str, remedy: str) -> Finding:
    return Finding(name, "warning", found, remedy)


def problem(name: str, found: str, remedy: str) -> Finding:
    return Finding(name, "problem", found, remedy)


@dataclass
class Case:
    """What is examined; earlier checks fill in what later ones build on.

    Attributes:
        path: the config's file, if one was given.
        overrides: as on the command line.
        config: the config, once it was found valid.
        dataset: its data, once found well formed.
        task: data and encoder, ready for a run.
        nodes: resources of each node by Ray's names; memory in bytes. Empty while unknown.
        joined: whether these are the nodes of a cluster that runs already.
        cpus: CPUs of a worker, once its place was found.
        uses_gpu: whether a worker gets a GPU.
    """

    path: str | None = None
    overrides: list[str] = field(default_factory=list)
    config: TrainConfig | None = None
    dataset: Dataset | None = None
    task: Task | None = None
    nodes: list[dict[str, float]] = field(default_factory=list)
    joined: bool = False
    cpus: int | None = None
    uses_gpu: bool = False

    @property
    def has_config(self) -> bool:
        return self.path is not None or bool(self.overrides)

    @property
    def storage_path(self) -> str:
        """Absolute path or URI of where runs are kept; the default where no valid config says more."""
        from emoray.config import RunConfig
        from emoray.storage import absolute

        return absolute((self.config.run if self.config is not None else RunConfig()).storage_path)


Check = Callable[[Case], Iterable[Finding]]


def gib(size: float) -> str:
    """Bytes as a person reads them, e.g. `1.5 GiB`."""
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.0f} MiB"
