"""Several texts in one row without padding, and the attention that keeps them apart.

A batch is one row of ``T`` real tokens, its texts end to end and sorted by length. Embeddings, linear layers and
norms then compute nothing that is thrown away. Only attention has to know where texts begin:

- on CPU, texts of equal length lie side by side, so each length is one dense block of matrix products;
- on GPU, a variable-length kernel runs on the row (half precision, no dropout), else one masked padded block.

After the last layer's attention only the first token of each text matters to a classifier, so every other row is
dropped there: exact, and it spares the last feed-forward layer.

Nothing of a model's code is copied: an attention and a mask function are registered with transformers, and hooks
pick the first tokens. Outside :func:`packed_logits` an enabled model takes padded input as it always did.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from torch.nn.attention import varlen
except ImportError:  # torch before 2.10
    varlen = None  # type: ignore[assignment]

NAME = "emoray_packed"
"""The attention implementation that :func:`enable_packing` selects (not stored in saved configs)."""

# model_type -> the module that takes [:, 0], the first token's state. The RoBERTas count positions from padding + 1.
_READERS = {
    "bert": "bert.pooler",
    "electra": "classifier",
    "roberta": "classifier",
    "xlm-roberta": "classifier",
    "camembert": "classifier",
}
_COUNT_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")


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
    _block_rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

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
        ids, positions, first = (
            states.to(device, non_blocking=True) for states in (self.input_ids, self.position_ids, self.first)
        )
        return replace(self, input_ids=ids, position_ids=positions, first=first, _block_rows={})

    @cached_property
    def blocks(self) -> tuple[tuple[int, int, int], ...]:
        """(first token, texts, tokens per text) of each run of equally long texts."""
        runs, start = [], 0
        for length, texts in groupby(self.lengths):
            count = sum(1 for _ in texts)
            runs.append((start, count, length))
            start += count * length
        return tuple(runs)

    @cached_property
    def offsets(self) -> Tensor:
        """int32 [n_texts + 1]: where texts begin in the row's order, then ``T`` (the varlen kernel's form)."""
        sums = np.concatenate([[0], np.cumsum(self.lengths)])
        return torch.from_numpy(sums.astype(np.int32)).to(self.input_ids.device)

    def block_rows(self, heads: int) -> tuple[Tensor, Tensor]:
        """Row order that makes every block contiguous as [texts, heads, tokens], and the way back.

        Both are int64 [T * heads] and index the row seen as [T * heads, head size]. One gather of whole rows is far
        cheaper than a strided copy per block.
        """
        if heads not in self._block_rows:
            order = np.arange(self.n_tokens * heads).reshape(self.n_tokens, heads)
            parts = [
                order[start : start + count * length].reshape(count, length, heads).transpose(0, 2, 1).reshape(-1)
                for start, count, length in self.blocks
            ]
            forth = np.concatenate(parts)
            back = np.empty_like(forth)
            back[forth] = np.arange(len(forth))
            device = self.input_ids.device
            self._block_rows[heads] = torch.from_numpy(forth).to(device), torch.from_numpy(back).to(device)
        return self._block_rows[heads]


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


# The batch that the enabled models' hooks and attention act on: set for the duration of packed_logits only, and per
# thread, so that one thread's packed forward never reaches into another's padded one.
_running: ContextVar[PackedBatch | None] = ContextVar("emoray_packed_batch", default=None)


def is_packable(model: nn.Module) -> bool:
    """Whether :func:`enable_packing` knows this model: an encoder of the BERT family with a classifier on top."""
    if not isinstance(model, PreTrainedModel) or not type(model).__name__.endswith("ForSequenceClassification"):
        return False
    config = model.config
    return config.model_type in _READERS and not config.is_decoder and config.chunk_size_feed_forward == 0


def enable_packing(model: PreTrainedModel) -> None:
    """Teach ``model`` to take packed batches through :func:`packed_logits`, in place; doing it twice does no harm.

    Padded ``[B, L]`` input with an attention mask keeps working and then runs transformers' own sdpa attention.

    Raises:
        ValueError: the model is not packable.
    """
    if not is_packable(model):
        raise ValueError(f"{type(model).__name__} can't take packed batches: not an encoder of the BERT family")
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    for module, hook in (
        (_layers(model)[-1].attention.output, _keep_first_tokens),
        (model.get_submodule(_READERS[model.config.model_type]), _one_text_per_row),
    ):
        if hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook)


def packed_logits(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Logits [n_texts, n_labels] of a packed batch, in the order in which the texts were given to :func:`pack`.

    Args:
        model: a model after :func:`enable_packing`, or a wrapper (DistributedDataParallel) around one.
        batch: on the model's device.

    Raises:
        RuntimeError: gradient checkpointing is on (its second forward would not see the batch).
    """
    inner = cast(PreTrainedModel, getattr(model, "module", model))
    if inner.training and _layers(inner)[0].gradient_checkpointing:
        raise RuntimeError("packed batches and gradient checkpointing do not go together")
    token = _running.set(batch)
    try:
        output = model(input_ids=batch.input_ids, position_ids=batch.position_ids + _first_position(inner))
    finally:
        _running.reset(token)
    return cast(Tensor, output.logits)


def _layers(model: PreTrainedModel) -> Any:
    return cast(Any, model.base_model).encoder.layer


def _first_position(model: PreTrainedModel) -> int:
    return int(model.config.pad_token_id) + 1 if model.config.model_type in _COUNT_FROM_PADDING else 0


def _keep_first_tokens(module: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Pre-hook of the last attention's output block: keep the first tokens of (attention output, residual)."""
    batch = _running.get()
    if batch is None:
        return None
    attended, residual = args
    return attended.index_select(1, batch.first), residual.index_select(1, batch.first)


def _one_text_per_row(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
    """Pre-hook of the head, which takes ``[:, 0]``: show it [n_texts, 1, hidden]."""
    return None if _running.get() is None else (args[0].transpose(0, 1),)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask for a packed row: a T x T one would be mostly emptiness. Padded input gets sdpa's."""
    return None if _running.get() is not None else sdpa_mask(*args, **kwargs)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, T, size] each in, [1, T, heads, size] out."""
    batch = _running.get()
    if batch is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    if not q.is_cuda:
        drop = module.dropout if dropout > 0 else None
        return _by_length(q, k, v, batch, scale, cast("nn.Module | None", drop))[None], None
    if dropout == 0 and _varlen_kernel_takes(q):
        return _varlen(q, k, v, batch, scale)[None], None
    return _one_padded_block(q, k, v, batch, scale, dropout)[None], None


def _by_length(
    q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, scale: float, drop: nn.Module | None
) -> Tensor:
    """Exact attention, [T, heads, size] in and out, one dense block per text length."""
    keep = None
    if drop is not None:
        # Dropout of ones is the scaled mask, whichever dropout module the model has; one draw for all blocks.
        keep = drop(torch.ones(q.shape[1] * sum(n * size**2 for _, n, size in batch.blocks), dtype=q.dtype))
    forth, back = batch.block_rows(q.shape[1])
    attend = cast(Any, _BlockAttention.apply)
    return cast(Tensor, attend(q, k, v, keep, forth, back, batch.blocks, scale))


class _BlockAttention(torch.autograd.Function):
    """Attention within blocks as one node: autograd's own slicing would fill a zero row per block and tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor | None,
        forth: Tensor,
        back: Tensor,
        blocks: tuple[tuple[int, int, int], ...],
        scale: float,
    ) -> Tensor:
        heads, size = q.shape[1:]
        rows = [states.reshape(-1, size).index_select(0, forth) for states in (q, k, v)]
        out = torch.empty_like(rows[0])
        places, probs = _places(blocks, heads), []
        for place, (qb, kb, vb, ob) in zip(places, _views(blocks, heads, *rows, out), strict=True):
            p = torch.softmax(torch.bmm(qb, kb.transpose(1, 2)).mul_(scale), -1)
            torch.bmm(p if keep is None else p * keep[place].view_as(p), vb, out=ob)
            probs.append(p)
        ctx.save_for_backward(*rows, forth, back, *(() if keep is None else (keep,)), *probs)
        ctx.blocks, ctx.scale, ctx.shape, ctx.dropped = blocks, scale, q.shape, keep is not None
        return out.index_select(0, back).view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, forth, back, *rest = ctx.saved_tensors
        keep, probs = (rest[0], rest[1:]) if ctx.dropped else (None, rest)
        heads, size = ctx.shape[1:]
        rows = [grad.reshape(-1, size).index_select(0, forth), q, k, v]
        grads = [torch.empty_like(q) for _ in range(3)]
        places, views = _places(ctx.blocks, heads), _views(ctx.blocks, heads, *rows, *grads)
        for place, p, (do, qb, kb, vb, dq, dk, dv) in zip(places, probs, views, strict=True):
            kept = None if keep is None else keep[place].view_as(p)
            torch.bmm((p if kept is None else p * kept).transpose(1, 2), do, out=dv)
            dp = torch.bmm(do, vb.transpose(1, 2))
            dp = dp if kept is None else dp.mul_(kept)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(ctx.scale)
            torch.bmm(ds, kb, out=dq)
            torch.bmm(ds.transpose(1, 2), qb, out=dk)
        return *(g.index_select(0, back).view(ctx.shape) for g in grads), None, None, None, None, None


def _views(blocks: tuple[tuple[int, int, int], ...], heads: int, *rows: Tensor) -> Any:
    """Each block of block-ordered rows [T * heads, size], as [texts * heads, tokens, size]."""
    sizes = [count * length * heads for _, count, length in blocks]
    for (_, count, length), *parts in zip(blocks, *(torch.split(row, sizes) for row in rows), strict=True):
        yield [part.view(count * heads, length, -1) for part in parts]


def _places(blocks: tuple[tuple[int, int, int], ...], heads: int) -> Any:
    """Where each block's attention probabilities lie in one flat array of them all."""
    start = 0
    for _, count, length in blocks:
        stop = start + count * heads * length**2
        yield slice(start, stop)
        start = stop


def _varlen_kernel_takes(q: Tensor) -> bool:
    """Flash attention runs in half precision, on Ampere and later; older torch has no public way to it."""
    if varlen is None or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def _varlen(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, scale: float) -> Tensor:
    """[T, heads, size] in and out through torch's variable-length kernel."""
    longest = batch.lengths[-1]
    out = varlen.varlen_attn(q, k, v, batch.offsets, batch.offsets, longest, longest, scale=scale)
    return cast(Tensor, out)


def _one_padded_block(
    q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, scale: float, dropout: float
) -> Tensor:
    """[T, heads, size] in and out through one padded sdpa call: on a GPU fewer launches beat fewer products."""
    starts = batch.offsets[:-1, None]
    places = torch.arange(batch.lengths[-1], device=q.device)
    real = starts + places < batch.offsets[1:, None]
    rows = torch.where(real, starts + places, starts)
    mask = real[:, None, None]
    q, k, v = (states[rows].transpose(1, 2) for states in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    text = torch.searchsorted(batch.offsets[1:], torch.arange(batch.n_tokens, device=q.device), right=True)
    return out.transpose(1, 2)[text, batch.position_ids[0]]
