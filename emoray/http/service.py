"""What the routes need of a model, as a protocol, which `on_ray/replica.py` fulfils."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from emoray.attribution import Explanation
from emoray.prediction import Prediction

State = Literal["starting", "ready", "stopping", "failed"]


@dataclass(frozen=True)
class Answer:
    """One model's say on the texts of one request.

    Attributes:
        model: `name@fingerprint` of the model that computed it; it may change between two requests.
        labels: names in the order of their ids.
        predictions: one a text, in the texts' order.
        logits: float32 [texts, labels], before calibration.
        explanations: one a text where they were asked for, else none.
    """

    model: str
    labels: tuple[str, ...]
    predictions: Sequence[Prediction]
    logits: NDArray[np.float32]
    explanations: Sequence[Explanation] = ()


@dataclass(frozen=True)
class Identity:
    """Which model answers.

    Attributes:
        name: the run's, e.g. `emotion`.
        fingerprint: 12 hex digits of the sha256 of the model's manifest.
        labels: names in the order of their ids.
    """

    name: str
    fingerprint: str
    labels: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}@{self.fingerprint}"


class Service(Protocol):
    """A model that answers, is being changed, or is not there yet."""

    async def start(self) -> None:
        """Begin to load; returns at once. Called once, when the server starts."""

    async def close(self) -> None:
        """Answer what is under way, then stop."""

    @property
    def state(self) -> State:
        """`ready` once the model is loaded and warm."""

    @property
    def identity(self) -> Identity | None:
        """The model that answers; None until there is one."""

    async def classify(
        self, texts: Sequence[str], deadline: float, truncate: bool = True, explain: bool = False
    ) -> Answer:
        """Score a request's texts.

        Args:
            texts: at least one.
            deadline: seconds of time.monotonic.
            truncate: cut texts that are too long; else they are refused.
            explain: say which words pulled each prediction, too: a forward pass more for each word.

        Raises:
            RequestError: `validation` (too long), `too_large` (too much to explain), `overloaded`, `unavailable`,
                `timeout`, `model`.
        """

    def info(self) -> dict[str, Any]:
        """For `/info`, JSON-able: max_length, engine, versions, and `swap`, the state of a model change."""

    async def change_model(self, location: str) -> None:
        """Begin to load another model beside the present one; returns at once, `/info` tells the rest.

        Raises:
            RequestError: `conflict` where another change is under way.
        """
