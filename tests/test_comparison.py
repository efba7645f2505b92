"""Two models on the same rows: the tests are those of scipy, and the words say what the figures say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tiny import Emoray, train_here

from emoray import Classifier, uncertainty
from emoray.comparison import compare, comparison_text, recipe_differences
from emoray.evaluation import Scored

LABELS = ("sadness", "joy", "love")


def outputs(shift: float, seed: int, rows: int = 1000) -> Scored:
    """A model as good as `shift`; the rows are the same for every seed, what the model makes of them isn't."""
    targets = np.random.default_rng(0).choice(3, rows, p=[0.5, 0.4, 0.1])
    logits = np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)
    logits[np.arange(rows), targets] += shift
    tokens = np.full(rows, 9, dtype=np.int32)
    texts = [f"text {i}" for i in range(rows)]
    return Scored("test", LABELS, texts, targets, logits, tokens, np.zeros(rows, dtype=bool))


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 5), (3, 11), (11, 3), (0, 7), (40, 70), (900, 1100)])
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert uncertainty.mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_differences_are_those_of_a_paired_bootstrap() -> None:
    first, second = outputs(2.0, 1), outputs(2.6, 2)
    found = compare(first, second, ("a", "b"))
    right = [(split.predicted == split.targets).astype(float) for split in (first, second)]
    gain = right[1] - right[0]
    assert found.differences["accuracy"][0] == pytest.approx(gain.mean())
    reference = stats.bootstrap((gain,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(5))
    low, high = reference.confidence_interval
    assert found.differences["accuracy"][1:] == pytest.approx((low, high), abs=0.004)
    # Drawn apart instead of in pairs, the interval of a model against itself would not be a point.
    same = compare(first, first, ("a", "a"))
    assert set(same.differences.values()) == {(0.0, 0.0, 0.0)}
    assert (same.p_value, same.same_answers, same.differ) == (1.0, 1000, False)


def test_counts_add_up() -> None:
    first, second = outputs(2.0, 1), outputs(2.6, 2)
    found = compare(first, second, ("a", "b"))
    a, b = found.figures["accuracy"]
    assert found.only_second - found.only_first == round(1000 * (b - a))
    assert set(found.differences) == {"accuracy", "f1", "macro_f1", "loss", "brier"}
    for name, (difference, low, high) in found.differences.items():
        assert difference == pytest.approx(found.figures[name][1] - found.figures[name][0])
        assert low < difference < high


def test_words_name_the_better_model_whichever_is_first() -> None:
    worse, better = outputs(1.5, 1), outputs(2.6, 2)
    for pair, names in (((worse, better), ("worse", "better")), ((better, worse), ("better", "worse"))):
        found = compare(*pair, names)
        assert found.differ
        assert found.p_value < 1e-6
        gain = 100 * abs(found.differences["accuracy"][0])
        assert found.words().startswith(f"They differ: better is better than worse by {gain:.2f} points of accuracy")
        low, high = sorted(abs(100 * bound) for bound in found.differences["accuracy"][1:])
        assert f"(95%: {low:.2f} to {high:.2f})" in found.words()


def test_models_as_good_as_each_other_are_rarely_said_to_differ() -> None:
    """Noise alone: at a level of 5% a handful of 60 pairs at most."""
    said = [compare(outputs(2.0, seed), outputs(2.0, seed + 1000), ("a", "b")).differ for seed in range(60)]
    assert sum(said) <= 6
    assert not said[0]
    text = comparison_text(compare(outputs(2.0, 0), outputs(2.0, 1000), ("a", "b")))
    assert "No difference is shown" in text


def test_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="same rows"):
        compare(outputs(2.0, 1), outputs(2.0, 1, rows=999), ("a", "b"))


@pytest.fixture(scope="module")
def weak_run(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for a single step, which is not enough."""
    folder = tmp_path_factory.mktemp("runs")
    changes = ["training.max_steps=1", "run.name=weak", f"run.storage_path={folder}"]
    return train_here([*tiny_overrides, *changes])


def test_command_compares_two_runs(emoray: Emoray, trained_run: Path, weak_run: Path) -> None:
    answer = emoray("evaluate", trained_run, weak_run)
    assert answer.status == 0, answer.err
    assert f"They differ: {trained_run} is better than {weak_run}" in answer.out
    assert "training.max_steps None -> 1" in answer.out
    found: dict[str, Any] = json.loads(emoray("evaluate", trained_run, weak_run, "--json").out)
    single = [json.loads(emoray("evaluate", run, "--json").out) for run in (trained_run, weak_run)]
    for name in ("accuracy", "f1", "loss", "ece", "brier"):
        assert found["figures"][name] == [pytest.approx(one[name]) for one in single]
    assert found["differ"] is True
    same = emoray("evaluate", trained_run, trained_run / "best")
    assert "No difference is shown" in same.out


def test_labels_in_another_order_are_matched_by_name(
    emoray: Emoray, trained_run: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    order = ["data.labels=[sad,glad,cross,calm]", "run.name=turned", f"run.storage_path={tmp_path}"]
    turned = train_here([*tiny_overrides, *order])
    found = json.loads(emoray("evaluate", trained_run, turned, "--json").out)
    alone = json.loads(emoray("evaluate", turned, "--json").out)
    assert found["figures"]["accuracy"][1] == pytest.approx(alone["accuracy"])
    assert found["figures"]["macro_f1"][1] == pytest.approx(alone["macro_f1"])


def test_what_can_not_be_compared_is_said(emoray: Emoray, trained_run: Path, tmp_path: Path) -> None:
    three = emoray("evaluate", trained_run, trained_run, trained_run)
    assert three.status != 0
    assert "compares two models, not 3" in three.err
    report = emoray("evaluate", trained_run, trained_run, "--report", tmp_path / "r.html")
    assert report.status != 0
    assert "a report is of one model" in report.err


def test_recipes_differ_by_the_seed_alone_only_on_the_same_data(trained_run: Path) -> None:
    facts = Classifier.load(trained_run).facts
    config = {**facts["config"], "training": {**facts["config"]["training"], "seed": 7}}
    moved = {**config, "data": {**config["data"], "dataset": "/elsewhere"}}
    other = {**facts["data"], "fingerprint": "0" * 64}
    assert set(recipe_differences(facts, {**facts, "config": moved})) == {"training.seed"}
    assert set(recipe_differences(facts, {**facts, "config": config, "data": other})) == {"training.seed", "data"}


def test_the_difference_that_rows_leave_open() -> None:
    """As the bootstrap says where there is much to draw from; where two models answer alike, more than nothing."""
    found = compare(outputs(2.0, 0), outputs(2.0, 1000), ("a", "b"))
    exact = uncertainty.paired_difference(found.only_first, found.only_second, found.rows)
    assert exact == pytest.approx(found.differences["accuracy"][1:], abs=0.004)
    low, high = uncertainty.paired_difference(0, 0, 30)
    assert -low == high == pytest.approx(1.96 / 32)


def test_models_that_differ_in_opposite_ways_are_not_called_better() -> None:
    found = compare(outputs(1.5, 1), outputs(2.6, 2), ("a", "b"))
    assert found.differ
    gain, low, high = found.differences["f1"]
    turned = dataclasses.replace(found, differences={**found.differences, "f1": (-gain, -high, -low)})
    assert not turned.differ and "F1 doesn't say the same" in turned.words()
