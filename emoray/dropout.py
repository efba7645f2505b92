"""Dropout that depends on (seed, step, micro-batch) and on nothing else.

A run that was killed and started again must draw the masks that it would have drawn, so no mask may depend on the
history of a global generator. :meth:`DropoutSource.begin` starts a fresh stream per micro-batch; every dropout layer
of the model reads from it in the order of the forward pass, which the model and the batch determine.

Masks are also cheap this way: 16 random bits an element, drawn in bulk and compared with a threshold, take about a
fifth of the time of torch's own CPU dropout.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

_WORDS = 1 << 16


class DropoutSource:
    """A stream of scaled dropout masks, a pure function of the key last given to :meth:`begin`.

    On CPU the words come from numpy (one thread, so the thread count changes nothing); on other devices from one
    torch generator per device. The two give different masks for the same key.
    """

    def __init__(self) -> None:
        self._words: np.random.SFC64 | None = None
        self._seed = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def begin(self, *, seed: int, step: int, micro_batch: int) -> None:
        """Start the stream of one micro-batch; call it before every forward pass in training mode.

        Torch's global generators are reseeded from the same key, for dropout that happens inside torch's kernels
        (sdpa attention on padded batches).

        Args:
            seed: the run's seed, at least 0.
            step: the optimizer step, at least 0.
            micro_batch: which micro-batch of that step, counted over all workers, at least 0.

        Raises:
            ValueError: a negative part of the key.
        """
        key = np.random.SeedSequence((seed, step, micro_batch))
        self._words = np.random.SFC64(key)
        self._seed = int(key.generate_state(1, np.uint64)[0] >> np.uint64(1))
        self._generators.clear()
        torch.manual_seed(self._seed)

    def scaled_mask(
        self, shape: torch.Size | tuple[int, ...], p: float, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """The next mask of the stream: 0 where an element is dropped, else 1 / (share kept).

        Args:
            shape: of the mask.
            p: probability of a drop, 0 <= p < 1, rounded to a multiple of 2**-16; the scale belongs to the
                rounded value, so the expectation is kept, up to what `dtype` resolves (bfloat16: 0.2%).
            device: where the mask lies.
            dtype: a floating-point type.

        Raises:
            RuntimeError: :meth:`begin` was never called.
        """
        if self._words is None:
            raise RuntimeError("call DropoutSource.begin() before a forward pass in training mode")
        threshold = min(round(p * _WORDS), _WORDS - 1)
        # int16 words are uniform on [-2**15, 2**15): torch compares those in SIMD, and writes floats in the same pass.
        words = self._cpu_words(shape) if device.type == "cpu" else self._device_words(shape, device)
        mask = torch.empty(shape, dtype=dtype, device=device)
        torch.ge(words, threshold - _WORDS // 2, out=mask)
        return mask.mul_(_WORDS / (_WORDS - threshold))

    def _cpu_words(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        assert self._words is not None
        count = int(np.prod(shape, dtype=np.int64))
        raw = np.atleast_1d(self._words.random_raw((count + 3) // 4))
        return torch.from_numpy(raw.view(np.int16)[:count]).view(shape)

    def _device_words(self, shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        words = torch.empty(shape, dtype=torch.int16, device=device)
        return words.random_(-_WORDS // 2, _WORDS // 2, generator=self._generators[device])


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
        return x * self.source.scaled_mask(x.shape, self.p, x.device, x.dtype)

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
