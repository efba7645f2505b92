"""A GPU's forward and backward passes as CUDA graphs: one launch for the thousand small kernels of a step.

A BERT's step on short texts is some 1,500 kernels of a few microseconds each, which Python can't launch as fast as a
GPU runs them. A graph records the launches of one shape and repeats them at a stroke (https://docs.pytorch.org/docs/
stable/notes/cuda.html#cuda-graphs). Shapes are few, for packed rows are padded to a multiple of 128 tokens, which is
what a tile of a matrix product takes anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from emoray.packing import PackedBatch, send
from emoray.world import World

TOKENS = 128
TEXTS = 16
"""Micro-batches are padded to multiples of these."""
_NO_TARGET = -100
"""`cross_entropy` leaves such rows out."""


@dataclass(frozen=True)
class FixedBatch:
    """A packed batch whose tensors stay where they are; see `packing.PackedBatch` for those of the same names.

    Texts without a token are laid before the real ones, and one of the tokens that are missing after them. No loss
    sees them, so they add zeros to the gradients.
    """

    input_ids: Tensor
    position_ids: Tensor
    first: Tensor
    offsets: Tensor
    longest: int


class _Captured(NamedTuple):
    """A graph, and the tensors that it reads and writes."""

    replay: Callable[[], Any]
    numbers: Tensor
    denominator: Tensor
    loss: Tensor


class GraphedPasses:
    """Forward and backward passes of one worker's micro-batches, and the sum of gradients over workers.

    Gradients of all parameters lie in one piece of memory: set to zero at a stroke, and summed by one call. That they
    are summed after the pass, not beside it, costs less than a pass that Python launches.

    Args:
        loss: of (batch, targets int64 [texts], -100 for none) the sum of the texts' losses, a scalar.
        parameters: those that learn, of one type.
        longest: tokens of the longest text there is.
        compression: what gradients are summed in, "none" for their own type or "bf16".
    """

    def __init__(
        self,
        loss: Callable[[FixedBatch, Tensor], Tensor],
        parameters: Sequence[nn.Parameter],
        longest: int,
        world: World,
        compression: str,
    ) -> None:
        self._loss, self._longest, self._world, self._compression = loss, max(longest, TOKENS), world, compression
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._pool: Any = None
        self._gradients = torch.zeros(sum(p.numel() for p in parameters), device=world.device)
        for parameter, gradient in zip(parameters, self._gradients.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def run(self, batch: PackedBatch, targets: NDArray[np.int64], denominator: float) -> Tensor:
        """Add a micro-batch's gradients of (sum of losses / `denominator`), dropout as the generator is seeded.

        Args:
            batch: on the CPU.

        Returns:
            The sum / `denominator`, a scalar on the device that the next call writes over.
        """
        shape = _round_up(batch.n_tokens, TOKENS), _round_up(batch.n_texts, TEXTS)
        numbers = _numbers(batch, targets, *shape)
        if shape not in self._captured:
            devices = [self._world.device] if self._world.device.type == "cuda" else []
            with torch.random.fork_rng(devices):  # masks must not depend on whether a shape is new
                self._captured[shape] = self._capture_shape(numbers, *shape)
        captured = self._captured[shape]
        captured.numbers.copy_(send(numbers, self._world.device))
        captured.denominator.fill_(denominator)
        captured.replay()
        return captured.loss

    def sum_gradients(self) -> None:
        """Add the gradients up over all workers."""
        if self._world.size == 1:
            return
        if self._compression == "bf16":
            rounded = self._gradients.to(torch.bfloat16)
            dist.all_reduce(rounded)
            self._gradients.copy_(rounded)
        else:
            dist.all_reduce(self._gradients)

    def clear_gradients(self) -> None:
        """Set all gradients to zero; never to None, for the graphs add to them where they lie."""
        self._gradients.zero_()

    def _capture_shape(self, numbers: Tensor, n_tokens: int, n_texts: int) -> _Captured:
        numbers = numbers.to(self._world.device, copy=True)
        denominator = torch.full(
            (), torch.inf, device=self._world.device
        )  # so that the warm-up adds zeros to the gradients
        sizes = (n_tokens, n_tokens, n_texts, n_texts, n_texts + 2)

        def passes() -> Tensor:
            ids, positions, first, targets, offsets = numbers.split(sizes)
            batch = FixedBatch(ids[None], positions[None], first, offsets.int(), self._longest)
            loss = self._loss(batch, targets) / denominator
            loss.backward()
            return loss.detach()

        replay, loss = self._capture(passes)
        return _Captured(replay, numbers, denominator, loss)

    def _capture(self, passes: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """What repeats the passes, and where it leaves their loss."""
        stream = torch.cuda.Stream(self._world.device)
        stream.wait_stream(torch.cuda.current_stream(self._world.device))
        with torch.cuda.stream(stream):  # libraries set themselves up at their first use, which can't be captured
            passes()
        torch.cuda.current_stream(self._world.device).wait_stream(stream)
        self._pool = self._pool or torch.cuda.graph_pool_handle()  # graphs run in turn, so they share their memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = passes()
        return graph.replay, loss


def _numbers(batch: PackedBatch, targets: NDArray[np.int64], n_tokens: int, n_texts: int) -> Tensor:
    """All that a graph reads of a micro-batch end to end, int64, so that it is sent in one piece."""
    tokens, texts = n_tokens - batch.n_tokens, n_texts - batch.n_texts
    parts = (
        np.pad(batch.input_ids[0].numpy(), (0, tokens)),
        np.pad(batch.position_ids[0].numpy(), (0, tokens)),
        np.pad(batch.first.numpy(), (0, texts)),
        np.pad(targets, (0, texts), constant_values=_NO_TARGET),
        np.pad(batch.offsets.numpy().astype(np.int64), (texts, 0)),
        [n_tokens],
    )
    return torch.from_numpy(np.concatenate(parts))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
