"""From a config to a BERT classifier, its tokenizer, its optimizer and its learning-rate schedule."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from emoray import data_hub, hub
from emoray.config import ModelConfig, TrainingConfig
from emoray.data_files import near
from emoray.errors import ModelError
from emoray.packed_model import first_position
from emoray.wording import first_line

# The names under which encoders keep their dropout probabilities.
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "dropout",
    "attention_dropout",
    "seq_classif_dropout",
)


def load_tokenizer(pretrained: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of an encoder.

    Raises:
        ModelError: where there is none, or the Hub is out of reach.
    """
    with _errors(pretrained, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            pretrained, use_fast=True, local_files_only=_local_only(pretrained)
        )
    if not tokenizer.is_fast or not tokenizer.get_vocab().keys() - tokenizer.all_special_tokens:
        raise ModelError(f"{pretrained}: has no fast tokenizer (tokenizer.json or vocab.txt), which emoray needs")
    return tokenizer


def load_config(config: ModelConfig, labels: Sequence[str]) -> PretrainedConfig:
    """The encoder's own config, with this data set's labels and the dropout that is asked for.

    Raises:
        ModelError: where there is none, it is no encoder of texts, or `max_length` is more than it has positions.
    """
    with _errors(config.pretrained, "config"):
        hf_config: PretrainedConfig = AutoConfig.from_pretrained(
            config.pretrained, local_files_only=_local_only(config.pretrained)
        )
    if hf_config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise ModelError(
            f"{config.pretrained}: is a {hf_config.model_type}, of which transformers makes no text classifier: "
            "choose an encoder such as BERT"
        )
    hf_config.id2label = dict(enumerate(labels))
    hf_config.label2id = {label: i for i, label in enumerate(labels)}
    hf_config.problem_type = "single_label_classification"
    if config.dropout is not None:
        for name in _DROPOUTS:
            if hasattr(hf_config, name):
                setattr(hf_config, name, config.dropout)
    positions = getattr(hf_config, "max_position_embeddings", None)
    if positions is not None and config.max_length > (room := positions - first_position(hf_config)):
        raise ModelError(
            f"model.max_length is {config.max_length}, but {config.pretrained} has {room} positions: lower it"
        )
    return hf_config


def load(config: ModelConfig, labels: Sequence[str], seed: int) -> PreTrainedModel:
    """An encoder with a classification head; what the checkpoint lacks is drawn from the seed.

    Returns:
        The model in float32 on the CPU, in training mode.

    Raises:
        ModelError: where the encoder can't be loaded as a sequence classifier, or has not all of its weights.
    """
    hf_config = load_config(config, labels)
    with _errors(config.pretrained, "weights"), torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        if config.from_scratch:
            model = AutoModelForSequenceClassification.from_config(hf_config, dtype=torch.float32)
        else:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                config.pretrained,
                config=hf_config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=_local_only(config.pretrained),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            _refuse_gaps(config.pretrained, model, found)
    model.train()
    return model  # type: ignore[no-any-return]


def _refuse_gaps(pretrained: str, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Raises ModelError where weights of the encoder itself would be random.

    A head may be new, also where there is one of another number of labels; so may a pooler.
    """

    def is_encoder(name: str) -> bool:
        return name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name

    for name, there, wanted in sorted(found["mismatched_keys"]):
        if is_encoder(name):
            raise ModelError(
                f"{pretrained}: the weights don't fit: {name} has the shape {list(there)}, but must have "
                f"{list(wanted)} by config.json: give a whole copy"
            )
    lost = [name for name in sorted(found["missing_keys"]) if is_encoder(name)]
    if lost:
        raise ModelError(
            f"{pretrained}: {len(lost)} of the encoder's weights are missing, {lost[0]} first: give a whole copy, "
            "or set model.from_scratch=true for random weights"
        )


def rebuild(hf_config: PretrainedConfig, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model from its config and weights, without drawing random weights first.

    Args:
        state: tensors by name; the model takes them as they are, not as copies.
    """
    with quiet(), torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(hf_config, dtype=torch.float32)
        model.load_state_dict(dict(state), strict=False, assign=True)
    for module in model.modules():
        # Buffers that are no part of the weights (position ids) are computed, so a meta one has no content yet.
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(name, _buffer(name, buffer), persistent=False)
    lost = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if lost:
        raise ModelError(f"weights are missing: {', '.join(lost[:5])}")
    model.train()
    return model  # type: ignore[no-any-return]


def _buffer(name: str, like: Tensor) -> Tensor:
    if name == "position_ids":
        return torch.arange(like.shape[-1]).expand(like.shape).clone()
    if name == "token_type_ids":
        return torch.zeros(like.shape, dtype=like.dtype)
    raise ModelError(f"the encoder computes a buffer that emoray doesn't know: {name}")


def folder_files(hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files of a Hugging Face folder beside the weights: name -> content."""
    hf_config.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[hf_config.model_type]]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        hf_config.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW, fused; without weight decay it is plain Adam. Biases and norms are never decayed."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if p.ndim < 2]
    decayed = [p for name, p in trained if p.ndim >= 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def learning_rates(config: TrainingConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the step (0, 1, ...), by transformers' schedules of the same name."""
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    warmup = round(config.warmup_ratio * total_steps)
    schedule = transformers.get_scheduler(config.lr_scheduler_type, dummy, warmup, total_steps)
    factor = schedule.lr_lambdas[0]
    return lambda step: config.learning_rate * float(factor(step))


@contextlib.contextmanager
def _errors(pretrained: str, what: str) -> Iterator[None]:
    """Failures of loading, told as one sentence with the remedy."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = first_line(error).rstrip(".")
        if not os.path.isdir(pretrained) and not data_hub.is_id(pretrained):
            found = f"no such folder{near(Path(pretrained))}; give a Hugging Face folder, or a Hub id (owner/name)"
        elif os.path.isdir(pretrained):
            found = f"the {what} can't be loaded from this folder: {reason}; give a whole Hugging Face folder"
        elif hub.reachable():
            found = (
                f"no such folder here, and the Hub has no {what} of it that can be loaded: {reason}. Correct "
                "model.pretrained; for a private or gated one log in (hf auth login)"
            )
        elif _is_missing(error):
            found = f"no such folder here, and its {what} couldn't be fetched from the Hub. {hub.REMEDY}"
        else:
            found = f"the {what} of its cached copy can't be loaded: {reason}"
        raise ModelError(f"{pretrained}: {found}") from None


def _is_missing(error: Exception) -> bool:
    """Whether transformers found no cached copy while it might look at nothing else."""
    return isinstance(error, OSError) and any(word in str(error) for word in ("connect", "cached", "local_files_only"))


def _local_only(pretrained: str) -> bool:
    """Look into the cache alone where the Hub is out of reach: transformers would retry for half a minute."""
    return os.path.isdir(pretrained) or not data_hub.is_id(pretrained) or not hub.reachable()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A new head on an encoder is what we want, not a reason for a warning."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bar:
            transformers.utils.logging.enable_progress_bar()


def as_arrays(model: nn.Module) -> dict[str, NDArray[np.float32]]:
    """A model's weights by name: in Ray's object store a node has one copy, however many workers read it."""
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def as_tensors(arrays: Mapping[str, NDArray[np.float32]]) -> dict[str, Tensor]:
    """Tensors over read-only arrays, without a copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "not writable": nothing writes to them
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
