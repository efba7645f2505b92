"""The board where an endpoint's replicas agree on the model: changes in order, votes, verdicts, who is alive.

It lies in the cluster's own key-value store, so there is no process whose end could lose it. A change is proposed by
whoever is asked; every living replica loads the new model beside the present one and votes; the verdict is written
once, by the first that sees it: all for it, or one against. So a model that any replica can't load changes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.experimental import internal_kv as kv

from emoray.engines import Wanted

_NAMESPACE = b"emoray"
SILENT_S = 6.0
"""A replica whose beat has stood still for so long is dead, in seconds: its vote is not awaited."""
_FORGOTTEN_S = 60.0


@dataclass(frozen=True)
class Change:
    """A wish for another model.

    Attributes:
        number: changes come one after the other.
        model: folder or URI.
        engine: that is to run it, as `ServeConfig.engine`.
        declared: the `wish` of the deployment's config then; one that differs is newer.
        gate: what the model must have reached, a `GateConfig` as JSON.
    """

    number: int
    model: str
    engine: Wanted
    declared: str
    gate: Mapping[str, Any]

    @property
    def wish(self) -> str:
        return wish(self.model, self.engine)


def wish(model: str, engine: str) -> str:
    """What a config asks for, as one string to compare."""
    return f"{model} in {engine}"


def open_board(app: str) -> Board:
    """The board of an application of the cluster's Ray Serve: another life of Serve has another one."""
    from ray.serve.context import _get_global_client

    return Board(f"{_get_global_client()._controller._actor_id.hex()}/{app}")


class Board:
    """The board of one application.

    Args:
        scope: tells applications apart, and one life of Serve from the next.
        store: with the functions of `ray.experimental.internal_kv`; None takes those. Tests give a dictionary.
    """

    def __init__(self, scope: str, store: Any = None) -> None:
        self._scope = scope
        self._store = kv if store is None else store
        self._beats: dict[str, tuple[int, float]] = {}

    def latest(self) -> int:
        """Number of the newest change; 0 where there was none."""
        return max((int(key) for key in self._names("change/")), default=0)

    def change(self, number: int) -> Change:
        content = self._read(f"change/{number:08d}")
        assert content is not None
        return Change(number, **content)

    def propose(self, model: str, engine: Wanted, declared: str, gate: Mapping[str, Any]) -> Change | None:
        """Ask for a model; None where an earlier change has no verdict yet, or someone else was faster."""
        number = self.latest() + 1
        if number > 1 and self.verdict(number - 1) is None:
            return None
        content: dict[str, Any] = {"model": model, "engine": engine, "declared": declared, "gate": dict(gate)}
        return Change(number, **content) if self._create(f"change/{number:08d}", content) else None

    def vote(self, number: int, replica: str, vote: Mapping[str, Any]) -> None:
        """Args: vote: `{"model": name@fingerprint, "swap": for /info}` for the change, or `{"error": why}`."""
        self._write(f"vote/{number:08d}/{replica}", vote)

    def votes(self, number: int) -> dict[str, Any]:
        """Votes so far, by replica."""
        prefix = f"vote/{number:08d}/"
        return {name: vote for name in self._names(prefix) if (vote := self._read(prefix + name)) is not None}

    def verdict(self, number: int) -> dict[str, Any] | None:
        """A vote that all agree on, one of `{"error": why}`, or None while it is open."""
        return self._read(f"verdict/{number:08d}")

    def settle(self, number: int, verdict: Mapping[str, Any]) -> dict[str, Any]:
        """Write the verdict, and return the one that holds: the first."""
        self._create(f"verdict/{number:08d}", verdict)
        return self.verdict(number) or dict(verdict)

    def accepted(self) -> Change | None:
        """The newest change that was accepted: what a new replica starts with."""
        for number in range(self.latest(), 0, -1):
            if "model" in (self.verdict(number) or {}):
                return self.change(number)
        return None

    def beat(self, replica: str, count: int, state: Mapping[str, Any]) -> None:
        """Say that a replica lives, and how it is."""
        self._write(f"alive/{replica}", {"beat": count, **state})

    def leave(self, replica: str) -> None:
        self._store._internal_kv_del(self._key(f"alive/{replica}"), namespace=_NAMESPACE)

    def alive(self) -> dict[str, dict[str, Any]]:
        """What living replicas say of themselves. Beats are compared with earlier ones, so no clocks have to agree."""
        now, living = time.monotonic(), {}
        for name in self._names("alive/"):
            said = self._read(f"alive/{name}")
            if said is None:
                continue
            count, since = self._beats.get(name, (-1, now))
            if said["beat"] != count:
                since = now
            self._beats[name] = (said["beat"], since)
            if now - since < SILENT_S:
                living[name] = said
            elif now - since > _FORGOTTEN_S:  # it was killed, and could not leave
                self.leave(name)
        return living

    def wipe(self) -> None:
        """Forget everything: for an application that doesn't run."""
        self._store._internal_kv_del(self._key(""), del_by_prefix=True, namespace=_NAMESPACE)

    def _key(self, name: str) -> bytes:
        return f"{self._scope}/{name}".encode()

    def _names(self, prefix: str) -> list[str]:
        full = self._key(prefix)
        keys = self._store._internal_kv_list(full, namespace=_NAMESPACE)
        return sorted(key[len(full) :].decode() for key in keys)

    def _read(self, name: str) -> dict[str, Any] | None:
        value = self._store._internal_kv_get(self._key(name), namespace=_NAMESPACE)
        return None if value is None else json.loads(value)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        self._store._internal_kv_put(
            self._key(name), json.dumps(content).encode(), overwrite=True, namespace=_NAMESPACE
        )

    def _create(self, name: str, content: Mapping[str, Any]) -> bool:
        """Whether the key is new; an existing one stays as it is."""
        existed = self._store._internal_kv_put(
            self._key(name), json.dumps(content).encode(), overwrite=False, namespace=_NAMESPACE
        )
        return not existed


def judge(votes: Mapping[str, Any], alive: Mapping[str, Any]) -> dict[str, Any] | None:
    """The verdict on a change, or None while a living replica's vote is missing and none is against it."""
    for vote in votes.values():
        if "error" in vote:
            return {"error": vote["error"]}
    if not votes or alive.keys() - votes.keys():
        return None
    found = sorted({vote["model"] for vote in votes.values()})
    if len(found) > 1:
        return {"error": f"replicas found different models there: {', '.join(found)}"}
    return dict(votes[min(votes)])
