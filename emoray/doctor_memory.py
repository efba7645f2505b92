"""`emoray doctor` on memory: what training with a config takes, and whether workers and checkpoints fit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emoray.doctor_findings import GIB, Case, Finding, gib, ok, problem
from emoray.doctor_machine import existing
from emoray.storage import is_uri

if TYPE_CHECKING:
    from emoray.task import Task

PROCESS = 0.5 * GIB
"""Bytes of a process with torch, transformers and Ray loaded, before any weights (measured, Linux x86)."""


@dataclass(frozen=True)
class Need:
    """Memory that training takes, in bytes.

    Attributes:
        weights: float32 parameters that are trained or frozen.
        gradients: of those that are trained.
        moments: Adam's two, of those that are trained.
        activations: what one micro-batch keeps for its backward pass.
        shared: whole weights, once a node: in Ray's object store, and in the driver.
        parameters: number of parameters of the whole model.
    """

    weights: float
    gradients: float
    moments: float
    activations: float
    shared: float
    parameters: int

    @property
    def worker(self) -> float:
        """Of a worker, its process aside."""
        return self.weights + self.gradients + self.moments + self.activations


def memory_needed(task: Task, num_workers: int, bf16: bool = False) -> Need:
    """Estimate from shapes alone; nothing is loaded."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from emoray.model import quiet
    from emoray.vocabulary import is_exact, used_rows

    config, training = task.config.model, task.config.training
    with torch.device("meta"), quiet():
        model = AutoModelForSequenceClassification.from_config(task.hf_config)
    whole = sum(parameter.numel() for parameter in model.parameters())
    frozen = sum(p.numel() for p in model.base_model.embeddings.parameters()) if config.freeze_embeddings else 0
    kept = whole
    if training.compact_vocabulary != "off" and is_exact(model, training.weight_decay, config.freeze_embeddings):
        table = model.get_input_embeddings()
        rows = used_rows((part.tokens for part in task.parts.values()), table.num_embeddings, table.padding_idx)
        kept -= (table.num_embeddings - len(rows)) * table.embedding_dim
    lengths = np.sort(task.parts["train"].tokens.lengths)[::-1]
    texts = task.config.texts_a_worker(num_workers)
    tokens = max(int(lengths[0]), min(training.micro_batch_tokens, int(lengths[:texts].sum())))
    activations = tokens * _bytes_a_token(task.hf_config, int(lengths[0]), 2 if bf16 else 4)
    return Need(4.0 * kept, 4.0 * (kept - frozen), 8.0 * (kept - frozen), activations, 8.0 * whole, whole)


def _bytes_a_token(hf_config: Any, longest: int, size: int) -> float:
    """What a transformer keeps of a token for the backward pass.

    Counted as by Korthikanti et al. 2022 ("Reducing activation recomputation", eq. 1): of `size` bytes 8 hidden and 2
    intermediate vectors a layer, and twice the attention's weights; dropout's masks take one byte each.
    """
    hidden, layers, heads, inner = (
        int(getattr(hf_config, name, getattr(hf_config, other, default)) or default)
        for name, other, default in (
            ("hidden_size", "dim", 768),
            ("num_hidden_layers", "n_layers", 12),
            ("num_attention_heads", "n_heads", 12),
            ("intermediate_size", "hidden_dim", 3072),
        )
    )
    layer = size * (8 * hidden + 2 * inner) + 2 * hidden + (2 * size + 1) * heads * longest
    return float(layers * layer + 3 * 4 * hidden)


def fits(case: Case) -> Iterator[Finding]:
    """Memory of all workers against the nodes', and of checkpoints against the disk's."""
    if case.task is None or not case.nodes or case.config is None:
        return
    workers = case.config.workers.min_workers
    need = memory_needed(case.task, workers)
    parts = ("weights", "gradients", "moments", "activations")
    listed = ", ".join(f"{name} {gib(getattr(need, name))}" for name in parts)
    found = f"{need.parameters / 1e6:.1f} million parameters; a worker takes about {gib(need.worker)} ({listed})"
    remedy = "lower training.micro_batch_tokens, model.max_length or workers.num_workers, or take a smaller encoder"
    if case.uses_gpu:
        yield from _fits_gpu(case, found, remedy)
    else:
        each = need.worker + PROCESS
        found += f" and {gib(PROCESS)} for its process"
        room = sum(_room(node, need.shared, each) for node in case.nodes)
        there = sum(node.get("memory", 0) for node in case.nodes)
        sentence = (
            f"{found}; {gib(there)} {'in all' if case.joined else 'free'}: room for {room} workers, asked for {workers}"
        )
        yield problem("memory fits", sentence, remedy) if room < workers else ok("memory fits", sentence)
    yield from _fits_disk(case, need)


def _room(node: Mapping[str, float], shared: float, each: float) -> int:
    """Workers for which a node has memory: none on a head that takes no work, which has no CPUs."""
    return max(0, int((node.get("memory", 0) - shared) // each)) if node.get("CPU", 0) >= 1 else 0


def _fits_gpu(case: Case, found: str, remedy: str) -> Iterator[Finding]:
    """Against this machine's first GPU; those of other nodes can't be seen from here."""
    import torch

    from emoray.forward import uses_bf16

    assert case.task is not None and case.config is not None
    if not torch.cuda.is_available():
        yield ok("memory fits", f"{found}; no GPU here to compare with")
        return
    bf16 = uses_bf16(case.config.training.precision, torch.device("cuda"))
    need = memory_needed(case.task, case.config.workers.min_workers, bf16)
    free = torch.cuda.mem_get_info(0)[0]
    sentence = f"{found}; in {'bf16' if bf16 else 'fp32'} {gib(need.worker)} of {gib(free)} free on the GPU"
    yield problem("memory fits", sentence, remedy) if need.worker > free else ok("memory fits", sentence)


def _fits_disk(case: Case, need: Need) -> Iterator[Finding]:
    """Checkpoints hold weights and moments; one more is there while another is written, and best/ has weights."""
    assert case.config is not None
    if is_uri(case.storage_path):
        return
    wanted = (case.config.training.keep_checkpoints + 2) * (4 * need.parameters + need.moments) + 4 * need.parameters
    free = shutil.disk_usage(existing(Path(case.storage_path))).free
    found = f"checkpoints take up to {gib(wanted)}, {gib(free)} are free"
    if wanted > free:
        remedy = "lower training.keep_checkpoints, make room, or set run.storage_path to a larger disk"
        yield problem("disk fits", found, remedy)
    else:
        yield ok("disk fits", found)
