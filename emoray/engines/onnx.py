"""The ONNX Runtime engine, on exports of `emoray/export.py`: float32, or int8 where that was found to agree."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoray.engines import Name, own_threads
from emoray.engines.feeds import feed, is_packed
from emoray.errors import MissingExtraError, ModelError
from emoray.tokens import Tokens, padding_tokens, split_packed, split_padded

_SLOWER = ["SkipLayerNormFusion"]
"""Rewritings of the graph that ONNX Runtime 1.32 loses by: its fused norm takes six times as long as its parts."""
TOKENS_A_RUN = 128
"""Tokens of a run: a few texts of similar length, so that attention pads little, and tensors that fit a cache."""


def is_there() -> bool:
    """Whether ONNX Runtime is installed: the extra `onnx`."""
    from importlib.util import find_spec

    return find_spec("onnxruntime") is not None


class OnnxEngine:
    """See `emoray.engines.Engine`.

    Args:
        file: the graph.
        labels: number of them.
        pad_id: the token that pads batches.
        threads: None takes the process's own.

    Raises:
        MissingExtraError, ModelError: onnxruntime is missing, or can't load the graph.
    """

    def __init__(self, name: Name, file: Path, labels: int, pad_id: int, threads: int | None = None) -> None:
        self.name: Name = name
        self.figures: dict[str, Any] = {}
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError(
                "The engine onnx needs onnxruntime, which isn't installed: pip install 'emoray[onnx]', or take torch."
            ) from None
        options = onnxruntime.SessionOptions()
        # Threads that run texts side by side scale; those that share one run's products of a few dozen rows don't.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Shapes change with every batch: plans and arenas for each would only take memory.
        options.enable_mem_pattern = False
        try:
            self._session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=_SLOWER
            )
        except Exception as error:  # onnxruntime's errors share no base class
            raise ModelError(f"{file}: ONNX Runtime can't load it: {error}") from None
        self._packed = is_packed(given.name for given in self._session.get_inputs())
        self._labels, self._pad_id = labels, pad_id
        count = threads or own_threads()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="emoray-onnx") if count > 1 else None

    def padding(self, lengths: Sequence[int]) -> int:
        return 0 if self._packed else padding_tokens(lengths, TOKENS_A_RUN)

    def forward(self, tokens: Tokens) -> NDArray[np.float32]:
        lengths = tokens.lengths
        order = np.argsort(-lengths, kind="stable")
        logits = np.empty((len(tokens), self._labels), np.float32)
        split = split_packed if self._packed else split_padded

        def run(rows: NDArray[np.int64]) -> None:
            feeds = feed([tokens[row] for row in rows], self._packed, self._pad_id)
            logits[rows] = self._session.run(None, feeds)[0]

        parts = split(order, lengths, TOKENS_A_RUN)
        if self._threads is None or len(parts) == 1:
            for rows in parts:
                run(rows)
        else:
            list(self._threads.map(run, parts))
        return logits
