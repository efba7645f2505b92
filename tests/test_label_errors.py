"""Likely label errors: flipped labels are found, by models that have not seen them."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import LABELS, Emoray, write_rows

from emoray import data, label_errors
from emoray.config import load
from emoray.errors import MissingExtraError

FLIPPED = (3, 30, 57, 90, 121, 150)  # of the 160 training rows

pytestmark = pytest.mark.usefixtures("torch_settings")


@pytest.fixture
def wrong_data(tiny_data: Path, tmp_path: Path) -> Path:
    """The tiny data with a few training labels flipped."""
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (tiny_data / f"{split}.jsonl").read_text().splitlines()]
        for i in FLIPPED if split == "train" else ():
            rows[i]["label"] = LABELS[(LABELS.index(rows[i]["label"]) + 2) % 4]
        write_rows(tmp_path / "wrong" / f"{split}.jsonl", rows)
    return tmp_path / "wrong"


@pytest.fixture
def overrides(tiny_overrides: list[str], wrong_data: Path) -> list[str]:
    kept = [override for override in tiny_overrides if not override.startswith("data.dataset")]
    return [*kept, f"data.dataset={wrong_data}"]


def test_flipped_rows_are_found(emoray: Emoray, overrides: list[str], wrong_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("cleanlab")
    config = tmp_path / "config.yaml"
    config.write_text(load(None, overrides).to_yaml())
    out = tmp_path / "errors.csv"
    answer = emoray("check-data", config, "--label-errors", out, "--json")
    assert answer.status == 0, answer.err
    with out.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["row", "label", "likely_label", "score", "text"]
    assert json.loads(answer.out)["label_errors"] == {"path": str(out), "rows": len(rows)}
    found = {int(row["row"]) - 1 for row in rows}  # numbers of lines count from 1
    assert len(found & set(FLIPPED)) >= 4
    # The tiny models are often wrong themselves; still a flagged row is flipped far more often than any row.
    assert len(found & set(FLIPPED)) / len(found) >= 4 * len(FLIPPED) / 160
    lines = [json.loads(line) for line in (wrong_data / "train.jsonl").read_text().splitlines()]
    for row in rows:
        line = lines[int(row["row"]) - 1]
        assert (row["label"], row["text"]) == (line["label"], line["text"])
        assert row["likely_label"] in set(LABELS) - {row["label"]}
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores)


def test_each_row_is_scored_by_a_model_that_has_not_seen_it(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts that a fold trains on and those it is asked about share nothing, and all are asked about once."""
    config = load(None, overrides)
    dataset = data.load(config.data)
    split = dataset.splits["train"]
    asked: list[np.ndarray] = []

    def without(task: object, state: object, kept: np.ndarray, device: object) -> np.ndarray:
        held_out = [split.texts[i] for i in np.flatnonzero(~kept)]
        assert not set(held_out) & {split.texts[i] for i in np.flatnonzero(kept)}
        asked.append(np.flatnonzero(~kept))
        return np.full((len(held_out), 4), 0.25)

    monkeypatch.setattr(label_errors, "_without", without)
    labels, probabilities = label_errors.out_of_sample(config, dataset)
    assert labels == LABELS
    assert probabilities.shape == (160, 4)
    assert sorted(np.concatenate(asked)) == list(range(160))


def test_folds_are_even_and_keep_copies_together() -> None:
    texts = [f"text {i % 90}" for i in range(100)]
    targets = np.array([i % 3 for i in range(100)])
    fold = label_errors.deal(texts, targets, 4)
    assert all(fold[i] == fold[i + 90] for i in range(10))
    for label in range(3):
        counts = np.bincount(fold[:90][targets[:90] == label], minlength=4)
        assert counts.max() - counts.min() <= 2
    # Not of the order of the rows:
    backwards = label_errors.deal(texts[:90][::-1], targets[:90][::-1], 4)
    assert (backwards[::-1] == label_errors.deal(texts[:90], targets[:90], 4)).all()


def test_only_doubted_rows_are_listed_worst_first() -> None:
    pytest.importorskip("cleanlab")
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 300)
    probabilities = np.full((300, 3), 0.05)
    probabilities[np.arange(300), truth] = 0.9
    given = truth.copy()
    given[:12] = (given[:12] + 1) % 3
    found = label_errors.find(("a", "b", "c", "unused"), given, np.pad(probabilities, ((0, 0), (0, 1))))
    assert {error.row for error in found} == set(range(12))
    assert all(error.likely == "abc"[truth[error.row]] and error.label == "abc"[given[error.row]] for error in found)
    assert label_errors.find(("a", "b"), np.zeros(5, dtype=np.int64), np.full((5, 2), 0.5)) == []


def test_without_cleanlab_it_says_how_to_get_it(
    emoray: Emoray, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(MissingExtraError):
        label_errors.find(("a", "b"), np.zeros(2, dtype=np.int64), np.eye(2))
    config = tmp_path / "config.yaml"
    config.write_text(load(None, overrides).to_yaml())
    answer = emoray("check-data", config, "--label-errors", tmp_path / "errors.csv")
    assert answer.status == 1
    assert "pip install 'emoray[label-errors]'" in answer.err
    assert not (tmp_path / "errors.csv").exists()


def test_csv_quotes_what_texts_may_hold() -> None:
    texts = ['a, "b"\nc', "plain"]
    split = data.Split("train", texts, np.array([0, 1]), np.array([7, 9]))
    found = [label_errors.LabelError(0, "x", "y", 0.25)]
    rows = list(csv.reader(io.StringIO(label_errors.as_csv(found, split))))
    assert rows[1] == ["7", "x", "y", "0.250000", texts[0]]
