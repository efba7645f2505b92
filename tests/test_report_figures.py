"""Every figure of a run's report, recomputed with scikit-learn and scipy from what plain transformers predicts.

Nothing of emoray's arithmetic is used: the model is asked text by text, without packing or padding. It checks the tiny
run of the tests; `EMORAY_CHECK_RUN=runs/emotion pytest tests/test_report_figures.py` checks any other finished run.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from scipy.special import log_softmax, softmax
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve
from test_report import Page
from transformers import AutoModelForSequenceClassification, AutoTokenizer


@dataclass(frozen=True)
class Raw:
    """What transformers says of one split."""

    texts: list[str]
    true: Any
    logits: Any
    lengths: Any
    cut: Any
    temperature: float
    power: float

    @cached_property
    def said(self) -> Any:
        return self.logits.argmax(1)

    @cached_property
    def p(self) -> Any:
        return softmax(self.scaled(self.logits), axis=1)

    def scaled(self, logits: Any) -> Any:
        return -(((logits.max(-1, keepdims=True) - logits) / self.temperature) ** self.power)

    @cached_property
    def top(self) -> Any:
        return self.p.max(1)

    @property
    def right(self) -> Any:
        return self.said == self.true

    def ece(self, p: Any) -> float:
        true, sure = calibration_curve(self.right, p.max(1), n_bins=15)
        counts = np.bincount(np.searchsorted(np.linspace(0, 1, 16)[1:-1], p.max(1)), minlength=15)
        return float((counts[counts > 0] * abs(true - sure)).sum() / len(self.true))


def rows_of(run: Path, split: str) -> tuple[list[str], list[str]]:
    config = yaml.safe_load((run / "config.yaml").read_text())["data"]
    path = Path(config["dataset"]) / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row[config["text_column"]] for row in rows], [row[config["label_column"]] for row in rows]


@torch.inference_mode()
def ask(folder: Path, texts: list[str]) -> tuple[Any, Any, Any]:
    """Logits, tokens seen, and whether the text was cut, one text at a time."""
    facts = json.loads((folder / "emoray.json").read_text())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    whole = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    kept = tokenizer(texts, truncation=True, max_length=facts["max_length"])["input_ids"]
    logits = [model.eval()(input_ids=torch.tensor([ids])).logits[0].double().numpy() for ids in kept]
    lengths = np.array([len(ids) for ids in kept])
    return np.stack(logits), lengths, np.array(whole) > lengths


@pytest.fixture(scope="module")
def run(trained_run: Path) -> Path:
    return Path(os.environ.get("EMORAY_CHECK_RUN", trained_run))


@pytest.fixture(scope="module")
def facts(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "best" / "emoray.json").read_text()))


@pytest.fixture(scope="module")
def raw(run: Path, facts: dict[str, Any]) -> dict[str, Raw]:
    found = {}
    for split in ("validation", "test"):
        texts, labels = rows_of(run, split)
        true = np.array([facts["labels"].index(label) for label in labels])
        found[split] = Raw(texts, true, *ask(run / "best", texts), facts["temperature"], facts["power"])
    return found


@pytest.fixture(scope="module")
def test(raw: dict[str, Raw]) -> Raw:
    return raw["test"]


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def near(shown: str, value: float, digits: int = 4) -> None:
    """As printed, but for the last digit, in which two ways to add up may differ."""
    assert float(shown.replace(",", "")) == pytest.approx(value, abs=1.01 * 10.0**-digits)


def is_wilson(shown: str, right: Any) -> None:
    interval = stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    assert [float(bound) for bound in shown.split("–")] == pytest.approx(interval, abs=1.01e-3)


def test_headline(page: Page, html: str, raw: dict[str, Raw]) -> None:
    table = {row[0]: row[1:] for row in page.table("Figure")}
    for column, split in enumerate(raw.values()):
        figures = {
            "Accuracy": sk.accuracy_score(split.true, split.said),
            "F1 (weighted)": sk.f1_score(split.true, split.said, average="weighted"),
            "Macro F1": sk.f1_score(split.true, split.said, average="macro"),
            "Loss": -log_softmax(split.logits, axis=1)[np.arange(len(split.true)), split.true].mean(),
            "ECE": split.ece(split.p),
            "Brier": sk.brier_score_loss(split.true, split.p, labels=range(split.p.shape[1]), scale_by_half=False),
        }
        for title, value in figures.items():
            near(table[title][column].split()[0], value)
        assert table["Rows"][column] == f"{len(split.true):,}"
    right = int(split.right.sum())
    assert f"{right:,} right, {len(split.true) - right:,} wrong" in html


def test_intervals(page: Page, test: Raw) -> None:
    """Of the accuracy Wilson's; the others drawn anew with scikit-learn: the bounds agree to their scatter."""
    table = {row[0]: row[-1].split()[1] for row in page.table("Figure") if len(row[-1].split()) > 1}
    rng, size = np.random.default_rng(11), len(test.true)
    onehot = np.eye(test.p.shape[1])[test.true]
    losses = -log_softmax(test.logits, axis=1)[np.arange(size), test.true]
    wilson = stats.binomtest(int((test.true == test.said).sum()), size).proportion_ci(method="wilson")
    assert [float(b) for b in table.pop("Accuracy").split("–")] == pytest.approx([wilson.low, wilson.high], abs=6e-4)
    drawn: dict[str, list[float]] = {title: [] for title in ("F1 (weighted)", "Macro F1", "Loss", "Brier")}
    for _ in range(600):
        rows = rng.integers(0, size, size)
        true, said = test.true[rows], test.said[rows]
        drawn["F1 (weighted)"].append(sk.f1_score(true, said, average="weighted"))
        drawn["Macro F1"].append(sk.f1_score(true, said, average="macro"))
        drawn["Loss"].append(losses[rows].mean())
        drawn["Brier"].append(((test.p[rows] - onehot[rows]) ** 2).sum(1).mean())
    assert set(table) == set(drawn)
    for title, values in drawn.items():
        scatter = 0.35 * np.std(values) + 1e-3
        assert [float(b) for b in table[title].split("–")] == pytest.approx(
            np.quantile(values, [0.025, 0.975]), abs=scatter
        )


def test_results_table(run: Path, page: Page, facts: dict[str, Any]) -> None:
    """Each epoch whose checkpoint is still there, scored anew; the one that was kept always is."""
    texts, labels = rows_of(run, "validation")
    true = np.array([facts["labels"].index(label) for label in labels])
    checked = 0
    for _, step, loss, accuracy, f1 in page.table("Epoch"):
        folder = run / "checkpoints" / f"step-{int(step):08d}"
        if folder.is_dir():
            logits, _, _ = ask(folder, texts)
            near(loss, -log_softmax(logits, axis=1)[np.arange(len(true)), true].mean())
            near(accuracy, sk.accuracy_score(true, logits.argmax(1)))
            near(f1, sk.f1_score(true, logits.argmax(1), average="weighted"))
            checked += 1
    assert checked >= 1


def test_labels_and_confusion(page: Page, test: Raw, facts: dict[str, Any]) -> None:
    columns = sk.precision_recall_fscore_support(test.true, test.said, zero_division=0)
    for i, row in enumerate(page.table("Label")):
        mine = test.true == i
        recall, interval = row[2].split()
        assert row[0] == facts["labels"][i]
        for shown, column in zip((row[1], recall, row[3]), columns[:3], strict=True):
            near(shown, column[i])
        near(row[4], test.top[mine].mean())
        assert row[5] == f"{columns[3][i]:,}"
        is_wilson(interval, test.right[mine])
    cells = [[int(cell.replace(",", "")) for cell in row[1:]] for row in page.table("True")]
    assert cells == sk.confusion_matrix(test.true, test.said).tolist()


def test_calibration(html: str, page: Page, test: Raw) -> None:
    figures = [
        (test.ece(p), sk.brier_score_loss(test.true, p, labels=range(p.shape[1]), scale_by_half=False))
        for p in (softmax(test.logits, axis=1), test.p)[: 1 if (test.temperature, test.power) == (1, 1) else 2]
    ]
    shown = re.findall(r"<br>ECE ([\d.]+), Brier ([\d.]+)</figcaption>", html)
    for (ece, brier), found in zip(figures, shown, strict=True):
        near(found[0], ece)
        near(found[1], brier)
    found_range = re.search(r"show an ECE of ([\d.]+)–([\d.]+) by chance", " ".join(html.split()))
    assert found_range is not None
    rng = np.random.default_rng(3)
    chance = []
    bins = np.searchsorted(np.linspace(0, 1, 16)[1:-1], test.top)
    for _ in range(1000):
        gaps = np.bincount(bins, weights=test.top - (rng.random(len(test.top)) < test.top), minlength=15)
        chance.append(abs(gaps).sum() / len(test.top))
    expected = np.quantile(chance, [0.025, 0.975])
    assert [float(bound) for bound in found_range.groups()] == pytest.approx(expected, abs=0.3 * np.std(chance) + 1e-3)
    for row, least in zip(page.table("Confidence"), (0, 0.5, 0.7, 0.9, 0.95, 0.99), strict=False):
        sure = test.top >= least
        accuracy, interval = row[3].split()
        near(row[1], float(sure.sum()), 0)
        near(row[2].rstrip("%"), 100 * sure.mean(), 1)
        near(accuracy, test.right[sure].mean())
        is_wilson(interval, test.right[sure])


def test_lengths(html: str, page: Page, test: Raw) -> None:
    rows = page.table("Tokens")
    assert sum(int(row[1].replace(",", "")) for row in rows) == len(test.true)
    for name, count, accuracy, confidence in rows:
        low, high = map(int, (name.split("–") * 2)[:2])
        inside = (test.lengths >= low) & (test.lengths <= high)
        assert count == f"{inside.sum():,}"
        near(accuracy.split()[0], test.right[inside].mean())
        is_wilson(accuracy.split()[1], test.right[inside])
        near(confidence, test.top[inside].mean())
    text = " ".join(html.split())
    assert f"{test.lengths.mean():.1f} tokens on average, median {np.median(test.lengths):.0f}" in text
    assert f"longest {test.lengths.max()}; {test.cut.sum():,} of {len(test.true):,} texts truncated" in text


def test_worst_errors_and_their_words(run: Path, html: str, test: Raw, facts: dict[str, Any]) -> None:
    wrong = np.flatnonzero(~test.right)
    if not len(wrong):
        assert "every row of test is right" in html
        return
    order = wrong[np.lexsort((wrong, -test.top[wrong]))][:20]
    section = html[html.index('<section id="errors">') :]
    body = section[section.index("<tbody>") : section.index("</tbody>")]
    shown = re.findall(r'<td class="text" dir="auto">(.*?)</td>.*?<td>([\d.]+)</td><td class="row">([\d,]+)</td>', body)
    assert len(shown) == len(order)
    for (cell, probability, row), expected in zip(shown, order, strict=True):
        i = int(row.replace(",", "")) - 1  # the line of its file
        near(probability, test.top[i], 3)
        assert test.top[i] == pytest.approx(test.top[expected], abs=1e-5)  # equals may change places
        text, _, words = cell.partition("<small>")
        assert unescape(re.sub("<[^>]+>", "", text)) == test.texts[i]
        for word, effect in re.findall(r"(\S+) ([+-][\d.]+)", unescape(words))[:3]:
            said = int(test.said[i])
            fits = []
            for match in re.finditer(re.escape(word), test.texts[i]):
                left = test.texts[i][: match.start()] + test.texts[i][match.end() :]
                logits, _, _ = ask(run / "best", [left])
                fits.append(_log_odds(test.logits[i], said, test) - _log_odds(logits[0], said, test))
            assert min(abs(fit - float(effect)) for fit in fits) < 0.06, (word, effect, fits)
        if row == shown[0][2]:
            assert words, "the surest error shows its words"


def _log_odds(logits: Any, label: int, split: Raw) -> float:
    scaled = split.scaled(logits)
    return float(scaled[label] - np.log(np.exp(np.delete(scaled, label)).sum()))


def test_label_errors(page: Page, html: str, test: Raw, facts: dict[str, Any]) -> None:
    filters = pytest.importorskip("cleanlab.filter")
    from emoray.label_errors import FILTER

    flagged = np.flatnonzero(filters.find_label_issues(test.true, test.p, filter_by=FILTER, n_jobs=1))
    if not len(flagged):
        assert "None found on test" in html
        return
    assert f"{len(flagged):,} of {len(test.true):,} rows of test have a label" in " ".join(html.split())
    for text, label, likely, score, row in page.table("Doubted text"):
        i = int(row.replace(",", ""))
        assert i in flagged
        assert (text, label) == (test.texts[i], facts["labels"][test.true[i]])
        assert likely == facts["labels"][test.said[i]]
        others = np.delete(test.p[i], test.true[i]).max()
        near(score, (test.p[i, test.true[i]] - others + 1) / 2, 3)


def test_data_recipe_and_environment(run: Path, html: str) -> None:
    texts = {split: rows_of(run, split) for split in ("train", "validation", "test")}
    said = unescape(re.sub("<[^>]+>", " ", html))
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        shared = len(set(texts[a][0]) & set(texts[b][0]))
        assert (f"{a} and {b} share {shared} text" in said) == (shared > 0)
    for split, (names, labels) in texts.items():
        copies = sum(count - 1 for count in Counter(zip(names, labels, strict=True)).values())
        assert (f"{split}: {copies} exact duplicate" in said) == (copies > 0)
        contradictions = sum(
            len({b for a, b in set(zip(names, labels, strict=True)) if a == t}) > 1
            for t, n in Counter(names).items()
            if n > 1
        )
        assert (f"{split}: {contradictions} text" in said) == (contradictions > 0)
    speeds = [json.loads(line)["tokens_per_s"] for line in (run / "history.jsonl").read_text().splitlines()]
    flat = " ".join(said.split())
    assert f"tokens/s (median) {np.median(speeds):,.0f}" in flat
    for section, keys in yaml.safe_load((run / "config.yaml").read_text()).items():
        assert section in flat
        assert all(key in flat for key in keys)
    for name in ("hardware", "training time", "data fingerprint", "torch", "transformers", "ray", "python"):
        assert name in flat
