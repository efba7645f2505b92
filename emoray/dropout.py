"""Dropout without a history: masks are functions of (seed, step, text) on CPUs, of (seed, step, micro-batch) on GPUs.

A run that was killed and started again must draw the masks that it would have drawn, so no mask may depend on the
history of a generator. Nor should it matter which worker or micro-batch a text lies in: on CPUs each element's bits are
a hash of (seed, step, text, token, dropout layer, element), as in counter-based generators (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"), so that any number of workers trains the same model.

Masks are also cheap this way: 16 bits an element, hashed in bulk and compared with a threshold, take about a fifth of
the time of torch's own CPU dropout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

_VALUES = 1 << 16
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CACHED = 1 << 15
"""Words hashed at a time: the passes over them then stay within a core's second-level cache."""


class DropoutSource:
    """Scaled dropout masks of one micro-batch after the other, each begun with :meth:`begin`.

    On CPU masks belong to texts. On a GPU torch's own kernels draw them, from a generator that each micro-batch seeds
    by its texts: as repeatable on GPUs of one kind, but other numbers of workers draw other ones.
    """

    def __init__(self) -> None:
        self._tokens: NDArray[np.uint64] | None = None
        self._first: NDArray[np.int64] = np.empty(0, np.int64)
        self._layer = 0

    def begin(
        self,
        *,
        seed: int,
        step: int,
        texts: NDArray[np.int64],
        places: NDArray[np.int64],
        first: NDArray[np.int64],
    ) -> None:
        """Name the rows of a micro-batch; call it before every forward pass in training mode.

        Args:
            seed: the run's seed, at least 0.
            step: the optimizer step, at least 0.
            texts: which text of the data set each token of the micro-batch belongs to, int64 [tokens], padding
                included.
            places: which token of its text each one is, int64 [tokens].
            first: the texts' first tokens, in the order in which the model keeps them, int64 [n_texts].

        Raises:
            ValueError: a negative seed or step.
        """
        (key,) = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
        keys = _mix(_mix(key + texts.astype(np.uint64) * _GOLDEN) + places.astype(np.uint64))
        self._tokens, self._first, self._layer = keys, first, 0
        torch.manual_seed(int(keys[0] >> np.uint64(1)))  # for a GPU's kernels

    def scaled_mask(self, shape: torch.Size | tuple[int, ...], p: float, dtype: torch.dtype) -> Tensor:
        """The next layer's mask, on the CPU: 0 where an element is dropped, else 1 / (share kept).

        Args:
            shape: [..., elements], with one row a token or one a text.
            p: probability of a drop, 0 <= p < 1, rounded to a multiple of 2**-16; the scale belongs to the
                rounded value, so the expectation is kept, up to what `dtype` resolves (bfloat16: 0.2%).
            dtype: a floating-point type.

        Raises:
            RuntimeError: :meth:`begin` was never called.
        """
        width = shape[-1] if shape else 1
        mask = torch.empty(shape, dtype=dtype)
        rows = mask.numel() // width if width else 0
        keys = self._rows(rows)
        return self._fill(mask.view(-1), keys, [(rows, width)], p).view(shape)

    def scaled_scores(
        self, rows: NDArray[np.int64], heads: int, shapes: Sequence[tuple[int, int]], p: float, dtype: torch.dtype
    ) -> Tensor:
        """The next layer's mask for attention's scores on CPU, where texts lie in blocks of different sizes.

        Args:
            rows: token * heads + head of each row of the blocks, int64 [rows].
            shapes: (rows, elements) of each block; the rows of all add up to those of `rows`.

        Returns:
            The blocks' masks end to end, flat.
        """
        tokens, head = np.divmod(rows, heads)
        keys = self._keys()[tokens] + head.astype(np.uint64) * _GOLDEN
        return self._fill(torch.empty(sum(n * width for n, width in shapes), dtype=dtype), keys, shapes, p)

    def _keys(self) -> NDArray[np.uint64]:
        if self._tokens is None:
            raise RuntimeError("call DropoutSource.begin() before a forward pass in training mode")
        return self._tokens

    def _rows(self, count: int) -> NDArray[np.uint64]:
        """Keys of so many rows: tokens, first tokens, or, in a layer of an unknown shape, numbered ones."""
        keys = self._keys()
        if count == len(keys):
            return keys
        return keys[self._first] if count == len(self._first) else keys[0] + np.arange(count, dtype=np.uint64)

    def _fill(self, mask: Tensor, keys: NDArray[np.uint64], shapes: Sequence[tuple[int, int]], p: float) -> Tensor:
        self._layer += 1
        keys = _mix(keys ^ (np.uint64(self._layer) << np.uint64(32)))
        row = place = 0
        for rows, width in shapes:
            words = torch.from_numpy(_words(keys[row : row + rows], width))[:, :width]
            _threshold(words, p, mask[place : place + rows * width].view(rows, width))
            row, place = row + rows, place + rows * width
        return mask


def _threshold(words: Tensor, p: float, out: Tensor) -> Tensor:
    """`out` as the scaled mask of int16 words that are uniform on [-2**15, 2**15)."""
    threshold = min(round(p * _VALUES), _VALUES - 1)
    # torch compares int16 in SIMD, and writes floats in the same pass.
    torch.ge(words, threshold - _VALUES // 2, out=out)
    return out.mul_(_VALUES / (_VALUES - threshold))


def _mix(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): each bit of a result depends on each bit of the key."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = keys ^ (keys >> np.uint64(31))
    return mixed


def _words(keys: NDArray[np.uint64], width: int) -> NDArray[np.int16]:
    """Uniform words [rows, width, rounded up to even]: two of each 32-bit hash of (key, place in the row).

    The two rounds are those of `lowbias32` (Wellons 2018, "Prospecting for hash functions"). The key's upper half goes
    in before the first and its lower half between them, so that two rows can't be shifted copies of one another.
    """
    columns = np.arange((width + 1) // 2, dtype=np.uint32) * np.uint32(_GOLDEN >> np.uint64(32))
    upper, lower = (keys >> np.uint64(32)).astype(np.uint32)[:, None], keys.astype(np.uint32)[:, None]
    hashes = np.empty((len(keys), len(columns)), np.uint32)
    step = max(1, _CACHED // max(1, len(columns)))
    shifted = np.empty((step, len(columns)), np.uint32)
    for start in range(0, len(keys), step):
        x = hashes[start : start + step]
        y = shifted[: len(x)]
        np.add(upper[start : start + step], columns, out=x)
        np.bitwise_xor(x, np.right_shift(x, 16, out=y), out=x)
        np.multiply(x, np.uint32(0x7FEB352D), out=x)
        np.bitwise_xor(x, lower[start : start + step], out=x)
        np.bitwise_xor(x, np.right_shift(x, 15, out=y), out=x)
        np.multiply(x, np.uint32(0x846CA68B), out=x)
        np.bitwise_xor(x, np.right_shift(x, 16, out=y), out=x)
    words: NDArray[np.int16] = hashes.view("<i2")
    return words


class SeededDropout(nn.Module):
    """``nn.Dropout`` whose masks come from a :class:`DropoutSource`; the identity in eval mode."""

    def __init__(self, p: float, source: DropoutSource) -> None:
        super().__init__()
        self.p = p
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        """Dropped and rescaled copy of ``x`` (any shape), or ``x`` itself in eval mode."""
        if not self.training or self.p == 0:
            return x
        if self.p >= 1:
            return x * 0
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        return x * self.source.scaled_mask(x.shape, self.p, x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def seed_dropout(model: nn.Module) -> DropoutSource:
    """Replace every ``nn.Dropout`` in ``model`` by a :class:`SeededDropout`, in place, and return their source.

    Has no effect on parameters or the state dict. Doing it again returns the source that is already there.

    Not for use with gradient checkpointing: the second forward pass would draw other masks than the first.
    """
    for module in model.modules():
        if isinstance(module, SeededDropout):
            return module.source
    source = DropoutSource()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, SeededDropout(child.p, source))
    return source
