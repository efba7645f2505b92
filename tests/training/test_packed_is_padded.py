"""Training on packed rows is training on padded ones: logits, gradients, and the weights after many steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import Configure, learner_of, minilm, real_data, weights_of
from torch import Tensor

from emoray import config as cfg
from emoray.config import TrainConfig
from emoray.learner import Learner

BOTH = ("training.packing='off'", "training.packing='on'")
MEANINGLESS = ".attention.self.key.bias"  # see test_workers.py
VARIANTS = [
    (),
    ("training.micro_batch_tokens=128",),
    ("training.class_weights=balanced", "training.label_smoothing=0.1"),
    ("training.compact_vocabulary='off'", "training.weight_decay=0.01"),
]


def gradients(learner: Learner, step: int) -> dict[str, Tensor]:
    """The gradient that a step would clip and apply, by name; nothing is updated."""
    found: dict[str, Tensor] = {}

    def keep(_: int) -> None:
        found.update({n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None})
        learner.optimizer.zero_grad(set_to_none=True)

    learner._update = keep  # type: ignore[method-assign]
    learner.step(step)
    del learner.__dict__["_update"]
    return found


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_a_step(variant: tuple[str, ...], configure: Configure) -> None:
    padded, packed = (learner_of(configure("model.dropout=0", choice, *variant)) for choice in BOTH)
    assert packed.forward.packed and not padded.forward.packed
    compare(padded, packed, steps=(0, 5, 10))


def compare(
    padded: Learner, packed: Learner, steps: tuple[int, ...], splits: tuple[str, ...] = ("validation", "test")
) -> None:
    for split in splits:
        np.testing.assert_allclose(packed.scores(split), padded.scores(split), atol=1e-5, rtol=0)
    for step in steps:
        expected, found = gradients(padded, step), gradients(packed, step)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_thirty_steps(variant: tuple[str, ...], configure: Configure) -> None:
    recipe = ("model.dropout=0", "training.num_epochs=3", *variant)
    padded, packed = (learner_of(configure(*recipe, choice)) for choice in BOTH)
    for step in range(30):
        assert float(packed.step(step)) == pytest.approx(float(padded.step(step)), rel=1e-5)
    expected, found = weights_of(padded), weights_of(packed)
    for name, tensor in expected.items():
        if not name.endswith(MEANINGLESS):
            assert float((found[name] - tensor).norm() / tensor.norm()) < 1e-5, name


def real(choice: str) -> TrainConfig:
    return cfg.load(
        None,
        [f"model.pretrained={minilm()}", f"data.dataset={real_data()}", "model.dropout=0", choice],
    )


@pytest.mark.slow
def test_real_weights_and_texts() -> None:
    """All-MiniLM-L6-v2 on every text of the validation split, and the gradients of two steps."""
    padded, packed = (learner_of(real(choice)) for choice in BOTH)
    compare(padded, packed, steps=(0, 100), splits=("validation",))
