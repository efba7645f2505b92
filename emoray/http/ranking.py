"""Scores in the forms that the dialects ask for: a list of labels a text, the best first."""

from __future__ import annotations

from typing import Literal

import numpy as np

from emoray.http.service import Answer

Function = Literal["softmax", "sigmoid", "none"]


def ranked(answer: Answer, function: Function = "softmax", top_k: int | None = None) -> list[list[dict[str, object]]]:
    """`[{"label", "score"}, ...]` for each text.

    Args:
        function: `softmax` gives calibrated probabilities, as everywhere in emoray; `sigmoid` and `none` are taken
            of the logits as the model puts them out, as transformers' pipeline does.
        top_k: so many labels; None, or more than there are, gives all.
    """
    if function == "softmax":
        return [
            [{"label": label, "score": score} for label, score in list(prediction.scores.items())[:top_k]]
            for prediction in answer.predictions
        ]
    values = answer.logits.astype(np.float64)
    if function == "sigmoid":
        values = 1 / (1 + np.exp(-values))
    order = np.argsort(-answer.logits, axis=1, kind="stable")[:, :top_k]
    return [
        [{"label": answer.labels[i], "score": float(row[i])} for i in places]
        for row, places in zip(values, order, strict=True)
    ]
