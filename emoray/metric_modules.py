"""The figures of metrics.py as `evaluate.Metric` modules: `from emoray.metrics import WeightedF1`.

Built here, never by `evaluate.load`, which asks the Hub for a script even for accuracy. Kept apart from
metrics.py because `import evaluate` takes seconds. Predictions and references stay in memory.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from emoray import metrics

_GUO = "Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks. ICML 2017."
_BRIER = "Brier: Verification of Forecasts Expressed in Terms of Probability. 1950."


class _Module(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped
    """An evaluate metric that needs neither network nor disk; subclasses say what they measure."""

    description = ""
    citation = ""
    from_probabilities = False

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(**kwargs)

    def _build_data_dir(self) -> str:
        # The base class makes a folder in the cache even if nothing is ever written to it.
        return "" if self.keep_in_memory else str(super()._build_data_dir())

    def _info(self) -> Any:
        label = datasets.Value("int64")
        row = datasets.Sequence(datasets.Value("float64"))
        given, shape = (row, "probabilities [n, L]") if self.from_probabilities else (label, "label ids [n]")
        return evaluate.MetricInfo(
            description=type(self).description,
            citation=type(self).citation,
            inputs_description=f"predictions: {shape}; references: label ids [n].",
            features=datasets.Features({"predictions": given, "references": label}),
        )


def _cells(predictions: Any, references: Any) -> metrics.Array:
    """Confusion [L, L] over the ids that occur."""
    guesses, targets = np.asarray(predictions, dtype=np.int64), np.asarray(references, dtype=np.int64)
    ids, places = np.unique(np.concatenate([guesses, targets]), return_inverse=True)
    return metrics.count_cells(places[: len(guesses)], places[len(guesses) :], len(ids))


def _probabilities(predictions: Any, references: Any) -> tuple[metrics.Array, metrics.Array]:
    return np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.int64)


class Accuracy(_Module):
    description = "Share of rows whose predicted label is the true one."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        cells = _cells(predictions, references)
        return {"accuracy": float(np.trace(cells) / cells.sum())}


class WeightedF1(_Module):
    description = "F1 of each label, averaged with the labels' support as weights."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"f1": float(metrics.weighted_f1(_cells(predictions, references)))}


class MacroF1(_Module):
    description = "Plain mean of the F1 of each label that occurs."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"macro_f1": float(metrics.macro_f1(_cells(predictions, references)))}


class ExpectedCalibrationError(_Module):
    description = "Mean distance between confidence and accuracy, in equal-width bins of the top probability."
    citation = _GUO
    from_probabilities = True

    def _compute(self, predictions: Any, references: Any, bins: int = metrics.BINS) -> dict[str, float]:
        probabilities, targets = _probabilities(predictions, references)
        return {"ece": metrics.expected_calibration_error(probabilities, targets, bins)}


class BrierScore(_Module):
    description = "Squared distance of the probabilities to the one-hot target, mean over rows: 0..2."
    citation = _BRIER
    from_probabilities = True

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"brier": float(metrics.row_briers(*_probabilities(predictions, references)).mean())}
