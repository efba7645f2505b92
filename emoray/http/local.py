"""The model of one replica: a classifier behind a batcher, until another takes its place.

Three steps a request: encode (threads), forward (the batcher's thread), decode.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoray.attribution import Occlusion
from emoray.engines import Wanted
from emoray.errors import EmorayError
from emoray.http.batcher import Batcher
from emoray.http.candidate import Candidate, Model, bring_up, finite, load_model
from emoray.http.errors import RequestError, invalid, unavailable
from emoray.http.metrics import Metrics, Silent
from emoray.http.service import Answer, Identity, State
from emoray.serve_config import GateConfig, ServeConfig
from emoray.tokens import Tokens
from emoray.wording import first_line

_log = logging.getLogger("emoray.http")

GRACE_S = 30.0
"""How long a stopping server goes on with the requests it has."""
_DECODE_HERE = 64
"""Texts up to which decoding is quicker than a thread's hand-over."""
_ENCODE_HERE = 1000
"""Characters up to which tokenising is: 35 microseconds for a short message."""

_PROBE, _PROBE_S = "a", 10.0
"""What a model that has failed is asked, and how long it may take, in seconds."""

Ids = NDArray[np.int32]
"""One text as token ids."""


@dataclass(frozen=True)
class _Served:
    """A model in service, with the queue in front of it."""

    model: Model
    identity: Identity
    batcher: Batcher[Ids, NDArray[np.float32]]


class LocalModel:
    """A model that is brought up, put into service, asked, and changed; which one, and when, is the replica's matter.

    Args:
        load: how a model is loaded; None loads into the engine that the config names. Tests give dummies.
        metrics: told of batches and predictions.
    """

    def __init__(
        self, config: ServeConfig, load: Callable[[str], Model] | None = None, metrics: Metrics | None = None
    ) -> None:
        self._config, self._load = config, load
        self._metrics = metrics or Silent()
        self._served: _Served | None = None
        self._state: State = "starting"
        self._failing = False
        # Two threads, so that one huge text does not hold up the others: a fast tokenizer is shared by them.
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="emoray-encode")
        self._loaders = ThreadPoolExecutor(1, thread_name_prefix="emoray-load")
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def state(self) -> State:
        return self._state

    @property
    def identity(self) -> Identity | None:
        return self._served.identity if self._served else None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def bring_up(self, location: str, gate: GateConfig, engine: Wanted | None = None) -> Candidate:
        """Load, check and warm a model beside the present one, in a thread.

        Args:
            engine: None takes the config's.

        Raises:
            EmorayError: it can't be served.
        """
        present = self._served.model if self._served else None
        load = self._load or partial(load_model, engine=engine or self._config.engine)
        run = asyncio.get_running_loop().run_in_executor
        candidate = await run(self._loaders, bring_up, location, load, present, gate)
        name = self._config.served_name or candidate.identity.name
        return replace(candidate, identity=replace(candidate.identity, name=name))

    def adopt(self, candidate: Candidate) -> None:
        """Put a model into service: one reference changes, and the old one answers what it has."""
        if self._state == "stopping":
            return
        model, before = candidate.model, self._served
        batcher = Batcher[Ids, NDArray[np.float32]](
            lambda texts: list(finite(model.forward(Tokens.of(texts)))),
            **_bounds(self._config),
            padding=model.engine.padding,
            metrics=self._metrics,
        )
        self._served, self._state = _Served(model, candidate.identity, batcher), "ready"
        self._metrics.model(str(candidate.identity))
        if before is not None:
            self._metrics.swap("accepted")
            self._spawn(before.batcher.close(GRACE_S))

    def refuse(self) -> None:
        """Note that a model is not served; without another one this is the end of the start."""
        if self._served is None:
            self._state = "failed"
        else:
            self._metrics.swap("refused")

    async def classify(
        self, texts: Sequence[str], deadline: float, truncate: bool = True, explain: bool = False
    ) -> Answer:
        loop = asyncio.get_running_loop()
        try:
            served, tokens, occlusion, rows = await self._score(texts, deadline, truncate, explain)
            logits, without = np.stack(rows[: len(texts)]), rows[len(texts) :]
            decode = served.model.decode
            if len(texts) <= _DECODE_HERE:
                predictions = decode(logits, tokens)
            else:
                predictions = await loop.run_in_executor(self._encoders, decode, logits, tokens)
        except (RequestError, asyncio.CancelledError):
            raise
        except Exception as error:
            self._failing = True
            _log.error("the model failed on a request of %d texts", len(texts), exc_info=error)
            raise RequestError("model", "the model failed on one of these texts; the server's log has more") from error
        for prediction in predictions:
            self._metrics.prediction(prediction.label, prediction.score)
        explanations = occlusion.explanations(served.model, logits, np.array(without)) if occlusion else ()
        return Answer(str(served.identity), served.identity.labels, predictions, logits, explanations)

    async def is_broken(self) -> bool:
        """Whether the model fails on any text, as after an error of its GPU; it is asked only once it has failed."""
        if not self._failing:
            return False
        try:
            await self._score([_PROBE], time.monotonic() + _PROBE_S, truncate=True, explain=False)
        except RequestError:
            return False  # busy, or there is no model: not its fault
        except Exception as error:
            _log.error("the model fails on any text", exc_info=error)
            return True
        self._failing = False
        return False

    async def _score(
        self, texts: Sequence[str], deadline: float, truncate: bool, explain: bool
    ) -> tuple[_Served, Tokens, Occlusion | None, list[NDArray[np.float32]]]:
        """The texts' tokens and logits; where they are to be explained, followed by the logits without each word."""
        run = asyncio.get_running_loop().run_in_executor
        while True:
            served = self._served
            if served is None or self._state == "stopping":
                raise _not_there(self._state)
            served.batcher.admit(0, deadline)  # what is refused anyway need not be tokenised
            if sum(map(len, texts)) <= _ENCODE_HERE:
                tokens = served.model.encode(texts)
            else:
                tokens = await run(self._encoders, served.model.encode, texts)
            if not truncate and tokens.truncated.any():
                raise too_long(int(np.argmax(tokens.truncated)), served.model.max_length)
            occlusion, parts = None, [tokens]
            if explain:
                occlusion = await run(self._encoders, _occlusion, served.model, texts, self._config.limits.max_texts)
                parts.append(await run(self._encoders, _encode_variants, served.model, occlusion))
            if served is self._served:  # else the model was changed meanwhile, and the old queue is closed
                ids = [part[i] for part in parts for i in range(len(part))]
                lengths = [length for part in parts for length in part.lengths.tolist()]
                return served, tokens, occlusion, await served.batcher.submit(ids, lengths, deadline)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for the model."""
        return self._served.batcher.queued_tokens if self._served else 0

    @property
    def busy_s(self) -> float:
        """Seconds for which the present model has computed, since it is in service."""
        return self._served.batcher.busy_s if self._served else 0.0

    def reconfigure(self, config: ServeConfig) -> None:
        """Take over another config; its model and engine hold from the next change of the model on."""
        self._config = config
        if self._served is not None:
            self._served.batcher.reconfigure(**_bounds(config))

    def info(self) -> dict[str, Any]:
        served = self._served
        facts = served.model.facts if served else {}
        return {
            "max_length": served.model.max_length if served else None,
            "engine": served.model.engine.name if served else None,
            "engines": served.model.engine.figures if served else {},
            "metrics": facts.get("metrics", {}).get("test"),
            "versions": facts.get("versions", {}),
            "queued": {
                "requests": served.batcher.requests if served else 0,
                "tokens": served.batcher.queued_tokens if served else 0,
            },
        }

    async def close(self) -> None:
        self._state = "stopping"
        if self._served is not None:
            await self._served.batcher.close(GRACE_S)
        for executor in (self._encoders, self._loaders):
            executor.shutdown(wait=False, cancel_futures=True)


def _bounds(config: ServeConfig) -> dict[str, Any]:
    """What a config says of the queue, as the batcher's arguments."""
    return {
        "max_tokens": config.batching.max_tokens,
        "max_requests": config.limits.max_queued_requests,
        "max_wait_s": config.limits.max_queue_s,
    }


def reason(location: str, error: Exception) -> str:
    """Why a model is not served, in one line for `/info`; the log has the rest."""
    expected = isinstance(error, EmorayError)
    _log.error("model %s: can't be served: %s", location, error, exc_info=None if expected else error)
    # What a model's folder says of itself is for its owner: the log has it, /info the first line.
    return first_line(error) if expected else "the server's log has the cause"


def _occlusion(model: Model, texts: Sequence[str], most: int) -> Occlusion:
    occlusion = Occlusion.of(texts, model.seen(texts))
    words = sum(len(found) for found in occlusion.spans)
    if words > most:
        raise RequestError(
            "too_large", f"explaining costs one more text for each word: {words} words, and {most} is the limit"
        )
    return occlusion


def _encode_variants(model: Model, occlusion: Occlusion) -> Tokens:
    return model.encode(list(occlusion.variants()))


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
