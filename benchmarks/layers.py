"""What each layer of the endpoint costs: the engine in this process, the classifier, the batcher, HTTP without Ray.

Each layer is measured over those below it, on one thread, with texts that come alone and with texts in 32s:
`python -m benchmarks.layers --model MODEL --texts test.jsonl`. The last layer, Ray Serve and its proxy, is what
bench_serve.py measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

TEXTS = 1600


def layers(model: Path, texts: list[str]) -> dict[str, dict[str, float]]:
    """Layer -> texts/s and CPU ms a text. Run in processes of their own, one thread each."""
    found: dict[str, dict[str, float]] = {}
    for processes in (1, os.cpu_count() or 1):
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.layers", "--model", str(model), "--count", str(len(texts))]
                + (["--engine-only"] if processes > 1 else []),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                text=True,
            )
            for _ in range(processes)
        ]
        given = json.dumps(texts[:TEXTS])
        for process in running:
            assert process.stdin is not None
            process.stdin.write(given)
            process.stdin.close()
        answers = []
        for process in running:
            assert process.stdout is not None
            answers.append(json.loads(process.stdout.read()))
            process.wait()
        for name in answers[0]:
            label = name if processes == 1 else f"{name}, {processes} processes"
            found[label] = {
                "texts_per_s": sum(answer[name]["texts_per_s"] for answer in answers),
                "cpu_ms": sum(answer[name]["cpu_ms"] for answer in answers) / processes,
            }
    return found


def _timed(count: int, work: Callable[[], Any]) -> dict[str, float]:
    cpu, since = time.process_time(), time.perf_counter()
    work()
    return {
        "texts_per_s": count / (time.perf_counter() - since),
        "cpu_ms": (time.process_time() - cpu) / count * 1000,
    }


def engine_layers(classifier: Any, texts: list[str]) -> dict[str, dict[str, float]]:
    """The engine on tokens, and the classifier on texts."""
    import numpy as np

    tokens = classifier.encode(texts)
    rows = np.arange(len(texts))
    alone = [tokens.take(rows[i : i + 1]) for i in range(400)]
    together = [tokens.take(rows[i : i + 32]) for i in range(0, len(texts), 32)]
    forward = classifier.forward
    [forward(part) for part in together]
    return {
        "engine, texts alone": _timed(len(alone), lambda: [forward(part) for part in alone]),
        "engine, 32 texts": _timed(len(texts), lambda: [forward(part) for part in together]),
        "classifier, 32 texts": _timed(
            len(texts), lambda: [classifier(texts[i : i + 32]) for i in range(0, len(texts), 32)]
        ),
    }


def service_layers(classifier: Any, texts: list[str]) -> dict[str, dict[str, float]]:
    """The queue in front of the classifier, with 16 callers of one text, and of 32; then HTTP in front of that."""
    from emoray.http.local import LocalModel
    from emoray.serve_config import ServeConfig

    config = ServeConfig(model="measured")
    found: dict[str, dict[str, float]] = {}

    async def ask(call: Callable[[list[str]], Awaitable[Any]], size: int) -> None:
        groups = iter([texts[i : i + size] for i in range(0, len(texts), size)])

        async def caller() -> None:
            for group in groups:
                await call(group)

        await asyncio.gather(*(caller() for _ in range(16)))

    async def all_of_it() -> None:
        service = LocalModel(config, lambda _: classifier)
        service.adopt(await service.bring_up("measured", config.gate))

        async def classify(group: list[str]) -> None:
            await service.classify(group, time.monotonic() + 60)

        for size in (1, 32):
            await ask(classify, size)
            cpu, since = time.process_time(), time.perf_counter()
            await ask(classify, size)
            found[f"batcher, {size} a request"] = {
                "texts_per_s": len(texts) / (time.perf_counter() - since),
                "cpu_ms": (time.process_time() - cpu) / len(texts) * 1000,
            }
        await _http(service, config, texts, found)
        await service.close()

    asyncio.run(all_of_it())
    return found


async def _http(service: Any, config: Any, texts: list[str], found: dict[str, dict[str, float]]) -> None:
    """The same behind uvicorn, asked by wrk: this process's CPU alone counts."""
    import tempfile

    import uvicorn

    from benchmarks.bench_serve import bodies, wrk
    from benchmarks.peers import PEERS, free_port
    from emoray.http.app import make_app
    from emoray.http.keys import Keys

    port, peer = free_port(), PEERS["emoray"]
    app = make_app(service, config, keys=Keys())
    options = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", access_log=False, lifespan="off")
    server = uvicorn.Server(options)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    with tempfile.TemporaryDirectory() as name:
        for size in (1, 32):
            file = bodies(Path(name), peer, texts, size)
            cpu = time.process_time()
            came = await asyncio.to_thread(wrk, f"http://127.0.0.1:{port}", peer.path, file, 16, 4.0)
            count = came["requests"] * size
            found[f"HTTP, {size} a request"] = {
                "texts_per_s": count / came["seconds"],
                "cpu_ms": (time.process_time() - cpu) / count * 1000,
            }
    server.should_exit = True
    await serving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--texts", type=Path, help="jsonl with a `text` in each row; default: a JSON list on stdin")
    parser.add_argument("--count", type=int, default=TEXTS)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--engine-only", action="store_true")
    options = parser.parse_args()
    from emoray import Classifier

    if options.texts:
        texts = [json.loads(line)["text"] for line in options.texts.read_text().splitlines()]
    else:
        texts = json.loads(sys.stdin.read())
    classifier = Classifier.load(options.model, engine=options.engine)
    found = engine_layers(classifier, texts[:TEXTS])
    if not options.engine_only:
        found |= service_layers(classifier, texts[:TEXTS])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
