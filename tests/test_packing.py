"""A packed row gives what the padded model gives, and its texts do not know of each other."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    CamembertConfig,
    CamembertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from emoray import packed_attention, packed_model, packing
from emoray.dropout import seed_dropout
from emoray.packed_model import enable_packing, is_packable, packed_logits
from emoray.packing import PackedBatch, pack

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "num_labels": 5,
    "pad_token_id": 1,
}
FAMILY = {
    "bert": (BertConfig, BertForSequenceClassification),
    "electra": (ElectraConfig, ElectraForSequenceClassification),
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaForSequenceClassification),
    "camembert": (CamembertConfig, CamembertForSequenceClassification),
}
SHARED = Path(__file__).parents[2] / "shared"
MINILM = os.environ.get("EMORAY_TEST_MINILM", "")


def tiny(kind="bert", **changes):
    torch.manual_seed(0)
    config, model = FAMILY[kind]
    model = model(config(**(SHAPE | changes))).eval()
    for parameter in model.parameters():  # the usual 0.02 would leave attention flat and hide mistakes in it
        nn.init.normal_(parameter, std=0.2)
    return model


def some_texts(n=23, longest=30, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(2, 97, size=draw.integers(1, longest + 1)).astype(np.int32) for _ in range(n)]


def padded_logits(model, texts, pad=1):
    """What the model does without any of this: every text padded to the longest."""
    ids = torch.full((len(texts), max(map(len, texts))), pad)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.from_numpy(text.astype(np.int64))
    lengths = torch.tensor([len(text) for text in texts])[:, None]
    return model(input_ids=ids, attention_mask=(torch.arange(ids.shape[1]) < lengths).long()).logits


def test_pack_lays_out_the_row():
    batch = pack([np.array([7, 8, 9]), np.array([5]), np.array([1, 2, 3])])
    assert batch.input_ids.tolist() == [[5, 7, 8, 9, 1, 2, 3]]
    assert batch.position_ids.tolist() == [[0, 0, 1, 2, 0, 1, 2]]
    assert batch.first.tolist() == [1, 0, 4]
    assert (batch.lengths, batch.n_texts, batch.n_tokens) == ((1, 3, 3), 3, 7)
    assert batch.offsets.tolist() == [0, 1, 4, 7]


def test_to_moves_every_tensor():
    batch = pack(some_texts())
    assert batch.to("cpu") is batch
    moved = batch.to("meta")
    assert {t.device.type for t in vars(moved).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert isinstance(moved, PackedBatch)


@pytest.mark.parametrize("texts", [[], [np.array([3]), np.array([], dtype=np.int32)]])
def test_pack_refuses_nothing(texts):
    with pytest.raises(ValueError, match="at least one"):
        pack(texts)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", FAMILY)
def test_logits_and_gradients_equal_the_padded_model(kind, attention):
    padded, texts = tiny(kind), some_texts()
    padded.set_attn_implementation(attention)
    packed = copy.deepcopy(padded)
    enable_packing(packed)
    labels = torch.arange(len(texts)) % 5
    expected, found = padded_logits(padded, texts), packed_logits(packed, pack(texts))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for logits in (expected, found):
        F.cross_entropy(logits, labels).backward()
    theirs = dict(padded.named_parameters())
    for name, parameter in packed.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("texts", [some_texts(1), some_texts(6, longest=1), [np.array([2, 3])] * 4])
def test_corner_shapes(texts):
    model = tiny()
    expected = padded_logits(model, texts)
    enable_packing(model)
    torch.testing.assert_close(packed_logits(model, pack(texts)), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_changing_one_text_moves_no_other():
    model, texts = tiny(), some_texts()
    enable_packing(model)
    before = packed_logits(model, pack(texts))
    for changed in range(len(texts)):
        others = [i for i in range(len(texts)) if i != changed]
        now = [t if i in others else (t + 31) % 95 + 2 for i, t in enumerate(texts)]
        after = packed_logits(model, pack(now))
        assert torch.equal(after[others], before[others])
        assert not torch.equal(after[changed], before[changed])


def test_padded_input_still_works_bit_for_bit_and_saved_config_is_plain(tmp_path):
    model, texts = tiny(), some_texts()
    before = padded_logits(model, texts)
    enable_packing(model)
    enable_packing(model)
    packed_logits(model, pack(texts))
    assert torch.equal(padded_logits(model, texts), before)
    model.save_pretrained(tmp_path)
    assert packed_model.NAME not in (tmp_path / "config.json").read_text()
    assert torch.equal(padded_logits(AutoModelForSequenceClassification.from_pretrained(tmp_path), texts), before)


def test_a_failed_forward_leaves_no_batch_behind():
    model, texts = tiny(), some_texts()
    before = padded_logits(model, texts)
    enable_packing(model)
    with pytest.raises(IndexError):
        packed_logits(model, pack([np.array([10_000])]))
    assert torch.equal(padded_logits(model, texts), before)


@torch.no_grad()
def test_last_feed_forward_sees_first_tokens_only():
    model, texts = tiny(), some_texts()
    enable_packing(model)
    seen = []
    for layer in model.bert.encoder.layer:
        layer.intermediate.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    batch = pack(texts)
    packed_logits(model, batch)
    assert seen == [batch.n_tokens, batch.n_tokens, batch.n_texts]


def test_dropout_with_the_same_key_gives_the_same_gradients():
    model, texts = tiny(), some_texts()
    enable_packing(model)
    source = seed_dropout(model.train())
    logits = []
    for step in (2, 2, 3):
        batch = pack(texts)
        text, places, first = batch.places()
        source.begin(seed=1, step=step, texts=text, places=places, first=first)
        logits.append(packed_logits(model, batch))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_blocks_hold_similar_lengths():
    lengths = (1, 1, 2, 7, 8, 8, 14, 15, 16)
    assert [lengths[begin:end] for begin, end in packing._similar(lengths)] == [(1, 1), (2,), (7, 8, 8), (14, 15, 16)]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_block_attention_has_the_right_gradient(dropped, first):
    batch = pack([np.zeros(n) for n in (8, 2, 7, 8)])
    layout = batch.layout(2)
    assert layout.shapes == ((1, 2), (3, 8))
    torch.manual_seed(0)
    states = [torch.randn(25, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    scores = 2 * (2 + 3 * 8) if first else 2 * (2**2 + 3 * 8**2)
    keep = (torch.rand(scores, dtype=torch.float64) > 0.3) / 0.7 if dropped else None

    def attend(q, k, v):
        return packed_attention._BlockAttention.apply(q, k, v, keep, layout, 0.5, first)

    assert torch.autograd.gradcheck(attend, states)


def random_states(batch):
    torch.manual_seed(0)
    return [torch.randn(batch.n_tokens, 4, 8) for _ in range(3)]


def test_attention_dropout_keeps_the_expectation():
    batch, p = pack(some_texts(8)), 0.3
    states = random_states(batch)
    exact = packed_attention._in_blocks(*states, batch, 0.35, None, False)
    draws = torch.stack([packed_attention._in_blocks(*states, batch, 0.35, nn.Dropout(p), False) for _ in range(400)])
    assert (draws[0] - draws[1]).abs().max() > 0.1
    z = (draws.mean(0) - exact) / (draws.std(0) / 20 + 1e-6)
    assert z.square().mean() == pytest.approx(1, abs=0.1)


def test_padded_block_for_gpus_equals_the_blocks_of_the_cpu():
    batch = pack(some_texts())
    states = random_states(batch)
    found = packed_attention._one_padded_block(*states, batch, 0.35, 0.0)
    torch.testing.assert_close(found, packed_attention._in_blocks(*states, batch, 0.35, None, False), atol=1e-5, rtol=0)


def test_bfloat16_by_autocast():
    model, texts = tiny(), some_texts()
    expected = padded_logits(model, texts)
    enable_packing(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = packed_logits(model, pack(texts))
    found.float().sum().backward()
    scale = expected.std()
    torch.testing.assert_close(found.float() / scale, expected / scale, atol=0.15, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_equals_cpu(dtype):
    model, texts = tiny(), some_texts()
    enable_packing(model)
    expected = packed_logits(model, pack(texts))
    found = packed_logits(model.to("cuda", dtype), pack(texts).to("cuda"))
    torch.testing.assert_close(found.float().cpu(), expected, atol=1e-4 if dtype == torch.float32 else 0.2, rtol=0)


def test_what_is_not_packable():
    model = DistilBertForSequenceClassification(
        DistilBertConfig(dim=32, n_heads=4, n_layers=1, hidden_dim=32, vocab_size=97)
    )
    assert not is_packable(model)
    assert not is_packable(nn.Linear(2, 2))
    assert not is_packable(tiny().bert)
    assert not is_packable(tiny(is_decoder=True))
    with pytest.raises(ValueError, match="DistilBert"):
        enable_packing(model)


def test_gradient_checkpointing_is_refused():
    model = tiny().train()
    enable_packing(model)
    for layer in model.bert.encoder.layer:
        layer.gradient_checkpointing = True
    with pytest.raises(RuntimeError, match="checkpointing"):
        packed_logits(model, pack(some_texts()))


@pytest.mark.skipif(not (SHARED / "data/emotion").is_dir(), reason="../shared/data/emotion is not here")
@pytest.mark.skipif(not MINILM, reason="EMORAY_TEST_MINILM does not name a folder with MiniLM's weights")
def test_real_texts_and_weights():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{MINILM}/tokenizer.json")
    tokenizer.no_padding()
    lines = (SHARED / "data/emotion/validation.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["text"] for line in lines]
    texts = [np.array(e.ids) for e in tokenizer.encode_batch(rows)]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=6).eval()
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding: half the time
    with torch.no_grad():
        padded = [padded_logits(model, [texts[i] for i in by_length[s : s + 50]], pad=0) for s in range(0, 2000, 50)]
        enable_packing(model)
        packed = [packed_logits(model, pack(texts[s : s + 64])) for s in range(0, 2000, 64)]
    found = torch.cat(packed)
    assert found.shape == (2000, 6)
    torch.testing.assert_close(found[by_length], torch.cat(padded), atol=1e-5, rtol=0)
