"""How far figures may be off by chance: bootstrap intervals, McNemar's test, what a calibrated model would show.

Shapes as in metrics.py: n rows, L labels; `logits` is [n, L], `targets` is [n].
"""

from __future__ import annotations

import math

import numpy as np

from emoray.metrics import (
    BINS,
    NO_CALIBRATION,
    Array,
    bin_of,
    check,
    macro_f1,
    row_briers,
    row_losses,
    softmax,
    weighted_f1,
)

_CHUNK = 4_000_000  # draws held in memory at once


def bootstrap_intervals(
    logits: Array,
    targets: Array,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    calibration: tuple[float, float] = NO_CALIBRATION,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of accuracy, f1, macro_f1, loss and brier.

    Calibration error has none: resampling inflates it, so that a percentile interval can miss the figure itself.
    `calibrated_ece_range` says what it is to be measured against.

    Returns:
        name -> (low, high). The same seed gives the same intervals.
    """
    drawn = bootstrap(logits, targets, resamples, seed, calibration)
    tails = [(1 - level) / 2, (1 + level) / 2]
    return {name: _pair(np.quantile(values, tails)) for name, values in drawn.items()}


def bootstrap(
    logits: Array,
    targets: Array,
    resamples: int = 1000,
    seed: int = 0,
    calibration: tuple[float, float] = NO_CALIBRATION,
) -> dict[str, Array]:
    """accuracy, f1, macro_f1, loss and brier of rows drawn with replacement: name -> [resamples].

    The draws depend on nothing but the seed and the numbers of rows and resamples: two models on the same rows
    are drawn alike, so that their differences are those of a paired bootstrap. Source: Efron and Tibshirani 1993.
    """
    logits, targets = check(logits, targets)
    size, width = logits.shape
    cell = targets * width + logits.argmax(1)
    losses, briers = row_losses(logits, targets), row_briers(softmax(logits, *calibration), targets)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[Array]] = {"accuracy": [], "f1": [], "macro_f1": [], "loss": [], "brier": []}
    step = max(1, _CHUNK // max(size, width * width))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        rows = rng.integers(0, size, (count, size))
        flat = cell[rows] + np.arange(count)[:, None] * width * width
        cells = np.bincount(flat.ravel(), minlength=count * width * width).reshape(count, width, width)
        drawn["accuracy"].append(np.trace(cells, axis1=1, axis2=2) / size)
        drawn["f1"].append(weighted_f1(cells))
        drawn["macro_f1"].append(macro_f1(cells))
        drawn["loss"].append(losses[rows].mean(1))
        drawn["brier"].append(briers[rows].mean(1))
    return {name: np.concatenate(values) for name, values in drawn.items()}


def calibrated_ece_range(probabilities: Array, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Where 95% of the calibration errors lie that a perfectly calibrated model of this confidence would show.

    ECE is never 0 on a finite number of rows. Each resample draws whether a row is right with the probability
    that the model gave: what comes out is chance alone, and an ECE inside the range says nothing against the model.
    Source: Broecker and Smith 2007, "Increasing the Reliability of Reliability Diagrams" (consistency resampling).
    """
    top = probabilities.max(1)
    place = bin_of(top, BINS)
    member = np.zeros((len(top), BINS))
    member[np.arange(len(top)), place] = 1
    rng = np.random.default_rng(seed)
    found = []
    step = max(1, _CHUNK // len(top))
    for start in range(0, resamples, step):
        right = rng.random((min(step, resamples - start), len(top))) < top
        found.append(np.abs((top - right) @ member).sum(1) / len(top))
    return _pair(np.quantile(np.concatenate(found), [0.025, 0.975]))


def mcnemar(first: int, second: int) -> float:
    """Two-sided exact p-value that two models are equally often right.

    Args:
        first: rows that only the first model gets right.
        second: rows that only the second one does.

    Were they equal, each such row would fall to either like a fair coin. Source: McNemar 1947, the exact
    (binomial) form.
    """
    tosses, fewer = first + second, min(first, second)
    if first == second:
        return 1.0
    log_ways = [math.lgamma(tosses + 1) - math.lgamma(k + 1) - math.lgamma(tosses - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(ways - tosses * math.log(2)) for ways in log_ways))


def wilson_interval(share: float, rows: int) -> tuple[float, float]:
    """95% interval of a share of `rows`, sound for few rows and near 0 or 1. Source: Wilson 1927."""
    z2 = 1.959964**2
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = float(np.sqrt(z2 * (share * (1 - share) / rows + z2 / (4 * rows**2)))) / (1 + z2 / rows)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(first: int, second: int, rows: int) -> tuple[float, float]:
    """95% interval of second minus first model's accuracy, also where they hardly differ and resamples don't at all.

    Args:
        first: rows that only the first model gets right.
        second: rows that only the second one does.
        rows: of both.

    Wald's interval with half a row added to each cell: Agresti and Min 2005, "Simple improved confidence intervals for
    comparing matched proportions".
    """
    size = rows + 2
    middle = (second - first) / size
    half = 1.96 * math.sqrt(first + second + 1 - (second - first) ** 2 / size) / size
    return middle - half, middle + half


def _pair(values: Array) -> tuple[float, float]:
    return float(values[0]), float(values[1])
