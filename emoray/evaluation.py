"""A model's raw outputs on one split, and every figure that follows from them.

`Scored` holds what the model said; nothing is computed twice or stored rounded. `results` is the content of
results.json, `results_table` that of results.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from emoray import data, metrics, uncertainty
from emoray.config import DataConfig, parse
from emoray.config_files import validate
from emoray.metrics import NO_CALIBRATION, Array, Calibration, LabelScore, Reliability
from emoray.storage import absolute
from emoray.tokens import Tokens

if TYPE_CHECKING:
    from emoray.classifier import Classifier

TABLE_HEADER = "| Epoch | Step | Validation Loss | Accuracy | F1 |"
_EPOCH_KEYS = ("epoch", "step", "validation_loss", "accuracy", "f1")


class SliceScore(TypedDict):
    """Figures of the rows that share something: a label, a length, a language."""

    name: str
    rows: int
    accuracy: float
    interval: tuple[float, float]  # of the accuracy, 95%
    f1: float
    confidence: float


class WrongRow(TypedDict):
    """A row that the model gets wrong: its place in the split, its number in the file, and how sure the model was."""

    row: int
    number: int
    text: str
    true: str
    predicted: str
    probability: float
    true_probability: float


@dataclass(frozen=True, eq=False)
class Scored:
    """Logits of a model on one split, beside the truth.

    Args:
        split: its name, e.g. "validation".
        labels: label names in the order of their ids, L of them.
        texts: n texts.
        targets: int64 [n], the true ids.
        logits: float32 [n, L], before calibration.
        tokens: int32 [n], real tokens of each text as the model saw it, special tokens included.
        truncated: bool [n], whether the text was cut at the model's maximum length.
        calibration: how logits become probabilities, wherever these are shown.
        languages: of each text, n of them; None where they aren't known.
        numbers: int64 [n], the line (Parquet and Hub: row) of each in its file, from 1; None counts them here.

    Raises:
        ValueError: lengths that differ, no rows, or ids outside the labels.
        NotFiniteError: a logit is NaN or infinite.
    """

    split: str
    labels: tuple[str, ...]
    texts: list[str] = field(repr=False)
    targets: Array = field(repr=False)
    logits: Array = field(repr=False)
    tokens: Array = field(repr=False)
    truncated: Array = field(repr=False)
    calibration: Calibration = NO_CALIBRATION
    languages: list[str] | None = field(default=None, repr=False)
    numbers: Array | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, rows: data.Split, labels: tuple[str, ...], logits: Array, tokens: Tokens, calibration: Calibration
    ) -> Scored:
        """What a model says of a split whose label ids are those of `labels`."""
        return cls(
            split=rows.name,
            labels=labels,
            texts=rows.texts,
            targets=rows.labels,
            logits=logits,
            tokens=tokens.lengths.astype(np.int32),
            truncated=np.array(tokens.truncated),
            calibration=calibration,
            languages=rows.languages,
            numbers=rows.rows,
        )

    def __post_init__(self) -> None:
        metrics.check(self.logits, self.targets)
        if self.logits.shape[1] != len(self.labels):
            raise ValueError(f"{self.split}: {len(self.labels)} labels for logits of {self.logits.shape[1]}")
        for name in ("texts", "tokens", "truncated"):
            size = len(getattr(self, name))
            if size != len(self.targets):
                raise ValueError(f"{self.split}: {size} {name} for {len(self.targets)} targets")
        if self.languages is not None and len(self.languages) != len(self.targets):
            raise ValueError(f"{self.split}: {len(self.languages)} languages for {len(self.targets)} targets")

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def probabilities(self) -> Array:
        """float64 [n, L], calibrated."""
        return metrics.softmax(self.logits, *self.calibration)

    @cached_property
    def predicted(self) -> Array:
        """int64 [n], the ids of the highest logits."""
        return np.asarray(self.logits.argmax(1), dtype=np.int64)

    def number(self, row: int) -> int:
        """The number, from 1, of the row at a place of the split."""
        return row + 1 if self.numbers is None else int(self.numbers[row])

    def metrics(self) -> dict[str, float]:
        """loss, accuracy, f1, macro_f1, ece and brier as in metrics.compute, and the number of rows."""
        return self._metrics

    @cached_property
    def _metrics(self) -> dict[str, float]:
        return {**metrics.compute(self.logits, self.targets, *self.calibration), "rows": len(self)}

    def per_label(self) -> list[LabelScore]:
        """Precision, recall, F1 and support of each label."""
        return metrics.per_label(self.logits, self.targets, self.labels)

    def confusion(self) -> Array:
        """int64 [L, L]: row = true label, column = predicted label."""
        return metrics.confusion(self.logits, self.targets)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95% intervals of accuracy (Wilson's: resampling a model that is always right would give no width), f1,
        macro_f1, loss and brier (bootstrap)."""
        return self._intervals

    @cached_property
    def _intervals(self) -> dict[str, tuple[float, float]]:
        wilson = uncertainty.wilson_interval(self._metrics["accuracy"], len(self))
        others = uncertainty.bootstrap_intervals(self.logits, self.targets, calibration=self.calibration)
        return {**others, "accuracy": wilson}

    def calibrated_ece_range(self) -> tuple[float, float]:
        """ECEs that a perfectly calibrated model as sure as this one would show on as many rows, 95% of them."""
        return uncertainty.calibrated_ece_range(self.probabilities)

    def reliability(self, calibrated: bool = True) -> Reliability:
        """Confidence against accuracy, after calibration or before."""
        return metrics.reliability(self._probabilities(calibrated), self.targets)

    def ece(self, calibrated: bool = True) -> float:
        """Expected calibration error, after calibration or before."""
        return metrics.expected_calibration_error(self._probabilities(calibrated), self.targets)

    def brier(self, calibrated: bool = True) -> float:
        """Brier score, after calibration or before."""
        return float(metrics.row_briers(self._probabilities(calibrated), self.targets).mean())

    def by_label(self) -> list[SliceScore]:
        """Slices by true label; a label without rows has no line."""
        return self.slices([(label, self.targets == i) for i, label in enumerate(self.labels)])

    def by_length(self, parts: int = 4) -> list[SliceScore]:
        """Slices by tokens, of about equal size; texts of one length are never torn apart."""
        edges = np.unique(np.quantile(self.tokens, np.linspace(0, 1, parts + 1)[1:], method="higher"))
        groups, low = [], int(self.tokens.min())
        for high in edges.astype(int):
            name = f"{low}–{high}" if low < high else f"{high}"
            groups.append((name, (self.tokens >= low) & (self.tokens <= high)))
            low = high + 1
        return self.slices(groups)

    def by_language(self) -> list[SliceScore]:
        """Slices by language, the largest first; empty where languages aren't known."""
        held = np.array(self.languages or [])
        counts = Counter(self.languages or [])
        return self.slices([(name, held == name) for name in sorted(counts, key=lambda name: (-counts[name], name))])

    def by_confidence(self, thresholds: Sequence[float] = (0.0, 0.5, 0.7, 0.9, 0.95, 0.99)) -> list[SliceScore]:
        """What is left, and how right, if only answers at least so sure are taken; the slices overlap."""
        sure = self.probabilities.max(1)
        return self.slices([(f"≥ {least:g}" if least else "any", sure >= least) for least in thresholds])

    def slices(self, groups: Sequence[tuple[str, Array]]) -> list[SliceScore]:
        """Figures of each named group of rows, given as bool [n]; empty groups are left out."""
        found = []
        for name, rows in groups:
            if rows.any():
                figures = metrics.compute(self.logits[rows], self.targets[rows])
                found.append(
                    SliceScore(
                        name=name,
                        rows=int(rows.sum()),
                        accuracy=figures["accuracy"],
                        interval=uncertainty.wilson_interval(figures["accuracy"], int(rows.sum())),
                        f1=figures["f1"],
                        confidence=float(self.probabilities[rows].max(1).mean()),
                    )
                )
        return found

    def worst(self, count: int) -> list[WrongRow]:
        """The wrong rows that the model is surest about, surest first."""
        sure = self.probabilities.max(1)
        wrong = np.flatnonzero(self.predicted != self.targets)
        order = wrong[np.lexsort((wrong, -sure[wrong]))][:count]
        return [
            WrongRow(
                row=int(i),
                number=self.number(int(i)),
                text=self.texts[i],
                true=self.labels[self.targets[i]],
                predicted=self.labels[self.predicted[i]],
                probability=float(sure[i]),
                true_probability=float(self.probabilities[i, self.targets[i]]),
            )
            for i in order
        ]

    def _probabilities(self, calibrated: bool) -> Array:
        return self.probabilities if calibrated else metrics.softmax(self.logits)


def results(epochs: Sequence[Mapping[str, Any]], best: Mapping[str, Any], test: Scored) -> dict[str, Any]:
    """The content of results.json.

    Args:
        epochs: one entry an evaluation on validation: epoch, step, validation_loss, accuracy, f1, and what
            else was measured.
        best: the entry that best/ was taken from.
        test: the best checkpoint on the test split.

    Raises:
        ValueError: an entry lacks one of the five keys.
    """
    return {
        "epochs": [_entry(epoch) for epoch in epochs],
        "best": _entry(best),
        "test": {**test.metrics(), **test.calibration._asdict()},
    }


def results_table(results: Mapping[str, Any]) -> str:
    """results.md: the epochs as a Markdown table, four decimals, and a line about the test split, if any."""
    lines = [TABLE_HEADER, "|---:|---:|---:|---:|---:|"]
    for entry in results["epochs"]:
        figures = " | ".join(f"{entry[key]:.4f}" for key in _EPOCH_KEYS[2:])
        lines.append(f"| {entry['epoch']:g} | {entry['step']} | {figures} |")
    test = results.get("test")
    if test:
        figures = ", ".join(f"{name} {test[key]:.4f}" for key, name in metrics.NAMES.items() if key in test)
        rows = f" ({test['rows']:,} rows)" if "rows" in test else ""
        lines += ["", f"Test{rows}: {figures}"]
    return "\n".join(lines) + "\n"


def _entry(given: Mapping[str, Any]) -> dict[str, Any]:
    """The design's keys first, in their order, then whatever else was measured."""
    missing = [key for key in _EPOCH_KEYS if key not in given]
    if missing:
        raise ValueError(f"a results entry has no {', '.join(missing)}: {dict(given)}")
    return {key: given[key] for key in (*_EPOCH_KEYS, *(key for key in given if key not in _EPOCH_KEYS))}


def evaluate(classifier: Classifier, dataset: str | None, split: str, language_column: str | None = None) -> Scored:
    """Score a model on a labelled split.

    Args:
        dataset: as `data.dataset`; None takes what the model was trained on.
        split: "train", "validation" or "test"; data without named splits counts as any of them.
        language_column: as `data.language_column`; None takes what the model was trained with.

    Raises:
        DataError: with every problem of the data, labels that the model doesn't have among them.
    """
    return score_on(classifier, rows_for(classifier, dataset, split, language_column=language_column))


def rows_for(classifier: Classifier, dataset: str | None, split: str, **columns: str | None) -> data.Split:
    """The rows that `evaluate` scores, labelled with the ids of this model; errors as there.

    Args:
        columns: `text_column`, `label_column` and `language_column`; None takes what the model was trained with.
    """
    config = parse(classifier.facts["config"]).data
    own = config.dataset
    changes = {"labels": classifier.labels, "dataset": dataset, **columns}
    given = {key: value for key, value in changes.items() if value is not None}
    config = validate({**config.model_dump(), **given}, DataConfig, "columns of the data", [])
    if dataset is None or own in (dataset, absolute(dataset)):
        return data.load(config).splits[split]  # the same cut: what it was trained on is not in the other splits
    return data.load_split(config, split)


def score_on(classifier: Classifier, rows: data.Split) -> Scored:
    """What a model says of rows that are labelled with its ids."""
    logits, tokens = classifier.logits(rows.texts)
    return Scored.of(rows, classifier.labels, logits, tokens, classifier.calibration)


def as_dict(scored: Scored) -> dict[str, Any]:
    """Figures, their intervals, a line a label and a line a language, for `--json`."""
    languages = {} if scored.languages is None else {"languages": scored.by_language()}
    return {
        **scored.metrics(),
        "split": scored.split,
        "intervals": scored.intervals(),
        "labels": scored.per_label(),
        **languages,
    }


def evaluation_text(scored: Scored) -> str:
    """Headline metrics with their 95% intervals, and a line a label, for a terminal."""
    figures, intervals = scored.metrics(), scored.intervals()
    lines = [f"{scored.split}: {len(scored):,} rows"]
    for key, name in metrics.NAMES.items():
        span = f"   (95%: {intervals[key][0]:.4f} to {intervals[key][1]:.4f})" if key in intervals else ""
        lines.append(f"  {name:<10}{figures[key]:.4f}{span}")
    lines.append(f"  {'label':<14}{'precision':>10}{'recall':>10}{'F1':>10}{'rows':>10}")
    for row in scored.per_label():
        figures_of_label = f"{row['precision']:>10.4f}{row['recall']:>10.4f}{row['f1']:>10.4f}{row['support']:>10,}"
        lines.append(f"  {row['label']:<14}{figures_of_label}")
    if scored.languages is not None:
        lines.append(f"  {'language':<14}{'accuracy':>10}{'F1':>10}{'confidence':>12}{'rows':>8}   accuracy, 95%")
    for part in scored.by_language():
        span = f"{part['interval'][0]:.4f} to {part['interval'][1]:.4f}"
        figures_of_part = f"{part['accuracy']:>10.4f}{part['f1']:>10.4f}{part['confidence']:>12.4f}{part['rows']:>8,}"
        lines.append(f"  {part['name']:<14}{figures_of_part}   {span}")
    return "\n".join(lines)
