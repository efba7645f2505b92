"""Sweeps as config files: one override mechanism, every problem at once, values that depend on (seed, trial, key)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from emoray import config as cfg
from emoray.config_files import override
from emoray.errors import ConfigError
from emoray.search_space import Domain, draw, grid
from emoray.tune_config import Plan, load

CONFIGS = Path(__file__).parents[1] / "configs"
TUNE = CONFIGS / "tune.yaml"
RATE = "search.training.learning_rate={loguniform: [1e-5, 1e-3]}"


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(TUNE, overrides)
    return caught.value.problems


def domain(kind: str, *args: object) -> Domain:
    return Domain("training.seed", kind, args)


# Where values come from


def test_base_then_file_then_overrides() -> None:
    plan = load(TUNE, ["training.num_epochs=3", "model.dropout=0.2", RATE])
    base = cfg.load(CONFIGS / "emotion.yaml")
    assert plan.base.training.evaluations_per_epoch == 4, "from tune.yaml"
    assert plan.base.training.num_epochs == 3 and plan.base.model.dropout == 0.2, "from the command line"
    assert plan.base.model.pretrained == base.model.pretrained, "from the base"
    rate, size = plan.domains
    assert (rate.key, rate.kind, rate.args) == ("training.learning_rate", "loguniform", (1e-5, 1e-3))
    assert (size.key, size.kind, size.args) == ("training.train_batch_size", "choice", (16, 32, 64))


def test_a_distribution_given_on_the_command_line_replaces_the_one_in_the_file() -> None:
    plan = load(TUNE, ["search.training.learning_rate={choice: [1e-4, 2e-4]}", "tune.num_trials=4"])
    assert [(d.kind, d.args) for d in plan.domains] == [("choice", (1e-4, 2e-4)), ("choice", (16, 32, 64))]


def test_a_sweep_has_a_name_of_its_own() -> None:
    assert load(TUNE, ["run={storage_path: elsewhere}"]).config.run.name == "sweep"


def test_a_trial_is_the_base_with_its_values() -> None:
    plan = load(TUNE, [RATE, "tune.metric=accuracy"])
    values = {"training.learning_rate": 3e-4, "training.train_batch_size": 32}
    trial = plan.trial("0003", "/runs/sweep/trials", values)
    expected = override(
        plan.base,
        [
            "training.learning_rate=3e-4",
            "training.train_batch_size=32",
            "training.metric_for_best_model=accuracy",
            "run.name='0003'",
            "run.storage_path=/runs/sweep/trials",
        ],
    )
    assert trial == expected


def test_the_resolved_sweep_is_one_file_that_means_the_same(tmp_path: Path) -> None:
    plan = load(TUNE, [RATE, "training.num_epochs=3", "run.name=mine"])
    path = tmp_path / "config.yaml"
    path.write_text(plan.to_config().to_yaml())
    again = load(path)
    assert (again.base, again.domains, again.config.tune) == (plan.base, plan.domains, plan.config.tune)
    assert again.recipe() == plan.recipe() and again.points() == plan.points()


def test_what_decides_a_sweep_is_told_apart_from_what_does_not() -> None:
    plan = load(TUNE)
    assert load(TUNE, ["tune.max_concurrent=3", "tune.max_minutes=5", "run.name=x"]).recipe() == plan.recipe()
    for change in ("tune.seed=1", "tune.num_trials=5", RATE, "training.num_epochs=3", "tune.reduction_factor=4"):
        assert load(TUNE, [change]).recipe() != plan.recipe(), change


# Drawn values


def test_values_are_a_function_of_seed_trial_and_key() -> None:
    few, many = load(TUNE, ["tune.num_trials=5"]).points(), load(TUNE, ["tune.num_trials=50"]).points()
    assert few is not None and many is not None
    assert many[:5] == few, "more trials don't change the first ones"
    alone = load(TUNE, ["tune.num_trials=5", "search.training.weight_decay={uniform: [0, 0.1]}"]).points()
    assert alone is not None
    for with_more, without in zip(alone, few, strict=True):
        assert without.items() <= with_more.items(), "nor does another key"
    assert load(TUNE, ["tune.num_trials=5", "tune.seed=1"]).points() != few
    # Pinned: a sweep that is continued with a later version must draw the same.
    assert few[0] == {"training.learning_rate": 0.000315, "training.train_batch_size": 32}


def test_drawn_values_keep_to_their_domain_and_use_all_of_it() -> None:
    domains = [
        Domain("a", "loguniform", (1e-5, 1e-3)),
        Domain("b", "uniform", (0.0, 0.5)),
        Domain("c", "quniform", (0.0, 0.3, 0.1)),
        Domain("d", "randint", (2, 6)),
        Domain("e", "choice", ("x", None, True)),
    ]
    points = draw(domains, 600, seed=3)
    rates = [p["a"] for p in points]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert 0.4 < sum(rate < 1e-4 for rate in rates) / 600 < 0.6, "half of them in the lower decade"
    assert all(0 <= p["b"] <= 0.5 for p in points)
    assert {p["c"] for p in points} == {0.0, 0.1, 0.2, 0.3}
    assert {p["d"] for p in points} == {2, 3, 4, 5}
    assert {p["e"] for p in points} == {"x", None, True}


def test_no_two_trials_are_alike() -> None:
    domains = [Domain("a", "choice", (1, 2, 3)), Domain("b", "randint", (0, 4))]
    points = draw(domains, 12, seed=0)
    assert len({json.dumps(point) for point in points}) == 12


def test_grids() -> None:
    domains = [Domain("a", "grid", (1, 2)), Domain("b", "choice", ("x", "y", "z"))]
    assert [tuple(point.values()) for point in grid(domains)] == [
        (1, "x"),
        (1, "y"),
        (1, "z"),
        (2, "x"),
        (2, "y"),
        (2, "z"),
    ]
    mixed = draw([Domain("a", "grid", (1, 2)), Domain("b", "uniform", (0.0, 1.0))], 6, seed=0)
    assert [point["a"] for point in mixed] == [1, 2, 1, 2, 1, 2]


def test_drawn_numbers_mean_the_same_when_they_are_read_from_yaml() -> None:
    for point in draw([Domain("a", "loguniform", (1e-9, 1.0)), Domain("b", "uniform", (-1.0, 1.0))], 200, seed=1):
        assert json.loads(json.dumps(point)) == point
        assert yaml.safe_load(yaml.safe_dump(point)) == point


# What is refused, before Ray starts


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "search.training.learning_rte={choice: [1]}",
            "search.training.learning_rte: unknown key (did you mean 'training.learning_rate'?)",
        ),
        ("search.training.weight_decay={uniform: [0.1, 0]}", "the first number must be the lower one"),
        ("search.training.weight_decay={loguniform: [0, 0.1]}", "must begin above 0"),
        ("search.training.weight_decay={uniform: [0]}", "must be [low, high], all numbers"),
        ("search.training.weight_decay={quniform: [0, 0.1, 0.5]}", "has the step 0.5"),
        ("search.training.num_epochs={randint: [1, 2.5]}", "must be whole numbers"),
        ("search.training.seed={choice: []}", "search.training.seed: choice is empty: name at least one value"),
        ("search.training.seed={choice: [1, 1]}", "names 1 twice"),
        ("search.training.seed={lognormal: [0, 1]}", "unknown distribution 'lognormal' (did you mean 'loguniform'?)"),
        ("search.training.seed={choice: [1], grid: [2]}", "must have one distribution"),
        ("search.training.seed=3", "search.training.seed: is 3, but must be a distribution"),
        ("search.training.warmup_ratio={uniform: [0, 2]}", "reaches 2.0: training.warmup_ratio: is 2.0, but"),
        ("search.training.lr_scheduler_type={choice: [linear, cosin]}", "reaches 'cosin'"),
        ("search.data.dataset={choice: [a, b]}", "figures on different data can't be compared"),
        ("search.workers.num_workers={choice: [1, 2]}", "all trials get the same workers"),
        ("search.run.name={choice: [a, b]}", "the sweep names the folders of its runs"),
        ("tune.metric=f2", "tune.metric: is 'f2', but no run reports it (did you mean 'f1'?)"),
        ("tune.mode=min", "of f1 the maximum is best"),
        ("tune.searcher=grid", "training.learning_rate has no list of values"),
        ("tune.shedule=asha", "tune.shedule: unknown key (did you mean 'scheduler'?)"),
        ("training.num_epoch=1", "training.num_epoch: unknown key (did you mean 'num_epochs'?)"),
        ("training.evaluations_per_epoch=0", "training.evaluations_per_epoch: is 0"),
        ("base=emotoin.yaml", "no such file (did you mean 'emotion.yaml'?)"),
        ("search=[1]", "must be a section of"),
        ("run=3", "run: is 3, but must be a section"),
        ("workers.num_workers=[1, 2]", "an elastic run needs training.global_batch_size"),
    ],
)
def test_bad_sweeps(override: str, message: str) -> None:
    assert any(message in problem for problem in problems(override)), problems(override)


def test_all_problems_at_once() -> None:
    found = problems("tune.metric=f2", "search.training.seed={choice: []}", "training.num_epochs=0", "nonsense")
    assert len(found) == 4, found


def test_fewer_combinations_than_trials() -> None:
    found = problems("search={training.train_batch_size: {choice: [16, 32]}}")
    assert found == [
        "tune.num_trials: is 16, but there are only 2 combinations, and trying one twice tells nothing: "
        "lower it to 2, or widen the search"
    ]


def test_asha_needs_something_to_compare_after() -> None:
    (found,) = problems("training.evaluations_per_epoch=1", "training.num_epochs=1")
    assert "a run has only 1" in found and "training.evaluations_per_epoch" in found
    load(TUNE, ["training.evaluations_per_epoch=1", "training.num_epochs=1", "tune.scheduler=none"])


def test_values_that_are_refused_together() -> None:
    found = problems(
        "search.training.weight_decay={choice: [0.0, 0.1]}", "search.training.compact_vocabulary={choice: [auto, 'on']}"
    )
    assert found and all("unused rows" in problem for problem in found)


def test_repeats_and_a_searched_seed_exclude_each_other() -> None:
    (found,) = problems("search.training.seed={randint: [0, 100]}", "tune.repeats=2")
    assert "tune.repeats" in found


def test_rungs() -> None:
    def rungs(*overrides: str) -> list[int]:
        return load(TUNE, overrides).rungs()

    assert rungs() == [1, 3]
    assert rungs("tune.reduction_factor=2") == [1, 2, 4]
    assert rungs("tune.first_rung=2") == [2, 6]
    assert rungs("tune.scheduler=none") == rungs("tune.scheduler=median") == []


def test_loss_is_better_when_it_is_lower() -> None:
    plan: Plan = load(TUNE, ["tune.metric=loss"])
    assert (plan.sign, plan.column) == (-1.0, "validation_loss")
    assert math.isclose(load(TUNE).sign, 1.0)


def test_values_of_a_grid_of_steps_lie_on_it() -> None:
    for low, high, step in ((4096, 16384, 128), (10_000, 10_009, 1)):
        values = {Domain("k", "quniform", (low, high, step)).at(n / 1000) for n in range(1000)}
        assert values == set(range(low, high + 1, step))
    assert Domain("k", "quniform", (0.0, 0.3, 0.1)).at(0.999) == 0.3
