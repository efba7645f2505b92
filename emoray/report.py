"""report.html: what a person must know before using a model, as one file without other hosts or scripts.

`render` turns a run's raw outputs into figures and pictures; `report.html.j2` lays them out. Nothing is read
from disk and no clock is asked: the same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from emoray import label_errors, plots
from emoray.attribution import Explanation
from emoray.config_files import flatten, plain
from emoray.errors import MissingExtraError
from emoray.evaluation import Scored, WrongRow
from emoray.label_errors import LabelError
from emoray.metrics import TITLES

if TYPE_CHECKING:
    from emoray.classifier import Classifier

WORST = 20
"""Rows shown of the worst errors, and of the likeliest label errors."""
WORDS = 5
"""Words of a text that are marked."""
LEAST_TOKENS = 50_000
"""Tokens that finding these words may cost on a small split; on others as many as the split has: it is scored twice."""


@dataclass(frozen=True, eq=False)
class ReportInput:
    """All that a report is made of.

    Args:
        name: of the run or model.
        config: the resolved config, nested or with dotted keys; empty if unknown.
        history: rows of history.jsonl (step, loss and learning_rate are drawn); empty without training.
        results: the content of results.json; empty without training.
        validation: the best checkpoint on validation.
        test: the same on test. The details are of test, or of validation where there is no test split.
        warnings: what the data check found, one sentence each; None where the data was not checked.
        facts: name -> value, shown as given: versions, hardware, duration, tokens/s, data fingerprint.
        insight: what the model itself was asked about the split of the details; None where it wasn't.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    results: Mapping[str, Any] = field(default_factory=dict)
    validation: Scored | None = None
    test: Scored | None = None
    warnings: Sequence[str] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    insight: Insight | None = None


@dataclass(frozen=True)
class Insight:
    """What takes more than a model's outputs on a split.

    Args:
        explanations: of each of the worst rows, by its place in the split, the words that pulled the wrong answer.
        label_errors: rows of the split that are likely mislabelled; or why they aren't known, as a sentence.
    """

    explanations: Mapping[int, Explanation]
    label_errors: Sequence[LabelError] | str


def insight(classifier: Classifier, scored: Scored) -> Insight:
    """Ask a model for the words behind its worst errors, and which labels of the split it doubts.

    A word costs its whole text once more, so that of long texts only the first few are explained.
    """
    worst = scored.worst(WORST)
    rows = [line["row"] for line in worst]
    cost = np.cumsum(scored.tokens[rows].astype(np.int64) ** 2)
    worst = worst[: int((cost <= max(LEAST_TOKENS, scored.tokens.sum())).sum())]
    explanations = classifier.explain([line["text"] for line in worst], [line["predicted"] for line in worst])
    doubts: Sequence[LabelError] | str
    if scored.split == "train":
        doubts = "Not asked of the training split, whose labels the model has learnt: emoray check-data does that."
    else:
        try:
            doubts = label_errors.find(scored.labels, scored.targets, scored.probabilities)
        except MissingExtraError as error:
            doubts = str(error)
    return Insight(dict(zip(rows, explanations, strict=False)), doubts)


def of_evaluation(classifier: Classifier, scored: Scored) -> ReportInput:
    """The report of a model on one split, with what its folder says of how it was made."""
    facts = classifier.facts
    return ReportInput(
        name=facts["config"]["run"]["name"],
        config=facts["config"],
        test=scored,
        warnings=facts["data"]["warnings"],
        facts={
            "trained on": facts["platform"],
            "data fingerprint": facts["data"]["fingerprint"],
            **{name: str(value) for name, value in facts["versions"].items()},
        },
        insight=insight(classifier, scored),
    )


def render(run: ReportInput) -> str:
    """The report as HTML text, encoded in UTF-8 when written."""
    shown = run.test or run.validation
    return page(
        "report.html.j2",
        run=run,
        headline=TITLES,
        splits=[_headline(split) for split in (run.validation, run.test) if split is not None],
        epochs=run.results.get("epochs", []),
        best_step=(run.results.get("best") or {}).get("step"),
        detail=None if shown is None else _detail(shown, run.insight),
        curves=_curves(run),
        recipe=sections(run.config),
    )


def page(template: str, **values: Any) -> str:
    """A template of this package, filled in."""
    import jinja2

    folder = resources.files("emoray")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(fixed=_fixed, percent=_percent, count=_count)
    return environment.get_template(template).render(**values)


def _headline(split: Scored) -> dict[str, Any]:
    """One line of the table of headline figures."""
    return {
        "name": split.split,
        "rows": len(split),
        "figures": split.metrics(),
        "intervals": split.intervals(),
    }


def _never_predicted(split: Scored) -> list[str]:
    """Labels that rows have and the model never gives: what it says of them, and its doubts of labels, mean little."""
    held, given = set(split.targets.tolist()), set(split.predicted.tolist())
    return [label for number, label in enumerate(split.labels) if number in held - given]


def _detail(split: Scored, asked: Insight | None) -> dict[str, Any]:
    """Everything below the headline, of one split."""
    explanations = asked.explanations if asked else {}
    top, right = split.probabilities.max(1), split.predicted == split.targets
    slices = {row["name"]: row for row in split.by_label()}
    return {
        "name": split.split,
        "rows": len(split),
        "wrong": int((~right).sum()),
        "never": _never_predicted(split),
        "headline": _headline(split),
        "per_label": [(row, slices.get(row["label"])) for row in split.per_label()],
        "confusion": _confusion(split),
        "calibrated": not split.calibration.is_none,
        "calibration": _calibration(split),
        "confidence": plots.confidence(top, right),
        "lengths": plots.lengths(split.tokens, split.truncated),
        "tokens": {
            "mean": float(split.tokens.mean()),
            "median": float(np.median(split.tokens)),
            "longest": int(split.tokens.max()),
            "truncated": int(split.truncated.sum()),
        },
        "by_length": split.by_length(),
        "by_language": split.by_language(),
        "by_confidence": split.by_confidence(),
        "ece_range": split.calibrated_ece_range(),
        "worst": [_with_words(row, explanations.get(row["row"])) for row in split.worst(WORST)],
        "explained": len(explanations),
        "label_errors": _label_errors(split, asked),
    }


def _with_words(row: WrongRow, explanation: Explanation | None) -> dict[str, Any]:
    """A wrong row, its text in pieces: those that pulled most carry their effect and its share of the strongest."""
    words = [] if explanation is None else sorted(explanation.strongest(WORDS), key=lambda word: word.start)
    most = max((abs(word.effect) for word in words), default=0.0) or 1.0
    pieces: list[dict[str, Any]] = []
    done = 0
    for word in words:
        pieces += [
            {"text": row["text"][done : word.start], "effect": None},
            {"text": word.word, "effect": word.effect, "share": abs(word.effect) / most},
        ]
        done = word.end
    pieces.append({"text": row["text"][done:], "effect": None})
    strongest = [] if explanation is None else explanation.strongest(3)
    return {**row, "pieces": [piece for piece in pieces if piece["text"]], "words": strongest}


def _label_errors(split: Scored, asked: Insight | None) -> dict[str, Any] | None:
    """How many rows are doubted, the likeliest of them with their texts, or why that isn't known."""
    if asked is None or isinstance(asked.label_errors, str):
        return None if asked is None else {"reason": asked.label_errors}
    found = asked.label_errors
    return {
        "reason": None,
        "count": len(found),
        "rows": [(row, split.texts[row.row], split.number(row.row)) for row in found[:WORST]],
    }


def _calibration(split: Scored) -> list[dict[str, Any]]:
    """Before and after: title, figures and reliability diagram; one entry where there is no calibration."""
    found = []
    for calibrated in (False, True):
        if calibrated and split.calibration.is_none:
            break
        ece, name = split.ece(calibrated), "after" if calibrated else "before"
        found.append(
            {
                "title": f"After ({split.calibration})" if calibrated else "Before calibration",
                "ece": ece,
                "brier": split.brier(calibrated),
                "picture": plots.reliability(split.reliability(calibrated), ece, name),
            }
        )
    if len(found) == 1:
        found[0]["title"] = "Reliability (no calibration)"
    return found


def _confusion(split: Scored) -> list[dict[str, Any]]:
    """Rows of the confusion table: of each cell the count and its share of the row, for the tint."""
    cells = split.confusion()
    shares = cells / np.maximum(cells.sum(1, keepdims=True), 1)
    return [
        {"label": label, "cells": [(int(n), float(share)) for n, share in zip(counts, part, strict=True)]}
        for label, counts, part in zip(split.labels, cells, shares, strict=True)
    ]


def _curves(run: ReportInput) -> list[tuple[str, str]]:
    """Captions and pictures of the training, as far as it was recorded."""
    epochs, pictures = run.results.get("epochs", []), []
    if run.history or epochs:
        pictures.append(("Loss", plots.loss(run.history, epochs)))
    if run.history:
        pictures.append(("Learning rate", plots.learning_rate(run.history)))
    return pictures


def sections(config: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """The config's keys by section, values as YAML writes them."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for key, value in flatten(dict(config)).items():
        section, _, name = key.partition(".")
        sections.setdefault(section if name else "", []).append((name or section, plain(value)))
    return sections


def _fixed(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}"


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%"


def _count(value: int) -> str:
    return f"{value:,}"
