"""Which words pulled a prediction: each whole word is left out once, and the model is asked again.

Occlusion (Zeiler and Fergus 2014; Li et al. 2016, "Understanding Neural Networks through Representation Erasure")
needs nothing of a model but its logits, so that the same figures come from torch and from ONNX Runtime, packed or
padded. Rejected: integrated gradients, which need the gradients of an engine that has none, and give a number to each
piece of a word and to [CLS].
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from emoray.metrics import Calibration, calibrated
from emoray.tokens import Tokens

Array = npt.NDArray[Any]

# Scripts written without spaces: a sign is taken for a word.
_SIGNS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# What belongs to the letter before it, though no letter itself: vowel signs of Indian scripts, Arabic vowels, accents.
_MARKS = "".join(sign for sign in map(chr, range(0x300, 0x1E950)) if unicodedata.category(sign)[0] == "M")
_PART = rf"[^\W{_SIGNS}](?:[^\W{_SIGNS}]|[{_MARKS}\u200c\u200d])*"
_WORD = re.compile(rf"[{_SIGNS}]|{_PART}(?:['’\-]{_PART})*|[^\w\s]+")
_AT_ONCE = 1024
"""Texts without one of their words that are made and asked at once: of a long text there are thousands, all long."""
_MARGIN = 1000
"""Characters behind those that the model sees that are kept: without a word, some of them move into its view."""


class Decoder(Protocol):
    """What must be known of a model to read its logits."""

    labels: tuple[str, ...]
    calibration: Calibration


class Model(Decoder, Protocol):
    """What is asked of a model: a Classifier, whatever its engine."""

    def logits(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.float32], Tokens]: ...

    def seen(self, texts: Sequence[str]) -> list[int]:
        """Of each text, how many characters the model sees before it is cut."""


@dataclass(frozen=True)
class WordEffect:
    """How one word pulled.

    Attributes:
        word: as it stands in the text.
        start: index of its first character in the text.
        end: index after its last character.
        effect: by how much it raises the log-odds of the label, in nats, calibrated; below 0 where
            it speaks against the label.
    """

    word: str
    start: int
    end: int
    effect: float


@dataclass(frozen=True)
class Explanation:
    """The words of one text, in its order, and what each does for a label."""

    label: str
    words: tuple[WordEffect, ...]

    def strongest(self, count: int = 5) -> list[WordEffect]:
        """The words that pulled most, either way, strongest first."""
        return sorted(self.words, key=lambda word: (-abs(word.effect), word.start))[:count]

    def text(self, count: int = 5) -> str:
        """`sadness because of: lonely +4.1, not +1.2, smiled -0.8`, for a terminal."""
        listed = ", ".join(f"{word.word} {word.effect:+.1f}" for word in self.strongest(count))
        return f"{self.label} because of: {listed}" if listed else f"{self.label}: there is no word to leave out"


def explain(model: Model, texts: Sequence[str], labels: Sequence[str] | None = None) -> list[Explanation]:
    """Leave out each whole word of each text, and see how far the log-odds of a label fall.

    Words are runs of letters and digits (an apostrophe or hyphen inside belongs to them), runs of other signs (an
    emoji, "!!!"), and single signs in Chinese and Japanese. What the model doesn't see of a long text has no effect.

    Args:
        texts: any number of them; the cost is a forward pass of each text a word.
        labels: of each text, the label in question; None takes the likeliest.

    Returns:
        One explanation a text. A text of a single word is compared with the empty text.

    Raises:
        ValueError: a label that the model doesn't have.
    """
    if not len(texts):
        return []
    occlusion = Occlusion.of(texts, model.seen(texts))
    whole, _ = model.logits(texts)
    variants, without = occlusion.variants(), [whole[:0]]
    while some := list(islice(variants, _AT_ONCE)):
        without.append(model.logits(some)[0])
    return occlusion.explanations(model, whole, np.concatenate(without), labels)


@dataclass(frozen=True)
class Occlusion:
    """Texts, and what is left of them without each of their words: what a model must be asked to explain them.

    Attributes:
        texts: as they were given.
        spans: of each text, where its words begin and end, in characters.
        seen: of each text, how many characters the model sees.
    """

    texts: Sequence[str]
    spans: Sequence[Sequence[tuple[int, int]]]
    seen: Sequence[int]

    @classmethod
    def of(cls, texts: Sequence[str], seen: Sequence[int]) -> Occlusion:
        """Args: seen: of each text, how many characters the model sees."""
        spans = [[m.span() for m in _WORD.finditer(text[:end])] for text, end in zip(texts, seen, strict=True)]
        return cls(texts, spans, seen)

    def variants(self) -> Iterator[str]:
        """Each text without each of its words in turn, text by text, and little of what the model doesn't see."""
        for text, found, seen in zip(self.texts, self.spans, self.seen, strict=True):
            for start, end in found:
                yield text[:start] + text[end : seen + (end - start) + _MARGIN]

    def explanations(
        self, model: Decoder, whole: Array, without: Array, labels: Sequence[str] | None = None
    ) -> list[Explanation]:
        """One a text, from the model's logits.

        Args:
            whole: of the texts, [texts, L].
            without: of the variants, [variants, L].
            labels: of each text, the label in question; None takes the likeliest.
        """
        targets = whole.argmax(1) if labels is None else np.array([_id(model, label) for label in labels])
        owners = np.repeat(np.arange(len(self.texts)), [len(found) for found in self.spans])
        odds = log_odds(whole, targets, model.calibration)
        left = log_odds(without, targets[owners], model.calibration) if len(without) else np.zeros(0)
        effects = iter((odds[owners] - left).tolist())
        return [
            Explanation(
                model.labels[target],
                tuple(WordEffect(text[start:end], start, end, next(effects)) for start, end in found),
            )
            for text, found, target in zip(self.texts, self.spans, targets, strict=True)
        ]


def log_odds(logits: Array, targets: Array, calibration: Calibration) -> Array:
    """log(p / (1 - p)) of one label a row, in nats, float64 [n]; finite even where p rounds to 1.

    Args:
        logits: [n, L].
        targets: ids of the labels, [n].
    """
    scaled = calibrated(logits, *calibration)
    rows = np.arange(len(scaled))
    own = scaled[rows, targets].copy()
    scaled[rows, targets] = -np.inf
    most = scaled.max(1)
    return np.asarray(own - most - np.log(np.exp(scaled - most[:, None]).sum(1)))


def _id(model: Decoder, label: str) -> int:
    if label not in model.labels:
        raise ValueError(f"'{label}' is none of the model's labels: {', '.join(model.labels)}")
    return model.labels.index(label)
