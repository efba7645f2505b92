"""Texts to predictions: encode, forward, decode; the one path of evaluate, classify, predict and serve."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from emoray import checkpoint
from emoray.attribution import Explanation, explain
from emoray.engines import Engine, Wanted
from emoray.engines.choice import open_engine
from emoray.errors import CheckpointError, ModelError
from emoray.metrics import Calibration, softmax
from emoray.prediction import Prediction
from emoray.storage import Storage, absolute, is_uri
from emoray.tokens import Tokens, characters_seen, tokenize
from emoray.wording import listing, nearest


class Classifier:
    """A trained model, ready for texts.

    Make one with `Classifier.load`.

    Attributes:
        engine: what runs its forward pass.
        labels: label names in the order of their ids.
        facts: what emoray.json holds: config, metrics, data fingerprint, versions.
        folder: where it was loaded from.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, facts: dict[str, Any], folder: Path) -> None:
        self.engine = engine
        self._tokenizer = tokenizer
        self.facts, self.folder = facts, folder
        self.labels: tuple[str, ...] = tuple(facts["labels"])
        self.calibration = Calibration(float(facts["temperature"]), float(facts.get("power", 1.0)))
        self.max_length = int(facts["max_length"])

    @classmethod
    def load(
        cls,
        location: str | os.PathLike[str],
        device: str | None = None,
        engine: Wanted = "torch",
        threads: int | None = None,
    ) -> Classifier:
        """Load and verify a model folder.

        Args:
            location: a checkpoint or `best/`, or a run's folder (its `best/` is taken); a path or a URI.
            device: e.g. "cuda"; None takes a GPU if there is one. The ONNX engines run on CPUs.
            engine: "onnx" and "onnx-int8" need an export (`emoray export`); "auto" takes the fastest that is there.
            threads: on a CPU; None takes the process's own.

        Raises:
            CheckpointError: a file is damaged or missing, or it is not a model that emoray trained.
            ModelError: it can't be loaded, or the engine has no export of it.
        """
        model = find_model(os.fspath(location))
        return cls.from_copy(model, checkpoint.fetch(model), device, engine, threads)

    @classmethod
    def from_copy(
        cls,
        model: Storage,
        folder: Path,
        device: str | None = None,
        engine: Wanted = "torch",
        threads: int | None = None,
    ) -> Classifier:
        """As `load`, for what `checkpoint.fetch` gave of a model: where that is a copy, it goes with the classifier."""
        try:
            classifier = cls.from_folder(folder, device, engine, threads)
        except BaseException:
            checkpoint.release(model, folder)
            raise
        weakref.finalize(classifier, checkpoint.release, model, folder)
        return classifier

    @classmethod
    def from_folder(
        cls, folder: Path, device: str | None = None, engine: Wanted = "torch", threads: int | None = None
    ) -> Classifier:
        """As `load`, for a local folder whose sums were checked, or that is only now being written."""
        facts = checkpoint.facts(folder)
        tokenizer = _load_tokenizer(folder)
        return cls(open_engine(engine, folder, facts, device, threads), tokenizer, facts, folder)

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits that change with any file of the model's folder, which must be whole."""
        return checkpoint.fingerprint(self.folder)

    def __call__(self, texts: Sequence[str]) -> list[Prediction]:
        """Predictions for texts, in their order."""
        return self.decode(*self.logits(texts)) if len(texts) else []

    def explain(self, texts: Sequence[str], labels: Sequence[str] | None = None) -> list[Explanation]:
        """Which words of each text pulled the prediction, and which way: see `attribution.py`.

        Args:
            labels: of each text, the label whose pull is asked for; None takes the predicted one.

        Raises:
            ValueError: a label that the model doesn't have.
        """
        return explain(self, texts, labels)

    def logits(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], Tokens]:
        """Logits, float32 [texts, labels], before calibration, and the texts' tokens."""
        tokens = self.encode(texts)
        return self.forward(tokens), tokens

    def forward(self, tokens: Tokens) -> NDArray[np.float32]:
        """Logits, float32 [texts, labels], before calibration."""
        return self.engine.forward(tokens)

    def encode(self, texts: Sequence[str]) -> Tokens:
        return tokenize(texts, self._tokenizer, self.max_length)

    def seen(self, texts: Sequence[str]) -> list[int]:
        """Of each text, how many characters the model sees before it is cut."""
        return characters_seen(texts, self._tokenizer, self.max_length)

    def decode(self, logits: NDArray[np.float32], tokens: Tokens) -> list[Prediction]:
        """Probabilities, calibrated, by label."""
        probabilities = softmax(logits, *self.calibration)
        lengths = tokens.lengths
        return [
            self._prediction(row, bool(tokens.truncated[i]), int(lengths[i])) for i, row in enumerate(probabilities)
        ]

    def _prediction(self, probabilities: Any, truncated: bool, tokens: int) -> Prediction:
        order = np.argsort(-probabilities, kind="stable")
        scores = {self.labels[i]: float(probabilities[i]) for i in order}
        label = self.labels[order[0]]
        return Prediction(label, scores[label], scores, truncated, tokens)


def _load_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer alone: transformers, which takes seconds to load, isn't needed for it."""
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # what tokenizers raises is a bare Exception
        raise ModelError(f"{folder}/tokenizer.json: can't be read: {error}") from None


def locate_model(location: str, base: str) -> str:
    """Where a model is: a URI or an absolute path as it stands, else below `base`, or the run of that name in runs/."""
    location = os.path.expanduser(location)
    if is_uri(location) or os.path.isabs(location):
        return location
    named = os.path.join(base, "runs", location)
    below = os.path.join(base, location)
    return named if not os.path.exists(below) and os.path.exists(named) else below


def find_model(location: str) -> Storage:
    """The model folder behind a location: itself, or the `best/` of a run, or what `locate_model` finds.

    Raises:
        CheckpointError: neither is there.
    """
    folder = Storage(absolute(locate_model(location, os.getcwd())))
    if folder.exists(checkpoint.MANIFEST):
        return folder
    if folder.exists(f"{checkpoint.BEST}/{checkpoint.MANIFEST}"):
        return folder / checkpoint.BEST
    if not folder.exists():
        near = _neighbours(location)
        raise CheckpointError(
            f"{location}: no such folder{near}; give a run's folder or name, its best/, or a checkpoint"
        )
    if folder.exists(checkpoint.FOLDER):
        raise CheckpointError(
            f"{location}: this run isn't finished, so it has no best/ yet; give one of its checkpoints"
        )
    raise CheckpointError(f"{location}: holds no model: no {checkpoint.MANIFEST} there or in best/")


def _neighbours(location: str) -> str:
    parent = Path(location).parent
    if not parent.name and Path("runs").is_dir():
        parent = Path("runs")
    names = sorted(p.name for p in parent.iterdir() if p.is_dir() and p.name[:1] != ".") if parent.is_dir() else []
    return nearest(Path(location).name, names) or (f" (there are: {listing(names, 5)})" if names else "")
