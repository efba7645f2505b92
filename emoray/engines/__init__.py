"""What runs a model's forward pass, behind one small interface: torch, or ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # the command line names engines without loading any
    import numpy as np
    from numpy.typing import NDArray

    from emoray.tokens import Tokens

Name = Literal["torch", "onnx", "onnx-int8"]
Wanted = Literal["auto", Name]
"""An engine, or the fastest that is there and agrees with the model."""


class Engine(Protocol):
    """A model's forward pass; what comes before (encode) and after it (decode) is the classifier's.

    Attributes:
        name: which of the engines.
        figures: of every engine that was tried where it was chosen by measurement, else empty; JSON-able.
    """

    name: Name
    figures: dict[str, Any]

    def forward(self, tokens: Tokens) -> NDArray[np.float32]:
        """Logits, float32 [texts, labels], before calibration, in the order of the texts."""

    def padding(self, lengths: Sequence[int]) -> int:
        """Tokens of padding that it computes beside texts of these lengths."""


def own_threads() -> int:
    """Threads that this process should compute with: what OMP_NUM_THREADS says (Ray sets it to a worker's CPUs), else
    the CPUs that it may run on."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
