"""The endpoint under clients that wait for answers, on any device: speed, agreement, a new model, a killed replica.

    python -m benchmarks.serve_load --models runs/a runs/b --texts test.jsonl replicas.num_gpus=0.3 replicas.num_cpus=2

Its clients are one Python process beside the endpoint, so for peers and for what a CPU can do see bench_serve.py, which
drives all with wrk. Writes JSON; exits with 1 where a request failed while something was done to the endpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import requests

from benchmarks.serving import Serving, environment, wait_until
from benchmarks.step import save

KEY = "the-admin-key-of-the-load"
HEADERS = {"Authorization": f"Bearer {KEY}"}
SCENES = ((1, 1), (16, 1), (64, 1), (1, 32), (16, 32), (64, 32), (16, 256))
"""Clients, and texts a request."""
CROWDED = ((64, 1), (64, 32))


async def ask(url: str, texts: list[str], clients: int, size: int, stop: asyncio.Event) -> dict[str, Any]:
    """What came of clients that each ask again once they are answered, until `stop`."""
    seconds: list[float] = []
    statuses: Counter[str] = Counter()
    models: Counter[str] = Counter()

    async def client(session: aiohttp.ClientSession, place: int) -> None:
        while not stop.is_set():
            place = (place + size) % (len(texts) - size)
            began = time.perf_counter()
            async with session.post(f"{url}/v1/classify", json={"texts": texts[place : place + size]}) as answer:
                content = await answer.json(content_type=None)
            statuses[str(answer.status)] += 1
            if answer.status == 200:
                seconds.append(time.perf_counter() - began)
                models[content["model"]] += 1

    began = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=HEADERS) as session:
        await asyncio.gather(*(client(session, number * 37) for number in range(clients)))
    lasted = time.perf_counter() - began
    seconds.sort()
    found = {
        "clients": clients,
        "texts": size,
        "texts_s": round(size * len(seconds) / lasted),
        "p50_ms": round(1000 * seconds[len(seconds) // 2], 1),
        "p99_ms": round(1000 * seconds[int(0.99 * len(seconds))], 1),
        "statuses": dict(statuses),
        "models": dict(models),
    }
    print(json.dumps(found), flush=True)
    return found


def load(url: str, texts: list[str], clients: int, size: int, seconds: float) -> dict[str, Any]:
    async def for_a_while() -> dict[str, Any]:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(seconds, stop.set)
        return await ask(url, texts, clients, size, stop)

    return asyncio.run(for_a_while())


def under_load(url: str, texts: list[str], action: Callable[[], None]) -> dict[str, Any]:
    """Sixteen clients of one text, while something is done."""

    async def both() -> dict[str, Any]:
        stop = asyncio.Event()
        asking = asyncio.create_task(ask(url, texts, 16, 1, stop))
        await asyncio.sleep(1)
        await asyncio.to_thread(action)
        await asyncio.sleep(1)
        stop.set()
        return await asking

    return asyncio.run(both())


def agreement(url: str, texts: list[str], model: Path, engine: str) -> dict[str, Any]:
    """The endpoint's answers, in batches of 250, beside those of the classifier itself."""
    from emoray import Classifier

    own = Classifier.load(model, engine=engine)(texts)  # type: ignore[arg-type]
    answers: list[dict[str, Any]] = []
    for start in range(0, len(texts), 250):
        body = {"texts": texts[start : start + 250]}
        answers += requests.post(f"{url}/v1/classify", json=body, headers=HEADERS, timeout=60).json()["predictions"]
    pairs = list(zip(own, answers, strict=True))
    largest = max(abs(a.scores[name] - b["scores"][name]) for a, b in pairs for name in a.scores)
    return {"texts": len(texts), "same_label": sum(a.label == b["label"] for a, b in pairs), "largest": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs=2, type=Path, required=True, help="two runs; the second is changed to")
    parser.add_argument("--texts", type=Path, required=True, help="jsonl with a `text` in each row")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each scene")
    parser.add_argument("--replicas", type=int, default=3, help="of the second endpoint, one of which is killed")
    parser.add_argument("overrides", nargs="*", help="of the endpoint's config")
    options = parser.parse_args()
    texts = [json.loads(line)["text"] for line in options.texts.read_text(encoding="utf-8").splitlines()]
    found: dict[str, Any] = {"overrides": options.overrides}
    with tempfile.TemporaryDirectory(prefix="el-", ignore_cleanup_errors=True) as name:
        settings = environment(Path(name), name, EMORAY_API_KEYS=f"admin:me={KEY}")
        for replicas in (1, options.replicas):
            size = [f"replicas.min={replicas}", f"replicas.max={replicas}", "http.port=0", *options.overrides]
            began = time.monotonic()
            with Serving(options.models[0].resolve(), Path(name) / "serve.log", settings, *size) as serving:
                part: dict[str, Any] = {"first_answer_s": round(time.monotonic() - began, 1)}
                found[f"{replicas} replica{'s' * (replicas > 1)}"] = part
                if replicas == 1:
                    first_endpoint(serving, texts, options, part)
                else:
                    second_endpoint(serving, texts, replicas, options.seconds, part)
    print(save("serve-load", found))
    disturbed = [
        part[name] for part in found.values() if isinstance(part, dict) for name in part if "under load" in name
    ]
    sys.exit(any(set(one["statuses"]) != {"200"} for one in disturbed))


def first_endpoint(serving: Serving, texts: list[str], options: argparse.Namespace, part: dict[str, Any]) -> None:
    engine = serving.info(KEY)["engine"]
    part["engine"] = engine
    part["agreement"] = agreement(serving.url, texts, options.models[0], engine)
    print(json.dumps(part), flush=True)
    part["scenes"] = [load(serving.url, texts, *scene, options.seconds) for scene in SCENES]
    other = options.models[1].resolve()
    part["model changed under load"] = under_load(serving.url, texts, lambda: serving.change_model(other, KEY))


def second_endpoint(serving: Serving, texts: list[str], replicas: int, seconds: float, part: dict[str, Any]) -> None:
    wait_until(lambda: len(serving.info(KEY)["replicas"]) == replicas, "all replicas")
    part["scenes"] = [load(serving.url, texts, *scene, seconds) for scene in CROWDED]

    def kill() -> None:
        os.kill(serving.replicas[0].pid, signal.SIGKILL)
        time.sleep(4)

    part["replica killed under load"] = under_load(serving.url, texts, kill)


if __name__ == "__main__":
    main()
