"""The workers of a run as one of them sees them: its rank, and the collectives: max, sum, gather, broadcast."""

from __future__ import annotations

import socket
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

T = TypeVar("T")


class World:
    """All workers of a run, seen from one.

    Words go over a gloo group of their own, on the CPU: a GPU is never made to wait for them.

    Args:
        rank: this worker, 0 .. size - 1; worker 0 is the one that writes.
        size: number of workers.
        device: what this worker computes on.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank = rank
        self.size = size
        self.device = torch.device(device)
        self.host = socket.gethostname()
        self._group = dist.new_group(backend="gloo") if size > 1 else None

    @property
    def writes(self) -> bool:
        """Whether this worker is the one that writes the run's files."""
        return self.rank == 0

    def max(self, value: int) -> int:
        """The largest of all workers' values."""
        if self.size == 1:
            return value
        word = torch.tensor(value)
        dist.all_reduce(word, dist.ReduceOp.MAX, group=self._group)
        return int(word)

    def sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over workers, element by element."""
        if self.size == 1:
            return values
        sums = torch.from_numpy(values.copy())
        dist.all_reduce(sums, group=self._group)
        return sums.numpy()

    def gather(self, value: T) -> list[T]:
        """Every worker's value, in the order of ranks; on worker 0 alone (empty elsewhere)."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.gather_object(value, values if self.writes else None, dst=0, group=self._group)
        return values if self.writes else []

    def barrier(self) -> None:
        """Return when all workers have called it."""
        self.max(0)

    def broadcast(self, value: T) -> T:
        """Worker 0's value, on every worker."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]  # type: ignore[no-any-return]
