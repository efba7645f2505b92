"""Evaluations within an epoch, and runs that pause after one: exact, whatever happens in between."""

from __future__ import annotations

import pytest
from harness import STEPS_PER_EPOCH, Configure, Script, begin, outcome, run_training
from hypothesis import given
from hypothesis import strategies as st

from emoray.errors import InterruptedRunError
from emoray.run import RESULTS, open_run
from emoray.training import Wish, evaluates, train
from emoray.world import World

THRICE = "training.evaluations_per_epoch=3"


@given(steps=st.integers(1, 400), per_epoch=st.integers(1, 50), epoch=st.integers(0, 3))
def test_evaluations_divide_an_epoch_evenly(steps: int, per_epoch: int, epoch: int) -> None:
    places = [n for n in range(1, steps + 1) if evaluates(epoch * steps + n, steps, per_epoch)]
    assert len(places) == min(per_epoch, steps), "never two at one step"
    assert places[-1] == steps, "the last one at the epoch's end"
    gaps = [b - a for a, b in zip([0, *places], places, strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_the_table_has_a_line_for_each(configure: Configure) -> None:
    folder = run_training(configure(THRICE))
    entries = outcome(folder).results["epochs"]
    assert [entry["step"] for entry in entries] == [4, 8, 11, 15, 19, 22]
    assert [entry["epoch"] for entry in entries] == [0.3636, 0.7273, 1, 1.3636, 1.7273, 2]
    lines = (folder / "results.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 1 + 6
    assert lines[4].startswith("| 1 | 11 |")


def test_evaluating_more_often_changes_no_weight(configure: Configure) -> None:
    once, thrice = outcome(run_training(configure())), outcome(run_training(configure(THRICE)))
    assert thrice.losses == once.losses
    assert thrice.sums["last weights"] == once.sums["last weights"]
    assert [e for e in thrice.results["epochs"] if e["step"] % STEPS_PER_EPOCH == 0] == once.results["epochs"]


def test_stopped_between_evaluations(configure: Configure) -> None:
    config = configure(THRICE)
    for steps in (2, 5, 6):
        with pytest.raises(InterruptedRunError):
            run_training(config, Script({steps: Wish.STOP}))
    assert outcome(run_training(config)) == outcome(run_training(configure(THRICE)))


def test_paused_after_evaluations(configure: Configure) -> None:
    """In stints, as the trials of a sweep are trained: each ends right after its evaluation."""
    config = configure(THRICE)
    run = open_run(config.run)
    for pause, step in ((1, 4), (1, 4), (3, 11), (4, 15)):
        task, state, attempt = begin(config)
        control = Script()
        with pytest.raises(InterruptedRunError, match=f"Paused after step {step} of 22"):
            train(task, state, World(), attempt, control, pause)
        (start,) = [event for event in control.events if event["kind"] == "start"]
        assert start["total_steps"] == 22 and start["optimizer"]["lr"] == config.training.learning_rate
        assert start["batch_size"] == config.training.global_batch_size
        assert len(start["evaluations"]) <= pause
    assert not run.exists(RESULTS)
    assert outcome(run_training(config)) == outcome(run_training(configure(THRICE)))


def test_a_pause_at_the_end_of_the_run_is_none(configure: Configure) -> None:
    task, state, attempt = begin(configure(THRICE))
    _, progress = train(task, state, World(), attempt, Script(), 6)
    assert progress.step == 22
