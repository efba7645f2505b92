"""What a Scored split says, recomputed from its raw logits; results.json and results.md to the letter."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from emoray import metrics
from emoray.errors import NotFiniteError
from emoray.evaluation import TABLE_HEADER, Scored, results, results_table

LABELS = ("sadness", "joy", "love", "anger", "fear", "surprise")


def scored(rows: int = 400, temperature: float = 1.0, seed: int = 0, **changes: Any) -> Scored:
    rng = np.random.default_rng(seed)
    targets = rng.choice(len(LABELS), rows, p=[0.29, 0.33, 0.08, 0.14, 0.12, 0.04])
    logits = rng.normal(size=(rows, len(LABELS))).astype(np.float32)
    logits[np.arange(rows), targets] += 2.5
    fields: dict[str, Any] = {
        "split": "test",
        "labels": LABELS,
        "texts": [f"text {i}" for i in range(rows)],
        "targets": targets,
        "logits": logits,
        "tokens": rng.integers(4, 60, rows).astype(np.int32),
        "truncated": rng.random(rows) < 0.02,
        "calibration": metrics.Calibration(temperature),
    }
    return Scored(**{**fields, **changes})


def test_figures_are_those_of_the_raw_logits() -> None:
    split = scored(temperature=1.7)
    predicted = split.logits.argmax(1)
    figures = split.metrics()
    assert figures == {**metrics.compute(split.logits, split.targets, 1.7), "rows": 400}
    assert figures["f1"] == pytest.approx(sk.f1_score(split.targets, predicted, average="weighted"))
    assert [line["f1"] for line in split.per_label()] == pytest.approx(
        sk.f1_score(split.targets, predicted, average=None)
    )
    np.testing.assert_array_equal(split.confusion(), sk.confusion_matrix(split.targets, predicted))
    assert set(split.intervals()) >= {"accuracy", "f1", "macro_f1"}
    np.testing.assert_allclose(split.probabilities, metrics.softmax(split.logits, 1.7))


def test_before_and_after_temperature() -> None:
    # Gaussian noise around a shift of 2.5 makes 2.5 * logits the honest ones: 4 * logits are too sure.
    sharp = scored(temperature=4 / 2.5, logits=scored().logits * 4)
    plain = metrics.compute(sharp.logits, sharp.targets)
    assert (sharp.ece(False), sharp.brier(False)) == (plain["ece"], plain["brier"])
    assert (sharp.ece(), sharp.brier()) == (sharp.metrics()["ece"], sharp.metrics()["brier"])
    assert sharp.ece() < sharp.ece(False)
    assert sharp.reliability()["count"].sum() == sharp.reliability(calibrated=False)["count"].sum() == 400


def test_slices_cover_each_row_once() -> None:
    split = scored()
    right = split.predicted == split.targets
    by_length = split.by_length()
    assert len(by_length) == 4
    assert sum(line["rows"] for line in by_length) == len(split)
    low, high = map(int, by_length[1]["name"].split("–"))
    rows = (split.tokens >= low) & (split.tokens <= high)
    assert by_length[1]["rows"] == rows.sum()
    assert by_length[1]["accuracy"] == pytest.approx(right[rows].mean())
    assert by_length[1]["f1"] == pytest.approx(
        sk.f1_score(split.targets[rows], split.predicted[rows], average="weighted", zero_division=0)
    )
    assert by_length[1]["confidence"] == pytest.approx(split.probabilities[rows].max(1).mean())
    by_label = split.by_label()
    assert [line["name"] for line in by_label] == list(LABELS)
    assert [line["accuracy"] for line in by_label] == pytest.approx([line["recall"] for line in split.per_label()])


def test_slices_of_degenerate_splits() -> None:
    same = scored(tokens=np.full(400, 7, dtype=np.int32))
    assert [(line["name"], line["rows"]) for line in same.by_length()] == [("7", 400)]
    skewed = scored(tokens=np.array([7] * 390 + [9] * 10, dtype=np.int32))
    assert [line["rows"] for line in skewed.by_length()] == [390, 10]
    one = scored(rows=1)
    assert len(one.by_label()) == len(one.by_length()) == 1


def test_worst_rows_are_the_surest_wrong_ones() -> None:
    split = scored()
    worst = split.worst(20)
    sure, wrong = split.probabilities.max(1), np.flatnonzero(split.predicted != split.targets)
    assert [line["row"] for line in worst] == sorted(wrong, key=lambda i: -sure[i])[:20]
    first = worst[0]
    assert first["text"] == split.texts[first["row"]]
    assert first["true"] == LABELS[split.targets[first["row"]]] != first["predicted"]
    assert first["probability"] == split.probabilities[first["row"]].max() > first["true_probability"]
    assert scored(logits=np.eye(6, dtype=np.float32)[split.targets]).worst(20) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": ["one"]}, "1 texts for 400 targets"),
        ({"tokens": np.ones(3, dtype=np.int32)}, "3 tokens"),
        ({"truncated": np.zeros(0, dtype=bool)}, "0 truncated"),
        ({"labels": ("a", "b")}, "2 labels for logits of 6"),
        ({"targets": np.full(400, 6)}, "outside 0..5"),
    ],
)
def test_fields_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scored(**changes)


def test_outputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NotFiniteError):
        scored(logits=np.full((400, 6), np.nan, dtype=np.float32))


def test_scored_travels_between_processes() -> None:
    split = scored()
    _ = split.probabilities
    assert pickle.loads(pickle.dumps(split)).metrics() == split.metrics()


def _documented() -> list[dict[str, Any]]:
    """The documented model's table."""
    return [
        {"epoch": 1, "step": 250, "validation_loss": 0.3466, "accuracy": 0.8965, "f1": 0.8966},
        {
            "step": 500,
            "f1": 0.92054,
            "epoch": 2,
            "macro_f1": 0.9,
            "validation_loss": 0.2369,
            "accuracy": 0.9195,
        },
    ]


def test_results_are_the_designs() -> None:
    epochs, test = _documented(), scored(temperature=1.25)
    found = json.loads(json.dumps(results(epochs, epochs[1], test)))
    assert list(found) == ["epochs", "best", "test"]
    assert [list(entry)[:5] for entry in found["epochs"]] == [
        ["epoch", "step", "validation_loss", "accuracy", "f1"]
    ] * 2
    assert found["epochs"] == epochs
    assert found["best"] == epochs[1]
    assert found["test"] == {**test.metrics(), "temperature": 1.25, "power": 1.0}
    assert list(found["test"])[:5] == ["accuracy", "f1", "macro_f1", "loss", "ece"]
    with pytest.raises(ValueError, match="validation_loss"):
        results([{"epoch": 1, "step": 2, "accuracy": 0.5, "f1": 0.5}], epochs[1], test)


def test_results_table_is_the_designs() -> None:
    epochs = _documented()
    assert results_table({"epochs": epochs}).splitlines() == [
        TABLE_HEADER,
        "|---:|---:|---:|---:|---:|",
        "| 1 | 250 | 0.3466 | 0.8965 | 0.8966 |",
        "| 2 | 500 | 0.2369 | 0.9195 | 0.9205 |",
    ]
    assert TABLE_HEADER == "| Epoch | Step | Validation Loss | Accuracy | F1 |"
    test = scored()
    *_, blank, line = results_table(results(epochs, epochs[1], test)).splitlines()
    figures = test.metrics()
    assert blank == ""
    assert line == (
        f"Test (400 rows): accuracy {figures['accuracy']:.4f}, F1 {figures['f1']:.4f}, "
        f"macro F1 {figures['macro_f1']:.4f}, loss {figures['loss']:.4f}, ECE {figures['ece']:.4f}, "
        f"Brier {figures['brier']:.4f}"
    )
