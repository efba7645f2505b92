"""Two models on the same rows: by how much they differ, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from emoray import metrics, uncertainty
from emoray.config import parse
from emoray.errors import DataError
from emoray.evaluation import Scored, score_on

if TYPE_CHECKING:
    from emoray.classifier import Classifier
    from emoray.data import Split

LEVEL = 0.05
"""A difference counts where chance alone would show one as large less often than this."""


@dataclass(frozen=True)
class Comparison:
    """How two models do on the same rows.

    Attributes:
        models: what each of them is called.
        split: name of the split.
        rows: how many.
        figures: metric -> its value for each model.
        differences: metric -> second minus first, and the 95% interval of that (paired bootstrap); not for ECE,
            whose resampled values are biased.
        only_first: rows that only the first model gets right.
        only_second: rows that only the second model gets right.
        p_value: McNemar's exact test of the two numbers before.
        same_answers: rows on which both say the same, right or wrong.
        recipe: config keys in which the recipes differ, each with both values; None where one isn't known.
    """

    models: tuple[str, str]
    split: str
    rows: int
    figures: dict[str, tuple[float, float]]
    differences: dict[str, tuple[float, float, float]]
    only_first: int
    only_second: int
    p_value: float
    same_answers: int
    recipe: dict[str, tuple[Any, Any]] | None = None

    @property
    def differ(self) -> bool:
        """Whether the difference is more than the chance of which rows were drawn: McNemar's test says so, and the
        interval of F1 lies on the same side of 0."""
        _, low, high = self.differences["f1"]
        return self.p_value < LEVEL and (low > 0 if self.only_second > self.only_first else high < 0)

    def words(self) -> str:
        """The verdict, as sentences for people."""
        first, second = self.models
        count = f"only {first} is right on {self.only_first:,} rows, only {second} on {self.only_second:,}"
        chance = f"(McNemar p {_p(self.p_value)})"
        if not self.differ:
            said = f"No difference is shown: {count}, which chance explains {chance}."
            if self.p_value < LEVEL:
                said = f"No clear difference: {count} {chance}, but F1 doesn't say the same beyond chance."
            return f"{said} {self._smallest()}"
        better, worse = (second, first) if self.only_second > self.only_first else (first, second)
        gain, low, high = self.differences["accuracy"]
        points = f"{abs(100 * gain):.2f} points of accuracy (95%: {_span(gain, low, high)})"
        return f"They differ: {better} is better than {worse} by {points}; {count} {chance}.{self._seed()}"

    def _smallest(self) -> str:
        low, high = uncertainty.paired_difference(self.only_first, self.only_second, self.rows)
        span = f"{round(100 * low, 2) + 0:+.2f} to {round(100 * high, 2) + 0:+.2f}"  # + 0: no minus before a zero
        return f"A true difference outside {span} points of accuracy (second minus first) is unlikely."

    def _seed(self) -> str:
        if self.recipe is None or set(self.recipe) != {"training.seed"}:
            return ""
        return (
            " Their recipes differ by the seed alone: that is the luck of a training, not a better recipe; "
            "compare recipes over several seeds."
        )

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "differ": self.differ, "words": self.words()}


def compare(first: Scored, second: Scored, models: tuple[str, str]) -> Comparison:
    """Compare what two models say of the same rows.

    Raises:
        ValueError: other rows, or labels in another order.
    """
    if first.texts != second.texts or first.labels != second.labels or (first.targets != second.targets).any():
        raise ValueError("two models are compared on the same rows, with their labels in the same order")
    figures = [{name: split.metrics()[name] for name in metrics.NAMES} for split in (first, second)]
    drawn = [
        uncertainty.bootstrap(split.logits, split.targets, calibration=split.calibration) for split in (first, second)
    ]
    right = [split.predicted == split.targets for split in (first, second)]
    only_first, only_second = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    return Comparison(
        models=models,
        split=first.split,
        rows=len(first),
        figures={name: (figures[0][name], figures[1][name]) for name in metrics.NAMES},
        differences={
            name: (figures[1][name] - figures[0][name], *_interval(drawn[1][name] - drawn[0][name]))
            for name in drawn[0]
        },
        only_first=only_first,
        only_second=only_second,
        p_value=uncertainty.mcnemar(only_first, only_second),
        same_answers=int((first.predicted == second.predicted).sum()),
    )


def on_same_rows(models: tuple[Classifier, Classifier], names: tuple[str, str], rows: Split) -> Comparison:
    """Score both models and compare them.

    Args:
        names: what they are called in the answer.
        rows: labelled with the ids of the first model, see `evaluation.rows_for`.

    Raises:
        DataError: the second model has other labels.
    """
    first, second = models
    if set(first.labels) != set(second.labels):
        problem = f"its labels are {', '.join(second.labels)}, those of {names[0]} are {', '.join(first.labels)}"
        raise DataError(names[1], [f"{problem}: only models of the same labels can be compared"])
    scored = score_on(first, rows)
    logits, tokens = second.logits(rows.texts)
    logits = logits[:, [second.labels.index(label) for label in first.labels]]
    other = Scored.of(rows, first.labels, logits, tokens, second.calibration)
    found = compare(scored, other, names)
    return replace(found, recipe=recipe_differences(first.facts, second.facts))


def recipe_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two models' recipes differ, and `data` where the fingerprints of what they read do.

    Args:
        first, second: what emoray.json says of each.
    """
    recipes = [
        {**parse(facts["config"]).recipe(), "data": facts["data"]["fingerprint"][:12]} for facts in (first, second)
    ]
    keys = [key for key in {**recipes[0], **recipes[1]} if recipes[0].get(key) != recipes[1].get(key)]
    return {key: (recipes[0].get(key), recipes[1].get(key)) for key in keys}


def comparison_text(found: Comparison) -> str:
    """The figures side by side and the verdict, for a terminal."""
    first, second = found.models
    lines = [
        f"{found.split}: {found.rows:,} rows, the same for both; on {found.same_answers:,} they give the same answer",
        f"  A  {first}",
        f"  B  {second}",
        f"  {'':<10}{'A':>10}{'B':>10}{'B - A':>10}   95% (paired bootstrap)",
    ]
    for key, name in metrics.NAMES.items():
        a, b = found.figures[key]
        line = f"  {name:<10}{a:>10.4f}{b:>10.4f}{b - a:>+10.4f}"
        if key in found.differences:
            line += f"   {found.differences[key][1]:+.4f} to {found.differences[key][2]:+.4f}"
        lines.append(line)
    if found.recipe:
        changes = "; ".join(f"{key} {a} -> {b}" for key, (a, b) in found.recipe.items())
        lines.append(f"  Recipes differ in {changes}")
    return "\n".join([*lines, found.words()])


def _interval(values: metrics.Array) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _span(gain: float, low: float, high: float) -> str:
    low, high = (-high, -low) if gain < 0 else (low, high)  # of the better one over the other
    return f"{100 * low:.2f} to {100 * high:.2f}"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"= {value:.4f}"
