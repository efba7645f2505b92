"""Train only the embedding rows that a data set uses, and put them back: the same result for half of the traffic.

A row that no text uses gets a zero gradient at every step, and Adam without weight decay then leaves it as it is
(Kingma & Ba 2015: both moments stay zero). So the rows that do occur are all that training has to keep.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from emoray.tokens import Tokens

# Encoders that use a token's id for nothing but the look-up in the table (RoBERTa, say, derives positions from it).
_LOOKS_UP_ONLY = {"bert", "distilbert", "electra"}


class CompactVocabulary:
    """The used rows of a model's word embeddings in place of the whole table.

    Args:
        model: its table is replaced in place.
        splits: all texts that will be seen, validation and test included.
    """

    def __init__(self, model: PreTrainedModel, splits: Iterable[Tokens]) -> None:
        table = model.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        self.name = next(f"{name}.weight" for name, module in model.named_modules() if module is table)
        self.full = table.weight.data
        self.rows = used_rows(splits, self.full.shape[0], table.padding_idx)
        table.weight = nn.Parameter(self.full[torch.from_numpy(self.rows)].clone())
        table.num_embeddings = len(self.rows)
        if table.padding_idx is not None:
            table.padding_idx = int(np.searchsorted(self.rows, table.padding_idx))

    def remap(self, tokens: Tokens) -> Tokens:
        """The same texts in ids of the compact table."""
        return replace(tokens, ids=np.searchsorted(self.rows, tokens.ids).astype(np.int32))

    def expand(self, compact: Tensor) -> Tensor:
        """The whole table, [vocabulary, hidden], with the trained rows in place."""
        whole = self.full.clone()
        whole[torch.from_numpy(self.rows)] = compact.to(whole.device)
        return whole


def used_rows(splits: Iterable[Tokens], size: int, pad_id: int | None) -> NDArray[np.int64]:
    """Ids that occur in any text, ascending, with the padding id."""
    used = np.zeros(size, np.bool_)
    for tokens in splits:
        used[np.asarray(tokens.ids)] = True
    if pad_id is not None:
        used[pad_id] = True
    return np.flatnonzero(used)


def is_exact(model: PreTrainedModel, weight_decay: float, frozen: bool) -> bool:
    """Whether training the compact table gives what training the whole one would."""
    if model.config.model_type not in _LOOKS_UP_ONLY or not isinstance(model.get_input_embeddings(), nn.Embedding):
        return False
    return weight_decay == 0 and not frozen and not getattr(model, "_tied_weights_keys", None)
