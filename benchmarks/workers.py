"""Two workers of one thread against one, and against two runs that don't talk: tokens a second, bytes of gradients.

    python -m benchmarks.workers --encoder DIR --data DIR [--rounds 3] [--steps 3] [KEY=VALUE ...]

All see a batch of 64 texts a worker. Two runs side by side that exchange nothing show what the machine itself gives to
two processes, which share its memory and clock. Rounds alternate; writes benchmarks/results/<date>-cpu-workers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.step import save
from emoray import model
from emoray.config import load
from emoray.learner import Learner
from emoray.process import WORKER_ENVIRONMENT
from emoray.task import prepare
from emoray.world import World

WARM_UP = 1


def work(rank: int, size: int, overrides: list[str], steps: int) -> dict[str, Any]:
    """One worker's part; the figures are those of the whole batch."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=size)
    world = World(rank, size)
    task = prepare(load(None, [*overrides, f"workers.num_workers={size}"]))
    learner = Learner(task, model.load(task.config.model, task.labels, 42).state_dict(), world)
    tokens, seconds = 0, 0.0
    for step in range(WARM_UP + steps):
        world.barrier()  # all start together
        start = time.perf_counter()
        float(learner.step(step))
        world.barrier()
        if step >= WARM_UP:
            seconds += time.perf_counter() - start
            tokens += int(learner.plan.lengths[learner.plan.samples(step)].sum())
    gradients = sum(p.numel() * p.element_size() for p in learner.model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.load(task.config.model, task.labels, 42).parameters()) * 4
    return {"tokens_per_s": tokens / seconds, "gradient_bytes": gradients, "gradient_bytes_of_whole_table": whole}


def start(size: int, overrides: list[str], steps: int) -> list[subprocess.Popen[str]]:
    """The worker processes of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, **WORKER_ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "benchmarks.workers", "--steps", str(steps), *overrides]
    return [
        subprocess.Popen(
            [*command, "--rank", str(rank), "--size", str(size)],
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def measured(workers: list[subprocess.Popen[str]]) -> dict[str, Any]:
    """What worker 0 measured, when all have ended."""
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        sys.exit("a worker failed")
    result: dict[str, Any] = json.loads(outputs[0].strip().splitlines()[-1])
    return result


def one_round(overrides: list[str], steps: int) -> dict[str, Any]:
    """One worker, two workers, and two runs of one worker at once, in turn."""
    one = measured(start(1, overrides, steps))
    two = measured(start(2, overrides, steps))
    apart = [start(1, overrides, steps) for _ in range(2)]
    speeds = {"one": one["tokens_per_s"], "two": two["tokens_per_s"]}
    return {**two, **speeds, "two apart": sum(measured(run)["tokens_per_s"] for run in apart)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="folder of an encoder; with model.from_scratch=true config and tokenizer do")
    parser.add_argument("--data", help="folder of a labelled data set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    if arguments.rank is not None:
        print(json.dumps(work(arguments.rank, arguments.size, arguments.overrides, arguments.steps)))
        return
    overrides = [f"model.pretrained={arguments.encoder}", f"data.dataset={arguments.data}", *arguments.overrides]
    rounds = []
    for _ in range(arguments.rounds):
        rounds.append(one_round(overrides, arguments.steps))
        print({name: round(rounds[-1][name], 1) for name in ("one", "two", "two apart")}, file=sys.stderr)
    ratios = {name: sorted(run[name] / run["one"] for run in rounds) for name in ("two", "two apart")}
    print(
        f"Two workers of one thread: {_spread(ratios['two'])} of one; two runs that don't talk: "
        f"{_spread(ratios['two apart'])}. {rounds[0]['gradient_bytes'] / 2**20:,.0f} MiB of gradients a step, "
        f"{rounds[0]['gradient_bytes_of_whole_table'] / 2**20:,.0f} with the whole vocabulary."
    )
    content = {"encoder": Path(arguments.encoder).name, "ratios": ratios, "rounds": rounds}
    print(f"Written to {save('cpu-workers', content)}")


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} x ({ratios[0]:.2f} - {ratios[-1]:.2f})"


if __name__ == "__main__":
    main()
