"""`emoray predict` against the classifier in this process on the same texts, and killed in the middle and given again.

    python -m benchmarks.predict --model RUN --data FOLDER --work DIR [--texts 200000] [--sample 20000] [--kill]

The texts are those of all jsonl files in FOLDER, repeated and shuffled. The classifier scores a sample of them before
and after the command; the command's speed is told twice: of all its time, start included, and of its parts alone. With
--kill the command is given anew, killed when half the parts are there, given again, and the sha256 sums of both
outputs are compared. Writes benchmarks/results/<date>-cpu-predict.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.disturb import Command
from benchmarks.step import save
from emoray.classifier import Classifier
from emoray.process import WORKER_ENVIRONMENT, set_up_torch


def make_input(data: Path, count: int, path: Path) -> list[str]:
    """Write the texts, each with its number, and return them."""
    texts = [json.loads(line)["text"] for file in sorted(data.glob("*.jsonl")) for line in file.open(encoding="utf-8")]
    texts = (texts * -(-count // len(texts)))[:count]
    random.Random(0).shuffle(texts)
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return texts


def score_here(model: str, texts: list[str]) -> float:
    """Texts a second of the classifier alone, on all cores."""
    set_up_torch(os.cpu_count() or 1, torch.device("cpu"))
    classifier = Classifier.load(model)
    classifier(texts[:2048])
    start = time.perf_counter()
    classifier(texts)
    return len(texts) / (time.perf_counter() - start)


def in_process(model: str, source: Path, count: int) -> float:
    """The same in a new process, started with the settings that actors get."""
    arguments = [
        "--model",
        model,
        "--data",
        str(source),
        "--work",
        str(source.parent),
        "--sample",
        str(count),
        "--alone",
    ]
    environment = {**os.environ, **WORKER_ENVIRONMENT}
    command = [sys.executable, "-m", "benchmarks.predict", *arguments]
    return float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def command(model: str, source: Path, output: Path) -> Command:
    environment = {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled", **os.environ}
    arguments = ["predict", model, str(source), "--output", str(output), "--json"]
    return Command(arguments, output, output.with_suffix(".log"), environment)


def parts(output: Path) -> list[Path]:
    return sorted(output.glob("part-*"))


def finish(started: Command) -> dict[str, Any]:
    started.patience_s = 3600
    if started.status() != 0:
        sys.exit(started.output)
    summary: dict[str, Any] = json.loads(started.output.strip().splitlines()[-1])
    return summary


def speed_of_parts(output: Path, actors: int) -> float:
    """Rows a second between the end of each actor's first part and the last one's."""
    found = sorted(parts(output), key=lambda path: path.stat().st_mtime_ns)
    rows = sum(len(path.read_bytes().splitlines()) for path in found[actors:])
    return rows / (found[-1].stat().st_mtime - found[actors - 1].stat().st_mtime)


def sums(output: Path) -> str:
    digest = hashlib.sha256()
    for path in parts(output):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def measure(arguments: argparse.Namespace, source: Path, texts: list[str]) -> dict[str, Any]:
    """The command's speed between two of the classifier's."""
    alone = [in_process(arguments.model, source, arguments.sample)]
    output = arguments.work / "whole"
    shutil.rmtree(output, ignore_errors=True)
    start = time.perf_counter()
    summary = finish(command(arguments.model, source, output))
    seconds = time.perf_counter() - start
    alone.append(in_process(arguments.model, source, arguments.sample))
    own = sum(alone) / len(alone)
    steady = speed_of_parts(output, os.cpu_count() or 1)
    whole = len(texts) / seconds
    figures = {"classifier": alone, "command": whole, "command, its parts": steady, "seconds": seconds}
    return {"texts_per_s": figures, "of_classifier": {"command": whole / own, "parts": steady / own}, **summary}


def killed(arguments: argparse.Namespace, source: Path) -> dict[str, Any]:
    """Killed at half of its parts, and given again."""
    output = arguments.work / "killed"
    shutil.rmtree(output, ignore_errors=True)
    whole = arguments.work / "whole"
    total = int(json.loads((whole / "_emoray" / "summary.json").read_text())["parts"])  # written when all are there
    first = command(arguments.model, source, output)
    first.patience_s = 3600
    first.wait_until(lambda: len(parts(output)) >= total // 2, "half of the parts")
    first.kill()
    time.sleep(5)  # its actors are ended by Ray
    first.end()
    before = {path.name: path.stat().st_mtime_ns for path in parts(output)}
    finish(command(arguments.model, source, output))
    again = [name for name, when in before.items() if (output / name).stat().st_mtime_ns != when]
    return {
        "parts": total,
        "there_when_killed": len(before),
        "written_again": len(again),
        "identical": sums(output) == sums(whole),
        "sha256": sums(output),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of jsonl with a column text")
    parser.add_argument("--work", type=Path, required=True, help="folder for input and output")
    parser.add_argument("--texts", type=int, default=200_000)
    parser.add_argument("--sample", type=int, default=20_000)
    parser.add_argument("--kill", action="store_true", help="after a run without it, in the same --work")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        lines = arguments.data.read_text(encoding="utf-8").splitlines()[: arguments.sample]
        print(score_here(arguments.model, [json.loads(line)["text"] for line in lines]))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    source, kept = arguments.work / "texts.jsonl", arguments.work / "figures.json"
    texts = make_input(arguments.data, arguments.texts, source)
    if arguments.kill:
        content = {**json.loads(kept.read_text()), "killed": killed(arguments, source)}
    else:
        content = {"texts": len(texts), "threads": torch.get_num_threads(), **measure(arguments, source, texts)}
    kept.write_text(json.dumps(content))
    print(json.dumps(content, indent=1))
    content = {**content, "model": Path(arguments.model).name, "output": "a folder"}
    print(f"Written to {save('cpu-predict', content)}")


if __name__ == "__main__":
    main()
