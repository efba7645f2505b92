"""A replica's service: a model in this process, which changes together with those of all other replicas."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from emoray.classifier import locate_model
from emoray.engines import Wanted
from emoray.errors import ModelError
from emoray.http.candidate import Candidate, Model
from emoray.http.errors import busy
from emoray.http.local import LocalModel, reason
from emoray.http.metrics import Metrics
from emoray.http.service import Answer, Identity, State
from emoray.on_ray import shares
from emoray.on_ray.board import Board, Change, judge, wish
from emoray.serve_config import GateConfig, ServeConfig

_log = logging.getLogger("emoray.http")
T = TypeVar("T")

_LOOK_S = 1.0
"""How often a replica looks at the board, and says that it lives, in seconds; four times as often during a change."""


class ReplicaService:
    """See `emoray.http.service.Service`.

    Args:
        config: `model` is what this deployment declares.
        base: folder that relative locations are meant from: where `emoray serve` was called.
        name: of this replica.
        elsewhere: has another replica score texts; None keeps all of a request here.
    """

    def __init__(
        self,
        config: ServeConfig,
        base: str,
        board: Board,
        name: str,
        metrics: Metrics,
        load: Callable[[str], Model] | None = None,
        elsewhere: shares.Elsewhere | None = None,
    ) -> None:
        self._elsewhere = elsewhere
        self._local = LocalModel(config, load, metrics)
        self._declared, self._engine, self._gate, self._base = config.model, config.engine, config.gate, base
        self._board, self._name = board, name
        self._handled = 0
        self._in_service = 0  # number of the change whose model serves here
        self._candidate: tuple[int, Candidate | None] = (0, None)
        self._swap: dict[str, Any] = {"state": "idle"}
        self._peers: dict[str, Any] = {}
        self._beats = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._up: asyncio.Future[None] | None = None

    @property
    def state(self) -> State:
        return self._local.state

    @property
    def identity(self) -> Identity | None:
        return self._local.identity

    async def is_broken(self) -> bool:
        return await self._local.is_broken()

    @property
    def queued_tokens(self) -> int:
        return self._local.queued_tokens

    @property
    def busy_s(self) -> float:
        return self._local.busy_s

    async def classify(
        self, texts: Sequence[str], deadline: float, truncate: bool = True, explain: bool = False
    ) -> Answer:
        ready = sum(peer["state"] == "ready" for peer in self._peers.values())
        if self._elsewhere is None or ready < 2 or len(texts) < 2 * shares.LEAST or not truncate or explain:
            return await self._local.classify(texts, deadline, truncate, explain)
        return await shares.classify(texts, deadline, ready, self.classify_here, self._elsewhere)

    async def classify_here(self, texts: Sequence[str], deadline: float) -> Answer:
        """As `classify`, by this replica alone."""
        return await self._local.classify(texts, deadline)

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._up = loop.create_future()
        self._tasks += [loop.create_task(self._beat()), loop.create_task(self._live())]

    async def until_up(self) -> None:
        """Return when the first model is in service.

        Raises:
            ModelError: it can't be served.
        """
        assert self._up is not None
        await asyncio.shield(self._up)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await _in_thread(self._board.leave, self._name)
        await self._local.close()

    async def reconfigure(self, config: ServeConfig) -> None:
        """Take over another config; a model or engine that it newly declares is proposed to all replicas."""
        self._local.reconfigure(config)
        self._gate = config.gate
        if (config.model, config.engine) != (self._declared, self._engine):
            self._declared, self._engine = config.model, config.engine
            self._start_declaring()

    def _start_declaring(self) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(self._declare()))

    async def _declare(self) -> None:
        """See to it that the newest wish is the one that the deployment's config declares."""
        while True:
            with _store_may_be_away("declaring a model"):
                number = await _in_thread(self._board.latest)
                if number and wish(self._declared, self._engine) in await self._wishes(number):
                    return
                await self._propose(self._declared)
            await asyncio.sleep(_LOOK_S / 4)  # an open change comes first; another replica may have been faster

    async def _wishes(self, number: int) -> set[str]:
        """What a change stands for: what was declared then, and its own wish unless it was refused."""
        change = await _in_thread(self._board.change, number)
        refused = "error" in (await _in_thread(self._board.verdict, number) or {})
        return {change.declared} if refused else {change.declared, change.wish}

    async def _propose(self, model: str) -> Change | None:
        declared, gate = wish(self._declared, self._engine), self._gate.model_dump(mode="json")
        return await _in_thread(self._board.propose, model, self._engine, declared, gate)

    async def change_model(self, location: str) -> None:
        if self.state != "ready":
            raise busy()
        change = await self._propose(location)
        if change is None:
            raise busy()
        self._swap = {"state": "loading", "to": location, "change": change.number}

    def info(self) -> dict[str, Any]:
        return {**self._local.info(), "swap": self._swap, "replica": self._name, "replicas": self._peers}

    async def _beat(self) -> None:
        while True:
            self._beats += 1
            identity = self.identity
            said = {"state": self.state, "model": str(identity) if identity else None, "change": self._handled}
            with _store_may_be_away("saying that this replica lives"):
                await _in_thread(self._board.beat, self._name, self._beats, said)
                self._peers = {
                    name: {"state": peer["state"], "model": peer["model"]}
                    for name, peer in (await _in_thread(self._board.alive)).items()
                }
            await asyncio.sleep(_LOOK_S)

    async def _live(self) -> None:
        assert self._up is not None
        try:
            await self._boot()
        except Exception as error:
            why = reason(self._declared, error)
            self._local.refuse()
            self._swap = {"state": "failed", "to": self._declared, "error": why}
            self._up.set_exception(ModelError(why))
            return
        self._up.set_result(None)
        self._start_declaring()  # beside, for an open change wants this replica's vote first
        while True:
            with _store_may_be_away("looking after model changes"):
                await self._follow()
            await asyncio.sleep(_LOOK_S / 4 if self._swap["state"] == "loading" else _LOOK_S)

    async def _boot(self) -> None:
        """Start with what the others serve; the very first replica, with what the config declares."""
        while True:
            accepted: Change | None = await _in_thread(self._board.accepted)
            if accepted is not None and accepted.number == self._handled:
                return
            if accepted is None:
                self._local.adopt(await self._bring_up(self._declared, self._gate, self._engine))
                await self._settle_first()
                continue
            await self._take_over(accepted)
            verdict = await _in_thread(self._board.verdict, accepted.number) or {}
            self._handled, self._swap = accepted.number, verdict.get("swap", self._swap)

    async def _take_over(self, accepted: Change) -> None:
        """Serve what the others serve, which may not be refused here: it was let in once."""
        self._local.adopt(await self._bring_up(accepted.model, GateConfig(), accepted.engine))
        self._in_service = accepted.number

    async def _settle_first(self) -> None:
        """Write down what was started with: the first change. Of several first replicas any one may settle it."""
        await self._propose(self._declared)
        if (await _in_thread(self._board.change, 1)).wish == wish(self._declared, self._engine):
            await _in_thread(self._board.settle, 1, {"model": str(self.identity), "swap": self._swap})
            self._handled = self._in_service = 1

    async def _follow(self) -> None:
        """One look at the board: load what is proposed, vote, and take over what is decided."""
        number = await _in_thread(self._board.latest)
        if number <= self._handled:
            return
        change = await _in_thread(self._board.change, number)
        verdict = await _in_thread(self._board.verdict, number)
        if verdict is None:
            self._swap = {"state": "loading", "to": change.model, "change": number}
            await self._vote(change)
            votes, alive = await _in_thread(self._board.votes, number), await _in_thread(self._board.alive)
            self._swap["loaded"] = len(votes)
            found = judge(votes, alive)
            if found is None:
                return
            verdict = await _in_thread(self._board.settle, number, found)
        if "error" in verdict:
            accepted = await _in_thread(self._board.accepted)
            if accepted is not None and accepted.number > self._in_service:
                await self._take_over(accepted)  # a change that this replica was too silent to take part in
            self._local.refuse()
            self._swap = {"state": "failed", "to": change.model, "change": number, "error": verdict["error"]}
        else:
            await self._vote(change)
            candidate = self._candidate[1]
            if candidate is None:
                self._candidate = (0, None)  # so that it is loaded again
                raise ModelError(f"{change.model}: the others have it, but it can't be loaded here")
            self._local.adopt(candidate)
            self._in_service, self._swap = number, verdict["swap"]
        self._handled, self._candidate = number, (0, None)

    async def _vote(self, change: Change) -> None:
        """Load a change's model, unless that was done, and tell the others."""
        if self._candidate[0] == change.number:
            return
        try:
            gate = GateConfig.model_validate(change.gate)
            candidate = await self._bring_up(change.model, gate, change.engine)
            self._candidate, model = (change.number, candidate), str(candidate.identity)
            facts = {"from": str(self.identity), "to": model, "change": change.number, **candidate.comparison}
            vote: dict[str, Any] = {"model": model, "swap": {"state": "idle", **facts}}
        except Exception as error:
            self._candidate, vote = (change.number, None), {"error": reason(change.model, error)}
        await _in_thread(self._board.vote, change.number, self._name, vote)

    async def _bring_up(self, location: str, gate: GateConfig, engine: Wanted | None) -> Candidate:
        return await self._local.bring_up(locate_model(location, self._base), gate, engine)


@contextmanager
def _store_may_be_away(doing: str) -> Iterator[None]:
    """The cluster's head may be lost, and its store with it for a while: the model in service answers on."""
    try:
        yield
    except Exception as error:
        _log.error("%s failed, and is tried again", doing, exc_info=error)


async def _in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """The store's calls block for a network's round trip: never on the event loop."""
    return await asyncio.get_running_loop().run_in_executor(None, partial(function, *arguments))
