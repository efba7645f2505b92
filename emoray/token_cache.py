"""Tokens of texts kept on this machine: the same texts and tokenizer are never tokenised twice."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from emoray.errors import StorageError
from emoray.folders import cache_folder
from emoray.storage import Storage
from emoray.tokens import Tokens, tokenize, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES = ("ids", "offsets", "truncated")


def folder() -> Path:
    """Holds one folder of arrays for each split that was tokenised."""
    return cache_folder() / "tokens"


def read(entry: Path) -> Tokens | None:
    """Tokens that were kept, memory-mapped; None where they are not there, or damaged."""
    try:
        kept = Tokens(*(np.load(entry / f"{name}.npy", mmap_mode="r") for name in _NAMES))
        return kept if len(kept) == len(kept.truncated) and kept.offsets[-1] == len(kept.ids) else None
    except (OSError, ValueError, IndexError, EOFError):
        return None


def tokenize_cached(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """As `tokenize`; where the cache can't be written, nothing is kept."""
    key = hashlib.sha256(f"2 {max_length} {tokenizer_digest(tokenizer)}\n".encode())
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        key.update(b"%d:" % len(encoded) + encoded)
    name = key.hexdigest()[:32]
    kept = read(folder() / name)
    if kept is not None and len(kept) == len(texts):
        return kept
    tokens = tokenize(texts, tokenizer, max_length)
    # A read-only home, a full disk, or another process that was faster: the tokens are here all the same.
    with suppress(StorageError, OSError):
        _keep(tokens, name)
    return tokens


def _keep(tokens: Tokens, name: str) -> None:
    cache = Storage(str(folder()))
    with cache.staging() as stage:
        for part in _NAMES:
            np.save(stage / f"{part}.npy", getattr(tokens, part))
        cache.sync(stage)
        cache.publish(stage, name, "")
