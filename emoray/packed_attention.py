"""Attention over a packed row of texts, which it keeps apart: one function, computed in the way that suits the device.

- On a CPU, neighbours of similar length form a block, padded to its longest text for attention's products only.
- On a GPU, torch's variable-length flash kernel runs on the row (half precision), else one masked padded block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from emoray.dropout import SeededDropout
from emoray.packing import Layout, PackedBatch


def attend(q: Tensor, k: Tensor, v: Tensor, batch: Any, scale: float, drop: nn.Module | None, first: bool) -> Tensor:
    """Each token's attention to the tokens of its own text, [T, heads, size] in and out.

    Args:
        batch: a PackedBatch, or what has its tensors.
        scale: of the scores before their softmax.
        drop: dropout of the scores, a module with its probability `p`; None drops nothing.
        first: only texts' first tokens are read from the result; other rows may be anything.
    """
    if q.device.type == "cpu" and isinstance(batch, PackedBatch):
        return _in_blocks(q, k, v, batch, scale, drop, first)
    p = 0.0 if drop is None else float(cast(Any, drop).p)
    if varlen_kernel_takes(q.dtype, q.shape[2], q.device):
        return _varlen(q, k, v, batch, scale, p)
    return _one_padded_block(q, k, v, batch, scale, p)


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
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, layout: Layout, scale: float, first: bool
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
            dout.index_fill_(0, layout.padding, 0)  # what repeats a token must not count twice
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


def _split(rows: Tensor, layout: Layout, heads: int, first: bool = False) -> list[Tensor]:
    """The blocks in block-ordered rows [..., size], each [texts * heads, tokens (1 with `first`), size]."""
    shapes = [(count * heads, 1 if first else longest) for count, longest in layout.shapes]
    parts = torch.split(rows, [texts * tokens for texts, tokens in shapes])
    return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]


def _split_scores(keep: Tensor | None, layout: Layout, heads: int, first: bool) -> Sequence[Tensor | None]:
    """Each block's part of one flat dropout mask, [texts * heads, queries, longest]."""
    if keep is None:
        return [None] * len(layout.shapes)
    shapes = [(count * heads, 1 if first else longest, longest) for count, longest in layout.shapes]
    parts = torch.split(keep, [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _to_row(rows: Tensor, layout: Layout, first: bool, shape: torch.Size) -> Tensor:
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
