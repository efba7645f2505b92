"""Tokens a second of a training step, against transformers.Trainer and against the machine's matrix products.

    python -m benchmarks.step --encoder DIR --data DIR [--shape DIR] [--rounds 3] [--steps 8]

Contenders run one after the other, each in a process of its own, round after round (A B C A B C), so that a machine
that is busy for a while is busy for all of them. Writes benchmarks/results/<date>-<device>.json and prints the table;
ratios are taken within a round, then their median.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from emoray.process import WORKER_ENVIRONMENT

RESULTS = Path(__file__).parent / "results"
CONTENDERS = (
    "emoray",
    "matrix products",
    "matrix products, pruned",
    "Trainer",
    "Trainer group_by_length",
    "emoray padded",
    "Trainer padded to 128",
)
IN_BF16 = ("emoray, bf16", "Trainer, bf16", "Trainer group_by_length, bf16")
"""Run too where the processor multiplies bfloat16 by itself; elsewhere autocast is slower than float32."""


def measure(name: str, overrides: list[str], steps: int, threads: int, device: str) -> dict[str, Any]:
    """One contender's run in a fresh process; emoray's with the environment that its workers get."""
    environment = {**os.environ, **(WORKER_ENVIRONMENT if name.startswith("emoray") else {})}
    count = max(2, steps // 3) if name == "Trainer padded to 128" else steps
    command = [sys.executable, "-m", "benchmarks.contenders", name, "--steps", str(count), "--threads", str(threads)]
    command += ["--device", device]
    done = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    result["tokens_per_s"] = sum(result["tokens"]) / sum(result["seconds"])
    return result


def compare(
    contenders: Sequence[str], overrides: list[str], steps: int, rounds: int, threads: int, device: str = "cpu"
) -> dict[str, Any]:
    """All contenders, `rounds` times in turn."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in contenders:
            run = measure(name, overrides, steps, threads, device)
            runs[name].append(run)
            print(f"round {turn + 1}/{rounds}  {name:<26}{run['tokens_per_s']:>9,.0f} tokens/s", file=sys.stderr)
    return {name: _summary(runs[name], runs["emoray"]) for name in contenders} | {"runs": runs}


def _summary(runs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = [run["tokens_per_s"] for run in runs]
    ratios = [our["tokens_per_s"] / run["tokens_per_s"] for our, run in zip(ours, runs, strict=True)]
    return {
        "tokens_per_s": statistics.median(speeds),
        "step_s": statistics.median(s for run in runs for s in run["seconds"]),
        "emoray_is": statistics.median(ratios),
        "emoray_is_from_to": [min(ratios), max(ratios)],
        "memory_mb": statistics.median(run["memory_mb"] for run in runs),
    }


def table(result: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    lines = ["| | tokens/s | s a step | emoray is | from - to | memory |", "|---|---:|---:|---:|---:|---:|"]
    for name, row in result.items():
        if name == "runs":
            continue
        low, high = row["emoray_is_from_to"]
        lines.append(
            f"| {name} | {row['tokens_per_s']:,.0f} | {row['step_s']:.2f} | {row['emoray_is']:.2f} x "
            f"| {low:.2f} - {high:.2f} | {row['memory_mb']:,.0f} MB |"
        )
    return "\n".join(lines)


def processor() -> str:
    """The processor, as the kernel names it, and its number of cores."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def contenders() -> tuple[str, ...]:
    """All that can be compared on this processor."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return CONTENDERS + (IN_BF16 if "amx_bf16" in flags or "avx512_bf16" in flags else ())


def save(name: str, content: dict[str, Any]) -> Path:
    """Write a benchmark's result with what it was measured on."""
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "device": processor(),
        "versions": {name: version(name) for name in ("torch", "transformers", "ray", "numpy") if find_spec(name)},
        "threads": os.cpu_count(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{about['date']}-{name}.json"
    path.write_text(json.dumps({**about, **content}, indent=1))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder of a pretrained encoder, e.g. all-MiniLM-L6-v2")
    parser.add_argument("--data", required=True, help="folder of a labelled data set")
    parser.add_argument("--shape", help="folder with the config and tokenizer of a larger encoder (random weights)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    data = [f"data.dataset={arguments.data}", "training.learning_rate=2e-4"]
    encoders = {Path(arguments.encoder).name: [f"model.pretrained={arguments.encoder}"]}
    if arguments.shape:
        encoders[Path(arguments.shape).name] = [f"model.pretrained={arguments.shape}", "model.from_scratch=true"]
    content: dict[str, Any] = {"rounds": arguments.rounds, "steps": arguments.steps}
    for name, overrides in encoders.items():
        content[name] = compare(contenders(), [*data, *overrides], arguments.steps, arguments.rounds, arguments.threads)
        share = content[name]["matrix products"]["emoray_is"]
        print(f"\n{name}, batch 64, {arguments.threads} threads, {processor()}\n\n{table(content[name])}")
        print(f"\nemoray reaches {share:.0%} of the matrix-product limit.")
    print(f"\nWritten to {save('cpu-step', content)}")


if __name__ == "__main__":
    main()
