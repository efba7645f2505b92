"""A service in this process: a classifier behind a batcher. `emoray.http.app` over it is a whole endpoint without Ray.

Three steps a request: encode (threads), forward (the batcher's thread), decode.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from emoray.classifier import Prediction
from emoray.errors import EmorayError
from emoray.http.batcher import Batcher
from emoray.http.errors import RequestError, invalid, unavailable
from emoray.http.metrics import Metrics, Silent
from emoray.http.service import Identity, Scored, State
from emoray.serve_config import ServeConfig
from emoray.tokens import Tokens

_log = logging.getLogger("emoray.http")

GRACE_S = 30.0
"""How long a stopping server goes on with the requests it has."""
_DECODE_HERE = 64
"""Texts up to which decoding is quicker than a thread's hand-over."""
_WARM_UP = ("a", "i feel wonderful today, and so does everyone around me", "word " * 600)


class Model(Protocol):
    """The part of `emoray.Classifier` that serving uses."""

    facts: dict[str, Any]
    labels: tuple[str, ...]
    max_length: int

    def encode(self, texts: Sequence[str]) -> Tokens: ...

    def logits(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], Tokens]: ...

    def decode(self, logits: NDArray[np.float32], tokens: Tokens) -> list[Prediction]: ...


Loaded = tuple[Model, str]
"""A model and its fingerprint."""


def load_model(location: str) -> Loaded:
    """A verified model from a folder, URI or run.

    Raises:
        CheckpointError, ModelError, StorageError: it can't be served.
    """
    from emoray import checkpoint
    from emoray.classifier import Classifier, find_model

    folder = checkpoint.fetch(find_model(location))
    return Classifier.load(folder), fingerprint(folder)


def fingerprint(folder: Path) -> str:
    """12 hex digits that change with any file of a model folder."""
    from emoray import checkpoint

    return hashlib.sha256((folder / checkpoint.MANIFEST).read_bytes()).hexdigest()[:12]


@dataclass(frozen=True)
class _Served:
    """A model in service, with the queue in front of it."""

    model: Model
    identity: Identity
    batcher: Batcher[str, NDArray[np.float32]]


class LocalService:
    """See `emoray.http.service.Service`.

    Args:
        config: `model` says what is loaded at the start.
        load: how; tests give dummies.
        metrics: told of batches and predictions.
    """

    def __init__(
        self, config: ServeConfig, load: Callable[[str], Loaded] = load_model, metrics: Metrics | None = None
    ) -> None:
        self._config, self._load = config, load
        self._metrics = metrics or Silent()
        self._served: _Served | None = None
        self._state: State = "starting"
        self._swap: dict[str, Any] = {"state": "idle"}
        # Two threads, so that one huge text does not hold up the others; a fast tokenizer may be shared.
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="emoray-encode")
        self._loaders = ThreadPoolExecutor(1, thread_name_prefix="emoray-load")
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def state(self) -> State:
        return self._state

    @property
    def identity(self) -> Identity | None:
        return self._served.identity if self._served else None

    async def start(self) -> None:
        self._spawn(self._bring(self._config.model))

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def change_model(self, location: str) -> None:
        if self._state in ("starting", "stopping") or self._swap["state"] == "loading":
            raise RequestError("conflict", "a model is being loaded: look at /info, and try again when it is done")
        self._spawn(self._bring(location))

    async def _bring(self, location: str) -> None:
        """Load, verify and warm a model beside the present one, then change one reference."""
        before = self._served
        self._swap = {"state": "loading", "to": location}
        try:
            served = await asyncio.get_running_loop().run_in_executor(self._loaders, self._prepare, location)
        except Exception as error:
            expected = isinstance(error, EmorayError)
            _log.error("model %s: can't be served: %s", location, error, exc_info=None if expected else error)
            # What a model's folder says of itself is for its owner: the log has it, /info the first line.
            reason = str(error).splitlines()[0] if expected else "the server's log has the cause"
            self._swap = {"state": "failed", "to": location, "error": reason}
            if before is None:
                self._state = "failed"
            return
        if self._state == "stopping":
            return
        self._served, self._state = served, "ready"
        self._swap = {"state": "idle", "from": str(before.identity) if before else None, "to": str(served.identity)}
        if before is not None:
            await before.batcher.close(GRACE_S)

    def _prepare(self, location: str) -> _Served:
        """In a thread: a model that has answered once."""
        model, digest = self._load(location)
        name = str(model.facts.get("config", {}).get("run", {}).get("name", "emotion"))
        for text in _WARM_UP:
            _finite(model.logits([text])[0])
        batcher = Batcher[str, NDArray[np.float32]](
            lambda texts: list(_finite(model.logits(texts)[0])),
            max_tokens=self._config.batching.max_tokens,
            max_requests=self._config.limits.max_queued_requests,
            max_wait_s=self._config.limits.max_queue_s,
            metrics=self._metrics,
        )
        return _Served(model, Identity(name, digest, model.labels), batcher)

    async def classify(self, texts: Sequence[str], deadline: float, truncate: bool = True) -> Scored:
        loop = asyncio.get_running_loop()
        try:
            served, tokens, rows = await self._score(texts, deadline, truncate)
            logits = np.stack(rows)
            decode = served.model.decode
            if len(texts) <= _DECODE_HERE:
                predictions = decode(logits, tokens)
            else:
                predictions = await loop.run_in_executor(self._encoders, decode, logits, tokens)
        except (RequestError, asyncio.CancelledError):
            raise
        except Exception as error:
            _log.error("the model failed on a request of %d texts", len(texts), exc_info=error)
            raise RequestError("model", "the model failed on one of these texts; the server's log has more") from error
        for prediction in predictions:
            self._metrics.prediction(prediction.label, prediction.score)
        return Scored(str(served.identity), served.identity.labels, predictions, logits)

    async def _score(
        self, texts: Sequence[str], deadline: float, truncate: bool
    ) -> tuple[_Served, Tokens, list[NDArray[np.float32]]]:
        while True:
            served = self._served
            if served is None or self._state == "stopping":
                raise _not_there(self._state)
            served.batcher.admit(0, deadline)  # what is refused anyway need not be tokenised
            tokens = await asyncio.get_running_loop().run_in_executor(self._encoders, served.model.encode, texts)
            if not truncate and tokens.truncated.any():
                raise too_long(int(np.argmax(tokens.truncated)), served.model.max_length)
            if served is self._served:  # else the model was changed meanwhile, and the old queue is closed
                return served, tokens, await served.batcher.submit(texts, tokens.lengths.tolist(), deadline)

    def info(self) -> dict[str, Any]:
        served = self._served
        facts = served.model.facts if served else {}
        return {
            "max_length": served.model.max_length if served else None,
            "engine": "torch",
            "metrics": facts.get("metrics", {}).get("test"),
            "versions": facts.get("versions", {}),
            "queued": {
                "requests": served.batcher.requests if served else 0,
                "tokens": served.batcher.queued_tokens if served else 0,
            },
            "swap": self._swap,
        }

    async def close(self) -> None:
        self._state = "stopping"
        if self._served is not None:
            await self._served.batcher.close(GRACE_S)
        for executor in (self._encoders, self._loaders):
            executor.shutdown(wait=False, cancel_futures=True)


def _finite(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(logits).all():
        raise ArithmeticError("the model's output is not finite")
    return logits


def _not_there(state: State) -> RequestError:
    if state == "failed":
        return unavailable("the model could not be loaded; /info and the server's log say why", 30)
    if state == "stopping":
        return unavailable("this server is stopping: try again")
    return unavailable("the model is being loaded: try again soon", 2)


def too_long(place: int, max_length: int) -> RequestError:
    return invalid(
        f"text {place} is longer than the model's {max_length} tokens: shorten it, or let it be cut with truncate: true"
    )
