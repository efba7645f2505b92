"""All that a run needs before its first step: data read and checked, texts tokenised, the encoder loaded."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from emoray import __version__, data
from emoray.config import TrainConfig
from emoray.errors import ModelError
from emoray.storage import absolute, is_uri
from emoray.token_cache import tokenize_cached
from emoray.tokens import Tokens, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Part:
    """A split, ready for the model.

    Attributes:
        texts: the texts themselves (empty for train: workers need only its tokens).
        tokens: their token ids.
        targets: label ids, int64 [rows].
        rows: row numbers in the source, int64 [rows], for messages.
        languages: of each text, where `data.language_column` names them (None for train).
    """

    texts: list[str]
    tokens: Tokens
    targets: NDArray[np.int64]
    rows: NDArray[np.int64]
    languages: list[str] | None = None


@dataclass(frozen=True)
class Task:
    """A run's input, checked; plain data that travels to workers.

    Attributes:
        config: the resolved config.
        labels: label names in the order of their ids.
        parts: train, validation and test.
        hf_config: the encoder's config with these labels.
        files: the Hugging Face folder beside the weights (config, tokenizer): name -> content.
        facts: data fingerprint, source, sizes and warnings; versions. JSON-able.
        tokenizer: digest of the tokenizer.
    """

    config: TrainConfig
    labels: tuple[str, ...]
    parts: dict[str, Part]
    hf_config: PretrainedConfig
    files: dict[str, bytes]
    facts: dict[str, Any]
    tokenizer: str

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the weights; a run goes on only where it is the same."""
        return {
            "recipe": self.config.recipe(),
            "data": self.facts["data"]["fingerprint"],
            "tokenizer": self.tokenizer,
        }


def prepare(
    config: TrainConfig, say: Callable[[str], None] = lambda _: None, dataset: data.Dataset | None = None
) -> Task:
    """Read and check everything but the weights.

    Args:
        say: called with one line before each part that takes time.
        dataset: the config's, where it has been read already.

    Raises:
        DataError, ModelError: all that is wrong with the data, or with the encoder.
    """
    config = with_absolute_paths(config)
    if dataset is None:
        say(f"Reading {config.data.dataset}")
        dataset = data.load(config.data)
    from emoray import model  # torch and transformers take seconds: bad data is told before they load

    hf_config = model.load_config(config.model, dataset.labels)
    tokenizer = model.load_tokenizer(config.model.pretrained)
    if len(tokenizer) > hf_config.vocab_size:
        raise ModelError(
            f"{config.model.pretrained}: the tokenizer has {len(tokenizer)} pieces, but the encoder has rows for "
            f"{hf_config.vocab_size}: give the tokenizer that belongs to the encoder"
        )
    say(f"Tokenising {sum(len(split.texts) for split in dataset.splits.values())} texts")
    parts = {
        name: Part(
            texts=[] if name == "train" else split.texts,
            tokens=tokenize_cached(split.texts, tokenizer, config.model.max_length),
            targets=split.labels,
            rows=split.rows,
            languages=None if name == "train" else split.languages,
        )
        for name, split in dataset.splits.items()
    }
    digest = tokenizer_digest(tokenizer)
    return Task(
        config, dataset.labels, parts, hf_config, model.folder_files(hf_config, tokenizer), _facts(dataset), digest
    )


def _facts(dataset: data.Dataset) -> dict[str, Any]:
    names = ("ray", "torch", "transformers", "tokenizers", "numpy")
    return {
        "data": {
            "source": dataset.source,
            "fingerprint": dataset.fingerprint,
            "rows": {name: len(split.texts) for name, split in dataset.splits.items()},
            "warnings": list(dataset.warnings),
        },
        "versions": {
            "emoray": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in names},
        },
        "platform": f"{platform.machine()} {sys.platform}",
    }


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The config with paths that mean the same in every process: workers run in other folders."""
    storage = absolute(config.run.storage_path)
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"storage_path": storage}),
            "model": config.model.model_copy(update={"pretrained": _absolute_if_here(config.model.pretrained)}),
            "data": config.data.model_copy(update={"dataset": _absolute_if_here(config.data.dataset)}),
        }
    )


def _absolute_if_here(name: str) -> str:
    expanded = os.path.expanduser(name)
    return name if is_uri(name) or name == "quickstart" or not os.path.exists(expanded) else absolute(expanded)
