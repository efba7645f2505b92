"""What the endpoint counts, as a protocol: `on_ray` gives one over `ray.util.metrics`, tests one over lists."""

from __future__ import annotations

from typing import Protocol


class Metrics(Protocol):
    """Called on the event loop; must return at once and never raise."""

    def request(self, route: str, status: int, seconds: float) -> None:
        """One HTTP request was answered.

        Args:
            route: the route's template, e.g. `/v2/models/{name}/infer`, or `unmatched`.
            status: 499 where the client went away before its answer.
        """

    def waited(self, seconds: float) -> None:
        """One text waited so long from its request's arrival in the queue to its batch's start."""

    def batch(self, texts: int, tokens: int, padding: int, seconds: float) -> None:
        """One batch was computed: real tokens, tokens of padding that the engine computed beside them, model time."""

    def failure(self, kind: str) -> None:
        """One request was not computed; kind is `overloaded`, `expired`, `dropped` or `model`."""

    def prediction(self, label: str, score: float) -> None:
        """One text was answered: its likeliest label and that label's probability."""

    def model(self, model: str) -> None:
        """A model, `name@fingerprint`, answers from now on."""

    def swap(self, outcome: str) -> None:
        """A model change ended: `accepted` or `refused`."""


class Silent:
    """Counts nothing."""

    def request(self, route: str, status: int, seconds: float) -> None: ...

    def waited(self, seconds: float) -> None: ...

    def batch(self, texts: int, tokens: int, padding: int, seconds: float) -> None: ...

    def failure(self, kind: str) -> None: ...

    def prediction(self, label: str, score: float) -> None: ...

    def model(self, model: str) -> None: ...

    def swap(self, outcome: str) -> None: ...
