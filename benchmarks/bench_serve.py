"""`make bench-serve`: the endpoint against its peers, on the same model, texts and machine, under the same load.

Each server runs alone in an environment of its own and is asked by `wrk` (Debian: apt-get install wrk): 1, 16 and 64
connections, one text a request and 32. A round starts every server once; rounds are interleaved, and what is shown are
medians. `--only NAME --round N` measures a single server and joins it to the file, so that a long run can be cut up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmarks.layers import layers
from benchmarks.peers import PEERS, Peer, free_port, plain_copy
from benchmarks.serving import environment, wait_until
from benchmarks.step import RESULTS, processor
from emoray import checkpoint
from emoray.classifier import find_model

SCENES = ((1, 1, 1), (16, 1, 1), (64, 1, 1), (1, 32, 1), (16, 32, 3), (64, 32, 8))
"""(connections, texts a request, multiple of a scene's seconds: a slow server has thousands of texts under way)"""
KEY = "the-admin-key-of-the-benchmark"
_MINE = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
_LUA = Path(__file__).parent / "wrk.lua"


def bodies(folder: Path, peer: Peer, texts: list[str], size: int) -> Path:
    """A file of requests: all texts once, in an order that is the same for all."""
    order = random.Random(0).sample(texts, len(texts))
    groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    path = folder / f"bodies-{size}.jsonl"
    path.write_text("\n".join(json.dumps(peer.body(group)) for group in groups) + "\n")
    return path


def wrk(url: str, path: str, file: Path, connections: int, seconds: float) -> dict[str, Any]:
    """What one run of the load generator reports."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "60s", "-s", str(_LUA), url, "--"]
    ran = subprocess.run([*command, str(file), path, KEY], capture_output=True, text=True, timeout=seconds + 120)
    for line in ran.stdout.splitlines():
        if line.startswith("RESULT "):
            return dict(json.loads(line.removeprefix("RESULT ")))
    raise RuntimeError(f"wrk failed: {ran.stdout[-500:]} {ran.stderr[-500:]}")


class Tree:
    """A process and all below it: what they use together."""

    def __init__(self, process: subprocess.Popen[Any]) -> None:
        self._root = psutil.Process(process.pid)
        self._seen: dict[int, float] = {}

    def cpu_s(self) -> float:
        """CPU seconds so far; those of processes that ended meanwhile stay in the sum."""
        for process in self._all():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self._seen[process.pid] = times.user + times.system
        return sum(self._seen.values())

    def memory_mb(self) -> float:
        """What they have to themselves."""
        total = 0
        for process in self._all():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().uss
        return total / 2**20

    def _all(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [self._root, *self._root.children(recursive=True)]
        return []


@contextmanager
def running(peer: Peer, model: Path, folder: Path) -> Iterator[tuple[str, Tree, float]]:
    """A server that answers: its address, its processes, and seconds from its start to its first answer."""
    port, python = free_port(), peer.python()
    command = peer.command(python, model if peer.is_ours else plain_copy(model), port)
    settings = environment(folder, str(folder / "ray"), EMORAY_API_KEYS=f"admin:bench={KEY}") if peer.is_ours else None
    (folder / "ray").mkdir(exist_ok=True)
    settings = settings or {**environment(folder, str(folder / "ray")), "OMP_NUM_THREADS": str(os.cpu_count())}
    settings.pop("PYTHONPATH", None) if not peer.is_ours else None
    url = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("wb") as log:
        since = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=settings, cwd=folder)
    tree = Tree(process)
    try:

        def answers() -> bool:
            assert process.poll() is None, (folder / "server.log").read_text(errors="replace")[-3000:]
            with suppress(requests.RequestException):
                body, headers = peer.body(["i feel wonderful today"]), {"Authorization": f"Bearer {KEY}"}
                return requests.post(url + peer.path, json=body, headers=headers, timeout=30).status_code == 200
            return False

        wait_until(answers, f"{peer.name}'s first answer")
        yield url, tree, time.monotonic() - since
    finally:
        children = tree._all()[1:]
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for child in [psutil.Process(process.pid), *children] if process.poll() is None else children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait(30)


def change_model(url: str, model: Path) -> float:
    """Seconds until every replica answers with another model."""
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {KEY}"
    since = time.monotonic()
    answer = session.put(f"{url}/v1/model", json={"model": str(model)}, timeout=60)
    assert answer.status_code == 202, answer.text
    number = answer.json()["swap"]["change"]

    def done() -> bool:
        info = session.get(f"{url}/info", timeout=60).json()
        assert info["swap"]["state"] != "failed", info["swap"]
        models = {replica["model"] for replica in info["replicas"].values()}
        return info["swap"].get("change") == number and info["swap"]["state"] == "idle" and models == {info["model"]}

    wait_until(done, "the model change")
    return time.monotonic() - since


def measure(peer: Peer, model: Path, texts: list[str], seconds: float, other: Path | None) -> dict[str, Any]:
    """One server once: all scenes."""
    scenes: dict[str, Any] = {}
    result: dict[str, Any] = {"name": peer.name, "scenes": scenes}
    with tempfile.TemporaryDirectory(prefix="eb-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with running(peer, model, folder) as (url, tree, first_s):
            result["first_answer_s"] = first_s
            files = {size: bodies(folder, peer, texts, size) for size in (1, 32)}
            wrk(url, peer.path, files[1], 16, 3)
            for connections, size, times in SCENES:
                cpu, before = tree.cpu_s(), _cpu_of_all()
                came = wrk(url, peer.path, files[size], connections, seconds * times)
                used, all_used = tree.cpu_s() - cpu, _cpu_of_all() - before
                answered = (came["requests"] - came["refused"]) * size
                came["cpu_s_per_1000"] = used / max(1, answered) * 1000
                came["texts_per_s"] = answered / came["seconds"]
                # A machine that does other things meanwhile makes figures that say little.
                came["cores_of_others"] = max(0.0, (all_used - used) / came["seconds"])
                scenes[f"{connections}x{size}"] = came
            result["memory_mb"] = tree.memory_mb()
            if peer.is_ours:
                info = requests.get(f"{url}/info", headers={"Authorization": f"Bearer {KEY}"}, timeout=30).json()
                result["engine"], result["engines"] = info["engine"], info["engines"]
                if other is not None:
                    result["model_change_s"] = change_model(url, other)
    return result


def _cpu_of_all() -> float:
    """CPU seconds that the machine has computed so far, but for this process and its load generators."""
    times = psutil.cpu_times()
    own = sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime for who in _MINE)
    return float(times.user + times.nice + times.system + times.irq + times.softirq - own)


def accuracies(model: Path) -> dict[str, Any]:
    """Accuracy and F1 of each engine on the real splits."""
    from emoray import Classifier
    from emoray.evaluation import evaluate

    found: dict[str, Any] = {}
    for engine in ("torch", "onnx", "onnx-int8"):
        classifier = Classifier.load(model, engine=engine)  # type: ignore[arg-type]
        for split in ("validation", "test"):
            figures = evaluate(classifier, None, split).metrics()
            found.setdefault(engine, {})[split] = {key: figures[key] for key in ("accuracy", "f1")}
    return found


def table(content: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    names = [name for name in PEERS if any(run["name"] == name for run in content["runs"])]
    lines = []
    for size in (1, 32):
        lines += ["", f"{'One text' if size == 1 else f'{size} texts'} a request: texts/s (p50 / p95 / p99 in ms)", ""]
        lines += ["| | 1 connection | 16 | 64 | CPU s / 1,000 texts | errors | cores of others |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|"]
        lines += [_row(content, name, size) for name in names]
    lines += ["", "| | first answer s | model change s | memory MB | engine |", "|---|---:|---:|---:|---|"]
    for name in names:
        runs = [run for run in content["runs"] if run["name"] == name]
        change = [run["model_change_s"] for run in runs if "model_change_s" in run]
        engines = ", ".join(sorted({run["engine"] for run in runs if "engine" in run})) or "torch"
        lines.append(
            f"| {name} | {_middle(run['first_answer_s'] for run in runs):.1f} "
            f"| {f'{statistics.median(change):.1f}' if change else 'restart'} "
            f"| {_middle(run['memory_mb'] for run in runs):,.0f} | {engines} |"
        )
    if "accuracy" in content:
        lines += ["", "| engine | validation accuracy | F1 | test accuracy | F1 |", "|---|---:|---:|---:|---:|"]
        for engine, splits in content["accuracy"].items():
            figures = " | ".join(f"{splits[s][key]:.4f}" for s in ("validation", "test") for key in ("accuracy", "f1"))
            lines.append(f"| {engine} | {figures} |")
    if "layers" in content:
        lines += ["", "| layer | texts/s | CPU ms a text |", "|---|---:|---:|"]
        for name, row in content["layers"].items():
            lines.append(f"| {name} | {row['texts_per_s']:,.0f} | {row['cpu_ms']:.2f} |")
    return "\n".join(lines)


def _row(content: dict[str, Any], name: str, size: int) -> str:
    runs = [run["scenes"] for run in content["runs"] if run["name"] == name]
    cells, errors, cpu, others = [], 0, [], []
    for connections in (1, 16, 64):
        came = [scenes[f"{connections}x{size}"] for scenes in runs]
        speeds = [one["texts_per_s"] for one in came]
        spread = f" [{min(speeds):,.0f} - {max(speeds):,.0f}]" if len(came) > 1 else ""
        times = " / ".join(f"{_middle(one[key] for one in came):,.0f}" for key in ("p50_ms", "p95_ms", "p99_ms"))
        cells.append(f"{statistics.median(speeds):,.0f}{spread} ({times})")
        errors += sum(one["errors"] + one["refused"] for one in came)
        cpu += [one["cpu_s_per_1000"] for one in came if connections > 1]
        others += [one["cores_of_others"] for one in came]
    return f"| {name} | {' | '.join(cells)} | {_middle(cpu):.2f} | {errors} | {_middle(others):.1f} |"


def _middle(values: Any) -> float:
    return statistics.median(values)


def _folder(location: str) -> Path:
    return checkpoint.fetch(find_model(location))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=_folder, help="a run or a model's folder")
    parser.add_argument("--other", type=_folder, help="another one, for the time of a model change")
    parser.add_argument("--texts", required=True, type=Path, help="jsonl with a `text` in each row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each scene")
    parser.add_argument("--only", action="append", help=f"one of {', '.join(PEERS)}, layers, accuracy; default: all")
    parser.add_argument("--round", type=int, help="with --only: the number of this round")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{time.strftime('%Y-%m-%d')}-serve-cpu.json")
    parser.add_argument("--show", action="store_true", help="print the table of what there is, and measure nothing")
    options = parser.parse_args()
    texts = [json.loads(line)["text"] for line in options.texts.read_text().splitlines()]
    content: dict[str, Any] = {"runs": []}
    if options.out.exists():
        content = json.loads(options.out.read_text())
    content.update(date=time.strftime("%Y-%m-%d"), device=processor(), seconds=options.seconds)
    names = options.only or [*PEERS, "layers", "accuracy"]
    rounds = [options.round] if options.round is not None else list(range(1, options.rounds + 1))
    for turn in [] if options.show else rounds:
        for name in names:
            if name == "layers":
                content["layers"] = layers(options.model, texts)
            elif name == "accuracy":
                content["accuracy"] = accuracies(options.model)
            else:
                run = measure(PEERS[name], options.model, texts, options.seconds, options.other)
                kept = [old for old in content["runs"] if (old["name"], old["round"]) != (name, turn)]
                content["runs"] = [*kept, {**run, "round": turn}]
            options.out.parent.mkdir(exist_ok=True)
            options.out.write_text(json.dumps(content, indent=1))
            print(f"round {turn}: {name}", file=sys.stderr, flush=True)
    print(table(content))


if __name__ == "__main__":
    main()
