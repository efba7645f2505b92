"""`make chaos`, the part on serving: replicas killed, scaled and given other models under steady load; overload; soak.

Prints a table: requests, how many failed, how many answers were none of the two models' own, and times. Exits with 1
where a request failed, an answer was wrong, or fewer than 5,000 were sent.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import requests

from benchmarks.serving import AGREE, Came, Load, Serving, environment, expected_of, grown, run, wait_until
from emoray.quickstart import SENTENCES

KEY = "the-admin-key-of-the-chaos"
LEAST = 5000
CLIENTS = 4
_FAST = ("replicas.num_cpus=0.5", "replicas.upscale_delay_s=1", "replicas.downscale_delay_s=5", "http.port=0")


class Trial:
    """Steady load on one endpoint while something is done to it."""

    def __init__(self, serving: Serving, texts: list[str], models: list[Path]) -> None:
        self.serving, self.texts, self.models = serving, texts, models
        engine = serving.info(KEY)["engine"]
        self.expected = dict(expected_of(model, texts, engine) for model in models)
        self.rows: list[tuple[str, Came]] = []
        print(HEAD, flush=True)

    def under_load(self, name: str, action: Callable[[], None], clients: int = CLIENTS, pause: float = 0.0) -> Came:
        """Run an action in a thread while clients ask; they go on until it has ended."""

        async def both() -> Came:
            load = Load(self.serving.url, self.texts, self.expected, KEY)
            asking = asyncio.create_task(load.closed(clients, pause=pause))
            try:
                await asyncio.to_thread(action)
            finally:
                load.stop()
                await asking
            return load.came

        came = run(both())
        self.rows.append((name, came))
        print(row(name, came), flush=True)
        for problem in came.problems:
            print(f"  {problem}", file=sys.stderr)
        return came

    def kill_replicas(self, times: int) -> None:
        for _ in range(times):
            time.sleep(3)
            before = {process.pid for process in self.serving.replicas}
            victim = self.serving.replicas[0]
            victim.kill()
            wait_until(lambda before=before: len(self._ready() - before) > 0, "a new replica")

    def _ready(self) -> set[int]:
        """Processes of replicas, where as many are ready."""
        info = self.serving.info(KEY)
        ready = sum(replica["state"] == "ready" for replica in info["replicas"].values())
        found = {process.pid for process in self.serving.replicas}
        return found if ready >= len(found) else set()

    def until_replicas(self, count: int) -> None:
        def there() -> bool:
            replicas = self.serving.info(KEY)["replicas"].values()
            return sum(replica["state"] == "ready" for replica in replicas) == count

        wait_until(there, f"{count} replicas")

    def change_models(self, times: int) -> None:
        for i in range(times):
            time.sleep(1)
            self.serving.change_model(self.models[(i + 1) % 2], KEY)
        time.sleep(1)


HEAD = """| Under steady load | Requests | Failed | Wrong | By each model | p50 ms | p99 ms | max ms |
|---|---:|---:|---:|---|---:|---:|---:|"""


def row(name: str, came: Came) -> str:
    models = ", ".join(str(count) for _, count in sorted(came.models.items()))
    return (
        f"| {name} | {came.requests} | {came.failed} | {came.wrong} | {models} | {came.percentile(0.5) * 1000:.0f} "
        f"| {came.percentile(0.99) * 1000:.0f} | {max(came.seconds, default=0) * 1000:.0f} |"
    )


def chaos(trial: Trial, least: int, kills: int = 3, swaps: int = 5) -> bool:
    """All disturbances; whether nothing was lost and nothing wrong."""
    trial.under_load("a replica of one is killed", lambda: trial.kill_replicas(1))
    trial.under_load("more load: 1 -> 3 replicas", lambda: trial.until_replicas(3), clients=24)
    trial.under_load(f"replicas of three are killed, {kills} times", lambda: trial.kill_replicas(kills), clients=24)
    trial.under_load(f"the model is changed, {swaps} times", lambda: trial.change_models(swaps), clients=12)
    trial.under_load("less load: 3 -> 1 replicas", lambda: trial.until_replicas(1), clients=2, pause=0.2)
    missing = least - sum(came.requests for _, came in trial.rows)
    if missing > 0:
        rate = trial.rows[3][1].requests / trial.rows[3][1].lasted

        def more() -> None:
            until = time.monotonic() + missing / rate
            while time.monotonic() < until:
                trial.kill_replicas(1)
                trial.change_models(1)

        trial.under_load("kills and model changes by turns", more, clients=12)
    total = Came()
    for _, came in trial.rows:
        total.statuses += came.statuses
        total.wrong += came.wrong
        total.models += came.models
        total.seconds += came.seconds
    print(row("**all**", total), flush=True)
    return total.failed == 0 and total.wrong == 0 and total.requests >= least


def overload(serving: Serving, texts: list[str], seconds: float) -> bool:
    """Ten times the load that it can carry: what is accepted must not take twice as long as at capacity."""

    def load() -> Load:
        return Load(serving.url, texts, {}, KEY)

    run(load().closed(8, 5))
    full = run(load().closed(128, max(10.0, seconds / 3)))
    capacity = full.statuses[200] / full.lasted
    before = serving.memory()
    over = run(load().open(10 * capacity, seconds))
    before, after = grown(before, serving.memory())
    refused = sorted(over.refused)
    print(
        f"\nCapacity: {capacity:.0f} requests/s, p99 {full.percentile(0.99) * 1000:.0f} ms ({full.statuses})\n"
        f"Ten times that for {seconds:g} s: {over.requests} requests, {over.statuses[200]} answered "
        f"({over.statuses[200] / over.lasted:.0f}/s), p50 {over.percentile(0.5) * 1000:.0f} ms, "
        f"p99 {over.percentile(0.99) * 1000:.0f} ms; {dict(over.statuses)}; refused within "
        f"{refused[len(refused) // 2] * 1000:.0f} ms (half), {refused[int(len(refused) * 0.99)] * 1000:.0f} ms (99%); "
        f"memory {before:.0f} -> {after:.0f} MB",
        flush=True,
    )
    good = set(over.statuses) <= {200, 429, 503}
    return good and over.percentile(0.99) < 2 * full.percentile(0.99) and after < 1.2 * before + 50


def soak(serving: Serving, texts: list[str], seconds: float) -> bool:
    """Half of what it can carry for a long time."""
    full = run(Load(serving.url, texts, {}, KEY).closed(16, 15))
    rate = full.statuses[200] / full.lasted / 2
    load, memory = Load(serving.url, texts, {}, KEY), []
    parts = 10
    for part in range(parts):
        came = run(load.open(rate, seconds / parts))
        memory.append(serving.memory())
        now = sum(memory[-1].values())
        print(f"soak {part + 1}/{parts}: {came.requests} requests, {came.failed} failed, {now:.0f} MB", flush=True)
    first, last = grown(memory[0], memory[-1])
    print(
        f"\nSoak, {rate:.0f} requests/s for {seconds / 60:.1f} min: {came.requests} requests, {came.failed} failed, "
        f"p50 {came.percentile(0.5) * 1000:.0f} ms, p99 {came.percentile(0.99) * 1000:.0f} ms; "
        f"memory {first:.0f} -> {last:.0f} MB; {dict(came.statuses)} {came.problems}"
    )
    return came.failed == 0 and last < 1.1 * first + 20


def parity(serving: Serving, texts: list[str], model: Path) -> bool:
    """Every text alone and in batches: the label and scores that the classifier itself gives."""
    name, want = expected_of(model, texts, serving.info(KEY)["engine"])
    headers = {"Authorization": f"Bearer {KEY}"}
    worst, labels = 0.0, 0
    for size in (1, 250):
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            answer = requests.post(
                f"{serving.url}/v1/classify", json={"texts": part}, headers=headers, timeout=60
            ).json()
            assert answer["model"] == name
            for scores, prediction in zip(want[start : start + size], answer["predictions"], strict=True):
                labels += prediction["label"] == max(scores, key=scores.__getitem__)
                worst = max(worst, *(abs(prediction["scores"][label] - scores[label]) for label in scores))
    print(f"{labels} of {2 * len(texts)} labels the same, alone and in batches; scores differ by {worst:.1e}")
    return labels == 2 * len(texts) and worst < AGREE


def train_two(folder: Path) -> list[Path]:
    """Two small models, from the sentences in the package."""
    from emoray.quickstart import config_path, make_encoder

    make_encoder(folder / "encoder")
    for seed in (1, 2):
        overrides = [f"run.name=seed-{seed}", f"run.storage_path={folder}", f"model.pretrained={folder / 'encoder'}"]
        overrides += [f"training.seed={seed}", "training.max_steps=60", "workers.cpus_per_worker=1"]
        subprocess.run(
            [sys.executable, "-m", "emoray.cli", "train", str(config_path()), *overrides],
            check=True,
            env=environment(folder, str(folder)),
            capture_output=True,
        )
    return [folder / f"seed-{seed}" for seed in (1, 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["chaos"], help="chaos, overload, soak, parity (default: chaos)")
    parser.add_argument("--models", nargs=2, type=Path, help="two runs; default: two small ones are trained")
    parser.add_argument("--texts", type=Path, help="jsonl with a `text` in each row; default: a few sentences")
    parser.add_argument("--least", type=int, default=LEAST, help="requests in all")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload; ten times that for the soak")
    options = parser.parse_args()
    texts = list(SENTENCES)
    if options.texts:
        texts = [json.loads(line)["text"] for line in options.texts.read_text().splitlines()]
    good = True
    with tempfile.TemporaryDirectory(prefix="es-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        models = options.models or train_two(folder)
        keys = folder / "keys"
        keys.write_text(f"admin chaos {hashlib.sha256(KEY.encode()).hexdigest()}\n")
        for what in options.what:
            more = ("replicas.max=3", *_FAST) if what == "chaos" else ("replicas.max=1", "http.port=0")
            arguments = (models[0], folder / f"{what}.log", environment(folder, name), f"auth.keys_file={keys}", *more)
            with Serving(*arguments) as serving:
                if what == "chaos":
                    good &= chaos(Trial(serving, texts[:300], models), options.least)
                elif what == "parity":
                    good &= parity(serving, texts, models[0])
                elif what == "overload":
                    good &= overload(serving, texts, options.seconds)
                else:
                    good &= soak(serving, texts, 10 * options.seconds)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
