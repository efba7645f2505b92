"""Several texts in one row without padding, and the attention that keeps them apart.

A batch is one row of ``T`` real tokens, its texts end to end and sorted by length. Embeddings, linear layers and
norms then compute nothing that is thrown away. Only attention has to know where texts begin:

- on CPU, neighbours of similar length form a block, filled up to its longest text for attention's products only;
- on GPU, torch's variable-length flash kernel runs on the row (half precision), else one masked padded block.

In the last layer only the first token of each text matters to a classifier, so only first tokens attend there and
all other rows are dropped before the feed-forward part: exact, and it spares an eighth of a six-layer encoder's
products.

Nothing of a model's code is copied: an attention and a mask function are registered with transformers, and hooks
pick the first tokens. Outside :func:`packed_logits` an enabled model takes padded input as it always did.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
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

from emoray.dropout import SeededDropout

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
class _Layout:
    """Blocks of texts for one number of heads; rows are those of the row of tokens seen as [T * heads, head size].

    Attributes:
        shapes: (texts, longest text) of each block.
        masks: per block None, or float32 [texts, 1, 1, longest]: -inf where a text is filled up.
        forth: int64, the row behind each row of the blocks seen as [texts * heads, longest]; one gather of whole rows
            is far cheaper than a strided copy per block.
        back: int64 [T * heads], the way back.
        filled: int64, the rows of the blocks that stand for no token (they repeat a text's last one).
        first: int64 [n_texts * heads], the rows of first tokens.
    """

    shapes: tuple[tuple[int, int], ...]
    masks: tuple[Tensor | None, ...]
    forth: Tensor
    back: Tensor
    filled: Tensor
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
    _layouts: dict[int, _Layout] = field(default_factory=dict, repr=False, compare=False)

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

    def layout(self, heads: int) -> _Layout:
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


def _lay_out(lengths: tuple[int, ...], heads: int) -> _Layout:
    sizes = np.array(lengths)
    starts = np.cumsum(sizes) - sizes
    shapes, masks, forth, filled = [], [], [], []
    for begin, end in _similar(lengths):
        size, start = sizes[begin:end, None], starts[begin:end, None]
        places = np.arange(lengths[end - 1])
        real = places < size
        rows = (start + np.minimum(places, size - 1))[:, None] * heads + np.arange(heads)[:, None]
        shapes.append((end - begin, lengths[end - 1]))
        masks.append(None if real.all() else torch.where(torch.from_numpy(real), 0.0, -torch.inf)[:, None, None])
        forth.append(rows.reshape(-1))
        filled.append(~np.broadcast_to(real[:, None], rows.shape).reshape(-1))
    row, is_filled = np.concatenate(forth), np.concatenate(filled)
    back = np.empty(sizes.sum() * heads, dtype=np.int64)
    back[row[~is_filled]] = np.flatnonzero(~is_filled)
    first = (starts[:, None] * heads + np.arange(heads)).reshape(-1)
    arrays = (row, back, np.flatnonzero(is_filled), first)
    return _Layout(tuple(shapes), tuple(masks), *(torch.from_numpy(array) for array in arrays))


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


# The batch that the enabled models' hooks and attention act on, None outside: set for the duration of packed_logits
# only, and per thread, so that one thread's packed forward never reaches into another's padded one.
running: ContextVar[Any] = ContextVar("emoray_packed_batch", default=None)


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
    AttentionMaskInterface.register(NAME, no_mask)
    model.set_attn_implementation(NAME)
    last = _layers(model)[-1].attention
    last.self.only_first_tokens_attend = True
    for module, hook in (
        (last.output, _keep_first_tokens),
        (model.get_submodule(_READERS[model.config.model_type]), _one_text_per_row),
    ):
        if hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook)


def packed_logits(model: nn.Module, batch: Any) -> Tensor:
    """Logits [n_texts, n_labels] of a packed batch, in the order in which the texts were given to :func:`pack`.

    Args:
        model: a model after :func:`enable_packing`, or a wrapper (DistributedDataParallel) around one.
        batch: a PackedBatch on the model's device, or what has its tensors (of cuda_graphs.py; of engines/graph.py,
            with an attention for it).

    Raises:
        RuntimeError: gradient checkpointing is on (its second forward would not see the batch).
    """
    inner = cast(PreTrainedModel, getattr(model, "module", model))
    if inner.training and _layers(inner)[0].gradient_checkpointing:
        raise RuntimeError("packed batches and gradient checkpointing do not go together")
    token = running.set(batch)
    try:
        output = model(input_ids=batch.input_ids, position_ids=batch.position_ids + _first_position(inner))
    finally:
        running.reset(token)
    return cast(Tensor, output.logits)


def _layers(model: PreTrainedModel) -> Any:
    return cast(Any, model.base_model).encoder.layer


def _first_position(model: PreTrainedModel) -> int:
    return int(model.config.pad_token_id) + 1 if model.config.model_type in _COUNT_FROM_PADDING else 0


def _keep_first_tokens(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Pre-hook in the last layer: of each argument [1, T, hidden] keep the first tokens, in the caller's order."""
    batch = running.get()
    return None if batch is None else tuple(states.index_select(1, batch.first) for states in args)


def _one_text_per_row(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
    """Pre-hook of the head, which takes ``[:, 0]``: show it [n_texts, 1, hidden]."""
    return None if running.get() is None else (args[0].transpose(0, 1),)


def no_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask for a packed row: a T x T one would be mostly emptiness. Padded input gets sdpa's."""
    return None if running.get() is not None else sdpa_mask(*args, **kwargs)


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
    batch = running.get()
    if batch is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # squeeze, not [0]: the gradient of an index is a row of zeros to fill, that of squeeze is a view.
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    if q.device.type == "cpu" and isinstance(batch, PackedBatch):
        drop = cast(nn.Module, module.dropout) if dropout > 0 else None
        first = getattr(module, "only_first_tokens_attend", False)
        return _in_blocks(q, k, v, batch, scale, drop, first)[None], None
    if varlen_kernel_takes(q.dtype, q.shape[2], q.device):
        return _varlen(q, k, v, batch, scale, dropout)[None], None
    return _one_padded_block(q, k, v, batch, scale, dropout)[None], None


def _in_blocks(
    q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, scale: float, drop: nn.Module | None, first: bool
) -> Tensor:
    """Exact attention, [T, heads, size] in and out; with `first` only first tokens attend and other rows are 0."""
    heads, keep = q.shape[1], None
    layout = batch.layout(heads)
    if drop is not None:
        shapes = [(count * heads * (1 if first else size), size) for count, size in layout.shapes]
        if isinstance(drop, SeededDropout):
            rows = layout.first if first else layout.forth
            keep = drop.source.scaled_scores(rows.numpy(), heads, shapes, drop.p, q.dtype)
        else:
            keep = drop(torch.ones(sum(n * size for n, size in shapes), dtype=q.dtype))  # of ones it is the mask
    attend = cast(Any, _BlockAttention.apply)
    with torch.autocast("cpu", enabled=False):  # it would turn some products to another type than their operands'
        return cast(Tensor, attend(q, k, v, keep, layout, scale, first))


class _BlockAttention(torch.autograd.Function):
    """Attention within blocks as one node: autograd's own slicing would fill a zero row per block and tensor."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, layout: _Layout, scale: float, first: bool
    ) -> Tensor:
        heads, size = q.shape[1:]
        queries = q.reshape(-1, size).index_select(0, layout.first if first else layout.forth).mul_(scale)
        keys, values = (states.reshape(-1, size).index_select(0, layout.forth) for states in (k, v))
        out, probs, dropped = torch.empty_like(queries), [], []
        keeps = _split_scores(keep, layout, heads, first)
        operands = (_split(queries, layout, heads, first), _split(keys, layout, heads), _split(values, layout, heads))
        for mask, kept, qb, kb, vb, ob in zip(
            layout.masks, keeps, *operands, _split(out, layout, heads, first), strict=True
        ):
            scores = torch.bmm(qb, kb.transpose(1, 2))
            if mask is not None:
                scores.view(len(mask), heads, *scores.shape[1:]).add_(mask)
            probs.append(torch.softmax(scores, -1))
            dropped.append(probs[-1] if kept is None else probs[-1] * kept)
            torch.bmm(dropped[-1], vb, out=ob)
        ctx.save_for_backward(queries, keys, values, keep, *probs, *dropped)
        ctx.layout, ctx.scale, ctx.first, ctx.shape = layout, scale, first, q.shape
        return _to_row(out, layout, first, q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, keep, *saved = ctx.saved_tensors
        layout, first, heads = ctx.layout, ctx.first, ctx.shape[1]
        probs, dropped = saved[: len(layout.shapes)], saved[len(layout.shapes) :]
        dout = grad.reshape(-1, ctx.shape[2]).index_select(0, layout.first if first else layout.forth)
        if not first:
            dout.index_fill_(0, layout.filled, 0)  # what repeats a token must not count twice
        dqueries, dkeys, dvalues = (torch.empty_like(rows) for rows in (queries, keys, values))
        of_queries = (_split(rows, layout, heads, first) for rows in (dout, queries, dqueries))
        of_keys = (_split(rows, layout, heads) for rows in (keys, values, dkeys, dvalues))
        keeps = _split_scores(keep, layout, heads, first)
        for p, pd, kept, do, qb, dq, kb, vb, dk, dv in zip(probs, dropped, keeps, *of_queries, *of_keys, strict=True):
            torch.bmm(pd.transpose(1, 2), do, out=dv)
            dp = torch.bmm(do, vb.transpose(1, 2))
            if kept is not None:
                dp.mul_(kept)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            torch.bmm(ds, kb, out=dq)
            torch.bmm(ds.transpose(1, 2), qb, out=dk)
        dq_row = _to_row(dqueries.mul_(ctx.scale), layout, first, ctx.shape)
        return dq_row, *(_to_row(rows, layout, False, ctx.shape) for rows in (dkeys, dvalues)), None, None, None, None


def _split(rows: Tensor, layout: _Layout, heads: int, first: bool = False) -> list[Tensor]:
    """The blocks in block-ordered rows [..., size], each [texts * heads, tokens (1 with `first`), size]."""
    shapes = [(count * heads, 1 if first else longest) for count, longest in layout.shapes]
    parts = torch.split(rows, [texts * tokens for texts, tokens in shapes])
    return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]


def _split_scores(keep: Tensor | None, layout: _Layout, heads: int, first: bool) -> Sequence[Tensor | None]:
    """Each block's part of one flat dropout mask, [texts * heads, queries, longest]."""
    if keep is None:
        return [None] * len(layout.shapes)
    shapes = [(count * heads, 1 if first else longest, longest) for count, longest in layout.shapes]
    parts = torch.split(keep, [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _to_row(rows: Tensor, layout: _Layout, first: bool, shape: torch.Size) -> Tensor:
    """Block-ordered rows back in the row of tokens, [T, heads, size]; with `first`, zeros around first tokens."""
    if first:
        return rows.new_zeros(shape).view(-1, shape[2]).index_copy_(0, layout.first, rows).view(shape)
    return rows.index_select(0, layout.back).view(shape)


def varlen_kernel_takes(dtype: torch.dtype, head_size: int, device: torch.device) -> bool:
    """Whether flash attention runs there: in half precision, on Ampere and later."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_size % 8 or head_size > 256:
        return False
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _varlen(q: Tensor, k: Tensor, v: Tensor, batch: Any, scale: float, dropout: float) -> Tensor:
    """[T, heads, size] in and out through torch's variable-length kernel.

    `torch.nn.attention.varlen.varlen_attn` is a wrapper of this operation that knows no dropout, which BERT has.
    """
    offsets, longest = batch.offsets, batch.longest
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, longest, longest, dropout, False, False, scale=scale
    )
    return cast(Tensor, out[0])


def _one_padded_block(q: Tensor, k: Tensor, v: Tensor, batch: Any, scale: float, dropout: float) -> Tensor:
    """[T, heads, size] in and out through one padded sdpa call: on a GPU fewer launches beat fewer products."""
    starts, ends = batch.offsets[:-1, None], batch.offsets[1:, None]
    places = torch.arange(batch.longest, device=q.device)
    real = starts + places < ends
    rows = torch.where(real, starts + places, 0)
    # A text without a token, as cuda_graphs.py lays some, must attend to something: softmax of nothing is NaN.
    mask = (real | (places == 0))[:, None, None]
    q, k, v = (states[rows].transpose(1, 2) for states in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    tokens = torch.arange(batch.input_ids.shape[1], device=q.device)
    text = torch.searchsorted(batch.offsets[1:], tokens, right=True)
    return out.transpose(1, 2)[text, tokens - batch.offsets[text]]
