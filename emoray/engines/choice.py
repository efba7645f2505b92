"""Which engine runs a model: the one that is named, or the fastest that is there, measured on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from emoray.engines import Engine, Name, Wanted
from emoray.engines import onnx as onnx_engine
from emoray.engines.exports import GRAPH, PRECISIONS, Precision, find, locate
from emoray.errors import EmorayError, ModelError
from emoray.tokens import Tokens
from emoray.wording import first_line

# Lengths in tokens of a batch of short messages: 25 on average, a few of them long.
_LENGTHS = (*range(7, 27), 18, 20, 28, 30, 32, 34, 37, 40, 45, 52, 60, 66)
_ROUNDS = 5
_DRIVERS = ("/proc/driver/nvidia", "/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""One of these is there where a GPU may be."""
_BY_EXACTNESS: tuple[Name, ...] = ("onnx", "onnx-int8", "torch")
_WORTH = 0.95
"""A less exact engine must take at most this share of the time of a more exact one to be preferred."""


def open_engine(name: Wanted, folder: Path, facts: dict[str, Any], device: str | None, threads: int | None) -> Engine:
    """The engine of a model's folder.

    Args:
        facts: what emoray.json says of the model.

    Raises:
        ModelError, CheckpointError: it can't be had: no export, a damaged or stale one, onnxruntime is missing.
    """
    if name == "auto":
        return _fastest(folder, facts, device, threads)
    if name == "torch":
        from emoray.engines.pytorch import TorchEngine  # torch takes seconds to load: only where it computes

        return TorchEngine(folder, device, threads)
    precision = PRECISIONS[name]
    export = find(folder, precision)
    if export is None:
        raise ModelError(
            f"{locate(folder, precision)[0]}: there is no export: `emoray export {folder} --precision {precision}`"
        )
    export.must_be_accepted()
    pad_id = int(export.facts["pad_id"])
    return onnx_engine.OnnxEngine(name, export.folder / GRAPH, len(facts["labels"]), pad_id, threads)


def _fastest(folder: Path, facts: dict[str, Any], device: str | None, threads: int | None) -> Engine:
    """By measurement among those that are there; on a GPU, torch.

    Where int8 may be used and pays, torch isn't measured too: loading it takes seconds, and it has never come close.
    """
    if _on_gpu(device) or not onnx_engine.is_there():
        return open_engine("torch", folder, facts, device, threads)
    figures: dict[str, Any] = {}
    best: tuple[float, Engine] | None = None
    for name in _BY_EXACTNESS:
        if name == "torch" and best is not None and best[1].name == "onnx-int8":
            break
        try:
            engine = open_engine(name, folder, facts, device, threads)
        except EmorayError as error:
            figures[name] = {"left_out": first_line(error)}
            continue
        figures[name] = measure(engine, int(facts["max_length"]))
        took = float(figures[name]["batch_ms_a_text"])
        if best is None or took < best[0] * (_WORTH if name == "onnx-int8" else 1):
            best = (took, engine)
    if best is None:
        raise ModelError(f"{folder}: no engine can load it: {figures}")
    best[1].figures = figures
    return best[1]


def exports_for(name: Wanted) -> tuple[Precision, ...]:
    """The exports that an engine runs, or chooses among; none where it is torch."""
    if name == "auto":
        return () if _on_gpu(None) or not onnx_engine.is_there() else ("fp32", "int8")
    return (PRECISIONS[name],) if name in PRECISIONS else ()


def _on_gpu(device: str | None) -> bool:
    if device is not None:
        return device.startswith("cuda")
    if not any(Path(place).exists() for place in _DRIVERS):
        return False  # no need to load torch for the question
    import torch

    return torch.cuda.is_available()


def measure(engine: Engine, max_length: int) -> dict[str, float]:
    """Milliseconds of one text of 20 tokens alone, and a text in a batch of 32 of usual lengths; the best of a few."""
    batch, one = _tokens(_LENGTHS, max_length), _tokens((20,), max_length)
    return {
        "one_ms": round(_best_ms(engine, one), 3),
        "batch_ms_a_text": round(_best_ms(engine, batch) / len(_LENGTHS), 3),
    }


def _best_ms(engine: Engine, tokens: Tokens) -> float:
    engine.forward(tokens)
    took = []
    for _ in range(_ROUNDS):
        since = time.perf_counter()
        engine.forward(tokens)
        took.append(time.perf_counter() - since)
    return 1000 * min(took)


def _tokens(lengths: tuple[int, ...], max_length: int) -> Tokens:
    """Texts of the first ids of the vocabulary: what they say makes no difference to the time."""
    return Tokens.of([np.arange(min(length, max_length), dtype=np.int32) % 16 for length in lengths])
