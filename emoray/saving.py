"""Checkpoints written in the background, one at a time: training waits only for a copy in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Saver:
    """Runs one write at a time beside training; an error shows at the next call.

    Attributes:
        waited_s: how long training stood still for checkpoints, in seconds.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}
        self.waited_s = 0.0

    def save(self, tensors: Mapping[str, Tensor], write: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Copy the tensors, then have `write` called with the copies on another thread."""
        start = time.monotonic()
        self.wait()
        for name, tensor in tensors.items():
            # The same memory each time: fresh pages for hundreds of megabytes take longer than the copy.
            if name not in self._copies:
                self._copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._copies[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        self._pending = self._thread.submit(write, dict(self._copies))
        self.waited_s += time.monotonic() - start

    def wait(self) -> None:
        """Return when the write under way is done; raises what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        self._thread.shutdown(wait=True)
