"""How replicas agree on the model, without Ray: real services and boards over a dictionary in place of its store."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "http"))

from serving import Dummy, Store

from emoray.http.metrics import Silent
from emoray.on_ray import board, replica
from emoray.on_ray.board import Board, wish
from emoray.on_ray.replica import ReplicaService
from emoray.serve_config import ServeConfig

NO_GATE = ServeConfig().gate.model_dump(mode="json")


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store()
    monkeypatch.setattr(board, "kv", made)
    monkeypatch.setattr(replica, "_LOOK_S", 0.04)
    return made


def load(location: str) -> Dummy:
    return Dummy(location.rsplit("/", 1)[-1], fingerprint=f"{abs(hash(location)):012x}"[:12])


def service(name: str, model: str, engine: str = "auto", load: Callable[[str], Any] = load) -> ReplicaService:
    config = ServeConfig.model_validate({"model": model, "engine": engine})
    return ReplicaService(config, "/", Board("app"), name, Silent(), load=load)


async def until(true: Callable[[], bool]) -> None:
    for _ in range(500):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it does not come to that")


def named(one: ReplicaService) -> str | None:
    return one.identity.name if one.identity else None


def test_all_change_together_and_a_new_replica_starts_with_what_they_serve() -> None:
    async def scenario() -> None:
        first, second = service("1", "/old"), service("2", "/old")
        for one in (first, second):
            await one.start()
            await one.until_up()
        await first.change_model("/new")
        await until(lambda: named(first) == named(second) == "new")
        third = service("3", "/old")
        await third.start()
        await third.until_up()
        assert named(third) == "new"
        for one in (first, second, third):
            await one.close()

    asyncio.run(scenario())


def test_a_replica_of_another_config_votes_on_the_open_change_first() -> None:
    """Else neither the change, which waits for its vote, nor its own wish, which waits for the change, would end."""

    async def scenario() -> None:
        old = service("1", "/old")
        await old.start()
        await old.until_up()
        started = asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow(location: str) -> Dummy:
            loop.call_soon_threadsafe(started.set)
            time.sleep(0.3)
            return load(location)

        old._local._load = slow
        await old.change_model("/between")
        await started.wait()
        new = service("2", "/wanted")
        await new.start()
        await new.until_up()
        await until(lambda: named(old) == named(new) == "wanted")
        for one in (old, new):
            await one.close()

    asyncio.run(scenario())


def test_another_engine_is_a_change_too() -> None:
    asked: list[str | None] = []

    async def scenario() -> None:
        one = service("1", "/model", "onnx")
        prepare = one._local.bring_up

        async def noted(location: str, gate: Any, engine: Any = None) -> Any:
            asked.append(engine)
            return await prepare(location, gate, engine)

        one._local.bring_up = noted  # type: ignore[method-assign]
        await one.start()
        await one.until_up()
        await one.reconfigure(ServeConfig.model_validate({"model": "/model", "engine": "torch"}))
        await until(lambda: len(asked) == 2)
        await one.close()

    asyncio.run(scenario())
    assert asked == ["onnx", "torch"]


@pytest.mark.parametrize("next_change_is_refused", [False, True])
def test_a_replica_that_was_silent_finds_back_to_the_others(next_change_is_refused: bool) -> None:
    async def scenario() -> None:
        one = service("1", "/old")
        await one.start()
        await one.until_up()
        other = Board("app")
        change = other.propose("/new", "auto", wish("/old", "auto"), NO_GATE)
        assert change is not None
        other.settle(change.number, {"model": "new@1", "swap": {"state": "idle"}})  # without this replica's vote
        if next_change_is_refused:
            bad = other.propose("/bad", "auto", wish("/old", "auto"), NO_GATE)
            assert bad is not None
            other.settle(bad.number, {"error": "it can't be loaded"})
        await until(lambda: named(one) == "new")
        await one.close()

    asyncio.run(scenario())


def test_what_can_not_be_loaded_here_is_tried_again() -> None:
    broken = [True, True]

    def load_late(location: str) -> Dummy:
        if location == "/new" and broken and broken.pop():
            raise OSError("the storage is away")
        return load(location)

    async def scenario() -> None:
        one = service("1", "/old", load=load_late)
        await one.start()
        await one.until_up()
        other = Board("app")
        change = other.propose("/new", "auto", wish("/old", "auto"), NO_GATE)
        assert change is not None
        other.settle(change.number, {"model": "new@1", "swap": {"state": "idle"}})
        await until(lambda: named(one) == "new")
        await one.close()

    asyncio.run(scenario())
    assert broken == []


def test_dead_replicas_are_forgotten(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    now = [0.0]
    monkeypatch.setattr(board.time, "monotonic", lambda: now[0])
    look, state = Board("app"), {"state": "ready", "model": "m", "change": 1}
    look.beat("dead", 1, state)
    assert set(look.alive()) == {"dead"}
    for now[0] in (3.0, 7.0, 50.0):
        look.beat("alive", int(now[0]), state)
        assert set(look.alive()) == ({"dead", "alive"} if now[0] < board.SILENT_S else {"alive"})
    now[0] = 70.0
    look.beat("alive", 70, state)
    assert set(look.alive()) == {"alive"} and [key for key in store if b"dead" in key] == []


def test_a_change_is_plain_data() -> None:
    made = Board("app").propose("/m", "torch", "d", NO_GATE)
    assert made is not None and Board("app").change(made.number) == made and made.wish == "/m in torch"
