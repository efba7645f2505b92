"""Texts as flat ids; and the batch plan as a pure function of its fields."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LABELS, sentences

from emoray.errors import ModelError
from emoray.tokens import (
    BatchPlan,
    _set,
    padding_tokens,
    split_packed,
    split_padded,
    tokenize,
    tokenizer_digest,
)

MBERT = Path(__file__).parents[2] / "shared" / "data" / "bert-base-multilingual-cased"
ODD = [
    "",
    " ",
    "\t\n",
    "a",
    "naïve café, e\u0301 and é",
    "ﬁne ½ ① Ǆ",
    "今天天气很好，我很高兴",
    "สวัสดีครับ",
    "مرحبا كيف حالك",
    "שלום עולם",
    "नमस्ते दुनिया",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 flags 🇩🇪🇫🇷",
    "\u200bzero\u200dwidth\ufeff",
    "\u202ereversed\u202c",
    "\x00null\x01",
    "[CLS] [SEP] [PAD] [MASK] [UNK] ##s",
    "supercalifragilisticexpialidocious" * 9,
    "i feel quiet and calm today " * 20,
    "@user #tag http://example.org/?a=b&c=d e-mail@host.example",
    "\ud7ff\ue000\U0010ffff",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Path) -> Any:
    from emoray.model import load_tokenizer

    return load_tokenizer(str(tiny_encoder))


# Tokens


def assert_as_the_wrapper(texts: Sequence[str], tokenizer: Any, max_length: int) -> None:
    """`tokenize` gives what transformers itself gives, text by text."""
    tokens = tokenize(texts, tokenizer, max_length)
    assert len(tokens) == len(texts)
    assert tokens.ids.dtype == np.int32 and tokens.offsets.dtype == np.int64 and tokens.truncated.dtype == np.bool_
    whole = [tokenizer(text, truncation=False)["input_ids"] for text in texts]
    cut = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
    for row in range(len(texts)):
        assert tokens[row].tolist() == cut[row], texts[row]
        assert tokens.truncated[row] == (len(whole[row]) > max_length), texts[row]
    assert tokens.lengths.tolist() == [len(ids) for ids in cut]


@pytest.mark.parametrize("max_length", [4, 12, 32, 400])
def test_tokenize_is_what_transformers_gives(max_length: int, tokenizer: Any) -> None:
    assert_as_the_wrapper([*ODD, *sentences("sad")], tokenizer, max_length)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=6), max_length=st.integers(4, 24))
def test_tokenize_any_text(texts: list[str], max_length: int, tokenizer: Any) -> None:
    assert_as_the_wrapper(texts, tokenizer, max_length)


@pytest.mark.skipif(not MBERT.is_dir(), reason="needs ../shared/data/bert-base-multilingual-cased")
def test_tokenize_with_the_real_multilingual_tokenizer() -> None:
    from emoray.model import load_tokenizer

    assert_as_the_wrapper(ODD, load_tokenizer(str(MBERT)), 16)


def test_no_texts(tokenizer: Any) -> None:
    tokens = tokenize([], tokenizer, 16)
    assert len(tokens) == 0 and len(tokens.ids) == 0 and tokens.offsets.tolist() == [0]


def test_a_slow_tokenizer_is_refused() -> None:
    slow: Any = SimpleNamespace(name_or_path="some/encoder")
    for use in (lambda: tokenize(["a"], slow, 8), lambda: tokenizer_digest(slow)):
        with pytest.raises(ModelError, match="some/encoder: has no fast tokenizer"):
            use()


def test_the_digest_does_not_depend_on_what_was_tokenised(tokenizer: Any) -> None:
    before = tokenizer_digest(tokenizer)
    tokenize(ODD, tokenizer, 8)
    tokenizer(ODD, padding=True, truncation=True, max_length=9)
    assert tokenizer_digest(tokenizer) == before


# The batch plan


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    lengths = draw(st.lists(st.integers(2, 90), min_size=1, max_size=60))
    return BatchPlan(
        lengths=np.array(lengths, np.int64),
        seed=draw(st.integers(0, 2**32 - 1)),
        batch_size=draw(st.integers(1, 70)),
        packed=draw(st.booleans()),
        micro_batch_tokens=draw(st.integers(16, 400)),
    )


@settings(max_examples=60, deadline=None)
@given(plan=plans(), epoch=st.integers(0, 5))
def test_an_epoch_has_each_row_once(plan: BatchPlan, epoch: int) -> None:
    first = epoch * plan.steps_per_epoch
    steps = [plan.samples(step) for step in range(first, first + plan.steps_per_epoch)]
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(plan.lengths)))
    assert all(len(rows) == plan.batch_size for rows in steps[:-1]) and 0 < len(steps[-1]) <= plan.batch_size


@settings(max_examples=60, deadline=None)
@given(plan=plans(), step=st.integers(0, 200))
def test_any_number_of_workers_share_a_step(plan: BatchPlan, step: int) -> None:
    whole = sorted(plan.samples(step).tolist())
    for workers in range(1, 6):
        shares = [plan.share(step, rank, workers) for rank in range(workers)]
        assert sorted(np.concatenate(shares).tolist()) == whole
        loads = [int(plan.lengths[rows].sum()) for rows in shares]
        assert max(loads) - min(loads) <= plan.lengths[whole].max()
        for rows in shares:
            assert np.all(np.diff(plan.lengths[rows]) <= 0), "longest first"


@settings(max_examples=80, deadline=None)
@given(plan=plans(), step=st.integers(0, 200), workers=st.integers(1, 5))
def test_micro_batches_are_a_workers_share_in_pieces(plan: BatchPlan, step: int, workers: int) -> None:
    for rank in range(workers):
        share = plan.share(step, rank, workers)
        pieces = plan.micro_batches(step, rank, workers)
        assert [row for piece in pieces for row in piece] == share.tolist()
        for rows in pieces:
            lengths = plan.lengths[rows]
            computed = int(lengths.sum()) if plan.packed else int(lengths.max()) * len(rows)
            assert computed <= plan.micro_batch_tokens or len(rows) == 1
        if not plan.packed:
            assert len(pieces) >= min(4, len(share)), "four lengths at least, where there are as many texts"


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 128), min_size=0, max_size=80), most=st.integers(1, 600))
def test_splits(lengths: list[int], most: int) -> None:
    array = np.array(sorted(lengths, reverse=True), np.int64)
    for split in (split_packed, split_padded):
        parts = split(np.arange(len(array)), array, most)
        assert [int(row) for part in parts for row in part] == list(range(len(array)))
        assert all(len(part) for part in parts)
    packed = split_packed(np.arange(len(array)), array, most)
    assert len(packed) <= max(1, 2 * -(-sum(lengths) // most)) + sum(length > most // 2 for length in lengths)


@settings(max_examples=40, deadline=None)
@given(plan=plans(), step=st.integers(0, 200))
def test_the_plan_is_a_pure_function(plan: BatchPlan, step: int) -> None:
    """Whatever was asked before, and whatever state NumPy's generator has: the same fields give the same rows."""
    state = np.random.get_state()
    asked = plan.samples(step).tolist()
    plan.order(step + 1), plan.order(step + 2)
    np.random.seed(1)
    again = BatchPlan(plan.lengths.copy(), plan.seed, plan.batch_size, not plan.packed, plan.micro_batch_tokens)
    assert again.samples(step).tolist() == asked
    np.random.set_state(state)


def test_order_differs_by_epoch_and_seed() -> None:
    orders = [
        BatchPlan(np.full(200, 5), seed, 32, True, 1024).order(epoch)
        for seed in (42, 43, 2**32 - 1)
        for epoch in (0, 1, 2)
    ]
    assert all(sorted(order.tolist()) == list(range(200)) for order in orders)
    for i, one in enumerate(orders):
        assert not any(np.array_equal(one, other) for other in orders[:i])
        assert abs(np.corrcoef(one, np.arange(200))[0, 1]) < 0.3


GOLDEN = [
    [11, 7, 12, 1, 6, 10, 4, 3, 15, 5, 13, 14, 9, 0, 2, 8],
    [4, 10, 12, 13, 9, 5, 3, 0, 11, 2, 15, 14, 7, 1, 6, 8],
    [52289, 38705, 51096, 27125, 20829, 80076],
]


def test_the_order_of_seed_42_is_pinned() -> None:
    """Runs resume, and figures are quoted, by this order: no new NumPy may change it."""
    plan = BatchPlan(np.full(16, 5), 42, 4, True, 1024)
    assert plan.order(0).tolist() == GOLDEN[0]
    assert plan.order(1).tolist() == GOLDEN[1]
    assert plan.samples(5).tolist() == GOLDEN[1][4:8]
    assert BatchPlan(np.full(100_000, 5), 42, 64, True, 1024).samples(3000)[:6].tolist() == GOLDEN[2]


def test_shares_of_a_known_step_are_pinned() -> None:
    lengths = np.array([9, 3, 7, 5, 12, 4, 8, 6])
    plan = BatchPlan(lengths, 42, 8, True, 1024)
    assert [plan.share(0, rank, 3).tolist() for rank in range(3)] == [[4, 3], [0, 7, 5], [6, 2, 1]]
    assert plan.share(0, 0, 1).tolist() == [4, 0, 6, 2, 7, 3, 5, 1]


def test_more_workers_than_texts() -> None:
    plan = BatchPlan(np.array([5, 6]), 42, 8, True, 1024)
    assert [plan.share(0, rank, 4).tolist() for rank in range(4)] == [[1], [0], [], []]
    assert plan.micro_batches(0, 3, 4) == []


def test_padding_of_real_texts_is_mostly_gone(tokenizer: Any) -> None:
    """What the four pieces are for: less is padded than in one batch."""
    lengths = tokenize([text for label in LABELS for text in sentences(label)], tokenizer, 64).lengths
    rows = np.argsort(-lengths)[:64]
    real = int(lengths[rows].sum())
    pieces = split_padded(rows, lengths, 10_000)
    computed = [int(lengths[piece].max()) * len(piece) for piece in pieces]
    assert len(pieces) == 4
    assert real / sum(computed) > real / (int(lengths[rows].max()) * 64)
    assert all(lengths[one].min() >= lengths[other].max() for one, other in pairwise(pieces))


def test_a_tokenizer_that_is_set_up_is_left_alone(tokenizer: Any) -> None:
    """Its setters wait for all threads that encode, and hold Python's lock meanwhile."""
    fast = tokenizer.backend_tokenizer
    tokenize(["a b"], fast, 9)

    class Same:
        padding, truncation = fast.padding, fast.truncation
        encode_batch_fast = staticmethod(fast.encode_batch_fast)

    assert _set(Same(), 9) is None  # type: ignore[arg-type, func-returns-value]
    with pytest.raises(AttributeError):
        _set(Same(), 8)  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 500))
def test_padding_tokens_are_those_of_split_padded(lengths: list[int], most: int) -> None:
    sizes = np.sort(np.array(lengths))[::-1]
    parts = split_padded(np.arange(len(sizes)), sizes, most)
    assert padding_tokens(lengths, most) == sum(int(sizes[part][0]) * len(part) for part in parts) - sum(lengths)
