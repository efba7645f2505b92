"""Seconds from the command to the first step of a run, and where they go: the first run on a machine, and a second one.

    python -m benchmarks.startup --encoder DIR --data DIR [--rounds 3]

Each round starts with nothing tokenised. "Import" is the time of a process that only imports torch, transformers and
ray, which no run can be faster than. Writes benchmarks/results/<date>-cpu-startup.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.step import save

CONFIG = str(Path(__file__).parents[1] / "configs" / "emotion.yaml")
_COMMAND = (sys.executable, "-c", "import sys; import sys; from emoray.cli import main; sys.exit(main())")


def first_step(name: str, folder: Path, overrides: list[str]) -> float:
    """Start `emoray train` in a process of its own; seconds until its history has a line."""
    environment = {**os.environ, "EMORAY_CACHE": str(folder / "cache"), "RAY_ADDRESS": "local"}
    run = [f"run.storage_path={folder}", f"run.name={name}", "training.max_steps=1", "training.logging_steps=1"]
    history = folder / name / "history.jsonl"
    start = time.perf_counter()
    process = subprocess.Popen(
        [*_COMMAND, "train", CONFIG, *overrides, *run], env=environment, stdout=subprocess.DEVNULL
    )
    while not (history.exists() and history.stat().st_size):
        if process.poll():
            sys.exit(f"the run failed with status {process.returncode}")
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    process.wait()
    return seconds


def imports() -> float:
    """Seconds of a process that imports what every run needs."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, transformers, ray.train"], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder of a pretrained encoder, e.g. all-MiniLM-L6-v2")
    parser.add_argument("--data", required=True, help="folder of a labelled data set")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    overrides = [f"model.pretrained={arguments.encoder}", f"data.dataset={arguments.data}"]
    rounds = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            seconds = {"import": imports()}
            for name in ("first", "second"):
                seconds[name] = first_step(name, Path(folder), overrides)
        rounds.append(seconds)
        print({name: round(value, 1) for name, value in seconds.items()}, file=sys.stderr)
    medians = {name: statistics.median(seconds[name] for seconds in rounds) for name in rounds[0]}
    print(
        f"From the command to the first step: {medians['first']:.1f} s, of a second run {medians['second']:.1f} s; "
        f"importing torch, transformers and ray takes {medians['import']:.1f} s of them, in driver and worker."
    )
    print(f"Written to {save('cpu-startup', {'medians': medians, 'rounds': rounds})}")


if __name__ == "__main__":
    main()
