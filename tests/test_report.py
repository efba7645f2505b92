"""The report and the model card: every figure recomputed from the raw logits, and the file stands alone."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import yaml
from sklearn import metrics as sk

from emoray.attribution import Explanation, WordEffect
from emoray.config import TrainConfig
from emoray.evaluation import Scored, results
from emoray.label_errors import LabelError
from emoray.metrics import Calibration
from emoray.model_card import CardInput
from emoray.model_card import render as render_card
from emoray.report import Insight, ReportInput, render

LABELS = ("sadness", "joy", "love")
NASTY = '<script>alert("x")</script> & <b>bold</b>'


def scored(split: str, rows: int = 300, temperature: float = 1.6, seed: int = 0, **changes: Any) -> Scored:
    rng = np.random.default_rng(seed)
    targets = rng.choice(len(LABELS), rows, p=[0.5, 0.4, 0.1])
    logits = rng.normal(size=(rows, len(LABELS)))
    logits[np.arange(rows), targets] += 1.5
    fields: dict[str, Any] = {
        "labels": LABELS,
        "texts": [f"{NASTY} {i}" for i in range(rows)],
        "targets": targets,
        "logits": (logits * 2).astype(np.float32),
        "tokens": rng.integers(4, 60, rows).astype(np.int32),
        "truncated": rng.random(rows) < 0.1,
        "calibration": Calibration(temperature),
    }
    return Scored(split=split, **{**fields, **changes})


def whole() -> ReportInput:
    epochs = [
        {"epoch": 1, "step": 25, "validation_loss": 0.61234, "accuracy": 0.81, "f1": 0.80},
        {"epoch": 2, "step": 50, "validation_loss": 0.51234, "accuracy": 0.86, "f1": 0.85},
    ]
    history = [
        {"step": i, "epoch": i / 25, "loss": 1 / i, "learning_rate": 1e-4 * (1 - i / 50), "tokens_per_s": 9.0}
        for i in range(1, 51)
    ]
    validation, test = scored("validation", seed=1), scored("test", seed=2)
    return ReportInput(
        name="a <run>",
        config=TrainConfig().model_dump(mode="json"),
        history=history,
        results=results(epochs, epochs[1], test),
        validation=validation,
        test=test,
        warnings=["3 rows of train occur twice <b>"],
        facts={"torch": "2.13.0", "hardware": "2 cores", "duration": "12 s", "data fingerprint": "abc123"},
    )


class Page(HTMLParser):
    """Tables as lists of rows of cells, and all start tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self._cell: list[str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []
        elif tag == "small" and self._cell is not None:
            self._cell.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def table(self, first: str) -> list[list[str]]:
        """Body of the one table whose header starts so."""
        (found,) = [table for table in self.tables if table[0][0] == first]
        return found[1:]


@pytest.fixture(scope="module")
def html() -> str:
    return render(whole())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def _test() -> tuple[Scored, Any, Any]:
    """The test split with its probabilities and predictions, computed here anew."""
    test = whole().test
    assert test is not None
    powers = np.exp(test.logits.astype(np.float64) / test.calibration.temperature)
    probabilities = powers / powers.sum(1, keepdims=True)
    return test, probabilities, probabilities.argmax(1)


def test_headline_figures(page: Page, html: str) -> None:
    test, probabilities, predicted = _test()
    cells = {row[0]: row[-1] for row in page.table("Figure")}
    for title, value in {
        "Accuracy": sk.accuracy_score(test.targets, predicted),
        "F1 (weighted)": sk.f1_score(test.targets, predicted, average="weighted"),
        "Macro F1": sk.f1_score(test.targets, predicted, average="macro"),
        "Loss": sk.log_loss(test.targets, np.exp(test.logits) / np.exp(test.logits).sum(1, keepdims=True)),
    }.items():
        shown, interval = cells[title].split()
        low, high = map(float, interval.split("–"))
        assert shown == f"{value:.4f}"
        assert low < value < high
    brier = ((probabilities - np.eye(3)[test.targets]) ** 2).sum(1).mean()
    assert cells["Brier"].split()[0] == f"{brier:.4f}"
    low, high = map(float, cells["Brier"].split()[1].split("–"))
    assert low < brier < high
    assert cells["Rows"] == "300"
    wrong = int((predicted != test.targets).sum())
    assert f"{300 - wrong} right, {wrong} wrong" in html


def test_results_table_marks_the_kept_epoch(page: Page) -> None:
    assert page.table("Epoch") == [
        ["1", "25", "0.6123", "0.8100", "0.8000"],
        ["2", "50", "0.5123", "0.8600", "0.8500"],
    ]
    assert [attributes.get("class") for tag, attributes in page.tags if tag == "tr"].count("best") == 1


def test_labels_and_confusion(page: Page) -> None:
    test, probabilities, predicted = _test()
    columns = sk.precision_recall_fscore_support(test.targets, predicted)
    for i, row in enumerate(page.table("Label")):
        precision, recall, f1, support = (column[i] for column in columns)
        confidence = probabilities.max(1)[test.targets == i].mean()
        recall_shown, interval = row[2].split()
        low, high = map(float, interval.split("–"))
        assert [row[0], row[1], recall_shown, *row[3:]] == [
            LABELS[i],
            f"{precision:.4f}",
            f"{recall:.4f}",
            f"{f1:.4f}",
            f"{confidence:.4f}",
            str(support),
        ]
        assert low < recall < high
    cells = [[int(cell) for cell in row[1:]] for row in page.table("True")]
    assert cells == sk.confusion_matrix(test.targets, predicted).tolist()


def test_calibration(page: Page, html: str) -> None:
    test, probabilities, predicted = _test()
    top, right = probabilities.max(1), predicted == test.targets
    ece = 0.0
    for low in np.arange(15) / 15:
        inside = (top > low) & (top <= low + 1 / 15)
        ece += abs(right[inside].sum() - top[inside].sum()) / len(top)
    assert f"ECE {ece:.4f}" in html
    assert html.count(f"expected calibration error {ece:.4f}") == 1  # the picture's alternative
    assert "After (temperature 1.600)" in html
    by_confidence = page.table("Confidence")
    for row, least in zip(by_confidence, (0.0, 0.5, 0.7, 0.9, 0.95, 0.99), strict=True):
        inside = top >= least
        assert row[1:3] == [str(inside.sum()), f"{100 * inside.mean():.1f}%"]
        assert row[3].split()[0] == f"{right[inside].mean():.4f}"


def test_lengths(page: Page, html: str) -> None:
    test, probabilities, predicted = _test()
    rows = page.table("Tokens")
    assert sum(int(row[1]) for row in rows) == 300
    for row in rows:
        low, high = map(int, row[0].split("–"))
        inside = (test.tokens >= low) & (test.tokens <= high)
        right = (predicted == test.targets)[inside]
        assert row[1] == str(inside.sum())
        assert row[2].split()[0] == f"{right.mean():.4f}"
        assert row[3] == f"{probabilities.max(1)[inside].mean():.4f}"
    assert f"{test.tokens.mean():.1f} tokens on average" in html
    assert f"{test.truncated.sum()} of 300 texts truncated" in html


def test_worst_errors_are_shown_and_escaped(page: Page, html: str) -> None:
    test, probabilities, predicted = _test()
    top = probabilities.max(1)
    order = sorted(np.flatnonzero(predicted != test.targets), key=lambda i: -top[i])[:20]
    assert page.table("Text") == [
        [f"{NASTY} {i}", LABELS[test.targets[i]], LABELS[predicted[i]], f"{top[i]:.3f}", str(i + 1)] for i in order
    ]
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "a &lt;run&gt;" in html
    assert "occur twice &lt;b&gt;" in html


def _asked() -> Insight:
    """Words for two of the worst rows, markup among them, and two doubted rows."""
    test = whole().test
    assert test is not None
    first, second = test.worst(2)
    words = [WordEffect("<script>", 0, 8, 2.0), WordEffect("x", 15, 16, -1.0), WordEffect("&", 28, 29, 0.5)]
    doubts = [LabelError(5, "joy", "love", 0.01), LabelError(7, "love", "joy", 0.2)]
    explained = {first["row"]: Explanation("joy", tuple(words)), second["row"]: Explanation("love", ())}
    return Insight(explained, doubts)


def test_words_are_marked_where_they_stand_and_escaped() -> None:
    html = render(dataclasses.replace(whole(), insight=_asked()))
    section = html[html.index('id="errors"') : html.index('id="label-errors"')]
    assert re.findall(r'<mark class="(\w+)" style="--share: ([\d.]+)">(.*?)</mark>', section) == [
        ("for", "1.00", "&lt;script&gt;"),
        ("against", "0.50", "x"),
        ("for", "0.25", "&amp;"),
    ]
    assert "<small>&lt;script&gt; +2.0, x -1.0, &amp; +0.5</small>" in section
    row = Page(html).table("Text")[0][0]
    assert row.startswith(NASTY)  # marking loses nothing of the text
    assert "<script" not in html


def test_doubted_rows_are_listed_or_said_why_not() -> None:
    html = render(dataclasses.replace(whole(), insight=_asked()))
    assert "2 of 300 rows of test have a label" in " ".join(html.split())
    test, _, _ = _test()
    assert Page(html).table("Doubted text") == [
        [test.texts[5], "joy", "love", "0.010", "6"],
        [test.texts[7], "love", "joy", "0.200", "8"],
    ]
    assert "None found on test" in render(dataclasses.replace(whole(), insight=Insight({}, [])))
    assert "needs &lt;x&gt;" in render(dataclasses.replace(whole(), insight=Insight({}, "needs <x>")))


def test_languages_have_a_table() -> None:
    names = ["de" if i % 3 else "en" for i in range(300)]
    page = Page(render(ReportInput(name="two", test=scored("test", languages=names))))
    split = scored("test")
    right = split.logits.argmax(1) == split.targets
    for row, name in zip(page.table("Language"), ("de", "en"), strict=True):
        mine = np.array(names) == name
        assert row[:2] == [name, str(mine.sum())]
        assert row[2].split()[0] == f"{right[mine].mean():.4f}"


def test_recipe_and_facts_are_complete(html: str) -> None:
    run = whole()
    text = re.sub(r"<[^>]+>", " ", html)
    for section in run.config.values():
        for key in section:
            assert key in text
    for name, value in run.facts.items():
        assert name in text
        assert value in text


def test_file_stands_alone(html: str) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|\bsrc=|<link|<iframe|<object", html)
    assert all(target.startswith("#") for target in re.findall(r'(?:href="|url\()([^")]*)', html))
    assert html.startswith("<!doctype html>")


def test_pictures_and_tables_are_accessible(page: Page, html: str) -> None:
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 6
    assert all(picture["role"] == "img" and picture["aria-label"] for picture in pictures)
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)
    assert [attributes.get("lang") for tag, attributes in page.tags if tag == "html"] == ["en"]


def test_pictures_take_the_pages_colours(html: str) -> None:
    body = html[html.index("<body>") :]
    assert not re.search(r"#[0-9a-fA-F]{3,6}\b(?=[;\"])", re.sub(r'href="#[^"]*"', "", body))
    assert "var(--accent)" in body
    assert "font-family" not in body


def test_same_input_gives_the_same_bytes(html: str) -> None:
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "axes.facecolor": "red"}):
        assert render(whole()) == html
    code = "import sys, test_report as t; sys.stdout.buffer.write(t.render(t.whole()).encode())"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": paths, "SOURCE_DATE_EPOCH": "1"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    pairs = zip(html.splitlines(), other.stdout.decode().splitlines(), strict=False)
    assert [pair for pair in pairs if pair[0] != pair[1]] == []
    assert other.stdout.decode() == html


def test_report_without_training_or_test() -> None:
    alone = render(ReportInput(name="evaluated", validation=scored("validation")))
    assert "Measured on the 300 rows of validation" in alone
    for section in ("training", "data", "recipe", "facts"):
        assert f'id="{section}"' not in alone
    nothing = render(ReportInput(name="no outputs yet", history=whole().history, warnings=[]))
    assert nothing.count("<svg") == 2
    assert "nothing to warn of" in nothing


@pytest.mark.parametrize(
    "changes",
    [
        {"logits": np.eye(3, dtype=np.float32)[scored("x").targets] * 9},
        {"targets": np.zeros(300, dtype=np.int64)},
        {"calibration": Calibration()},
        {"tokens": np.full(300, 2000, dtype=np.int32), "truncated": np.ones(300, dtype=bool)},
        {"logits": np.zeros((300, 3), dtype=np.float32)},
        {"labels": ("a|b", "<i>", "ein sehr langer Name, der nirgends Platz findet")},
    ],
    ids=["all right", "one label true", "no temperature", "all truncated", "all tied", "odd names"],
)
def test_degenerate_splits_have_a_report_and_a_card(changes: dict[str, Any]) -> None:
    split = scored("test", **changes)
    html = render(ReportInput(name="odd", test=split))
    assert not re.search(r"\bnan\b", html)
    assert not re.search(r"\bnan\b", render_card(_card(test=split, labels=split.labels)))


def test_labels_that_are_never_predicted_are_said_at_the_top() -> None:
    only_first = np.tile(np.array([9, 0, 0], dtype=np.float32), (300, 1))
    html = render(ReportInput(name="odd", test=scored("test", logits=only_first)))
    assert f"Never predicted: {LABELS[1]}, {LABELS[2]}." in html and "these labels" in html
    assert "Never predicted" not in render(ReportInput(name="fine", test=whole().test))


def test_one_row_has_a_report() -> None:
    history = whole().history[:1]
    assert "<svg" in render(ReportInput(name="one", history=history, test=scored("test", rows=1)))


def test_import_is_light() -> None:
    code = "import sys, emoray.report, emoray.model_card; print({'matplotlib', 'jinja2'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def _card(**changes: Any) -> CardInput:
    run = whole()
    fields: dict[str, Any] = {
        "name": "minilm",
        "labels": LABELS,
        "dataset": "dair-ai/emotion",
        "sizes": {"train": 16000, "validation": 300, "test": 300},
        "fingerprint": "abc123",
        "recipe": TrainConfig().recipe(),
        "results": run.results,
        "validation": run.validation,
        "test": run.test,
        "base_model": "bert-base-multilingual-cased",
        "dataset_id": "dair-ai/emotion",
        "max_length": 60,
        "warnings": ["3 texts occur twice"],
        "facts": {"torch": "2.13.0"},
    }
    return CardInput(**{**fields, **changes})


def test_card_is_valid_for_the_hub_and_states_what_was_measured() -> None:
    from huggingface_hub import ModelCard

    test, _, predicted = _test()
    text = render_card(_card())
    data: Any = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert data.base_model == "bert-base-multilingual-cased"
    assert data.datasets == ["dair-ai/emotion"]
    assert data.eval_results is not None
    measured = {found.metric_name: found.metric_value for found in data.eval_results}
    assert measured["Accuracy"] == pytest.approx(sk.accuracy_score(test.targets, predicted), abs=1e-6)
    assert measured["F1 (weighted)"] == pytest.approx(
        sk.f1_score(test.targets, predicted, average="weighted"), abs=1e-6
    )
    assert {found.dataset_split for found in data.eval_results} == {"test"}
    columns = sk.precision_recall_fscore_support(test.targets, predicted)
    for i, label in enumerate(LABELS):
        figures = " | ".join(f"{column[i]:.4f}" for column in columns[:3])
        assert f"| {label} | {figures} | {columns[3][i]} |" in text
    assert "| Epoch | Step | Validation Loss | Accuracy | F1 |" in text
    assert "`training.learning_rate` | `2.0e-05`" in text
    assert "emoray.Classifier.load" in text
    assert 'pipeline("text-classification"' in text
    assert "Calibrated on validation with temperature 1.600:" in text
    weakest = LABELS[int(np.argmin(columns[2]))]
    assert f"Weakest label: {weakest}, F1 {columns[2].min():.4f}" in text
    assert f"{test.truncated.sum()} of 300 in test were" in text


def test_card_without_hub_ids_claims_none() -> None:
    text = render_card(_card(base_model=None, dataset_id=None, dataset="notes | <x>", facts={}, name="a: b"))
    front = yaml.safe_load(text.split("---\n")[1])
    assert "base_model" not in front
    assert "datasets" not in front
    assert front["model-index"][0]["name"] == "a: b"
    assert "huggingface.co" not in text
    assert "## Versions" not in text
    assert "notes \\| &lt;x>" in text
