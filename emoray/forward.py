"""From token ids to logits: the one forward pass that training, evaluation and the classifier share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from emoray.cuda_graphs import FixedBatch
from emoray.packed_attention import varlen_kernel_takes
from emoray.packed_model import enable_packing, is_packable, packed_logits
from emoray.packing import PackedBatch, pack, send
from emoray.tokens import Tokens, padded, split_packed, split_padded

EVALUATION_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens of a batch where nothing is learned, by device: past that, a larger one only takes more memory."""


@dataclass(frozen=True)
class PaddedBatch:
    """Texts one below the other, padded to the longest.

    Attributes:
        input_ids: int64 [texts, longest].
        attention_mask: int64 [texts, longest], 1 for real tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def to(self, device: torch.device | str) -> PaddedBatch:
        return PaddedBatch(send(self.input_ids, device), send(self.attention_mask, device))

    def places(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of each token its text's index and its place in it, padding included; of each text its first token."""
        texts, longest = self.input_ids.shape
        text, place = np.divmod(np.arange(texts * longest), longest)
        return text, place, np.arange(texts) * longest


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether matrix products run in bfloat16.

    Args:
        precision: as `training.precision`; `auto` takes it where the GPU has it (emulated it is slower than float32).
    """
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


class Forward(nn.Module):
    """A classifier that takes texts as arrays of token ids, packed where its encoder allows it.

    Args:
        model: a sequence classifier of transformers.
        packed: lay texts end to end; None does where it is possible.
        bf16: run matrix products in bfloat16 (autocast); parameters and logits stay float32.

    Raises:
        ValueError: `packed` is True for an encoder that can't be packed.
    """

    def __init__(self, model: PreTrainedModel, packed: bool | None = None, bf16: bool = False) -> None:
        super().__init__()
        self.model = model
        self.packed = is_packable(model) if packed is None else packed
        self.bf16 = bf16
        if self.packed:
            enable_packing(model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def can_be_captured(self) -> bool:
        """Whether its passes have the same shapes each time where texts are padded, as a CUDA graph needs them."""
        config = self.model.config
        head_size = config.hidden_size // config.num_attention_heads if self.packed else 0
        return self.packed and self.bf16 and varlen_kernel_takes(torch.bfloat16, head_size, self.device)

    def batch(self, texts: Sequence[NDArray[np.integer[Any]]]) -> PackedBatch | PaddedBatch:
        """Token ids, one array a text, as tensors on the CPU."""
        if self.packed:
            return pack(texts)
        return PaddedBatch(*map(torch.from_numpy, padded(texts, self._pad_id())))

    def _pad_id(self) -> int:
        # The table's own padding row, which is not config.pad_token_id while the vocabulary is compact.
        row = getattr(self.model.get_input_embeddings(), "padding_idx", None)
        return int(self.model.config.pad_token_id or 0) if row is None else int(row)

    def forward(self, batch: PackedBatch | FixedBatch | PaddedBatch) -> Tensor:
        """Logits, float32 [texts, labels], in the order of the texts."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if isinstance(batch, PaddedBatch):
                logits: Tensor = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            else:
                logits = packed_logits(self.model, batch)
        return logits.float()


@torch.inference_mode()
def score(forward: Forward, tokens: Tokens, rows: NDArray[np.int64], most_texts: int) -> NDArray[np.float32]:
    """Logits of some rows of a split, float32 [len(rows), labels], in the order of `rows`.

    Args:
        rows: which texts.
        most_texts: texts a batch, at the most.
    """
    was_training = forward.training
    forward.eval()
    split = split_packed if forward.packed else split_padded
    most_tokens = EVALUATION_TOKENS.get(forward.device.type, EVALUATION_TOKENS["cpu"])
    lengths = tokens.lengths
    by_length = np.lexsort((rows, -lengths[rows]))
    logits = np.empty((len(rows), int(forward.model.config.num_labels or 0)), np.float32)
    for start in range(0, len(rows), most_texts):
        places = by_length[start : start + most_texts]
        done = 0
        for part in split(rows[places], lengths, most_tokens):
            batch = forward.batch([tokens[row] for row in part]).to(forward.device)
            logits[places[done : done + len(part)]] = forward(batch).cpu().numpy()
            done += len(part)
    forward.train(was_training)
    return logits
