"""The used rows of a word table: taken out, trained, put back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from emoray.tokens import Tokens
from emoray.vocabulary import CompactVocabulary, is_exact, used_rows

SIZE = 40
SHAPE = {
    "vocab_size": SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 20,
    "num_labels": 3,
}


def tokens(*texts: list[int]) -> Tokens:
    offsets = np.cumsum([0, *map(len, texts)])
    ids = np.array([piece for text in texts for piece in text], np.int32)
    return Tokens(ids, offsets, np.zeros(len(texts), np.bool_))


def bert(**changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**(SHAPE | changes))).eval()


def test_used_rows_are_those_of_all_splits_and_padding() -> None:
    splits = [tokens([2, 9, 3], [2, 5, 5, 3]), tokens([2, 39, 3]), tokens()]
    assert used_rows(splits, SIZE, 0).tolist() == [0, 2, 3, 5, 9, 39]
    assert used_rows(splits, SIZE, 5).tolist() == [2, 3, 5, 9, 39]
    assert used_rows(splits, SIZE, None).tolist() == [2, 3, 5, 9, 39]
    assert used_rows([], SIZE, 1).tolist() == [1]


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=9), min_size=1, max_size=9))
def test_remap_and_expand_are_a_round_trip(texts: list[list[int]]) -> None:
    model = bert(pad_token_id=1)
    whole = model.get_input_embeddings().weight.detach().clone()
    split = tokens(*texts)
    vocabulary = CompactVocabulary(model, [split])
    table = model.get_input_embeddings()
    assert table.weight.shape == (len(vocabulary.rows), 16) and table.num_embeddings == len(vocabulary.rows)
    compact = vocabulary.remap(split)
    assert compact.ids.dtype == np.int32 and compact.offsets is split.offsets and compact.truncated is split.truncated
    assert vocabulary.rows[compact.ids].tolist() == split.ids.tolist()
    assert torch.equal(table(torch.from_numpy(compact.ids).long()), whole[torch.from_numpy(split.ids).long()])
    assert torch.equal(vocabulary.expand(table.weight.detach()), whole)
    changed = vocabulary.expand(table.weight.detach() + 1)
    used = torch.from_numpy(vocabulary.rows)
    assert torch.equal(changed[used], whole[used] + 1)
    unused = np.setdiff1d(np.arange(SIZE), vocabulary.rows)
    assert torch.equal(changed[unused], whole[unused])
    assert torch.equal(vocabulary.full, whole), "the whole table itself is never written"


def test_the_padding_row_stays_the_padding_row() -> None:
    model = bert(pad_token_id=7)
    vocabulary = CompactVocabulary(model, [tokens([2, 9, 3])])
    table = model.get_input_embeddings()
    assert vocabulary.rows.tolist() == [2, 3, 7, 9]
    assert table.padding_idx == 2
    table(torch.tensor([0, 1, 2, 3])).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.abs().sum(1).tolist() == [16, 16, 0, 16], "it gets no gradient, as in the whole table"


def test_the_table_is_named_as_in_the_checkpoint() -> None:
    model = bert()
    vocabulary = CompactVocabulary(model, [tokens([2, 3])])
    assert vocabulary.name == "bert.embeddings.word_embeddings.weight"
    assert model.state_dict()[vocabulary.name].shape[0] == len(vocabulary.rows)


@torch.inference_mode()
def test_the_model_says_the_same() -> None:
    split = tokens([2, 30, 11, 3], [2, 8, 8, 3])
    ids, model = torch.from_numpy(split.ids).long().view(2, 4), bert()
    before = model(input_ids=ids).logits
    compact = CompactVocabulary(model, [split]).remap(split)
    assert torch.equal(model(input_ids=torch.from_numpy(compact.ids).long().view(2, 4)).logits, before)


@pytest.mark.parametrize(
    ("family", "exact"),
    [
        ((BertConfig, BertForSequenceClassification), True),
        ((DistilBertConfig, DistilBertForSequenceClassification), True),
        ((RobertaConfig, RobertaForSequenceClassification), False),
    ],
    ids=["bert", "distilbert", "roberta derives positions from ids"],
)
def test_is_exact_for_encoders_that_only_look_up(family: tuple[Any, Any], exact: bool) -> None:
    config, model = family
    names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
    shape = {names.get(k, k) if config is DistilBertConfig else k: v for k, v in SHAPE.items()}
    shape.pop("intermediate_size")
    assert is_exact(model(config(**shape)), weight_decay=0.0, frozen=False) is exact


def test_is_exact_only_where_unused_rows_would_stay() -> None:
    model = bert()
    assert is_exact(model, weight_decay=0.0, frozen=False)
    assert not is_exact(model, weight_decay=0.01, frozen=False), "decay shrinks unused rows too"
    assert not is_exact(model, weight_decay=0.0, frozen=True), "a frozen table has nothing to train"
