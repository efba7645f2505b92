"""`emoray doctor` takes one real step of training, in a process of its own: `python -m emoray.doctor_step 4 cpu`.

One that runs out of memory is killed, and doctor must live to tell. A pickled task goes in on stdin, and a line of JSON
comes out on stdout.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from emoray.doctor_findings import Case, Finding, gib, ok, problem, warning
from emoray.doctor_machine import free_memory
from emoray.errors import EmorayError
from emoray.task import Task
from emoray.wording import first_line

STEP_LIMIT_S = 60.0
"""How long the step may take, loading included, in seconds."""
_SMALLER = "lower training.micro_batch_tokens, model.max_length or the batch, or take a smaller encoder"


def one_step(case: Case) -> Iterator[Finding]:
    """Load the weights and do a worker's first step."""
    if case.task is None or case.config is None:
        return
    task = replace(case.task, config=_share_of_one_worker(case.config))
    try:
        done = run_step(task, case.cpus or 1, case.uses_gpu)
    except subprocess.TimeoutExpired:
        found = f"not done after {STEP_LIMIT_S:g} s"
        yield warning(
            "one step", found, "training here takes long: give it a GPU, a smaller batch or a smaller encoder"
        )
        return
    if "error" in done:
        yield problem("one step", done["error"], done["remedy"])
        return
    what = f"loss {done['loss']:.3f}, {done['seconds']:.2f} s for {done['tokens']:,} tokens"
    found = f"{what}, at most {gib(done['memory'])} of {done['device']} memory"
    if not math.isfinite(done["loss"]):
        yield problem("one step", found, "set training.precision=fp32, and look for broken weights")
    else:
        yield ok("one step", found)


def _share_of_one_worker(config: Any) -> Any:
    """The config of a run of one worker whose only step has the texts that a worker of this one gets."""
    workers = config.workers.min_workers
    training = {"max_steps": 1, "global_batch_size": None, "train_batch_size": config.texts_a_worker(workers)}
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def run_step(task: Task, threads: int, use_gpu: bool) -> dict[str, Any]:
    """What `emoray.doctor_step` answers, from a child process.

    Raises:
        subprocess.TimeoutExpired: after STEP_LIMIT_S.
    """
    command = [sys.executable, "-m", "emoray.doctor_step", str(threads), "gpu" if use_gpu else "cpu"]
    child = subprocess.run(command, input=pickle.dumps(task), capture_output=True, timeout=STEP_LIMIT_S, check=False)
    try:
        answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        free = gib(free_memory()[0])
        lines = child.stderr.decode(errors="replace").strip().splitlines()
        killed = child.returncode == -9
        why = f"killed, most likely for memory ({free} free)" if killed else f"ended with status {child.returncode}"
        remedy = _SMALLER if killed else "run it again, and report this"
        return {"error": f"the step's process was {why}: {lines[-1]}" if lines else why, "remedy": remedy}
    return answer


def step(task: Task, threads: int, use_gpu: bool) -> dict[str, Any]:
    """Load the weights and do the first step.

    Returns:
        `loss`, `seconds`, `tokens`, `memory` in bytes, `device`; or `error` and `remedy`.
    """
    import torch

    from emoray import model
    from emoray.learner import Learner
    from emoray.process import compute_on
    from emoray.world import World

    device = compute_on(use_gpu, threads)
    try:
        weights = model.load(task.config.model, task.labels, task.config.training.seed)
        learner = Learner(task, weights.state_dict(), World(device=device))
        start = time.perf_counter()
        loss = float(learner.step(0))  # reading it waits for the device
        seconds = time.perf_counter() - start
    except EmorayError as error:
        return {"error": str(error), "remedy": "set model.pretrained to a whole folder or Hub id of an encoder"}
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"error": f"out of memory: {first_line(error)}", "remedy": _SMALLER}
    except RuntimeError as error:
        remedy = _SMALLER if "allocate memory" in str(error) else "see the check of torch's build and the driver"
        return {"error": first_line(error), "remedy": remedy}
    tokens = int(task.parts["train"].tokens.lengths[learner.plan.samples(0)].sum())
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else _peak()
    return {"loss": loss, "seconds": seconds, "tokens": tokens, "memory": memory, "device": device.type.upper()}


def _peak() -> int:
    """Most resident memory of this process so far, in bytes; `getrusage` would count that of its parent before exec."""
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii")) if status.exists() else None
    return int(match[1]) * 1024 if match else 0  # 0 where this isn't Linux


if __name__ == "__main__":
    answer = step(pickle.load(sys.stdin.buffer), int(sys.argv[1]), sys.argv[2] == "gpu")
    print(json.dumps(answer), flush=True)
