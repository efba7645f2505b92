"""Models that take packed rows: hooks and an attention function, put into transformers' own extension points.

In the last layer only the first token of each text matters to a classifier, so only first tokens attend there and
all other rows are dropped before the feed-forward part: exact, and it spares an eighth of a six-layer encoder's
products. Outside :func:`packed_logits` an enabled model takes padded input as it always did.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from emoray.packed_attention import attend

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
        output = model(input_ids=batch.input_ids, position_ids=batch.position_ids + first_position(inner.config))
    finally:
        running.reset(token)
    return cast(Tensor, output.logits)


def _layers(model: PreTrainedModel) -> Any:
    return cast(Any, model.base_model).encoder.layer


def first_position(config: PretrainedConfig) -> int:
    """The position of a text's first token: some encoders keep those before it for padding."""
    return int(config.pad_token_id or 0) + 1 if config.model_type in _COUNT_FROM_PADDING else 0


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
    drop = cast(nn.Module, module.dropout) if dropout > 0 else None
    first = getattr(module, "only_first_tokens_attend", False)
    return attend(q, k, v, batch, scale, drop, first)[None], None
