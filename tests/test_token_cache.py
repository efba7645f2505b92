"""Tokens that are kept on this machine: read where they are whole and of these texts, else made again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import sentences

from emoray import token_cache
from emoray.token_cache import tokenize_cached
from emoray.tokens import Tokens, tokenize

TEXTS = ["", "a", "naïve café", "今天天气很好，我很高兴", "i feel quiet and calm today " * 20]


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Path) -> Any:
    from emoray.model import load_tokenizer

    return load_tokenizer(str(tiny_encoder))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMORAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of texts of each call of `tokenize`."""
    calls: list[int] = []

    def count(texts: Sequence[str], *rest: Any) -> Tokens:
        calls.append(len(texts))
        return tokenize(texts, *rest)

    monkeypatch.setattr(token_cache, "tokenize", count)
    return calls


def same(one: Tokens, other: Tokens) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("ids", "offsets", "truncated"))


def test_a_second_call_maps_the_files(tokenizer: Any, cache: Path, counted: list[int]) -> None:
    texts = sentences("glad")
    first, second = (tokenize_cached(texts, tokenizer, 16) for _ in range(2))
    assert counted == [60]
    assert same(first, second) and same(first, tokenize(texts, tokenizer, 16))
    assert isinstance(second.ids, np.memmap) and not second.ids.flags.writeable
    (entry,) = cache.iterdir()
    assert sorted(path.name for path in entry.iterdir()) == ["ids.npy", "offsets.npy", "truncated.npy"]


def test_what_decides_the_ids_decides_the_key(tokenizer: Any, cache: Path, counted: list[int]) -> None:
    texts = ["quiet lake", "furious"]
    for other, length in (
        (texts, 16),
        (texts, 17),
        (["quiet", "lake furious"], 16),
        (texts[::-1], 16),
        (texts[:1], 16),
    ):
        assert same(tokenize_cached(other, tokenizer, length), tokenize(other, tokenizer, length))
    assert len(counted) == len(list(cache.iterdir())) == 5
    tokenize_cached(texts, tokenizer, 16)
    assert len(counted) == 5


def test_texts_are_kept_apart_in_the_key(tokenizer: Any, cache: Path, counted: list[int]) -> None:
    tokenize_cached(["a\0b"], tokenizer, 16)
    tokenize_cached(["a", "b"], tokenizer, 16)
    assert counted == [1, 2]


@pytest.mark.parametrize("name", ["ids.npy", "offsets.npy", "truncated.npy"])
@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "garbage"])
def test_a_damaged_cache_is_made_again(name: str, damage: str, tokenizer: Any, cache: Path, counted: list[int]) -> None:
    texts = sentences("cross")
    tokenize_cached(texts, tokenizer, 16)
    (entry,) = cache.iterdir()
    path = entry / name
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "torn": content[:-7], "garbage": bytes(reversed(content))}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    assert same(tokenize_cached(texts, tokenizer, 16), tokenize(texts, tokenizer, 16))
    assert same(tokenize_cached(texts, tokenizer, 16), tokenize(texts, tokenizer, 16))
    assert counted == [60, 60], "the second call rebuilds the cache, the third reads it"
    assert len(list(cache.iterdir())) == 1


def test_files_that_do_not_belong_together_are_made_again(tokenizer: Any, cache: Path) -> None:
    texts = sentences("cross")
    tokenize_cached(texts, tokenizer, 16)
    (entry,) = cache.iterdir()
    np.save(entry / "ids.npy", np.load(entry / "ids.npy")[:-3])
    assert same(tokenize_cached(texts, tokenizer, 16), tokenize(texts, tokenizer, 16))


def test_a_cache_that_cannot_be_written_is_done_without(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EMORAY_CACHE", str(tmp_path / "file"))
    assert same(tokenize_cached(TEXTS, tokenizer, 16), tokenize(TEXTS, tokenizer, 16))
    assert (tmp_path / "file").read_text() == "in the way"
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    monkeypatch.setenv("EMORAY_CACHE", str(locked))
    assert same(tokenize_cached(TEXTS, tokenizer, 16), tokenize(TEXTS, tokenizer, 16))
    locked.chmod(0o700)


def test_a_full_disk_leaves_no_half_cache(
    tokenizer: Any, cache: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, array: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        tokenize_cached(TEXTS, tokenizer, 16)
    assert list(cache.iterdir()) == []
    tokenize_cached(TEXTS, tokenizer, 16)
    tokenize_cached(TEXTS, tokenizer, 16)
    assert len(counted) == 2


def test_the_cache_is_in_the_home_by_default(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMORAY_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    tokenize_cached(["tea"], tokenizer, 16)
    assert len(os.listdir(tmp_path / ".cache" / "emoray" / "tokens")) == 1
