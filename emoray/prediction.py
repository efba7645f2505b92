"""What the model says of one text: apart from the classifier, so that code which only passes it on loads no torch."""

from __future__ import annotations

from dataclasses import dataclass


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
