"""The batcher's promises, as properties of whatever texts, lengths, failures and drops come."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoray.http.batcher import Batcher
from emoray.http.errors import RequestError

MAX_TOKENS = 50
requests = st.lists(st.lists(st.integers(1, 120), min_size=1, max_size=8), min_size=1, max_size=12)


def later(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


class Engine:
    """Notes what it is given. A payload is (request, place, tokens); its result is the payload."""

    def __init__(self, fails: Callable[[Any], bool] = lambda payload: False) -> None:
        self.batches: list[list[Any]] = []
        self.threads: set[int] = set()
        self.fails = fails
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, payloads: list[Any]) -> list[Any]:
        self.gate.wait(10)
        self.threads.add(threading.get_ident())
        self.batches.append(list(payloads))
        bad = [payload for payload in payloads if self.fails(payload)]
        if bad:
            raise ValueError(f"can't compute {bad[0]}")
        return list(payloads)

    @property
    def seen(self) -> list[Any]:
        return [payload for batch in self.batches for payload in batch]


def payloads_of(number: int, sizes: list[int]) -> list[tuple[int, int, int]]:
    return [(number, place, size) for place, size in enumerate(sizes)]


async def submit_all(batcher: Batcher[Any, Any], lists: list[list[int]]) -> list[Any]:
    calls = [batcher.submit(payloads_of(n, sizes), sizes, later()) for n, sizes in enumerate(lists)]
    return await asyncio.gather(*calls, return_exceptions=True)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 30))


def make(engine: Engine, **options: Any) -> Batcher[Any, Any]:
    return Batcher(engine, **{"max_tokens": MAX_TOKENS, "max_wait_s": 60.0, **options})


@given(requests)
@settings(max_examples=60, deadline=None)
def test_each_text_once_in_bounded_batches_by_length_and_answered_in_order(lists: list[list[int]]) -> None:
    engine = Engine()

    async def scenario() -> list[Any]:
        batcher = make(engine)
        answers = await submit_all(batcher, lists)
        assert (batcher.queued_tokens, batcher.requests) == (0, 0)
        await batcher.close()
        return answers

    assert run(scenario()) == [payloads_of(n, sizes) for n, sizes in enumerate(lists)]
    assert sorted(engine.seen) == sorted(p for n, sizes in enumerate(lists) for p in payloads_of(n, sizes))
    assert len(engine.threads) == 1 and threading.get_ident() not in engine.threads
    for batch in engine.batches:
        sizes = [size for _, _, size in batch]
        assert sizes == sorted(sizes, reverse=True)
        assert sum(sizes) <= MAX_TOKENS or len(batch) == 1


@given(requests, st.sets(st.tuples(st.integers(0, 11), st.integers(0, 7)), max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_failing_text_fails_its_own_request_and_no_other(lists: list[list[int]], bad: set[tuple[int, int]]) -> None:
    engine = Engine(fails=lambda payload: payload[:2] in bad)
    answers = run(submit_all(make(engine), lists))
    for n, (sizes, answer) in enumerate(zip(lists, answers, strict=True)):
        wrong = [p for p in payloads_of(n, sizes) if p[:2] in bad]
        if wrong:
            assert isinstance(answer, ValueError) and str(answer) in {f"can't compute {p}" for p in wrong}
        else:
            assert answer == payloads_of(n, sizes)


@given(st.lists(st.tuples(st.integers(1, 60), st.sampled_from(["stays", "drops", "expires"])), min_size=1, max_size=15))
@settings(max_examples=30, deadline=None)
def test_dropped_and_expired_requests_are_not_computed(plan: list[tuple[int, str]]) -> None:
    engine = Engine()
    engine.gate.clear()

    async def scenario() -> list[Any]:
        batcher = make(engine)
        blocker = asyncio.create_task(batcher.submit([("blocker", 0, 1)], [1], later()))
        await asyncio.sleep(0.005)  # the model is busy with it now
        tasks = []
        for n, (size, fate) in enumerate(plan):
            deadline = later(0.01 if fate == "expires" else 20)
            tasks.append(asyncio.create_task(batcher.submit([(n, 0, size)], [size], deadline)))
        await asyncio.sleep(0.02)
        for task, (_, fate) in zip(tasks, plan, strict=True):
            if fate == "drops":
                task.cancel()
        await asyncio.sleep(0)
        engine.gate.set()
        await blocker
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert (batcher.queued_tokens, batcher.requests) == (0, 0)
        return answers

    answers = run(scenario())
    kept = [n for n, (_, fate) in enumerate(plan) if fate == "stays"]
    assert sorted(payload[0] for payload in engine.seen if payload[0] != "blocker") == kept
    for n, (_, fate) in enumerate(plan):
        if fate == "expires":
            # 429 where a busy machine has let it come too late to be begun at all
            assert isinstance(answers[n], RequestError) and answers[n].status in (429, 504)


def test_a_lone_text_goes_at_once() -> None:
    engine = Engine()

    async def scenario() -> float:
        batcher = make(engine)
        await batcher.submit([1], [1], later())
        start = time.perf_counter()
        for _ in range(20):
            await batcher.submit([1], [1], later())
        return time.perf_counter() - start

    assert run(scenario()) < 1.0  # a wait of even 50 ms each would show
    assert all(len(batch) == 1 for batch in engine.batches)


def test_an_oversize_text_is_not_starved_by_a_stream_of_small_ones() -> None:
    engine = Engine()

    async def scenario() -> int:
        batcher = make(engine)
        done = asyncio.Event()

        async def stream() -> None:
            while not done.is_set():
                await batcher.submit([("small", 0, 5)], [5], later())

        streams = [asyncio.create_task(stream()) for _ in range(20)]
        await asyncio.sleep(0.02)
        before = len(engine.batches)
        await batcher.submit([("large", 0, 500)], [500], later())
        done.set()
        await asyncio.gather(*streams)
        place = next(i for i, batch in enumerate(engine.batches) if batch[0][0] == "large")
        assert len(engine.batches[place]) == 1
        return place - before

    assert run(scenario()) <= 4  # what was in the model, and what was due before it


def test_a_large_request_shares_the_model_with_those_that_come_after_it() -> None:
    def slow(payloads: list[str]) -> list[str]:
        time.sleep(0.001 * len(payloads))
        return payloads

    async def scenario() -> tuple[float, float]:
        batcher: Batcher[str, str] = Batcher(slow, max_tokens=40, max_wait_s=60)
        await batcher.submit(["a"] * 40, [1] * 40, later())  # its speed is known now
        start = time.perf_counter()
        large = asyncio.create_task(batcher.submit(["large"] * 800, [1] * 800, later()))
        await asyncio.sleep(0.1)
        asked = time.perf_counter()
        await batcher.submit(["small"], [1], later())
        small_s = time.perf_counter() - asked
        await large
        return small_s, time.perf_counter() - start

    small_s, large_s = run(scenario())
    assert small_s < large_s / 3


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again() -> None:
    engine = Engine()
    engine.gate.clear()

    async def scenario() -> tuple[list[Any], float]:
        batcher = make(engine, max_requests=5)
        tasks = [asyncio.create_task(batcher.submit([n], [1], later())) for n in range(8)]
        await asyncio.sleep(0.05)
        refused = [task for task in tasks if task.done()]
        assert len(refused) == 3
        engine.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True), batcher.queued_tokens

    answers, left = run(scenario())
    errors = [answer for answer in answers if isinstance(answer, RequestError)]
    assert len(errors) == 3 and left == 0
    for error in errors:
        assert error.status == 429 and dict(error.all_headers())[b"retry-after"].isdigit()


def test_what_would_wait_too_long_is_refused() -> None:
    def slow(payloads: list[int]) -> list[int]:
        time.sleep(0.01 * len(payloads))
        return payloads

    async def scenario() -> list[Any]:
        batcher: Batcher[int, int] = Batcher(slow, max_tokens=10, max_wait_s=0.2)
        await batcher.submit([0], [1], later())
        calls = [batcher.submit([n], [1], later()) for n in range(100)]
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = run(scenario())
    served = [answer for answer in answers if not isinstance(answer, Exception)]
    assert 5 <= len(served) <= 60
    assert all(isinstance(a, list) or (isinstance(a, RequestError) and a.status == 429) for a in answers)


def test_what_can_not_be_done_in_time_is_refused_only_where_others_wait() -> None:
    def slow(payloads: list[int]) -> list[int]:
        time.sleep(0.005 * len(payloads))
        return payloads

    async def scenario() -> None:
        batcher: Batcher[int, int] = Batcher(slow, max_tokens=10, max_wait_s=5)
        await batcher.submit([0] * 10, [1] * 10, later())
        first = asyncio.create_task(batcher.submit([0] * 40, [1] * 40, later()))
        await asyncio.sleep(0)
        with pytest.raises(RequestError) as refused:
            await batcher.submit([0] * 100, [1] * 100, later(0.3))
        assert refused.value.status == 429
        await first
        with pytest.raises(RequestError) as tried:
            await batcher.submit([0] * 200, [1] * 200, later(0.05))
        assert tried.value.status == 504

    run(scenario())


@pytest.mark.parametrize("grace", [5.0, 0.0])
def test_closing_answers_what_waits_or_refuses_it(grace: float) -> None:
    engine = Engine()
    engine.gate.clear()

    async def scenario() -> tuple[list[Any], Any]:
        batcher = make(engine)
        tasks = [asyncio.create_task(batcher.submit([n], [40], later())) for n in range(4)]
        await asyncio.sleep(0.02)
        closing = asyncio.create_task(batcher.close(grace))
        await asyncio.sleep(0.02)
        late = (await asyncio.gather(batcher.submit([9], [1], later()), return_exceptions=True))[0]
        engine.gate.set()
        await closing
        return await asyncio.gather(*tasks, return_exceptions=True), late

    answers, late = run(scenario())
    assert late.status == 503
    if grace:
        assert answers == [[0], [1], [2], [3]]
    else:
        assert all(isinstance(answer, RequestError) and answer.status == 503 for answer in answers)


def test_results_that_do_not_match_the_batch_are_the_engines_failure() -> None:
    async def scenario() -> Any:
        batcher: Batcher[int, int] = Batcher(lambda payloads: [1, 2, 3], max_tokens=10)
        return await asyncio.gather(batcher.submit([1], [1], later()), return_exceptions=True)

    assert "3 results for 1 texts" in str(run(scenario())[0])


def test_it_tells_its_metrics() -> None:
    told: dict[str, list[Any]] = {"batch": [], "waited": [], "failure": []}

    class Notes:
        def request(self, route: str, status: int, seconds: float) -> None: ...

        def prediction(self, label: str, score: float) -> None: ...

        def waited(self, seconds: float) -> None:
            told["waited"].append(seconds)

        def batch(self, texts: int, tokens: int, padding: int, seconds: float) -> None:
            told["batch"].append((texts, tokens, padding))

        def failure(self, kind: str) -> None:
            told["failure"].append(kind)

    async def scenario() -> None:
        engine = Engine(fails=lambda payload: payload == "bad")
        batcher = make(engine, padding=lambda sizes: max(sizes) * len(sizes) - sum(sizes), metrics=Notes())
        await batcher.submit(["a", "b"], [3, 10], later())
        with pytest.raises(ValueError, match="bad"):
            await batcher.submit(["bad"], [1], later())

    run(scenario())
    assert told["batch"] == [(2, 13, 7), (1, 1, 0)]
    assert len(told["waited"]) == 3 and told["failure"] == ["model"]


def test_other_limits_hold_at_once() -> None:
    engine = Engine()
    engine.gate.clear()

    async def scenario() -> None:
        batcher = make(engine, max_requests=5)
        first = asyncio.create_task(batcher.submit(["blocker"], [1], later()))
        await asyncio.sleep(0.05)
        batcher.reconfigure(max_tokens=10, max_requests=2, max_wait_s=60.0)
        second = asyncio.create_task(batcher.submit(["a", "b", "c"], [6, 6, 6], later()))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="2 requests are waiting"):
            await batcher.submit(["d"], [1], later())
        engine.gate.set()
        await asyncio.gather(first, second)

    run(scenario())
    assert [len(batch) for batch in engine.batches] == [1, 1, 1, 1]
