"""A model on its way into service: compared with the present one, and kept out by the gate."""

from __future__ import annotations

import numpy as np
import pytest
from serving import Dummy

from emoray.errors import ConfigError, ModelError
from emoray.http.candidate import COMPARED, bring_up, compare
from emoray.serve_config import GateConfig, load


def model(f1: float | None, shift: float = 0.0) -> Dummy:
    dummy = Dummy(shift=shift)
    if f1 is not None:
        dummy.facts["metrics"] = {"test": {"f1": f1}}
    return dummy


@pytest.mark.parametrize(
    ("gate", "new", "present", "word"),
    [
        ({}, None, 0.9, None),
        ({"at_least": 0.8}, 0.8, None, None),
        ({"at_least": 0.8}, 0.79, None, "below 0.8000"),
        ({"at_least": 0.8}, None, None, "no test f1 is stored"),
        ({"may_lose": 0.01}, 0.5, None, None),
        ({"may_lose": 0.01}, 0.895, 0.9, None),
        ({"may_lose": 0.01}, 0.885, 0.9, "what serves has 0.9000"),
        ({"may_lose": 0.01, "at_least": 0.9}, 0.895, 0.9, "below 0.9000"),
    ],
)
def test_the_gate(gate: dict[str, float], new: float | None, present: float | None, word: str | None) -> None:
    served = model(present) if present is not None else None

    def bring() -> None:
        bring_up("there", lambda location: model(new), served, GateConfig.model_validate(gate))

    if word is None:
        bring()
    else:
        with pytest.raises(ModelError, match=word):
            bring()


def test_what_can_not_be_compared_is_kept_out_too() -> None:
    gate = GateConfig(may_lose=0.01)
    with pytest.raises(ModelError, match="what serves has no test f1 to compare it with"):
        bring_up("there", lambda location: model(0.9), model(None), gate)
    with pytest.raises(ConfigError, match=r"gate\.metric: is 'F1', but should be 'f1', 'macro_f1' or 'accuracy'"):
        load(None, ["gate.metric=F1"])


def test_the_comparison_tells_another_model_from_the_same_one() -> None:
    same, other = compare(model(None), model(None)), compare(model(None), Dummy(shift=np.array([9.0, 0.0, 0.0])))  # type: ignore[arg-type]
    assert same == {"texts": len(COMPARED), "same_label": len(COMPARED), "largest_difference": 0, "same_labels": True}
    assert other["same_label"] < len(COMPARED) and other["largest_difference"] > 0.1


def test_a_model_that_answers_nonsense_is_refused() -> None:
    with pytest.raises(ModelError, match="not finite"):
        bring_up("there", lambda location: model(None, shift=float("nan")), None, GateConfig())
