"""A batcher bounded by tokens: texts of many requests, one forward pass.

It never waits for company: a batch starts as soon as the model is free, with what has arrived by then. So a lone text
goes at once, and under load batches fill by themselves.

- Texts go by when they are due: a request's first on arrival, each further one later by the model's time for those
  before it. So a request of 1,000 texts shares the model with those that come after it, and nothing starves: only what
  was due earlier goes before a text.
- The text that is due first is in every batch; those behind it join where they fit. One over the budget goes alone.
- Within a batch texts go by length, longest first, so that engines that pad pad little.
- A batch that fails is halved until the failing text is alone: its request fails, and no other.
- Requests whose client has gone (cancelled) or whose time is out are not computed.
- What can't be served in bounded time is refused at once.

The event loop only does bookkeeping; the model runs in a thread.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from emoray.http.errors import overloaded, timed_out, unavailable
from emoray.http.metrics import Metrics, Silent

P = TypeVar("P")
R = TypeVar("R")

LOOK_AHEAD = 256
"""How many texts that don't fit are passed over for one batch: bounds its bookkeeping while long texts are in front."""
_DECAY = 0.9
"""What a batch's weight in the estimate of the model's speed falls by with each further batch."""


class Clock:
    """The model's speed, from the batches it computed, newer ones counting more."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0
        self._running = 0
        self._since = 0.0

    @property
    def seconds_a_token(self) -> float:
        """0 before the first batch."""
        return self._seconds / self._tokens if self._tokens else 0.0

    def start(self, tokens: int) -> None:
        self._running, self._since = tokens, time.monotonic()

    def stop(self) -> float:
        """Seconds that the batch took."""
        seconds = time.monotonic() - self._since
        # Sums, not a mean of ratios: a short batch costs more a token, and full ones are what queues are made of.
        self._seconds = self._seconds * _DECAY + seconds
        self._tokens = self._tokens * _DECAY + self._running
        self._running = 0
        return seconds

    def left(self) -> float:
        """Seconds until the batch in the model is done, about."""
        return max(0.0, self._running * self.seconds_a_token - (time.monotonic() - self._since))


@dataclass(eq=False)
class _Request(Generic[P, R]):
    """One request's texts.

    Attributes:
        answer: resolves to the results in the texts' order; cancelled when nobody waits for it any more.
        since: its arrival, in seconds of time.monotonic, as is `deadline`.
        pace: seconds between two tokens' being due.
        first: tokens of its first text, which is due on arrival.
        tokens: of all its texts.
        waiting: tokens of those that were not yet taken.
        missing: texts without a result.
    """

    answer: asyncio.Future[list[R]]
    since: float
    deadline: float
    pace: float
    first: int
    tokens: int
    waiting: int
    results: list[R | None]
    missing: int

    def is_dead(self) -> bool:
        return self.answer.done() or self.deadline <= time.monotonic()

    def overdue(self, now: float) -> float:
        """Tokens that were due by now and still wait."""
        since = self.tokens if self.pace == 0 else (now - self.since) / self.pace
        due = min(self.tokens, self.first + since)
        return max(0.0, due - (self.tokens - self.waiting))


@dataclass(eq=False)
class _Text(Generic[P, R]):
    request: _Request[P, R]
    place: int
    payload: P
    tokens: int


class Batcher(Generic[P, R]):
    """Gathers texts into batches for a function that runs in a thread of its own.

    Args:
        run: results of a batch of payloads, in their order. Called by one thread; may block and may raise.
        max_tokens: tokens of a batch at the most; one text always fits.
        max_requests: requests that may wait or run at once.
        max_wait_s: a request whose first text would wait longer for its turn is refused.
        padding: tokens of padding that the engine computes beside texts of these lengths; for the metrics.
        metrics: told of every batch, wait and failure.
    """

    def __init__(
        self,
        run: Callable[[list[P]], Sequence[R]],
        *,
        max_tokens: int,
        max_requests: int = 512,
        max_wait_s: float = 2.0,
        padding: Callable[[Sequence[int]], int] = lambda lengths: 0,
        metrics: Metrics | None = None,
    ) -> None:
        self._run = run
        self._max_tokens, self._max_requests, self._max_wait = max_tokens, max_requests, max_wait_s
        self._padding = padding
        self._metrics = metrics or Silent()
        self._queue: list[tuple[float, int, _Text[P, R]]] = []  # a heap by (due, order of arrival)
        self._arrivals = itertools.count()
        self._requests: set[_Request[P, R]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="emoray-model")
        self._worker: asyncio.Task[None] | None = None
        self._closing = False
        self._clock = Clock()
        self.queued_tokens = 0
        """Tokens that wait for the model."""
        self.busy_s = 0.0
        """Seconds for which the model has computed."""

    @property
    def requests(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    async def submit(self, payloads: Sequence[P], tokens: Sequence[int], deadline: float) -> list[R]:
        """Results of one request's texts, in their order. Cancelling the call drops the request.

        Args:
            tokens: of each payload.
            deadline: seconds of time.monotonic.

        Raises:
            RequestError: `overloaded` at once, `timeout` at the deadline, `unavailable` while closing.
            Exception: whatever `run` raised for one of these payloads.
        """
        if not payloads:
            return []
        now = time.monotonic()
        self.admit(sum(tokens), deadline)
        request = self._enqueue(payloads, tokens, now, deadline)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._work())
        try:
            return await asyncio.wait_for(request.answer, max(0.0, deadline - now))
        except asyncio.TimeoutError:
            self._metrics.failure("expired")
            raise timed_out(deadline - now) from None
        except asyncio.CancelledError:
            self._metrics.failure("dropped")
            raise
        finally:
            self.queued_tokens -= request.waiting
            request.waiting = 0
            self._requests.discard(request)

    def admit(self, tokens: int, deadline: float) -> None:
        """Refuse what would wait too long, so that what is accepted is answered soon.

        `submit` asks for itself; asked before a request's tokens are known, with 0, it saves finding them out.

        Raises:
            RequestError: `overloaded`, or `unavailable` while closing.
        """
        now = time.monotonic()
        if self._closing:
            raise unavailable("this server is stopping: try again, another one answers")
        waiting = self.queued_tokens * self._clock.seconds_a_token
        if len(self._requests) >= self._max_requests:
            self._metrics.failure("overloaded")
            raise overloaded(f"{len(self._requests)} requests are waiting, and no more may: try again soon", waiting)
        turn = self._clock.left() + waiting
        if turn > self._max_wait:  # only then is it worth a closer look
            overdue = sum(request.overdue(now) for request in self._requests)
            turn = self._clock.left() + overdue * self._clock.seconds_a_token
            if turn > self._max_wait:
                self._metrics.failure("overloaded")
                raise overloaded(f"the queue is {turn:.1f} s long, and {self._max_wait:g} s is the limit", turn)
        end = waiting + tokens * self._clock.seconds_a_token
        if self._requests and end > deadline - now:
            self._metrics.failure("overloaded")
            raise overloaded(f"with what is waiting this would take {end:.0f} s: try again, or send less", waiting)

    def reconfigure(self, *, max_tokens: int, max_requests: int, max_wait_s: float) -> None:
        """Take over other limits, from the next batch and request on."""
        self._max_tokens, self._max_requests, self._max_wait = max_tokens, max_requests, max_wait_s

    def _enqueue(self, payloads: Sequence[P], tokens: Sequence[int], now: float, deadline: float) -> _Request[P, R]:
        answer: asyncio.Future[list[R]] = asyncio.get_running_loop().create_future()
        count, total, pace = len(payloads), sum(tokens), self._clock.seconds_a_token
        request = _Request[P, R](answer, now, deadline, pace, tokens[0], total, total, [None] * count, count)
        before = 0
        for place, (payload, size) in enumerate(zip(payloads, tokens, strict=True)):
            text = _Text(request, place, payload, size)
            heapq.heappush(self._queue, (now + before * pace, next(self._arrivals), text))
            before += size
        self.queued_tokens += total
        self._requests.add(request)
        return request

    async def _work(self) -> None:
        """Batch after batch until nothing waits."""
        loop = asyncio.get_running_loop()
        while batch := self._take():
            tokens = sum(text.tokens for text in batch)
            self._clock.start(tokens)
            now = time.monotonic()
            for text in batch:
                self._metrics.waited(now - text.request.since)
            outcomes = await loop.run_in_executor(self._thread, self._compute, batch)
            seconds = self._clock.stop()
            padding = self._padding([text.tokens for text in batch])
            self.busy_s += seconds
            self._metrics.batch(len(batch), tokens, padding, seconds)
            for text, outcome in zip(batch, outcomes, strict=True):
                self._deliver(text, outcome)

    def _take(self) -> list[_Text[P, R]]:
        """The next batch: the first due text that anyone waits for, and those behind it that fit; longest first."""
        batch: list[_Text[P, R]] = []
        passed_over: list[tuple[float, int, _Text[P, R]]] = []
        budget, total = self._budget(), 0
        while self._queue and len(passed_over) < LOOK_AHEAD and total < budget:
            entry = heapq.heappop(self._queue)
            text = entry[2]
            if text.request.is_dead():
                continue
            if batch and total + text.tokens > budget:
                passed_over.append(entry)
                continue
            batch.append(text)
            total += text.tokens
            text.request.waiting -= text.tokens
            self.queued_tokens -= text.tokens
        for entry in passed_over:
            heapq.heappush(self._queue, entry)
        batch.sort(key=lambda text: -text.tokens)
        return batch

    def _budget(self) -> int:
        """Tokens of the next batch: less than `max_tokens` where a full one would keep others waiting too long."""
        pace = self._clock.seconds_a_token
        if pace == 0:
            return self._max_tokens
        return min(self._max_tokens, max(int(self._max_wait / 4 / pace), self._max_tokens // 16))

    def _compute(self, batch: list[_Text[P, R]]) -> list[R | Exception]:
        """In the model's thread: a result or an error for each text."""
        try:
            results = list(self._run([text.payload for text in batch]))
            if len(results) != len(batch):
                raise RuntimeError(f"the engine gave {len(results)} results for {len(batch)} texts")
            return [*results]
        except Exception as error:
            if len(batch) == 1:
                return [error]
        half = len(batch) // 2
        return self._compute(batch[:half]) + self._compute(batch[half:])

    def _deliver(self, text: _Text[P, R], outcome: R | Exception) -> None:
        request = text.request
        if request.answer.done():
            return
        if isinstance(outcome, Exception):
            self._metrics.failure("model")
            request.answer.set_exception(outcome)
            return
        request.results[text.place] = outcome
        request.missing -= 1
        if request.missing == 0:
            request.answer.set_result(request.results)  # type: ignore[arg-type]

    async def close(self, grace_s: float = 0.0) -> None:
        """Refuse new requests, answer those that wait, for at most `grace_s` seconds, and end the thread."""
        self._closing = True
        until = time.monotonic() + grace_s
        while self._requests and time.monotonic() < until:
            await asyncio.sleep(0.01)
        self._queue.clear()
        for request in self._requests:
            if not request.answer.done():
                request.answer.set_exception(unavailable("this server has stopped: try again"))
        self._thread.shutdown(wait=False, cancel_futures=True)
