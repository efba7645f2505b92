"""One contender of the step benchmark, run alone in a process: `python -m benchmarks.contenders NAME ...`.

Prints one JSON line: seconds and real tokens of each measured step, and the process's peak memory. All contenders
take the same texts, the same recipe (AdamW, clip 1.0, dropout as the encoder has it) and two threads.

On a GPU the measured batches are run once before, and the device is waited for at the first and the last of them only,
as a training run does: a step's own seconds then say when it was launched, and only their sum is its time.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.limit import MatrixProducts
from emoray import model
from emoray.config import load
from emoray.learner import Learner
from emoray.process import set_up_torch
from emoray.task import Task, prepare
from emoray.tokens import BatchPlan
from emoray.world import World

WARM_UP = 2
Measured = tuple[list[float], list[int]]


def emoray(task: Task, batches: list[NDArray[np.int64]], steps: list[int], device: str) -> Measured:
    """This project's step."""
    state = model.load(task.config.model, task.labels, task.config.training.seed).state_dict()
    set_up_torch(torch.get_num_threads(), torch.device(device))
    learner = Learner(task, state, World(device=device))
    ends = [time.perf_counter()]
    for done, step in enumerate(steps, 1):
        learner.step(step)
        _wait(device, done, len(steps))
        ends.append(time.perf_counter())
    return list(np.diff(ends)), _tokens(task, batches)


def _wait(device: str, done: int, steps: int) -> None:
    """Where the clock starts and where it stops, a GPU must have done what it was given."""
    if device == "cuda" and done in (steps // 2, steps):
        torch.cuda.synchronize()


def matrix_products(task: Task, batches: list[NDArray[np.int64]], pruned: bool) -> Measured:
    """The limit: see benchmarks/limit.py."""
    config, lengths = task.hf_config, task.parts["train"].tokens.lengths
    most = max(int(lengths[rows].sum()) for rows in batches)
    products = MatrixProducts(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        pruned,
        most,
    )
    seconds = []
    for rows in batches:
        start = time.perf_counter()
        products.step([int(length) for length in lengths[rows]])
        seconds.append(time.perf_counter() - start)
    return seconds, _tokens(task, batches)


def trainer(
    task: Task, batches: list[NDArray[np.int64]], padding: bool | str, device: str, bf16: bool = False
) -> Measured:
    """transformers.Trainer with its defaults, on these batches."""
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

    tokenizer = model.load_tokenizer(task.config.model.pretrained)
    train = task.parts["train"]
    texts = [{"input_ids": train.tokens[i].tolist(), "labels": int(train.targets[i])} for i in range(len(train.tokens))]
    collate = DataCollatorWithPadding(tokenizer, padding=padding, max_length=task.config.model.max_length)
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _wait(device, len(ends), len(batches))
            ends.append(time.perf_counter())

    class OnTheseBatches(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return DataLoader(texts, batch_sampler=[rows.tolist() for rows in batches], collate_fn=collate)  # type: ignore[arg-type]

    arguments = TrainingArguments(
        output_dir="/tmp/emoray-bench",
        per_device_train_batch_size=64,
        learning_rate=task.config.training.learning_rate,
        max_steps=len(batches),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
        bf16=bf16 or device == "cuda",
    )
    network = model.load(task.config.model, task.labels, task.config.training.seed)
    OnTheseBatches(network, arguments, train_dataset=texts, data_collator=collate, callbacks=[Clock()]).train()
    return list(np.diff(ends)), _tokens(task, batches)


def _tokens(task: Task, batches: list[NDArray[np.int64]]) -> list[int]:
    lengths = task.parts["train"].tokens.lengths
    return [int(lengths[rows].sum()) for rows in batches]


def _grouped(task: Task, count: int) -> list[NDArray[np.int64]]:
    """Batches as transformers' group_by_length makes them, drawn from all of an epoch: their lengths run in waves."""
    from transformers.trainer_pt_utils import LengthGroupedSampler

    lengths = [int(length) for length in task.parts["train"].tokens.lengths]
    order = np.array(list(LengthGroupedSampler(64, lengths=lengths, generator=torch.Generator().manual_seed(42))))
    whole = [order[start : start + 64] for start in range(0, len(order) - 63, 64)]
    return [whole[i] for i in np.random.default_rng(42).choice(len(whole), count, replace=False)]


def run(name: str, overrides: list[str], count: int, device: str) -> dict[str, Any]:
    """Measure one contender on `count` steps after the warm-up."""
    bf16 = name.endswith(", bf16")
    name = name.removesuffix(", bf16")
    choices = [f"training.packing={'off' if name == 'emoray padded' else 'auto'}"]
    choices += ["training.precision=bf16"] if bf16 else []
    task = prepare(load(None, [*overrides, *choices]))
    plan = BatchPlan(task.parts["train"].tokens.lengths, 42, 64, True, 16384)
    warm_up = WARM_UP if device == "cpu" else count
    spread = np.linspace(0, plan.steps_per_epoch - 2, count + WARM_UP).astype(int)
    steps = [int(step) for step in spread]
    grouped = _grouped(task, count + WARM_UP) if name.endswith("group_by_length") else []
    if device == "cuda":
        steps, grouped = steps[WARM_UP:] * 2, grouped[WARM_UP:] * 2
    batches = grouped or [plan.samples(step) for step in steps]
    contenders: dict[str, Callable[[], Measured]] = {
        "emoray": lambda: emoray(task, batches, steps, device),
        "emoray padded": lambda: emoray(task, batches, steps, device),
        "Trainer": lambda: trainer(task, batches, True, device, bf16),
        "Trainer group_by_length": lambda: trainer(task, batches, True, device, bf16),
        "Trainer padded to 128": lambda: trainer(task, batches, "max_length", device),
        "matrix products": lambda: matrix_products(task, batches, pruned=False),
        "matrix products, pruned": lambda: matrix_products(task, batches, pruned=True),
    }
    seconds, tokens = contenders[name]()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    return {"seconds": seconds[warm_up:], "tokens": tokens[warm_up:], "memory_mb": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(run(arguments.name, arguments.overrides, arguments.steps, arguments.device)))


if __name__ == "__main__":
    main()
