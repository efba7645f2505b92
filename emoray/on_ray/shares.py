"""A request of many texts, computed by several replicas at once: who computes what, and the answers put together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise

import numpy as np

from emoray.http.service import Answer

LEAST = 128
"""Texts of a share, at least: below, sending them costs more than it spares."""
_log = logging.getLogger("emoray.http")

Here = Callable[[Sequence[str], float], Awaitable[Answer]]
"""(texts, deadline) -> scored by this replica."""
Elsewhere = Callable[[Sequence[str], float], Awaitable[Answer]]
"""(texts, seconds left) -> scored by another replica."""


def shares(texts: Sequence[str], replicas: int) -> list[slice]:
    """Neighbouring texts for each replica, of about as many characters each, `LEAST` texts at the least."""
    count = min(replicas, len(texts) // LEAST)
    if count < 2:
        return [slice(0, len(texts))]
    ends = np.cumsum([len(text) + 8 for text in texts])
    cuts = np.searchsorted(ends, np.arange(1, count) * ends[-1] / count)
    # Not too few texts in any share, however long some of them are.
    least = np.arange(1, count) * LEAST
    cuts = np.minimum(np.maximum(cuts, least), len(texts) - least[::-1])
    bounds = [0, *np.maximum.accumulate(cuts).tolist(), len(texts)]
    return [slice(int(a), int(b)) for a, b in pairwise(bounds)]


async def classify(texts: Sequence[str], deadline: float, replicas: int, here: Here, elsewhere: Elsewhere) -> Answer:
    """Score texts on this replica and others. What another one can't, or did with another model, is computed here."""
    parts = shares(texts, replicas)
    sent = [asyncio.ensure_future(elsewhere(texts[part], deadline - time.monotonic())) for part in parts[1:]]
    try:
        found = [await here(texts[parts[0]], deadline)]
        for part, task in zip(parts[1:], sent, strict=True):
            try:
                scored = await task
            except asyncio.CancelledError:
                raise
            except Exception as error:  # it died, is full, or is stopping
                _log.info("a share of %d texts came back: %s", part.stop - part.start, error)
                scored = None
            if scored is None or scored.model != found[0].model:
                scored = await here(texts[part], deadline)
            found.append(scored)
    finally:
        for task in sent:
            task.cancel()
    if len({scored.model for scored in found}) > 1:  # the model was changed meanwhile
        return await here(texts, deadline)
    predictions = [prediction for scored in found for prediction in scored.predictions]
    logits = np.concatenate([scored.logits for scored in found])
    return Answer(found[0].model, found[0].labels, predictions, logits)
