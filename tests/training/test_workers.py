"""One, two and four workers take the same steps: the same samples, and weights that are equal to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import (
    BATCH,
    STEPS_PER_EPOCH,
    TRAIN_ROWS,
    Configure,
    Report,
    configure_from,
    folder_of,
    last_weights,
    learner_of,
    outcome,
    run_training,
    run_workers,
)
from torch import Tensor

from emoray.config import TrainConfig
from emoray.training import Wish

PACKINGS = ["training.packing='on'", "training.packing='off'"]
STEPS = 50
# Micro-batches are small on purpose: a worker then has several, and all but the last must not synchronise.
RECIPE = (
    "model.dropout=0",
    f"training.max_steps={STEPS}",
    "training.micro_batch_tokens=128",
    "training.logging_steps=1",
    "training.learning_rate=1e-3",
)
# softmax doesn't change where a constant is added to all its inputs, so the gradient of a key's bias is zero and what
# is computed is rounding; Adam makes full steps of it, in directions that mean nothing.
MEANINGLESS = ".attention.self.key.bias"


@dataclass(frozen=True)
class Whole:
    """A finished run."""

    config: TrainConfig
    reports: dict[int, Report]
    weights: dict[str, Tensor]
    losses: list[float]


@pytest.fixture(scope="module")
def run_on(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Whole]:
    """`run_on(2)`: the recipe on so many workers, once a module."""
    known: dict[tuple[int | str, ...], Whole] = {}

    def find(size: int, *overrides: str) -> Whole:
        key = (size, *overrides)
        if key not in known:
            config = configure_from(material, tmp_path_factory.mktemp(f"on{size}"), *RECIPE, *overrides)
            ending = run_workers(config, size, spy=True)
            assert ending.finished
            folder = folder_of(config)
            losses = outcome(folder).losses
            known[key] = Whole(config, ending.reports, last_weights(folder), losses)
        return known[key]

    return find


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """How far each tensor is off, relative to its length."""
    return {name: float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items()}


# Padded attention draws its dropout inside torch's kernel, so only packed runs can have any and agree.
@pytest.mark.parametrize(
    ("size", "variant"),
    [
        (2, (PACKINGS[0],)),
        (4, (PACKINGS[0],)),
        (4, (PACKINGS[1],)),
        (4, (PACKINGS[0], "model.dropout=0.2")),
        pytest.param(2, (PACKINGS[1],), marks=pytest.mark.slow),
        pytest.param(2, (PACKINGS[0], "model.dropout=0.2"), marks=pytest.mark.slow),
    ],
)
def test_same_weights(size: int, variant: tuple[str, ...], run_on: Callable[..., Whole]) -> None:
    one, many = run_on(1, *variant), run_on(size, *variant)
    found = differences(many.weights, one.weights)
    print(max((value, name) for name, value in found.items() if not name.endswith(MEANINGLESS)))
    assert max(value for name, value in found.items() if not name.endswith(MEANINGLESS)) < 1e-5
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)


@pytest.mark.parametrize("packing", PACKINGS)
def test_key_biases_mean_nothing(packing: str, run_on: Callable[..., Whole]) -> None:
    """Put those of one run into the other: no logit moves by more than rounding."""
    one, many = run_on(1, packing), run_on(4, packing)
    learner = learner_of(one.config)
    logits = []
    for weights in (
        many.weights,
        {**many.weights, **{k: v for k, v in one.weights.items() if k.endswith(MEANINGLESS)}},
    ):
        if learner.vocabulary is not None:
            name = learner.vocabulary.name
            weights = {**weights, name: weights[name][torch.from_numpy(learner.vocabulary.rows)]}
        learner.model.load_state_dict(weights)
        logits.append(learner.scores("validation"))
    assert logits[0] is not None and logits[1] is not None
    np.testing.assert_allclose(logits[1], logits[0], atol=2e-6)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("size", [2, 4])
def test_same_samples_at_every_step(size: int, packing: str, run_on: Callable[..., Whole]) -> None:
    """Each step's set is that of one worker, every row is computed by one worker only, and tokens are dealt evenly."""
    one, many = run_on(1, packing), run_on(size, packing)
    lengths = learner_of(one.config).plan.lengths
    for step in range(STEPS):
        shares = [many.reports[rank].rows[step] for rank in range(size)]
        together = [row for share in shares for row in share]
        assert len(together) == len(set(together))
        assert set(together) == set(one.reports[0].rows[step])
        tokens = [int(lengths[share].sum()) for share in shares]
        assert max(tokens) - min(tokens) <= lengths[together].max()
    epoch = [row for step in range(STEPS_PER_EPOCH) for rank in range(size) for row in many.reports[rank].rows[step]]
    assert sorted(epoch) == list(range(TRAIN_ROWS))


def test_a_last_batch_smaller_than_the_number_of_workers(run_on: Callable[..., Whole]) -> None:
    shares = [len(run_on(4, PACKINGS[0]).reports[rank].rows[STEPS_PER_EPOCH - 1]) for rank in range(4)]
    assert sorted(shares) == [0, 1, 1, 1] and TRAIN_ROWS % BATCH == 3


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_are_sent_once_a_step(size: int, packing: str, run_on: Callable[..., Whole]) -> None:
    """All but a step's last micro-batch only add to what lies here already."""
    whole = run_on(size, packing)
    plan = learner_of(whole.config).plan
    several = 0
    for rank, report in whole.reports.items():
        pieces = [len(plan.micro_batches(step, rank, size)) for step in range(STEPS)]
        several += sum(count > 1 for count in pieces)
        expected = sum(max(count - 1, 0) for count in pieces)
        assert report.unsynchronised == (expected if size > 1 else 0)
    assert several > 0 or packing == PACKINGS[0]  # a share of few tokens is one packed row, but four padded blocks


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_row_is_scored_once(size: int, run_on: Callable[..., Whole]) -> None:
    """In each evaluation, and with the best weights on validation and test at the end."""
    reports = run_on(size, PACKINGS[0]).reports
    counts = [len(report.scored) for report in reports.values()]
    assert set(counts) == {STEPS // STEPS_PER_EPOCH + 1 + 2}
    for deal in zip(*(report.scored for report in reports.values()), strict=True):
        rows = sorted(row for share in deal for row in share)
        assert rows == list(range(41)) or (
            rows == list(range(37)) and deal == tuple(r.scored[-1] for r in reports.values())
        )


def test_workers_evaluate_alike(run_on: Callable[..., Whole]) -> None:
    one, two = (outcome(folder_of(run_on(size, PACKINGS[0]).config)).results for size in (1, 2))
    for mine, theirs in zip(one["epochs"], two["epochs"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_compressed_gradients(run_on: Callable[..., Whole]) -> None:
    """Sums rounded to bfloat16 give another run, but one that is close, and the same one each time."""
    plain = run_on(2, PACKINGS[0])
    rough = run_on(2, PACKINGS[0], "training.gradient_compression=bf16")
    assert rough.losses != plain.losses
    np.testing.assert_allclose(rough.losses, plain.losses, rtol=0.02)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_run_goes_on_with_another_number_of_workers(
    packing: str, configure: Configure, run_on: Callable[..., Whole]
) -> None:
    """As an elastic run does: 2 workers, then 4, then 1."""
    config = configure(*RECIPE, packing)
    for size in (2, 4):
        ending = run_workers(config, size, wishes={13: Wish.STOP})
        assert {report.error.split(":")[0] for report in ending.reports.values()} == {"InterruptedRunError"}
    run_training(config)
    one = run_on(1, packing)
    found = differences(last_weights(folder_of(config)), one.weights)
    assert max(value for name, value in found.items() if not name.endswith(MEANINGLESS)) < 1e-5
    np.testing.assert_allclose(outcome(folder_of(config)).losses, one.losses, rtol=1e-5)
