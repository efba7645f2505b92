"""The torch engine: the packed forward pass that training uses, in bf16 on GPUs that have it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from emoray.engines import Name
from emoray.errors import ModelError
from emoray.forward import EVALUATION_TOKENS, Forward, score, uses_bf16
from emoray.model import quiet
from emoray.tokens import Tokens, padding_tokens

TEXTS_A_BATCH = {"cpu": 256, "cuda": 8192}


def load_model(folder: Path) -> PreTrainedModel:
    """The model of a folder, float32, on the CPU.

    Raises:
        ModelError: transformers can't load it.
    """
    try:
        with quiet():
            model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: can't be loaded: {error}") from None
    return model


class TorchEngine:
    """See `emoray.engines.Engine`.

    Args:
        folder: of a model.
        device: e.g. "cuda"; None takes a GPU if there is one.
        threads: on a CPU; None leaves torch's number, which is the process's own, as it is.
    """

    name: Name = "torch"

    def __init__(self, folder: Path, device: str | None = None, threads: int | None = None) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if threads is not None and device == "cpu":
            torch.set_num_threads(threads)
        bf16 = uses_bf16("auto", torch.device(device))
        self._most_texts = TEXTS_A_BATCH["cuda" if device.startswith("cuda") else "cpu"]
        self.figures: dict[str, Any] = {}
        self._forward = Forward(load_model(folder).to(device), bf16=bf16).eval()  # type: ignore[arg-type]

    def forward(self, tokens: Tokens) -> NDArray[np.float32]:
        return score(self._forward, tokens, np.arange(len(tokens)), self._most_texts)

    def padding(self, lengths: Sequence[int]) -> int:
        return 0 if self._forward.packed else padding_tokens(lengths, EVALUATION_TOKENS[self._forward.device.type])
