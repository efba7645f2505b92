"""Texts to predictions: encode, forward, decode; the one path of evaluate, classify, predict and serve."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification

from emoray import checkpoint
from emoray.errors import CheckpointError, ModelError
from emoray.forward import Forward, score
from emoray.metrics import softmax
from emoray.model import load_tokenizer, quiet
from emoray.storage import Storage, absolute
from emoray.tokens import Tokens, tokenize

TEXTS_A_BATCH = 256


@dataclass(frozen=True)
class Prediction:
    """What the model says of one text.

    Attributes:
        label: the likeliest label.
        score: its probability.
        scores: every label's probability, the likeliest first; they sum to 1.
        truncated: whether the text was cut to the model's length.
        tokens: tokens that the model saw, special tokens included.
    """

    label: str
    score: float
    scores: dict[str, float]
    truncated: bool
    tokens: int


class Classifier:
    """A trained model, ready for texts.

    Make one with `Classifier.load`.

    Attributes:
        labels: label names in the order of their ids.
        facts: what emoray.json holds: config, metrics, data fingerprint, versions.
    """

    def __init__(self, forward: Forward, tokenizer: Any, facts: dict[str, Any]) -> None:
        self._forward = forward.eval()
        self._tokenizer = tokenizer
        self.facts = facts
        self.labels: tuple[str, ...] = tuple(facts["labels"])
        self.temperature = float(facts["temperature"])
        self.max_length = int(facts["max_length"])

    @classmethod
    def load(cls, location: str | os.PathLike[str], device: str | None = None) -> Classifier:
        """Load and verify a model folder.

        Args:
            location: a checkpoint or `best/`, or a run's folder (its `best/` is taken); a path or a URI.
            device: e.g. "cuda"; None takes a GPU if there is one.

        Raises:
            CheckpointError: a file is damaged or missing, or it is no model that emoray trained.
        """
        folder = checkpoint.fetch(find_model(os.fspath(location)))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        facts = checkpoint.facts(folder)
        try:
            with quiet():
                model = AutoModelForSequenceClassification.from_pretrained(
                    folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
                )
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: can't be loaded: {error}") from None
        return cls(Forward(model.to(device)), load_tokenizer(str(folder)), facts)

    def __call__(self, texts: Sequence[str]) -> list[Prediction]:
        """Predictions for texts, in their order."""
        return self.decode(*self.logits(texts)) if len(texts) else []

    def logits(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], Tokens]:
        """Logits, float32 [texts, labels], before temperature, and the texts' tokens."""
        tokens = self.encode(texts)
        return score(self._forward, tokens, np.arange(len(tokens)), TEXTS_A_BATCH), tokens

    def encode(self, texts: Sequence[str]) -> Tokens:
        return tokenize(texts, self._tokenizer, self.max_length)

    def decode(self, logits: NDArray[np.float32], tokens: Tokens) -> list[Prediction]:
        """Probabilities at the model's temperature, by label."""
        probabilities = softmax(logits, self.temperature)
        lengths = tokens.lengths
        return [
            self._prediction(row, bool(tokens.truncated[i]), int(lengths[i])) for i, row in enumerate(probabilities)
        ]

    def _prediction(self, probabilities: Any, truncated: bool, tokens: int) -> Prediction:
        order = np.argsort(-probabilities, kind="stable")
        scores = {self.labels[i]: float(probabilities[i]) for i in order}
        label = self.labels[order[0]]
        return Prediction(label, scores[label], scores, truncated, tokens)


def find_model(location: str) -> Storage:
    """The model folder behind a location: itself, or the `best/` of a run.

    Raises:
        CheckpointError: neither is there.
    """
    folder = Storage(absolute(location))
    if folder.exists(checkpoint.MANIFEST):
        return folder
    if folder.exists(f"best/{checkpoint.MANIFEST}"):
        return folder / "best"
    if not folder.exists():
        near = _neighbours(location)
        raise CheckpointError(f"{location}: no such folder{near}; give a run's folder, its best/, or a checkpoint")
    if folder.exists(checkpoint.FOLDER):
        raise CheckpointError(
            f"{location}: this run isn't finished, so it has no best/ yet; give one of its checkpoints"
        )
    raise CheckpointError(f"{location}: holds no model: no {checkpoint.MANIFEST} there or in best/")


def _neighbours(location: str) -> str:
    parent = Path(location).parent
    names = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
    return f" (there are: {', '.join(names[:5])})" if names else ""
