"""The endpoint's metrics over `ray.util.metrics`: Prometheus sees each name with `ray_` in front of it.

emoray_requests_total{route, status}     requests answered; 499: the client had gone
emoray_request_seconds{route}            from a request's arrival at the replica to its answer
emoray_queue_seconds                     from a request's arrival in the queue to the start of a text's batch
emoray_batch_texts, emoray_batch_tokens  a batch's size
emoray_padding_tokens_total              tokens of padding that were computed beside real ones
emoray_model_seconds                     a batch's time in the model
emoray_failures_total{kind}              not computed: overloaded, expired, dropped, model
emoray_predictions_total{label}          texts by their likeliest label: a drifting input shows here,
emoray_confidence{label}                 and in that label's probability
emoray_model_info{model}                 1 for the name@fingerprint in service, 0 for those before
emoray_swaps_total{outcome}              model changes that this replica saw: accepted, refused

Series of replicas that are gone linger: aggregate with sum or max.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter as Tally
from typing import Any, TypeVar

from ray.util.metrics import Counter, Gauge, Histogram

FLUSH_S = 1.0
"""How often what was counted is handed to Ray, in seconds; Ray itself reports every few."""
_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
_POWERS = [float(2**i) for i in range(14)]
_MOST = 20_000
"""Observations of one histogram kept between two flushes; more are sampled away: a percentile stands all the same."""

Key = tuple[str, tuple[tuple[str, str], ...]]


_M = TypeVar("_M", Counter, Histogram)


def _by_name(*metrics: _M) -> dict[str, _M]:
    return {str(metric.info["name"]): metric for metric in metrics}


class RayMetrics:
    """See `emoray.http.metrics.Metrics`.

    The event loop only appends to lists; a thread hands them to Ray, whose calls cost tens of microseconds each.
    """

    def __init__(self) -> None:
        self._counters = _by_name(
            Counter("emoray_requests_total", "Requests answered", ("route", "status")),
            Counter("emoray_padding_tokens_total", "Tokens of padding computed"),
            Counter("emoray_failures_total", "Requests not computed", ("kind",)),
            Counter("emoray_predictions_total", "Texts by likeliest label", ("label",)),
            Counter("emoray_swaps_total", "Model changes", ("outcome",)),
        )
        confidence = [0.1 * i for i in range(1, 9)] + [0.85, 0.9, 0.95, 0.99, 1.0]
        self._histograms = _by_name(
            Histogram("emoray_request_seconds", "A request's time", _SECONDS, ("route",)),
            Histogram("emoray_queue_seconds", "A text's wait", _SECONDS),
            Histogram("emoray_batch_texts", "Texts of a batch", _POWERS[:11]),
            Histogram("emoray_batch_tokens", "Tokens of a batch", _POWERS),
            Histogram("emoray_model_seconds", "A batch's time in the model", _SECONDS),
            Histogram("emoray_confidence", "The likeliest label's probability", confidence, ("label",)),
        )
        self._model_info = Gauge("emoray_model_info", "1 for the model in service", ("model",))
        self._models: dict[str, float] = {}
        self._sums: Tally[Key] = Tally()
        self._seen: dict[Key, list[float]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._work, name="emoray-metrics", daemon=True).start()

    def request(self, route: str, status: int, seconds: float) -> None:
        self._count("emoray_requests_total", 1, route=route, status=str(status))
        self._observe("emoray_request_seconds", seconds, route=route)

    def waited(self, seconds: float) -> None:
        self._observe("emoray_queue_seconds", seconds)

    def batch(self, texts: int, tokens: int, padding: int, seconds: float) -> None:
        self._observe("emoray_batch_texts", texts)
        self._observe("emoray_batch_tokens", tokens)
        self._observe("emoray_model_seconds", seconds)
        self._count("emoray_padding_tokens_total", padding)

    def failure(self, kind: str) -> None:
        self._count("emoray_failures_total", 1, kind=kind)

    def prediction(self, label: str, score: float) -> None:
        self._count("emoray_predictions_total", 1, label=label)
        self._observe("emoray_confidence", score, label=label)

    def model(self, model: str) -> None:
        with self._lock:
            self._models = {**dict.fromkeys(self._models, 0.0), model: 1.0}

    def swap(self, outcome: str) -> None:
        self._count("emoray_swaps_total", 1, outcome=outcome)

    def _count(self, name: str, amount: float, **tags: str) -> None:
        with self._lock:
            self._sums[name, tuple(tags.items())] += amount  # type: ignore[assignment]

    def _observe(self, name: str, value: float, **tags: str) -> None:
        with self._lock:
            seen = self._seen.setdefault((name, tuple(tags.items())), [])
            if len(seen) < _MOST:
                seen.append(value)

    def _work(self) -> None:
        pause = threading.Event()
        while True:
            pause.wait(FLUSH_S)
            try:
                self.flush()
            except Exception as error:  # counting must never end a replica
                logging.getLogger("emoray.http").error("metrics could not be handed to Ray", exc_info=error)

    def flush(self) -> None:
        """Hand everything counted so far to Ray."""
        with self._lock:
            sums, self._sums = self._sums, Tally()
            seen, self._seen = self._seen, {}
            models = dict(self._models)
        for (name, tags), amount in sums.items():
            if amount > 0:
                self._counters[name].inc(amount, tags=dict(tags))
        for (name, tags), values in seen.items():
            observe: Any = self._histograms[name].observe
            for value in values:
                observe(value, tags=dict(tags))
        for model, value in models.items():
            self._model_info.set(value, tags={"model": model})
