"""One real step of training in a process of its own, for `emoray doctor`: `python -m emoray.doctor_step 4 cpu`.

A pickled task comes in on stdin; one line of JSON goes out on stdout.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
import time
from pathlib import Path
from typing import Any

from emoray.errors import EmorayError
from emoray.task import Task
from emoray.wording import first_line

_SMALLER = "lower training.micro_batch_tokens, model.max_length or the batch, or take a smaller encoder"


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
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(match[1]) * 1024 if match else 0


if __name__ == "__main__":
    answer = step(pickle.load(sys.stdin.buffer), int(sys.argv[1]), sys.argv[2] == "gpu")
    print(json.dumps(answer), flush=True)
