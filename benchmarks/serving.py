"""`emoray serve` in a process of its own, load on it over real HTTP, and what came back; for tests and `make chaos`."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import requests

PATIENCE_S = 240.0
"""The longest wait for anything; generous, for machines that are busy with other things."""
AGREE = 5e-5
"""How far a score may be from the classifier's own: batches are computed in other orders."""


class Serving:
    """One `emoray serve` under way. Use it as a context manager.

    Attributes:
        url: of the endpoint, once it answers.
    """

    def __init__(self, model: Path | str, log: Path, environment: dict[str, str], *overrides: str) -> None:
        self._log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "emoray.cli", "serve", str(model), "--json", *overrides],
                stdout=subprocess.PIPE,
                stderr=stream,
                env=environment,
                cwd=log.parent,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"`emoray serve` ended with {self.process.wait()}:\n{log.read_text()}"
        self.ready: dict[str, Any] = json.loads(line)
        self.url: str = self.ready["url"]

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def processes(self, title: str) -> list[psutil.Process]:
        """Processes below this one whose title begins so: `ray::ServeReplica`, `ray::ProxyActor`."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess, IndexError):
                    if child.cmdline()[0].startswith(title):
                        found.append(child)
        return found

    def listening(self) -> set[tuple[str, int]]:
        """Addresses on which its HAProxy, its proxies and its replicas' HTTP servers accept connections.

        Without those of Ray's own protocol, which every worker has.
        """
        found = set()
        titles = ("ray::ProxyActor", "ray::HAProxyManager", "ray::ServeReplica")
        binaries = [child for child in self.processes("") if os.path.basename(child.cmdline()[0]) == "haproxy"]
        for process in [*binaries, *(child for title in titles for child in self.processes(title))]:
            with suppress(psutil.NoSuchProcess):
                for connection in process.net_connections("tcp"):
                    if connection.status == "LISTEN":
                        found.add((connection.laddr.ip, connection.laddr.port))
        return {address for address in found if _speaks_http(address)}

    @property
    def replicas(self) -> list[psutil.Process]:
        return self.processes("ray::ServeReplica")

    def memory(self) -> dict[int, float]:
        """MB that each of the proxies and replicas has to itself, by process id."""
        used = {}
        for process in [*self.replicas, *self.processes("ray::ProxyActor")]:
            with suppress(psutil.NoSuchProcess):
                used[process.pid] = process.memory_full_info().uss / 2**20
        return used

    def info(self, key: str | None = None) -> dict[str, Any]:
        answer = requests.get(f"{self.url}/info", headers=_headers(key), timeout=60)
        return dict(answer.json())

    def change_model(self, model: Path | str, key: str) -> None:
        """PUT /v1/model, and return when every replica has it."""
        answer = requests.put(f"{self.url}/v1/model", json={"model": str(model)}, headers=_headers(key), timeout=60)
        assert answer.status_code == 202, answer.text
        number = answer.json()["swap"]["change"]

        def done() -> bool:
            info = self.info(key)
            swap = info["swap"]
            if swap.get("change") != number:  # this replica hasn't looked yet
                return False
            assert swap["state"] != "failed", swap
            models = {replica["model"] for replica in info["replicas"].values()}
            return swap["state"] == "idle" and models == {swap["to"]}

        wait_until(done, "the model change")


def grown(before: dict[int, float], after: dict[int, float]) -> tuple[float, float]:
    """MB before and after of the processes that were there both times: replicas come and go."""
    both = before.keys() & after.keys()
    return sum(before[pid] for pid in both), sum(after[pid] for pid in both)


def _speaks_http(address: tuple[str, int]) -> bool:
    host = "127.0.0.1" if address[0] in ("0.0.0.0", "::") else address[0]
    with suppress(requests.RequestException):
        return requests.get(f"http://{host}:{address[1]}/-/healthz", timeout=10).status_code < 600
    return False


def wait_until(condition: Callable[[], Any], what: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, f"waited {PATIENCE_S:g} s for {what}"
        time.sleep(0.1)


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


@dataclass
class Came:
    """What came back.

    Attributes:
        statuses: how often each HTTP status; 0 is a connection that broke.
        seconds: of each request that was answered with 200.
        refused: seconds of each that was answered with 429 or 503.
        models: how often each answered.
        wrong: answers that are none of the models' own.
        problems: the first few of them.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    models: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    problems: list[str] = field(default_factory=list)
    lasted: float = 0.0

    @property
    def requests(self) -> int:
        return sum(self.statuses.values())

    @property
    def failed(self) -> int:
        return self.requests - self.statuses[200]

    def percentile(self, share: float) -> float:
        """Seconds within which that share of the good answers came."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


class Load:
    """Requests of one text each, with answers that are known beforehand.

    Args:
        expected: each model's `name@fingerprint` -> scores by label of each text; empty checks nothing.
    """

    def __init__(
        self, url: str, texts: Sequence[str], expected: dict[str, list[dict[str, float]]], key: str | None = None
    ) -> None:
        self._url, self._texts, self._expected, self._key = f"{url}/v1/classify", texts, expected, key
        self.came = Came()
        self._stop = asyncio.Event()
        self._draw = random.Random(0)

    def stop(self) -> None:
        self._stop.set()

    async def closed(self, connections: int, seconds: float | None = None, pause: float = 0.0) -> Came:
        """So many clients that each wait for their answer before they ask again, until `stop` or the time is over."""
        began = time.monotonic()
        async with self._session() as session:

            async def client() -> None:
                while not self._stop.is_set() and (seconds is None or time.monotonic() - began < seconds):
                    await self._ask(session)
                    if pause:
                        await asyncio.sleep(pause)

            await asyncio.gather(*(client() for _ in range(connections)))
        self.came.lasted += time.monotonic() - began
        return self.came

    async def open(self, a_second: float, seconds: float) -> Came:
        """So many requests a second, whether or not those before them were answered."""
        began, tasks = time.monotonic(), set()
        async with self._session() as session:
            for i in range(int(a_second * seconds)):
                await asyncio.sleep(max(0.0, began + i / a_second - time.monotonic()))
                task = asyncio.create_task(self._ask(session))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)
        self.came.lasted += time.monotonic() - began
        return self.came

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=PATIENCE_S),
            headers=_headers(self._key),
        )

    async def _ask(self, session: aiohttp.ClientSession) -> None:
        place = self._draw.randrange(len(self._texts))
        began = time.monotonic()
        try:
            async with session.post(self._url, json={"texts": [self._texts[place]]}) as answer:
                content = await answer.json(content_type=None)
                status = answer.status
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            self.came.statuses[0] += 1
            self._note(f"{type(error).__name__}: {error}")
            return
        took = time.monotonic() - began
        self.came.statuses[status] += 1
        if status == 200:
            self.came.seconds.append(took)
            self._check(place, content)
            return
        self._note(f"{status}: {content}")
        if status in (429, 503):
            self.came.refused.append(took)

    def _check(self, place: int, content: dict[str, Any]) -> None:
        model = content["model"]
        self.came.models[model] += 1
        if not self._expected:
            return
        want = self._expected.get(model, [{}] * len(self._texts))[place]
        have = content["predictions"][0]["scores"]
        if want.keys() != have.keys() or any(abs(have[name] - want[name]) > AGREE for name in want):
            self.came.wrong += 1
            self._note(f"{model} on text {place}: {have} instead of {want}")

    def _note(self, problem: str) -> None:
        if len(self.came.problems) < 5:
            self.came.problems.append(problem[:500])


def run(work: Any) -> Any:
    """As asyncio.run, on the quick loop: clients must not be what is measured."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    loop = uvloop.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


def expected_of(model: Path | str, texts: Sequence[str], engine: str = "torch") -> tuple[str, list[dict[str, float]]]:
    """A model's `name@fingerprint`, and what the classifier itself says of texts, in the endpoint's engine."""
    from emoray.http.candidate import load_model

    classifier: Any = load_model(str(model), engine)  # as a replica does
    name = classifier.facts["config"]["run"]["name"]
    return f"{name}@{classifier.fingerprint}", [prediction.scores for prediction in classifier(texts)]


def environment(folder: Path, ray_folder: str, **more: str) -> dict[str, str]:
    """For a Ray that no one else is in."""
    return {
        **os.environ,
        "RAY_ADDRESS": "local",
        "RAY_TMPDIR": ray_folder,
        "TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "300",
        **more,
    }
