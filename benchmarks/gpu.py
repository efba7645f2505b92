"""The mBERT shape on one GPU in bf16: steps against transformers.Trainer, use of the matrix units, the whole recipe.

    python -m benchmarks.gpu --shape DIR --data DIR [--rounds 3] [--steps 40] [--peak-tflops 989]

DIR of --shape holds the config and tokenizer of bert-base-multilingual-cased; weights are random, for speed doesn't
depend on them. Runs without Ray. `--device cpu --steps 2 --rounds 1 --no-recipe` tries the script on a CPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch

from benchmarks.step import compare, save, table
from emoray import model
from emoray.config import load
from emoray.finish import finish
from emoray.process import set_up_torch
from emoray.run import Attempt, open_run
from emoray.task import prepare
from emoray.training import Alone, train
from emoray.world import World

CONTENDERS = ("emoray", "Trainer", "Trainer group_by_length")


def matrix_share(overrides: list[str], tokens_per_s: float, peak_tflops: float) -> float:
    """Share of the peak that the linear layers' products take: 6 operations a weight and token (Kaplan et al. 2020)."""
    config = model.load_config(load(None, overrides).model, ["a", "b"])
    weights = config.num_hidden_layers * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size)
    return float(6 * weights * tokens_per_s / (peak_tflops * 1e12))


def recipe(overrides: list[str], device: str) -> dict[str, Any]:
    """The documented recipe from the first step to the written results, in seconds; start-up apart."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        task = prepare(load(None, [*overrides, f"run.storage_path={folder}"]))
        state = model.load(task.config.model, task.labels, task.config.training.seed).state_dict()
        run = open_run(task.config.run)
        attempt = Attempt.begin(run, task.identity)
        start = time.perf_counter()
        learner, progress = train(task, state, World(device=device), attempt, Alone())
        trained = time.perf_counter()
        finish(learner, progress, attempt)
        return {
            "start_up_s": start - begin,
            "train_and_validate_s": trained - start,
            "finish_s": time.perf_counter() - trained,
            "steps": progress.step,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 of the GPU; 989 is an H100 SXM")
    parser.add_argument("--recipe", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    overrides = [
        f"model.pretrained={arguments.shape}",
        "model.from_scratch=true",
        f"data.dataset={arguments.data}",
        "training.checkpoint_every_minutes=null",
    ]
    threads = torch.get_num_threads()
    set_up_torch(threads, torch.device(arguments.device))
    result = compare(CONTENDERS, overrides, arguments.steps, arguments.rounds, threads, arguments.device)
    content: dict[str, Any] = {"arguments": vars(arguments), "steps": result}
    print(table(result))
    if arguments.device == "cuda":
        content["gpu"] = torch.cuda.get_device_name()
        share = matrix_share(overrides, result["emoray"]["tokens_per_s"], arguments.peak_tflops)
        content["share_of_peak"] = share
        print(f"\n{content['gpu']}: linear layers at {share:.0%} of {arguments.peak_tflops:g} TFLOPS")
    if arguments.recipe:
        content["recipe"] = recipe(overrides, arguments.device)
        print(f"\nThe whole recipe: {content['recipe']}")
    print(f"\nWritten to {save(f'{arguments.device}-recipe', content)}")


if __name__ == "__main__":
    main()
