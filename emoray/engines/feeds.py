"""What ONNX graphs are fed: texts as arrays of token ids, packed or padded, in numpy alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoray.tokens import padded

Ids = NDArray[np.integer[Any]]
Feeds = dict[str, NDArray[Any]]


def packed_feeds(texts: Sequence[Ids]) -> Feeds:
    """Texts end to end in one row of T tokens, and the way into a block [B texts, L tokens of the longest] and back.

    Returns:
        input_ids, position_ids: int64 [1, T].
        first: int64 [B], where in the row each text begins.
        forth: int64 [B, L], the row's token behind each place of the block; past its end a text's last one again.
        mask: float32 [B, 1, 1, L], 0 at real tokens, else -inf.
        back: int64 [T], the place in the block, seen as one row, of each token.
        owner: int64 [T], the text of each token.
    """
    lengths = np.array([len(text) for text in texts], np.int64)
    starts = np.cumsum(lengths) - lengths
    owner = np.repeat(np.arange(len(texts)), lengths)
    row = np.concatenate(texts).astype(np.int64)
    position = np.arange(len(row)) - starts[owner]
    longest = int(lengths.max())
    places = np.arange(longest)
    return {
        "input_ids": row[None],
        "position_ids": position[None],
        "first": starts,
        "forth": starts[:, None] + np.minimum(places, lengths[:, None] - 1),
        "mask": np.where(places < lengths[:, None], np.float32(0), np.float32(-np.inf))[:, None, None],
        "back": owner * longest + position,
        "owner": owner,
    }


def feed(texts: Sequence[Ids], packed: bool, pad_id: int) -> Feeds:
    """What a graph takes: see `is_packed`."""
    return packed_feeds(texts) if packed else padded_feeds(texts, pad_id)


def is_packed(names: Iterable[str]) -> bool:
    """Whether a graph of these inputs takes texts end to end."""
    return "forth" in names


def padded_feeds(texts: Sequence[Ids], pad_id: int) -> Feeds:
    ids, mask = padded(texts, pad_id)
    return {"input_ids": ids, "attention_mask": mask}
