"""Dropout masks depend on their key alone, and are right on average."""

import numpy as np
import pytest
import torch
from torch import nn

from emoray import tokens
from emoray.dropout import DropoutSource, SeededDropout, seed_dropout
from emoray.forward import PaddedBatch
from emoray.packing import pack


def begin(source: DropoutSource, *, seed=1, step=2, text=3, rows=64) -> None:
    """A micro-batch of one long text."""
    places = np.arange(rows)
    source.begin(seed=seed, step=step, texts=np.full(rows, text), places=places, first=places[:1])


def draw(source: DropoutSource, shape=(64, 96), p=0.1, **key) -> torch.Tensor:
    begin(source, **key)
    return source.scaled_mask(shape, p, torch.float32)


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)))


def test_same_key_same_mask_whatever_the_global_state():
    first = draw(DropoutSource())
    torch.manual_seed(999)
    np.random.seed(999)
    source = DropoutSource()
    draw(source, step=77)
    assert torch.equal(draw(source), first)


@pytest.mark.parametrize("part", ["seed", "step", "text"])
def test_every_part_of_the_key_counts(part):
    source = DropoutSource()
    assert not torch.equal(draw(source), draw(source, **{part: 9}))


def test_keys_do_not_run_into_each_other():
    source = DropoutSource()
    assert not torch.equal(draw(source, step=1, text=0), draw(source, step=0, text=1))
    assert not torch.equal(draw(source, seed=0, step=0, text=0), draw(source, seed=0, step=0, text=2**40))
    one, other = draw(source, text=0), draw(source, text=1)
    assert not any(torch.equal(one[:-shift], other[shift:]) for shift in range(1, 8))


def test_masks_of_two_layers_differ():
    source = DropoutSource()
    first = draw(source)
    assert not torch.equal(first, source.scaled_mask((64, 96), 0.1, torch.float32))


def test_thread_count_changes_nothing():
    before = torch.get_num_threads()
    masks = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            masks.append(draw(DropoutSource(), shape=(1024, 1024)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*masks)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_expectation(p):
    mask = draw(DropoutSource(), shape=(1000, 1001), p=p, rows=1000)
    five_sigma = 5 * (p * (1 - p) / mask.numel()) ** 0.5
    assert abs((mask == 0).double().mean().item() - p) < five_sigma + 2**-17
    assert abs(mask.double().mean().item() - 1) < five_sigma / (1 - p) + 1e-6


def test_rows_columns_and_layers_are_uncorrelated():
    """Shares of drops a row and a column spread as a binomial does; neighbours agree as often as strangers."""
    begin(source := DropoutSource(), rows=2000)
    masks = [(source.scaled_mask((2000, 1000), 0.5, torch.float32) != 0).double() - 0.5 for _ in range(2)]
    for dim, count in ((0, 2000), (1, 1000)):
        assert masks[0].mean(dim).std().item() == pytest.approx(0.5 / count**0.5, rel=0.15)
    pairs = ((masks[0], masks[1]), (masks[0][1:], masks[0][:-1]), (masks[0][:, 1:], masks[0][:, :-1]))
    for one, other in (*pairs, (masks[0][:, ::2], masks[0][:, 1::2])):
        assert abs((one * other).mean().item()) < 5 * 0.25 / one.numel() ** 0.5


def test_a_text_has_its_mask_in_any_micro_batch():
    """Packed or padded, with others or alone, as hidden states or as attention's scores."""
    lengths, rows = (3, 9, 5), np.array([70, 4, 12])
    texts = [np.ones(length, np.int64) for length in lengths]
    packed, padded = pack(texts), PaddedBatch(*map(torch.from_numpy, tokens.padded(texts, 0)))
    drawn = []
    for batch, keep in ((packed, rows), (padded, rows), (pack(texts[1:2]), rows[1:2])):
        text, places, first = batch.places()
        source = DropoutSource()
        source.begin(seed=1, step=2, texts=keep[text], places=places, first=first)
        hidden = source.scaled_mask((len(text), 7), 0.5, torch.float32)
        pooled = source.scaled_mask((len(first), 6), 0.5, torch.float32)
        scores = source.scaled_scores(np.arange(2 * len(text)), 2, [(2 * len(text), 9)], 0.5, torch.float32)
        mine = np.flatnonzero((keep[text] == 4) & (places < 9))
        drawn.append((hidden[mine], pooled[keep == 4], scores.view(-1, 2, 9)[mine]))
    for other in drawn[1:]:
        assert all(torch.equal(*pair) for pair in zip(drawn[0], other, strict=True))


@pytest.mark.parametrize("shape", [(), (1,), (3, 0), (5,), (2, 3, 7)])
def test_any_shape(shape):
    assert draw(DropoutSource(), shape=shape).shape == shape


def test_gradient_is_the_mask():
    x = torch.ones(50, 30, requires_grad=True)
    source = DropoutSource()
    layer = SeededDropout(0.3, source)
    begin(source)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert 0 in y


def test_zero_rate_and_eval_mode_are_the_identity():
    x = torch.randn(4, 4)
    source = DropoutSource()
    assert SeededDropout(0.0, source)(x) is x
    assert SeededDropout(0.5, source).eval()(x) is x


def test_seed_dropout_replaces_all_and_is_idempotent():
    model = small_model()
    names = list(model.state_dict())
    source = seed_dropout(model)
    assert not any(isinstance(module, nn.Dropout) for module in model.modules())
    assert [module.p for module in model.modules() if isinstance(module, SeededDropout)] == [0.1, 0.5]
    assert seed_dropout(model) is source
    assert list(model.state_dict()) == names


def test_training_forward_without_a_key_is_refused():
    model = small_model()
    seed_dropout(model)
    with pytest.raises(RuntimeError, match="begin"):
        model(torch.ones(2, 8))
    model.eval()(torch.ones(2, 8))


def test_begin_also_seeds_dropout_inside_torch_kernels():
    source = DropoutSource()
    draws = []
    for history in (1, 2):
        torch.manual_seed(history)
        begin(source, seed=5, step=6, text=7)
        q = torch.ones(1, 2, 6, 4)
        draws.append(torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5))
    assert torch.equal(*draws)


def test_negative_key_is_refused():
    with pytest.raises(ValueError, match="non-negative"):
        begin(DropoutSource(), seed=-1)
