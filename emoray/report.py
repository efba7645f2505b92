"""report.html: what a person must know before using a model, as one file without other hosts or scripts.

`render` turns a run's raw outputs into figures and pictures; `report.html.j2` lays them out. Nothing is read
from disk and no clock is asked: the same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np

from emoray import plots
from emoray.config import flatten
from emoray.evaluation import Scored

HEADLINE = {
    "accuracy": "Accuracy",
    "f1": "F1 (weighted)",
    "macro_f1": "Macro F1",
    "loss": "Loss",
    "ece": "ECE",
    "brier": "Brier",
}


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
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    results: Mapping[str, Any] = field(default_factory=dict)
    validation: Scored | None = None
    test: Scored | None = None
    warnings: Sequence[str] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def render(run: ReportInput) -> str:
    """The report as HTML text, encoded in UTF-8 when written."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(fixed=_fixed, percent=_percent, count=_count)
    template = resources.files("emoray").joinpath("report.html.j2").read_text(encoding="utf-8")
    shown = run.test or run.validation
    return environment.from_string(template).render(
        run=run,
        headline=HEADLINE,
        splits=[_headline(split) for split in (run.validation, run.test) if split is not None],
        epochs=run.results.get("epochs", []),
        best_step=(run.results.get("best") or {}).get("step"),
        detail=None if shown is None else _detail(shown),
        curves=_curves(run),
        recipe=_sections(run.config),
    )


def _headline(split: Scored) -> dict[str, Any]:
    """One line of the table of headline figures."""
    return {
        "name": split.split,
        "rows": len(split),
        "figures": split.metrics(),
        "intervals": split.intervals(),
    }


def _detail(split: Scored) -> dict[str, Any]:
    """Everything below the headline, of one split."""
    top, right = split.probabilities.max(1), split.predicted == split.targets
    slices = {row["name"]: row for row in split.by_label()}
    return {
        "name": split.split,
        "rows": len(split),
        "wrong": int((~right).sum()),
        "headline": _headline(split),
        "per_label": [(row, slices.get(row["label"])) for row in split.per_label()],
        "confusion": _confusion(split),
        "temperature": split.temperature,
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
        "by_confidence": split.by_confidence(),
        "worst": split.worst(20),
    }


def _calibration(split: Scored) -> list[dict[str, Any]]:
    """Before and after temperature: title, figures and reliability diagram; one entry where it is 1."""
    found = []
    for calibrated in (False, True):
        if calibrated and split.temperature == 1.0:
            break
        ece, name = split.ece(calibrated), "after" if calibrated else "before"
        found.append(
            {
                "title": f"After (temperature {split.temperature:.3f})" if calibrated else "Before (temperature 1)",
                "ece": ece,
                "brier": split.brier(calibrated),
                "picture": plots.reliability(split.reliability(calibrated), ece, name),
            }
        )
    if len(found) == 1:
        found[0]["title"] = "Reliability (no temperature)"
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


def _sections(config: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """The config's keys by section, values as YAML writes them."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for key, value in flatten(dict(config)).items():
        section, _, name = key.partition(".")
        sections.setdefault(section if name else "", []).append((name or section, _plain(value)))
    return sections


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def _fixed(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}"


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%"


def _count(value: int) -> str:
    return f"{value:,}"
