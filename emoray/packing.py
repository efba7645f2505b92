"""Several texts end to end in one row without padding, and how they lie in blocks where attention needs them apart.

A batch is one row of ``T`` real tokens, sorted by the length of their texts. Embeddings, linear layers and norms then
compute nothing that is thrown away. What a model needs for such rows is in packed_model.py, its attention in
packed_attention.py.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Blocks of texts for one number of heads; rows are those of the row of tokens seen as [T * heads, head size].

    Attributes:
        shapes: (texts, longest text) of each block.
        masks: per block None, or float32 [texts, 1, 1, longest]: -inf where a text is padded.
        forth: int64, the row behind each row of the blocks seen as [texts * heads, longest]; one gather of whole rows
            is far cheaper than a strided copy per block.
        back: int64 [T * heads], the way back.
        padding: int64, the rows of the blocks that stand for no token (they repeat a text's last one).
        first: int64 [n_texts * heads], the rows of first tokens.
    """

    shapes: tuple[tuple[int, int], ...]
    masks: tuple[Tensor | None, ...]
    forth: Tensor
    back: Tensor
    padding: Tensor
    first: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Texts end to end in one row of real tokens, sorted by length, shortest first.

    Attributes:
        input_ids: int64 [1, T], token ids.
        position_ids: int64 [1, T], 0, 1, 2, ... within each text.
        first: int64 [n_texts], where in the row each text begins, in the caller's order.
        lengths: tokens of each text, in the row's order.
    """

    input_ids: Tensor
    position_ids: Tensor
    first: Tensor
    lengths: tuple[int, ...]
    _layouts: dict[int, Layout] = field(default_factory=dict, repr=False, compare=False)

    @property
    def n_texts(self) -> int:
        """Number of texts."""
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        """Number of tokens ``T``, all real."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on ``device`` (itself if it is there already)."""
        if self.input_ids.device == torch.device(device):
            return self
        ids, positions, first = (send(states, device) for states in (self.input_ids, self.position_ids, self.first))
        return replace(self, input_ids=ids, position_ids=positions, first=first, _layouts={})

    def places(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of each token its text's index (the caller's order) and its place in it; of each text its first token."""
        first = self.first.numpy()
        return np.repeat(np.argsort(first), self.lengths), self.position_ids[0].numpy(), first

    @cached_property
    def offsets(self) -> Tensor:
        """int32 [n_texts + 1]: where texts begin in the row's order, then ``T`` (the varlen kernel's form)."""
        sums = np.concatenate([[0], np.cumsum(self.lengths)])
        return send(torch.from_numpy(sums.astype(np.int32)), self.input_ids.device)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.lengths[-1]

    def layout(self, heads: int) -> Layout:
        """How attention on CPU groups the texts; one for all layers."""
        if heads not in self._layouts:
            self._layouts[heads] = _lay_out(self.lengths, heads)
        return self._layouts[heads]


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A CPU tensor on `device`, without waiting: while a GPU computes one batch, the next is laid out and sent."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()  # from memory that may be swapped out, a copy can't run beside the kernels
    return tensor.to(device, non_blocking=True)


def pack(texts: Sequence[NDArray[np.integer[Any]]]) -> PackedBatch:
    """Lay texts end to end in one row, sorted by length (stable, so equal input gives an equal row).

    Args:
        texts: one 1-D array of token ids per text, special tokens included, each of at least one token.

    Raises:
        ValueError: no texts, or a text without tokens.
    """
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    if not len(sizes) or not sizes.all():
        raise ValueError("pack() needs at least one text, and at least one token in every text")
    order = np.argsort(sizes, kind="stable")
    lengths = sizes[order]
    starts = np.cumsum(lengths) - lengths
    row = np.concatenate([texts[i] for i in order]).astype(np.int64)
    first = np.empty_like(starts)
    first[order] = starts
    return PackedBatch(
        input_ids=torch.from_numpy(row)[None],
        position_ids=torch.from_numpy(np.arange(len(row)) - np.repeat(starts, lengths))[None],
        first=torch.from_numpy(first),
        lengths=tuple(lengths.tolist()),
    )


def _lay_out(lengths: tuple[int, ...], heads: int) -> Layout:
    sizes = np.array(lengths)
    starts = np.cumsum(sizes) - sizes
    shapes, masks, forth, padding = [], [], [], []
    for begin, end in _similar(lengths):
        size, start = sizes[begin:end, None], starts[begin:end, None]
        places = np.arange(lengths[end - 1])
        real = places < size
        rows = (start + np.minimum(places, size - 1))[:, None] * heads + np.arange(heads)[:, None]
        shapes.append((end - begin, lengths[end - 1]))
        masks.append(None if real.all() else torch.where(torch.from_numpy(real), 0.0, -torch.inf)[:, None, None])
        forth.append(rows.reshape(-1))
        padding.append(~np.broadcast_to(real[:, None], rows.shape).reshape(-1))
    row, is_padding = np.concatenate(forth), np.concatenate(padding)
    back = np.empty(sizes.sum() * heads, dtype=np.int64)
    back[row[~is_padding]] = np.flatnonzero(~is_padding)
    first = (starts[:, None] * heads + np.arange(heads)).reshape(-1)
    arrays = (row, back, np.flatnonzero(is_padding), first)
    return Layout(tuple(shapes), tuple(masks), *(torch.from_numpy(array) for array in arrays))


def _similar(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Cut sorted lengths into runs whose shortest text lacks at most an eighth of the longest.

    A batch of 64 short texts has some 30 lengths, but 12 such runs: a tenth more scores for a third of the calls.
    """
    runs, end = [], len(lengths)
    while end:
        begin = bisect_left(lengths, lengths[end - 1] - lengths[end - 1] // 8, 0, end)
        runs.append((begin, end))
        end = begin
    return runs[::-1]
