"""A model on its way into service: loaded, verified, warmed, compared with the present one, let through the gate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from emoray.engines import Engine, Wanted
from emoray.errors import ModelError
from emoray.http.service import Identity
from emoray.metrics import Calibration
from emoray.prediction import Prediction
from emoray.quickstart import SENTENCES
from emoray.serve_config import GateConfig
from emoray.tokens import Tokens

_log = logging.getLogger("emoray.http")

_WARM_UP = ("a", "i feel wonderful today, and so does everyone around me", "word " * 600)
COMPARED = (
    *SENTENCES,
    "i feel wonderful today",
    "leave me alone, all of you",
    "i miss my grandmother so much that it hurts",
    "what was that noise in the cellar",
    "i love the way you laugh",
    "i never expected to win, i am speechless",
    "nothing ever works here",
    "tomorrow is monday",
    "the train leaves at nine",
)
"""What a new model and the present one are both asked; how far they agree stands in `/info`, and decides nothing."""


class Model(Protocol):
    """The part of `emoray.Classifier` that serving uses."""

    facts: dict[str, Any]
    labels: tuple[str, ...]
    calibration: Calibration
    max_length: int
    engine: Engine

    @property
    def fingerprint(self) -> str: ...

    def encode(self, texts: Sequence[str]) -> Tokens: ...

    def seen(self, texts: Sequence[str]) -> list[int]: ...

    def forward(self, tokens: Tokens) -> NDArray[np.float32]: ...

    def decode(self, logits: NDArray[np.float32], tokens: Tokens) -> list[Prediction]: ...


@dataclass(frozen=True)
class Candidate:
    """A model that has answered, and may be put into service.

    Attributes:
        comparison: how far it agrees with the present model; empty where there is none.
    """

    model: Model
    identity: Identity
    comparison: dict[str, Any] = field(default_factory=dict)


def load_model(location: str, engine: Wanted = "auto") -> Model:
    """A verified model from a folder, URI or run, in an engine for which it is exported where that is missing.

    Raises:
        CheckpointError, MissingExtraError, ModelError, StorageError: it can't be served.
    """
    from emoray import checkpoint
    from emoray.classifier import Classifier, find_model
    from emoray.export import ensure_for

    model = find_model(location)
    folder = checkpoint.fetch(model)
    try:
        ensure_for(engine, model, folder, _log.info)
    except BaseException:
        checkpoint.release(model, folder)
        raise
    return Classifier.from_copy(model, folder, engine=engine)


def bring_up(location: str, load: Callable[[str], Model], present: Model | None, gate: GateConfig) -> Candidate:
    """Bring a model up to its first answer, beside the one that serves. Blocks for seconds: call it in a thread.

    Raises:
        EmorayError: it can't be loaded, doesn't answer sensibly, or is not good enough for the gate.
    """
    model = load(location)
    _pass(gate, location, model, present)
    for text in _WARM_UP:
        finite(model.forward(model.encode([text])))
    name = str(model.facts.get("config", {}).get("run", {}).get("name", "emotion"))
    comparison = {} if present is None else compare(present, model)
    return Candidate(model, Identity(name, model.fingerprint, model.labels), comparison)


def _pass(gate: GateConfig, location: str, model: Model, present: Model | None) -> None:
    """Raises ModelError for a model that the gate keeps out."""
    bounds = []
    if gate.at_least is not None:
        bounds.append((gate.at_least, "gate.at_least"))
    if gate.may_lose is not None and present is not None:
        served = _reached(gate.metric, present)
        if served is None:
            raise ModelError(
                f"{location}: what serves has no test {gate.metric} to compare it with: set gate.may_lose to null"
            )
        bounds.append((served - gate.may_lose, f"what serves has {served:.4f}, and gate.may_lose is {gate.may_lose:g}"))
    if not bounds:
        return
    reached = _reached(gate.metric, model)
    if reached is None:
        raise ModelError(f"{location}: no test {gate.metric} is stored with it, so it can't pass the gate")
    for bound, why in bounds:
        if reached < bound:
            raise ModelError(f"{location}: its {gate.metric} is {reached:.4f}, below {bound:.4f} ({why}): not served")


def _reached(metric: str, model: Model) -> float | None:
    value = (model.facts.get("metrics", {}).get("test") or {}).get(metric)
    return float(value) if isinstance(value, (int, float)) else None


def compare(present: Model, new: Model) -> dict[str, Any]:
    """How far two models agree on `COMPARED`: texts with the same label, and the largest difference of a score."""
    ours, theirs = _answers(present), _answers(new)
    shared = set(present.labels) & set(new.labels)
    differences = [abs(a.scores[name] - b.scores[name]) for a, b in zip(ours, theirs, strict=True) for name in shared]
    return {
        "texts": len(COMPARED),
        "same_label": sum(a.label == b.label for a, b in zip(ours, theirs, strict=True)),
        "largest_difference": round(max(differences, default=1.0), 4),
        "same_labels": sorted(present.labels) == sorted(new.labels),
    }


def _answers(model: Model) -> list[Prediction]:
    tokens = model.encode(COMPARED)
    return model.decode(model.forward(tokens), tokens)


def finite(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same logits.

    Raises:
        ModelError: where a model's output is NaN or infinite.
    """
    if not np.isfinite(logits).all():
        raise ModelError("the model's output is not finite")
    return logits
