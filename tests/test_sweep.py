"""Who goes on in a sweep, and who wins: functions of figures alone, whatever comes first."""

from __future__ import annotations

import io
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from emoray import checkpoint, sweep_results
from emoray.errors import RunError
from emoray.run import Attempt
from emoray.storage import Storage
from emoray.sweep import Stop, Sweep, Trial, median_stopping, read_records, successive_halving, write_record
from emoray.sweep_console import SweepDisplay
from emoray.sweep_report import importance, render
from emoray.sweep_results import as_csv, summary, table
from emoray.tune_config import load

TUNE = Path(__file__).parents[1] / "configs" / "tune.yaml"
EVALUATIONS = 8


def halving(curves: list[list[float]], rungs: tuple[int, ...] = (1, 3), factor: int = 3, **more: Any) -> list[Stop]:
    ended = more.get("ended", [False] * len(curves))
    return successive_halving(curves, ended, more.get("failed", [False] * len(curves)), rungs, factor)


def sweep(*overrides: str) -> Sweep:
    plan = load(TUNE, ["tune.num_trials=8", *overrides])
    return Sweep(plan, plan.points() or [])


def entry(place: int, value: float) -> dict[str, Any]:
    return {
        "epoch": place / 4,
        "step": place * 10,
        "validation_loss": 1 - value,
        "accuracy": value,
        "f1": value,
        "macro_f1": value,
    }


def figure(trial: int, place: int) -> float:
    """What trial would reach after that many evaluations: trial 5 is best in the end, trial 2 at first."""
    return round(0.3 + 0.06 * place + 0.02 * (trial * 3 % 8) - (0.01 * place if trial == 2 else 0), 4)


def play(table: Sweep, order: random.Random, at_once: int = 3, fail: int | None = None) -> None:
    """A sweep with stints that take a random time: whoever runs, one of them gets an evaluation next."""
    running: dict[str, float] = {}
    while not table.over:
        for trial, until in table.ready():
            if len(running) < at_once:
                running[trial.name], trial.state = until, "running"
        name = order.choice(sorted(running))
        trial = table[name]
        if fail is not None and trial.name == f"{fail:04d}" and len(trial.evaluations) == 1:
            trial.state, trial.reason = "failed", "the loss is nan"
            del running[name]
            table.settle()
            continue
        if len(trial.evaluations) < EVALUATIONS:
            place = len(trial.evaluations) + 1
            number = int(name[:4])
            trial.evaluations.append(entry(place, figure(number, place)))
            trial.total_steps = 10 * EVALUATIONS
        stopped = table.settle()
        if trial in stopped or len(trial.evaluations) in (running[name], EVALUATIONS):
            if trial not in stopped:
                trial.state = "finished" if len(trial.evaluations) == EVALUATIONS else "waiting"
            del running[name]
        for other in stopped:
            running.pop(other.name, None)
        table.settle()


# Successive halving


def test_no_rung_is_decided_before_all_of_a_group_are_there() -> None:
    assert halving([[0.5], [0.6], []]) == [Stop(1), Stop(1), Stop(1)]
    assert halving([[0.5], [0.6], [0.1]]) == [Stop(1, out=True), Stop(3), Stop(1, out=True)]
    assert halving([[0.5], [0.6, 0.6, 0.7], [0.1]])[1] == Stop(math.inf), "the only one left at the last rung goes on"


def test_one_in_three_goes_on_and_of_equals_the_earlier() -> None:
    curves = [[0.5], [0.9], [0.9], [0.9], [0.1], [0.2], [0.3], [0.4]]
    assert [n for n, stop in enumerate(halving(curves)) if not stop.out] == [1, 2, 3]


def test_a_later_group_is_judged_beside_the_earlier_ones_and_does_not_hold_them_up() -> None:
    first = [[0.1 * n] for n in range(9)]
    waiting = halving([*first, [], [0.99]])
    assert [n for n, stop in enumerate(waiting[:9]) if not stop.out] == [6, 7, 8]
    assert waiting[9:] == [Stop(1), Stop(1)]
    both = halving([*first, [0.65], [0.55]])
    assert both[:9] == waiting[:9], "what was decided stays"
    assert [stop.out for stop in both[9:]] == [False, True], "of eleven the best four go on: 0.8, 0.7, 0.65, 0.6"


def test_who_failed_holds_no_place() -> None:
    curves = [[0.9], [], [0.5], [0.4]]
    stops = halving(curves, ended=[False, True, False, False], failed=[False, True, False, False])
    assert [stop.out for stop in stops] == [False, True, True, True]
    later = halving([[0.9], [0.8, 0.8, 0.8], *[[0.1]] * 4], ended=[True] + [False] * 5, failed=[True] + [False] * 5)
    assert later[1] == Stop(math.inf), "trial 0 failed after its first rung, so trial 1 is the best of the second"


def test_who_ended_before_a_rung_is_judged_by_what_it_reached() -> None:
    stops = halving([[0.9, 0.95], [0.8, 0.8, 0.99], *[[0.1]] * 4], ended=[True] + [False] * 5)
    assert [stop.out for stop in stops[:2]] == [True, False]


# Median stopping


def test_median_stopping_needs_three_earlier_trials_that_are_as_far() -> None:
    curves = [[0.5] * 3, [0.6] * 3, [0.7] * 3, [0.55] * 3, [0.65] * 3]
    assert median_stopping(curves, [False] * 5, first=1) == [
        Stop(math.inf),
        Stop(math.inf),
        Stop(math.inf),
        Stop(1, out=True),
        Stop(math.inf),
    ]
    behind = [[0.5], [0.6] * 3, [0.7] * 3, [0.65, 0.1, 0.1], [0.1] * 3]
    assert median_stopping(behind, [False] * 5, first=2)[3:] == [Stop(math.inf)] * 2, "trial 0 isn't there yet"


# The same trials and the same winner, whatever comes first


@pytest.mark.parametrize("scheduler", ["asha", "median", "none"])
@pytest.mark.parametrize("fail", [None, 5])
def test_the_outcome_does_not_depend_on_who_is_faster(scheduler: str, fail: int | None) -> None:
    outcomes = set()
    for seed in range(25):
        table = sweep(f"tune.scheduler={scheduler}")
        play(table, random.Random(seed), at_once=1 + seed % 4, fail=fail)
        outcomes.add(str([(t.name, t.state, t.values, len(t.evaluations)) for t in table.trials]))
        assert table.ranking()[0].name == ("0005" if fail is None else "0007") or scheduler == "asha"
    assert len(outcomes) == 1


def test_asha_takes_less_than_half_of_the_steps() -> None:
    halved, whole = sweep(), sweep("tune.scheduler=none")
    play(halved, random.Random(0))
    play(whole, random.Random(0))
    assert whole.steps()[0] == whole.steps()[1] == 8 * 80
    assert halved.steps() == (8 * 10 + 3 * 20 + 1 * 50, 8 * 80)


def test_repeats_decide_by_the_mean() -> None:
    table = sweep("tune.scheduler=none", "tune.repeats=2", "tune.repeat_best=2")
    for n, trial in enumerate(table.search):
        trial.evaluations, trial.state = [entry(1, 0.5 + n / 100)], "finished"
    table.settle()
    again = [trial for trial in table.trials if trial.repeats is not None]
    assert [(t.name, t.repeats, t.values["training.seed"]) for t in again] == [
        ("0007-seed43", 7, 43),
        ("0007-seed44", 7, 44),
        ("0006-seed43", 6, 43),
        ("0006-seed44", 6, 44),
    ]
    assert [(trial.name, until) for trial, until in table.ready()] == [(trial.name, math.inf) for trial in again]
    del table.trials[9:]  # a restart that knows of one of them only
    table.settle()
    assert table.trials[8:] == again
    again = table.trials[8:]
    for trial, value in zip(again, (0.2, 0.3, 0.6, 0.7), strict=True):
        trial.evaluations, trial.state = [entry(1, value)], "finished"
    table.settle()
    assert table.over and len(table.trials) == 12
    assert [trial.name for trial in table.ranking()] == ["0006", "0007"]
    assert table.mean(table["0006"]) == pytest.approx((0.56 + 0.6 + 0.7) / 3)
    assert table.spread(table["0006"]) == pytest.approx(0.0721, abs=1e-4)
    assert table.kept() == {"0006", "0007"}


# What is kept


def test_records_come_back(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path / "sweep"))
    attempt = Attempt.begin(folder, {"recipe": {}})
    before = sweep()
    play(before, random.Random(1))
    for trial in before.trials:
        write_record(trial, attempt)
    after = sweep()
    read_records(folder, after)
    assert after.over and after.trials == before.trials

    (tmp_path / "sweep" / "trials" / "0003" / "trial.json").write_text("{")
    with pytest.raises(RunError, match=r"0003/trial.json: is damaged .* delete it"):
        read_records(folder, sweep())


def test_what_a_sweep_tells() -> None:
    table_ = sweep()
    play(table_, random.Random(1), fail=5)
    results = summary(table_, {"best": entry(8, 0.9), "test": {"accuracy": 0.8, "f1": 0.8}})
    assert results["best"]["trial"] == table_.ranking()[0].name
    assert results["best"]["metric"] == table_.ranking()[0].evaluations[-1]["f1"]
    assert results["steps"]["taken"] < results["steps"]["without_stopping"] / 2
    lines = table(table_).splitlines()
    assert lines[2].startswith(f"| {results['best']['trial']} |")
    assert sum("| failed: the loss is nan |" in line for line in lines) == 1
    rows = as_csv(table_).splitlines()
    assert rows[0].startswith(
        "trial,state,training.learning_rate,training.train_batch_size,validation_loss,accuracy,f1"
    )
    assert len(rows) == 9
    page = render(table_, results)
    assert page.count("<svg") == 5 and "0005 failed: the loss is nan" in page
    assert "http" not in page.replace("http://www.w3.org", ""), "one file, no other hosts"


def test_the_key_that_matters_is_found() -> None:
    table_ = sweep("tune.num_trials=30", "search.training.weight_decay={uniform: [0, 0.1]}")
    for trial in table_.search:
        distance = abs(math.log10(trial.values["training.learning_rate"]) + 3.7)
        trial.evaluations, trial.state = [entry(1, 0.9 - 0.3 * distance**2)], "finished"
    weights = importance(table_)
    assert weights["training.learning_rate"] > 0.95
    assert weights["training.weight_decay"] < 0.3 and weights["training.train_batch_size"] < 0.3


def test_trials_are_looked_up_by_name() -> None:
    table_ = sweep()
    assert table_["0003"] is table_.trials[3] and isinstance(table_.trials[3], Trial)


# What is seen of a sweep under way


def test_a_log_gets_a_line_where_something_happens() -> None:
    console = Console(file=io.StringIO(), width=200)
    display, table_ = SweepDisplay(console), sweep()
    first, second = table_.trials[:2]
    first.state = second.state = "running"
    display.show(table_)
    display.show(table_)
    first.evaluations.append(entry(1, 0.5))
    display.show(table_)
    second.state, second.reason = "failed", "the loss is nan\nat step 3"
    display.show(table_)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert lines == [
        "Trial 0000 running  (learning_rate 0.000315, train_batch_size 32)",
        "Trial 0001 running  (learning_rate 3.317e-05, train_batch_size 32)",
        "Trial 0000 epoch 0.25  f1 0.5000",
        "Trial 0001 failed: the loss is nan  (learning_rate 3.317e-05, train_batch_size 32)",
    ]


def test_a_terminal_gets_a_table() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    table_ = sweep()
    with SweepDisplay(console) as display:
        table_.trials[0].state, table_.trials[0].left_s = "running", 75.0
        table_.trials[0].evaluations, table_.trials[0].epoch = [entry(1, 0.5)], 0.4
        table_.trials[1].state, table_.trials[1].reason = "failed", "the loss is nan"
        display.show(table_)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    words = next(line for line in shown.splitlines() if "0000" in line).split()
    assert words == ["0000", "0.000315", "32", "0.40", "0.5000", "running", "1:15", "left"]
    assert "failed: the loss is nan" in shown and "pending" in shown


def test_the_winner_s_model_has_the_sweep_s_name_and_no_exports(trained_run: Path, tmp_path: Path) -> None:
    """Only what the manifest lists travels: an export is made anew where the model is served."""
    folder = Storage(str(tmp_path))
    winner = Trial("0000", {})
    card = (trained_run / "best" / "README.md").read_text()
    shutil.copytree(trained_run / "best", tmp_path / winner.folder / "best")
    exported = tmp_path / winner.folder / "best" / "onnx" / "fp32"
    exported.mkdir(parents=True)
    (exported / "export.json").write_text("{}")
    sweeped = sweep()
    sweeped.trials = [winner]
    sweep_results._take_model(sweeped, winner, Attempt.begin(folder, {"recipe": {}}))
    checkpoint.verify(tmp_path / "best")
    assert checkpoint.facts(tmp_path / "best")["config"]["run"]["name"] == sweeped.plan.config.run.name
    assert sweeped.plan.config.run.name == "sweep" and "# tiny\n" in card and "- name: tiny\n" in card
    renamed = card.replace("# tiny\n", "# sweep\n").replace("- name: tiny\n", "- name: sweep\n")
    assert (tmp_path / "best" / "README.md").read_text() == renamed
    assert "onnx" not in folder.names("best") and not folder.exists(f"{winner.folder}/best")
