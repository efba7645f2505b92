"""Accuracy, F1, per label, calibration: numpy from logits to figures.

Two doors to the same arithmetic: plain functions on arrays, which the training loop and the reports call, and
`evaluate.Metric` modules (`Accuracy`, `WeightedF1`, `MacroF1`, `ExpectedCalibrationError`, `BrierScore`) for
whoever works with the evaluate library. The modules are built on first use, because importing evaluate pulls
in torch and transformers and takes seconds; none of them touches the network or the disk.

Shapes: n rows, L labels. `logits` is [n, L], `targets` is [n] with label ids 0..L-1.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from emoray.errors import NotFiniteError

Array = npt.NDArray[Any]

BINS = 15  # of the reliability diagram, as in Guo et al. 2017
TEMPERATURE_BOUNDS = (0.05, 20.0)
POWER_BOUNDS = (0.4, 2.5)
CHI2_1_AT_1_PERCENT = 6.635  # upper quantile of chi-squared with one degree of freedom


NAMES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "macro_f1": "macro F1",
    "loss": "loss",
    "ece": "ECE",
    "brier": "Brier",
}
"""What the figures of `compute` are called in a sentence, and in a terminal's table."""
TITLES = {**{key: name[:1].upper() + name[1:] for key, name in NAMES.items()}, "f1": "F1 (weighted)"}
"""What they are called at the head of a table or a page."""
EVALUATED = {"validation_loss": "loss", "accuracy": "accuracy", "f1": "f1", "macro_f1": "macro_f1"}
"""Of an evaluation during training: its columns, and the figure that each is."""


class LabelScore(TypedDict):
    """One line of the per-label table; support is the number of rows that truly have the label."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


class Calibration(NamedTuple):
    """How logits become probabilities that can be believed: fitted on validation, kept with the model.

    A label whose logit lies d below the highest one gets the weight exp(-(d / temperature) ** power). Power 1 is
    temperature scaling (Guo et al. 2017). One temperature makes every row flatter or every row sharper; a power above 1
    takes sureness from near ties and adds it to clear cases, which is what a model needs that meets texts of two kinds,
    plain and ambiguous. The order of the labels stays as it is, the first place included (an intra order-preserving
    map, Rahimi et al. 2020).
    """

    temperature: float = 1.0
    power: float = 1.0

    @property
    def is_none(self) -> bool:
        """Whether probabilities are those of a plain softmax."""
        return self == NO_CALIBRATION

    def __str__(self) -> str:
        power = "" if self.power == 1.0 else f", power {self.power:.3f}"
        return f"temperature {self.temperature:.3f}{power}"


NO_CALIBRATION = Calibration()


def softmax(logits: Array, temperature: float = 1.0, power: float = 1.0) -> Array:
    """Probabilities, float64 [n, L], calibrated as in `Calibration`."""
    return np.asarray(np.exp(_log_softmax(logits, temperature, power)))


def compute(logits: Array, targets: Array, temperature: float = 1.0, power: float = 1.0) -> dict[str, float]:
    """The headline figures of one split.

    Returns:
        loss: mean cross-entropy in nats, always at temperature 1, so that it compares with the training loss.
        accuracy, f1 (weighted by support), macro_f1 (over the labels that occur in targets or predictions):
        as scikit-learn's accuracy_score and f1_score.
        ece: expected calibration error of the top probability, BINS equal-width bins, calibrated.
        brier: mean over rows of the summed squared distance to the one-hot target, 0..2, calibrated.

    Raises:
        ValueError: shapes that don't fit, no rows, or ids outside 0..L-1.
        NotFiniteError: a logit is NaN or infinite.
    """
    logits, targets = check(logits, targets)
    probabilities = softmax(logits, temperature, power)
    cells = count_cells(logits.argmax(1), targets, logits.shape[1])
    return {
        "accuracy": float(np.trace(cells) / len(targets)),
        "f1": float(weighted_f1(cells)),
        "macro_f1": float(macro_f1(cells)),
        "loss": float(row_losses(logits, targets).mean()),
        "ece": expected_calibration_error(probabilities, targets),
        "brier": float(row_briers(probabilities, targets).mean()),
    }


def per_label(logits: Array, targets: Array, labels: tuple[str, ...] | list[str]) -> list[LabelScore]:
    """Precision, recall, F1 and support of each label, in the order of their ids; 0/0 counts as 0."""
    cells = confusion(logits, targets)
    if len(labels) != len(cells):
        raise ValueError(f"{len(labels)} label names for logits of {len(cells)} labels")
    hits, support, predicted = _margins(cells)
    precision, recall = _ratio(hits, predicted), _ratio(hits, support)
    f1 = _ratio(2 * hits, support + predicted)
    return [
        LabelScore(label=label, precision=float(p), recall=float(r), f1=float(f), support=int(s))
        for label, p, r, f, s in zip(labels, precision, recall, f1, support, strict=True)
    ]


def confusion(logits: Array, targets: Array) -> Array:
    """Counts, int64 [L, L]: row = true label, column = predicted label."""
    logits, targets = check(logits, targets)
    return count_cells(logits.argmax(1), targets, logits.shape[1])


def row_losses(logits: Array, targets: Array) -> Array:
    """Cross-entropy in nats of each row, float64 [n], at temperature 1."""
    return np.asarray(-_log_softmax(logits)[np.arange(len(targets)), targets])


class Reliability(TypedDict):
    """A reliability diagram: arrays [BINS]; means are NaN where a bin is empty."""

    edges: Array
    count: Array
    confidence: Array
    accuracy: Array


def reliability(probabilities: Array, targets: Array, bins: int = BINS) -> Reliability:
    """Rows by their top probability in equal-width bins (low, high]: how many, how sure, how often right.

    `edges` has bins + 1 values from 0 to 1.
    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    top, right, place = _bins(probabilities, targets, bins)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(place, weights=top, minlength=bins) / count
        accuracy = np.bincount(place, weights=right, minlength=bins) / count
    edges = np.linspace(0, 1, bins + 1)
    return Reliability(edges=edges, count=count, confidence=confidence, accuracy=accuracy)


def expected_calibration_error(probabilities: Array, targets: Array, bins: int = BINS) -> float:
    """Mean distance between confidence and accuracy over the bins of `reliability`, weighted by rows."""
    top, right, place = _bins(probabilities, targets, bins)
    return float(np.abs(np.bincount(place, weights=top - right, minlength=bins)).sum() / len(targets))


def fit_temperature(logits: Array, targets: Array) -> float:
    """The temperature that minimises the cross-entropy of softmax(logits / temperature).

    The loss is convex in 1 / temperature, so its slope has one root at most: found by bisection over the
    logarithm, to rounding. Where there is no minimum inside TEMPERATURE_BOUNDS (no rows, constant logits,
    every row right, worse than chance) the data doesn't say what the temperature is, and the answer is 1.0.
    Fit on validation, never on test. Source: Guo et al. 2017.
    """
    logits, targets = np.asarray(logits, dtype=np.float64), np.asarray(targets)
    if logits.ndim != 2 or len(logits) == 0 or logits.shape[1] < 2 or not np.isfinite(logits).all():
        return 1.0
    true = logits[np.arange(len(targets)), targets].mean()

    def slope(log_temperature: float) -> float:
        """d loss / d (1 / temperature): the expected logit minus the true one."""
        return float((softmax(logits, np.exp(log_temperature)) * logits).sum(1).mean() - true)

    low, high = np.log(TEMPERATURE_BOUNDS)
    if not slope(low) > 0 > slope(high):
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return float(np.exp((low + high) / 2))


def fit_calibration(logits: Array, targets: Array) -> Calibration:
    """The temperature and the power that minimise the cross-entropy of the true labels.

    For each power the temperature follows as in `fit_temperature` (it is the temperature of the logits raised to that
    power), and the best power is found by golden section. A power other than 1 is taken only where the data asks for
    it: where the likelihood-ratio test of the one parameter more rejects 1 at 1%. Few rows give a plain temperature.

    Fit on validation, never on test.
    """
    logits, targets = np.asarray(logits, dtype=np.float64), np.asarray(targets)
    plain = Calibration(fit_temperature(logits, targets))
    if plain.temperature == 1.0:  # the data doesn't say, or there is none
        return plain
    rows = np.arange(len(targets))

    def loss(calibration: Calibration) -> float:
        return float(-_log_softmax(logits, *calibration)[rows, targets].mean())

    def at(log_power: float) -> tuple[float, Calibration]:
        power = float(np.exp(log_power))
        raised = fit_temperature(calibrated(logits, 1.0, power), targets)
        found = Calibration(raised ** (1 / power), power)
        return (loss(found), found) if raised != 1.0 else (np.inf, found)

    low, high = np.log(POWER_BOUNDS)
    inner = (np.sqrt(5) - 1) / 2
    left, right = high - inner * (high - low), low + inner * (high - low)
    a, b = at(left), at(right)
    while high - low > 1e-3:
        if a[0] <= b[0]:
            high, right, b = right, left, a
            left = high - inner * (high - low)
            a = at(left)
        else:
            low, left, a = left, right, b
            right = low + inner * (high - low)
            b = at(right)
    best, found = min(a, b)
    return found if 2 * len(targets) * (loss(plain) - best) > CHI2_1_AT_1_PERCENT else plain


def check(logits: Array, targets: Array) -> tuple[Array, Array]:
    """The arrays as float64 [n, L] and int64 [n], or an error that says what doesn't fit."""
    logits, targets = np.asarray(logits, dtype=np.float64), np.asarray(targets)
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or logits.shape[1] == 0:
        raise ValueError(f"logits must be [n, L] and targets [n], not {logits.shape} and {targets.shape}")
    if len(targets) == 0:
        raise ValueError("no rows: metrics of an empty split are undefined")
    if not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(f"targets must be label ids, not {targets.dtype}")
    if targets.min() < 0 or targets.max() >= logits.shape[1]:
        raise ValueError(f"targets span {targets.min()}..{targets.max()}, outside 0..{logits.shape[1] - 1}")
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits).all(1)).sum())
        raise NotFiniteError(
            f"the model's outputs are NaN or infinite for {bad} of {len(targets)} rows: it has diverged; "
            "lower training.learning_rate or take an earlier checkpoint"
        )
    return logits, targets.astype(np.int64)


def calibrated(logits: Array, temperature: float, power: float = 1.0) -> Array:
    """Logits whose plain softmax are the calibrated probabilities, float64; the highest of each row is 0."""
    if not (np.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}, but must be a finite number above 0")
    # Divided after the shift: a tiny temperature then can't overflow, only underflow to probability 0.
    if not (np.isfinite(power) and power > 0):
        raise ValueError(f"power is {power}, but must be a finite number above 0")
    logits = np.asarray(logits, dtype=np.float64)
    shifted = (logits - logits.max(-1, keepdims=True)) / temperature
    return np.asarray(shifted if power == 1.0 else -((-shifted) ** power))


def _log_softmax(logits: Array, temperature: float = 1.0, power: float = 1.0) -> Array:
    shifted = calibrated(logits, temperature, power)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _bins(probabilities: Array, targets: Array, bins: int) -> tuple[Array, Array, Array]:
    """Of each row: the top probability, whether it is right (0 or 1), and its bin."""
    top = probabilities.max(1)
    right = (probabilities.argmax(1) == targets).astype(np.float64)
    return top, right, bin_of(top, bins)


def bin_of(top: Array, bins: int) -> Array:
    """The equal-width bin, from 0, of each probability; bins are (low, high]."""
    return np.asarray(np.clip(np.ceil(top * bins).astype(np.int64) - 1, 0, bins - 1))


def row_briers(probabilities: Array, targets: Array) -> Array:
    """Squared distance of each row to its one-hot target, [n], 0..2. Source: Brier 1950."""
    true = probabilities[np.arange(len(targets)), targets]
    return np.asarray((probabilities**2).sum(1) - 2 * true + 1)


def count_cells(predicted: Array, targets: Array, width: int) -> Array:
    """Confusion [L, L] of label ids [n]: row = true, column = predicted."""
    return np.bincount(targets * width + predicted, minlength=width * width).reshape(width, width)


def _margins(cells: Array) -> tuple[Array, Array, Array]:
    """Hits, support and predicted counts per label, [..., L], of confusions [..., L, L]."""
    return np.diagonal(cells, axis1=-2, axis2=-1), cells.sum(-1), cells.sum(-2)


def weighted_f1(cells: Array) -> Array:
    """F1 averaged by support, [...], of confusions [..., L, L]."""
    hits, support, predicted = _margins(cells)
    return np.asarray((_ratio(2 * hits, support + predicted) * support).sum(-1) / support.sum(-1))


def macro_f1(cells: Array) -> Array:
    """Plain mean over labels, [...], as scikit-learn: labels neither true nor predicted don't count."""
    hits, support, predicted = _margins(cells)
    present = (support + predicted > 0).sum(-1)
    return np.asarray(_ratio(2 * hits, support + predicted).sum(-1) / present)


def _ratio(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.zeros(whole.shape), where=whole > 0)


MODULES = ("Accuracy", "WeightedF1", "MacroF1", "ExpectedCalibrationError", "BrierScore")


def __getattr__(name: str) -> Any:
    """Build the evaluate modules when one is first asked for (see the module's docstring)."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from emoray import metric_modules

    return getattr(metric_modules, name)
