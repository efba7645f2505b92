"""Every figure against scikit-learn, on random and on degenerate input."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from emoray import metrics, uncertainty
from emoray.errors import NotFiniteError


def _random(rows: int, labels: int, seed: int, skill: float = 2.0) -> tuple[metrics.Array, metrics.Array]:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, labels, rows)
    logits = rng.normal(size=(rows, labels)).astype(np.float32)
    logits[np.arange(rows), targets] += skill * rng.random(rows)
    return logits, targets


def _one_hot(ids: Any, labels: int) -> metrics.Array:
    return np.asarray(np.eye(labels, dtype=np.float32)[np.asarray(ids)])


CASES = {
    "random": _random(500, 6, 0),
    "two labels": _random(300, 2, 1),
    "many labels": _random(400, 40, 2),
    "one row": _random(1, 3, 3),
    "all right": (_one_hot([0, 1, 2, 1], 3) * 9, np.array([0, 1, 2, 1])),
    "all wrong": (_one_hot([1, 2, 0, 0], 3) * 9, np.array([0, 1, 2, 1])),
    "one label predicted": (_one_hot([1] * 6, 3), np.array([0, 1, 2, 1, 0, 0])),
    "one label true": (_random(50, 4, 4)[0], np.full(50, 2)),
    "a label that never occurs": (_one_hot([0, 1, 1, 0], 5), np.array([0, 1, 0, 0])),
    "ties": (np.zeros((8, 3), dtype=np.float32), np.array([0, 1, 2, 0, 1, 2, 0, 0])),
    "huge logits": (_random(60, 3, 5)[0] * 1e6, _random(60, 3, 5)[1]),
}
cases = pytest.mark.parametrize(("logits", "targets"), CASES.values(), ids=CASES.keys())


@cases
def test_headline_figures_are_those_of_scikit_learn(logits: metrics.Array, targets: metrics.Array) -> None:
    figures, predicted = metrics.compute(logits, targets), logits.argmax(1)
    assert set(figures) == {"loss", "accuracy", "f1", "macro_f1", "ece", "brier"}
    assert all(type(value) is float and np.isfinite(value) for value in figures.values())
    assert figures["accuracy"] == pytest.approx(sk.accuracy_score(targets, predicted))
    assert figures["f1"] == pytest.approx(sk.f1_score(targets, predicted, average="weighted", zero_division=0))
    assert figures["macro_f1"] == pytest.approx(sk.f1_score(targets, predicted, average="macro", zero_division=0))
    one_hot = np.eye(logits.shape[1])[targets]
    assert figures["brier"] == pytest.approx(((metrics.softmax(logits) - one_hot) ** 2).sum(1).mean())


@pytest.mark.parametrize("name", ["random", "two labels", "many labels", "ties", "one label true"])
def test_loss_is_the_mean_cross_entropy(name: str) -> None:
    logits, targets = CASES[name]
    expected = sk.log_loss(targets, metrics.softmax(logits), labels=np.arange(logits.shape[1]))
    assert metrics.compute(logits, targets)["loss"] == pytest.approx(expected)
    # Temperature moves probabilities, not the loss that is compared with training's.
    assert metrics.compute(logits, targets, temperature=2.5)["loss"] == pytest.approx(expected)


@cases
def test_per_label_and_confusion_are_those_of_scikit_learn(logits: metrics.Array, targets: metrics.Array) -> None:
    width, predicted = logits.shape[1], logits.argmax(1)
    names = [f"label {i}" for i in range(width)]
    expected = sk.precision_recall_fscore_support(targets, predicted, labels=range(width), zero_division=0)
    table = metrics.per_label(logits, targets, names)
    assert [line["label"] for line in table] == names
    for key, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [line[key] for line in table] == pytest.approx(column.tolist())  # type: ignore[literal-required]
    np.testing.assert_array_equal(
        metrics.confusion(logits, targets), sk.confusion_matrix(targets, predicted, labels=range(width))
    )


def _slow_ece(probabilities: metrics.Array, targets: metrics.Array, bins: int) -> float:
    top, right = probabilities.max(1), probabilities.argmax(1) == targets
    total = 0.0
    for i in range(bins):
        inside = (top > i / bins) & (top <= (i + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - top[inside].mean())
    return total


@cases
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_calibration_error_by_its_definition(logits: metrics.Array, targets: metrics.Array, temperature: float) -> None:
    probabilities = metrics.softmax(logits, temperature)
    figures = metrics.compute(logits, targets, temperature)
    assert figures["ece"] == pytest.approx(_slow_ece(probabilities, targets, metrics.BINS))
    bins = metrics.reliability(probabilities, targets)
    filled = bins["count"] > 0
    gaps = np.abs(bins["accuracy"] - bins["confidence"])[filled]
    assert bins["count"].sum() == len(targets)
    assert figures["ece"] == pytest.approx((gaps * bins["count"][filled]).sum() / len(targets))


def test_softmax_takes_extreme_input() -> None:
    logits = np.array([[1e30, 0, -1e30], [5, 5, 5]], dtype=np.float32)
    for temperature in (1e-3, 1.0, 1e3):
        np.testing.assert_allclose(metrics.softmax(logits, temperature).sum(1), 1)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature"):
            metrics.softmax(logits, temperature)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (np.zeros((0, 3)), np.zeros(0, int), "no rows"),
        (np.zeros(3), np.zeros(3, int), r"\[n, L\]"),
        (np.zeros((3, 2)), np.zeros(2, int), r"\[n, L\]"),
        (np.zeros((2, 2)), np.array([0, 2]), "outside 0..1"),
        (np.zeros((2, 2)), np.array([-1, 0]), "outside 0..1"),
        (np.zeros((2, 2)), np.array([0.0, 1.0]), "label ids"),
    ],
)
def test_input_that_does_not_fit_is_refused(logits: metrics.Array, targets: metrics.Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.compute(logits, targets)


def test_outputs_that_are_not_finite_are_no_metric() -> None:
    logits = np.array([[0.0, 1.0], [np.nan, 0.0], [np.inf, 0.0]])
    with pytest.raises(NotFiniteError, match="2 of 3 rows"):
        metrics.compute(logits, np.array([0, 1, 1]))


@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 2.5])
def test_fitted_temperature_is_the_minimum(true_temperature: float) -> None:
    rng = np.random.default_rng(7)
    honest = rng.normal(size=(20_000, 4)) * 2
    targets = (honest + rng.gumbel(size=honest.shape)).argmax(1)  # drawn from softmax(honest)
    logits = honest * true_temperature
    found = metrics.fit_temperature(logits, targets)
    assert found == pytest.approx(true_temperature, rel=0.03)

    def loss(temperature: float) -> float:
        return float(sk.log_loss(targets, metrics.softmax(logits, temperature)))

    assert loss(found) <= min(loss(found * 0.99), loss(found * 1.01))
    assert metrics.compute(logits, targets, found)["ece"] < 0.01


@pytest.mark.parametrize("name", ["all right", "all wrong", "ties"])
def test_temperature_is_one_where_the_data_does_not_say(name: str) -> None:
    assert metrics.fit_temperature(*CASES[name]) == 1.0


def test_temperature_of_nothing_or_nan_is_one() -> None:
    assert metrics.fit_temperature(np.zeros((0, 3)), np.zeros(0, int)) == 1.0
    assert metrics.fit_temperature(np.zeros((4, 1)), np.zeros(4, int)) == 1.0
    assert metrics.fit_temperature(np.array([[np.nan, 1], [0, 1]]), np.array([0, 1])) == 1.0


def test_temperature_of_huge_logits_stays_in_bounds() -> None:
    low, high = metrics.TEMPERATURE_BOUNDS
    for scale in (1e-6, 1e-2, 1.0, 10.0, 1e8):
        logits, targets = _random(200, 3, 11)
        found = metrics.fit_temperature(logits * scale, targets)
        assert found == 1.0 or low <= found <= high


def test_bootstrap_agrees_with_resampling_by_hand() -> None:
    logits, targets = _random(150, 4, 8)
    found = uncertainty.bootstrap_intervals(logits, targets, resamples=300, seed=5)
    rng, predicted = np.random.default_rng(5), logits.argmax(1)
    drawn: dict[str, list[float]] = {"accuracy": [], "f1": [], "macro_f1": [], "loss": []}
    for rows in rng.integers(0, 150, (300, 150)):
        true, guess = targets[rows], predicted[rows]
        drawn["accuracy"].append(float(sk.accuracy_score(true, guess)))
        drawn["f1"].append(float(sk.f1_score(true, guess, average="weighted", zero_division=0)))
        drawn["macro_f1"].append(float(sk.f1_score(true, guess, average="macro", zero_division=0)))
        drawn["loss"].append(float(sk.log_loss(true, metrics.softmax(logits[rows]), labels=range(4))))
    for name, values in drawn.items():
        assert found[name] == pytest.approx(np.quantile(values, [0.025, 0.975]).tolist()), name


def test_bootstrap_is_fast_deterministic_and_around_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = _random(2000, 6, 9)
    start = time.perf_counter()
    first = uncertainty.bootstrap_intervals(logits, targets)
    assert time.perf_counter() - start < 5  # 0.15 s on a quiet core; only a lost vectorisation takes longer
    assert first == uncertainty.bootstrap_intervals(logits, targets)
    assert first != uncertainty.bootstrap_intervals(logits, targets, seed=1)
    figures = metrics.compute(logits, targets)
    for name, (low, high) in first.items():
        assert low < figures[name] < high
    # One standard error of an accuracy is sqrt(p (1 - p) / n).
    low, high = first["accuracy"]
    p = figures["accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / 2000), rel=0.15)
    # Memory is bounded by doing the resamples in pieces; the pieces don't change the result.
    monkeypatch.setattr(uncertainty, "_CHUNK", 7 * 2000)
    assert uncertainty.bootstrap_intervals(logits, targets) == first


@cases
def test_bootstrap_of_degenerate_input_is_finite(logits: metrics.Array, targets: metrics.Array) -> None:
    for low, high in uncertainty.bootstrap_intervals(logits, targets, resamples=50).values():
        assert np.isfinite([low, high]).all()
        assert low <= high


@cases
def test_evaluate_modules_say_the_same(
    logits: metrics.Array, targets: metrics.Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evaluate

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a metric must not ask the Hub")

    monkeypatch.setattr("socket.socket.connect", refuse)
    figures, probabilities = metrics.compute(logits, targets), metrics.softmax(logits)
    for name, key, predictions in [
        ("Accuracy", "accuracy", logits.argmax(1)),
        ("WeightedF1", "f1", logits.argmax(1)),
        ("MacroF1", "macro_f1", logits.argmax(1)),
        ("ExpectedCalibrationError", "ece", probabilities),
        ("BrierScore", "brier", probabilities),
    ]:
        module = getattr(metrics, name)()
        assert isinstance(module, evaluate.Metric)
        found = module.compute(predictions=predictions, references=targets)
        assert found == {key: pytest.approx(figures[key])}


def test_evaluate_modules_work_in_the_library() -> None:
    import evaluate

    logits, targets = CASES["random"]
    both = evaluate.combine([metrics.Accuracy(), metrics.WeightedF1()])
    for rows in np.array_split(np.arange(len(targets)), 3):
        both.add_batch(predictions=logits[rows].argmax(1), references=targets[rows])
    figures = metrics.compute(logits, targets)
    assert both.compute() == {key: pytest.approx(figures[key]) for key in ("accuracy", "f1")}
    with pytest.raises(AttributeError, match="NoSuchMetric"):
        _ = metrics.NoSuchMetric


def test_import_is_light() -> None:
    code = "import sys, emoray.metrics; print({'evaluate', 'torch', 'ray', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_range_of_chance_holds_a_calibrated_model_and_not_another() -> None:
    """Targets drawn from the probabilities themselves fall inside 95% of the time; overconfident ones don't."""
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(60):
        logits = rng.normal(size=(800, 4)) * 2
        probabilities = metrics.softmax(logits)
        targets = (probabilities.cumsum(1) < rng.random((800, 1))).sum(1).clip(max=3)
        low, high = uncertainty.calibrated_ece_range(probabilities, resamples=200, seed=seed)
        assert 0 < low < high
        inside += low <= metrics.expected_calibration_error(probabilities, targets) <= high
        sharp = metrics.softmax(logits * 2)
        assert metrics.expected_calibration_error(sharp, targets) > uncertainty.calibrated_ece_range(sharp, 200)[1]
    assert 50 <= inside <= 60
    assert uncertainty.calibrated_ece_range(probabilities) == uncertainty.calibrated_ece_range(probabilities)


def test_brier_is_resampled_at_the_temperature() -> None:
    logits, targets = CASES["random"]
    probabilities = metrics.softmax(logits, 2.0)
    brier = ((probabilities - np.eye(6)[targets]) ** 2).sum(1)
    low, high = uncertainty.bootstrap_intervals(logits, targets, calibration=(2.0, 1.0))["brier"]
    error = brier.std() / len(brier) ** 0.5
    assert (low, high) == pytest.approx((brier.mean() - 1.96 * error, brier.mean() + 1.96 * error), abs=0.3 * error)


@pytest.mark.parametrize("power", [0.7, 1.0, 1.8])
def test_fitted_calibration_is_the_minimum(power: float) -> None:
    """Targets drawn from a known calibration of the logits: it is found again, and no plain temperature beats it."""
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(6000, 5)) * 3
    probabilities = metrics.softmax(logits, 2.0, power)
    targets = (probabilities.cumsum(1) < rng.random((6000, 1))).sum(1).clip(max=4)
    found = metrics.fit_calibration(logits, targets)
    assert found == pytest.approx((2.0, power), rel=0.08)
    assert (found.power == 1.0) == (power == 1.0)  # one more parameter only where the data asks for it

    def loss(*calibration: float) -> float:
        return float(sk.log_loss(targets, metrics.softmax(logits, *calibration)))

    for temperature, other in ((1.02, 1), (0.98, 1), (1, 1.02), (1, 0.98)):
        if found.power != 1.0 or other == 1:
            assert loss(*found) <= loss(found.temperature * temperature, found.power * other)
    assert loss(*found) <= loss(metrics.fit_temperature(logits, targets)) + 1e-12


def test_few_rows_give_a_plain_temperature() -> None:
    found = [metrics.fit_calibration(*_random(40, 4, seed, skill=3.0)).power for seed in range(20)]
    assert sum(power != 1.0 for power in found) <= 1  # the test's level is 1%


@pytest.mark.parametrize("name", list(CASES))
def test_calibration_of_degenerate_input_is_sound(name: str) -> None:
    logits, targets = CASES[name]
    found = metrics.fit_calibration(logits, targets)
    probabilities = metrics.softmax(logits, *found)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    np.testing.assert_array_equal(probabilities.argmax(1), np.asarray(logits).argmax(1))


def test_order_of_the_labels_survives_any_calibration() -> None:
    logits, _ = CASES["many labels"]
    for power in (0.4, 1.0, 2.5):
        np.testing.assert_array_equal(np.argsort(metrics.softmax(logits, 1.7, power), 1), np.argsort(logits, 1))
    with pytest.raises(ValueError, match="power is 0"):
        metrics.softmax(logits, 1.0, 0.0)
