"""A model as an ONNX graph: texts end to end where its encoder allows it, else padded; exported by torch itself.

In the packed graph all but attention sees real tokens only. Attention gathers them into a padded block and back, which
costs little beside the linear layers that would otherwise compute the padding too. What both forms are fed is made in
feeds.py.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from emoray import packed_model
from emoray.engines.feeds import Feeds, packed_feeds, padded_feeds

NAME = "emoray_graph"
"""The attention implementation that is traced."""
OPSET = 20
_EXAMPLE = tuple(np.arange(1, 2 + size, dtype=np.int32) for size in (4, 6, 9))
"""Three texts of different lengths: sizes that can't be mistaken for constants while the graph is traced."""


@dataclass(frozen=True)
class _TracedBatch:
    """What the hooks of packed_model.py and the attention below need; see `feeds.packed_feeds` for the tensors."""

    input_ids: Tensor
    position_ids: Tensor
    first: Tensor
    forth: Tensor
    mask: Tensor
    back: Tensor
    owner: Tensor


class _Packed(nn.Module):
    """Logits [texts, labels] of a packed batch, as a function of tensors alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        packed_model.enable_packing(model)
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, packed_model.no_mask)
        model.set_attn_implementation(NAME)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        first: Tensor,
        forth: Tensor,
        mask: Tensor,
        back: Tensor,
        owner: Tensor,
    ) -> Tensor:
        batch = _TracedBatch(input_ids, position_ids, first, forth, mask, back, owner)
        return packed_model.packed_logits(self.model, batch)


class _Padded(nn.Module):
    """Logits [texts, labels] of a padded batch."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        model.set_attn_implementation("eager")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


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
    batch = packed_model.running.get()
    assert isinstance(batch, _TracedBatch)
    heads, size = query.shape[1], query.shape[3]
    texts = batch.forth.shape[0]
    scale = size**-0.5 if scaling is None else scaling
    first = getattr(module, "only_first_tokens_attend", False)
    rows = [states.transpose(1, 2).reshape(-1, heads * size) for states in (query, key, value)]
    places = batch.forth.reshape(-1)
    q, k, v = (
        states.index_select(0, batch.first if first and i == 0 else places).view(texts, -1, heads, size).transpose(1, 2)
        for i, states in enumerate(rows)
    )
    scores = torch.matmul(q * scale, k.transpose(2, 3)) + batch.mask
    out = torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2).reshape(-1, heads * size)
    # In the last layer all tokens of a text get what its first one has: only that one is read afterwards.
    return out.index_select(0, batch.owner if first else batch.back).view(1, -1, heads, size), None


def export(model: PreTrainedModel, path: Path) -> int:
    """Write a model as one ONNX file, float32, with any number and length of texts.

    Returns:
        The token that pads batches.
    """
    model = model.eval().cpu()
    pad_id = int(model.config.pad_token_id or 0)
    feeds: Feeds
    if packed_model.is_packable(model):
        graph: nn.Module = _Packed(model)
        feeds = packed_feeds(_EXAMPLE)
    else:
        graph = _Padded(model)
        feeds = padded_feeds(_EXAMPLE, pad_id)
    dim = torch.export.Dim.DYNAMIC
    shapes = {name: {place: dim for place, size in enumerate(array.shape) if size > 1} for name, array in feeds.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            (),
            str(path),
            kwargs={name: torch.from_numpy(array) for name, array in feeds.items()},
            input_names=list(feeds),
            output_names=["logits"],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return pad_id
