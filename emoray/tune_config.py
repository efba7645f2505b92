"""What `emoray tune` reads: `configs/tune.yaml`, in the manner of config.py, and the trials that follow from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from emoray import search_space
from emoray.config import BestMetric, RunConfig, TrainConfig, column_and_sign
from emoray.config_files import (
    Number,
    PositiveInt,
    Section,
    blame,
    flatten,
    override,
    override_tree,
    read_yaml,
    validate,
)
from emoray.errors import ConfigError
from emoray.search_space import Domain
from emoray.wording import nearest

METRICS = get_args(BestMetric)
_SHARED = ("model", "data", "training", "workers")
_FIXED = {
    "run.": "the sweep names the folders of its runs",
    "data.": "figures on different data can't be compared",
    "workers.": "all trials get the same workers",
    "training.metric_for_best_model": "tune.metric decides that",
    "training.evaluations_per_epoch": "trials are compared after the same share of their training",
}


class SweepSection(Section):
    num_trials: PositiveInt = 16
    """How many trials; the searcher `grid` has as many as there are combinations."""
    searcher: Literal["random", "grid", "optuna"] = "random"
    """Where values come from; optuna (Bayesian, TPE) needs `pip install emoray[optuna]`."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """Who is stopped early: successive halving, those below the median, or no one."""
    metric: str = "f1"
    """Validation metric that trials are compared by, and that picks a trial's best checkpoint."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether more is better; `auto` knows."""
    max_concurrent: PositiveInt | Literal["auto"] = "auto"
    """Trials at once; `auto` is as many as there are GPUs for, or one on each node without GPUs."""
    reduction_factor: Annotated[int, Number, Field(ge=2, le=16)] = 3
    """At each rung one trial of so many goes on, and rungs lie so many times further apart (asha)."""
    first_rung: PositiveInt = 1
    """No trial is stopped before so many evaluations."""
    repeats: Annotated[int, Number, Field(ge=0, le=100)] = 0
    """Train the best trials again so many times, with other seeds; the best mean wins."""
    repeat_best: PositiveInt = 3
    """How many of the best trials `repeats` is for."""
    seed: Annotated[int, Number, Field(ge=0, lt=2**32)] = 0
    """Decides which values are drawn. Trials share `training.seed`."""
    max_minutes: Annotated[float, Number, Field(gt=0)] | None = None
    """Stop a command after so many minutes; the same command goes on."""
    max_gpu_hours: Annotated[float, Number, Field(gt=0)] | None = None
    """Stop when trials have used so many hours of GPUs (of workers, where there are none), in all commands together;
    the same command with more goes on."""

    @field_validator("metric")
    @classmethod
    def _a_run_reports_it(cls, metric: str) -> str:
        if metric not in METRICS:
            raise ValueError(f"no run reports it{nearest(metric, METRICS)}; there are {', '.join(METRICS)}")
        return metric

    @model_validator(mode="after")
    def _mode_fits_metric(self) -> SweepSection:
        right = "min" if self.metric == "loss" else "max"
        if self.mode not in ("auto", right):
            raise ValueError(f"mode is {self.mode}, but of {self.metric} the {right}imum is best: leave it out")
        return self


class TuneConfig(Section):
    """A whole sweep: `configs/tune.yaml`."""

    run: RunConfig = RunConfig(name="sweep")
    base: str | None = None
    """The training config that trials override, beside this file; null begins with the defaults."""
    model: dict[str, Any] = Field(default={})
    """What differs from the base in all trials."""
    data: dict[str, Any] = Field(default={})
    training: dict[str, Any] = Field(default={})
    workers: dict[str, Any] = Field(default={})
    search: dict[str, Any] = Field(default={})
    """The dotted keys that differ between trials, each with its distribution."""
    tune: SweepSection = SweepSection()


@dataclass(frozen=True)
class Plan:
    """A sweep, checked.

    Attributes:
        config: as read.
        base: what all trials share.
        domains: what differs between them.
    """

    config: TuneConfig
    base: TrainConfig
    domains: tuple[Domain, ...]

    @property
    def sign(self) -> float:
        """1 where more of the metric is better, else -1."""
        return column_and_sign(self.config.tune.metric)[1]

    @property
    def column(self) -> str:
        """The metric's name in an evaluation."""
        return column_and_sign(self.config.tune.metric)[0]

    def points(self) -> list[dict[str, Any]] | None:
        """The values of all trials, where they are known before the first one ends."""
        tune = self.config.tune
        if tune.searcher == "grid":
            return search_space.grid(self.domains)
        return search_space.draw(self.domains, tune.num_trials, tune.seed) if tune.searcher == "random" else None

    def rungs(self) -> list[int]:
        """After how many evaluations trials are compared."""
        tune, rungs = self.config.tune, []
        place = tune.first_rung
        while tune.scheduler == "asha" and place < evaluations(self.base):
            rungs.append(place)
            place *= tune.reduction_factor
        return rungs

    def trial(self, name: str, storage: str, values: Mapping[str, Any]) -> TrainConfig:
        """The training config of a trial: the base with its values, in a folder of the sweep's.

        Raises:
            ConfigError: where the values don't go together.
        """
        given = {"training.metric_for_best_model": self.config.tune.metric, **values}
        overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()]
        places = [f"run.name={json.dumps(name)}", f"run.storage_path={json.dumps(storage)}", "run.on_existing=resume"]
        return override(self.base, [*overrides, *places], f"trial {name}")

    def recipe(self) -> dict[str, Any]:
        """What decides the trials and who wins; the same sweep is continued only where it is the same."""
        free = {"max_concurrent", "max_minutes", "max_gpu_hours"}
        tune = {f"tune.{k}": v for k, v in self.config.tune.model_dump(mode="json").items() if k not in free}
        search = {f"search.{domain.key}": {domain.kind: list(domain.args)} for domain in self.domains}
        return {**tune, **{key: json.dumps(value) for key, value in search.items()}, **self.base.recipe()}

    def to_config(self) -> TuneConfig:
        """The same sweep as one file that needs no other."""
        sections = self.base.model_dump(mode="json")
        return self.config.model_copy(update={"base": None, **{name: sections[name] for name in _SHARED}})


def evaluations(config: TrainConfig) -> int:
    """How many evaluations a whole run has (fewer where `max_steps` or early stopping ends it)."""
    return config.training.num_epochs * config.training.evaluations_per_epoch


def load(path: str | Path, overrides: Iterable[str] = ()) -> Plan:
    """A sweep: defaults < base < YAML file < `key.path=value` overrides.

    `training.num_epochs=3` is for all trials, `search.training.seed={choice: [1, 2]}` replaces what is searched.

    Raises:
        ConfigError: with every problem found.
    """
    tree, overrides = read_yaml(path), list(overrides)
    for section in ("search", *_SHARED):
        if isinstance(tree.get(section), dict):
            tree[section] = _nested(tree[section])
    problems = override_tree(tree, overrides)
    tree["run"] = tree.get("run") or {}
    if isinstance(tree["run"], dict):
        tree["run"].setdefault("name", "sweep")
    config = None
    try:
        config = validate(tree, TuneConfig, str(path), problems)
    except ConfigError as error:
        problems = error.problems
    base, wrong = _base(tree, Path(path).parent)
    problems += wrong
    known = list(flatten((base or TrainConfig()).model_dump()))
    search = tree.get("search")
    domains, wrong = search_space.parse(search if isinstance(search, dict) else {}, known)
    problems += wrong + [problem for domain in domains for problem in _refused(domain, base or TrainConfig())]
    if not search:
        problems.append(
            "search: is empty: name at least one key, e.g. training.learning_rate: {loguniform: [1e-5, 1e-3]}"
        )
    if config is not None:
        problems += _disagreements(config.tune, domains, base)
    if config is None or base is None or problems:
        raise blame(str(path), overrides, problems)
    plan = Plan(config, base, tuple(domains))
    _must_go_together(plan, str(path))
    return plan


def _nested(section: Mapping[str, Any]) -> dict[str, Any]:
    """`{"training.learning_rate": x}` as `{"training": {"learning_rate": x}}`, which overrides can reach."""
    nested: dict[str, Any] = {}
    for key, value in section.items():
        place = nested
        *parents, leaf = str(key).split(".")
        for parent in parents:
            inner = place.setdefault(parent, {})
            place = inner if isinstance(inner, dict) else place
        if isinstance(value, dict) and isinstance(place.get(leaf), dict):
            place[leaf].update(_nested(value))
        else:
            place[leaf] = _nested(value) if isinstance(value, dict) else value
    return nested


def _base(tree: Mapping[str, Any], folder: Path) -> tuple[TrainConfig | None, list[str]]:
    """What all trials share, and what is wrong with it."""
    name = tree.get("base")
    try:
        whole = read_yaml(folder / str(name)) if name is not None else {}
        for section in _SHARED:
            shared = tree.get(section)
            if isinstance(shared, dict):
                inherited = whole.get(section)
                whole[section] = {**(inherited if isinstance(inherited, dict) else {}), **shared}
        whole.pop("run", None)
        base = validate(whole, TrainConfig, str(name), [])
    except ConfigError as error:
        where = "base: " if any("no such file" in problem for problem in error.problems) else ""
        return None, [f"{where}{error.subject}: {p}" if where else p for p in error.problems]
    if base.workers.elastic:
        return base, [
            f"workers.num_workers: is {list(base.workers.num_workers)}, but trials beside each other "  # type: ignore[arg-type]
            "need a fixed number"
        ]
    return base, []


def _refused(domain: Domain, base: TrainConfig) -> list[str]:
    """Why a key can't be searched, or which of its values the training config refuses."""
    for prefix, why in _FIXED.items():
        if domain.key.startswith(prefix):
            return [f"search.{domain.key}: can't be searched, since {why}"]
    problems: list[str] = []
    for value in domain.extremes:
        try:
            override(base, [f"{domain.key}={json.dumps(value)}"])
        except ConfigError as error:
            problems += [f"search.{domain.key}: {domain.kind} reaches {value!r}: {p}" for p in error.problems]
    return problems


def _disagreements(tune: SweepSection, domains: list[Domain], base: TrainConfig | None) -> list[str]:
    """What is possible by itself, but not together."""
    problems = []
    loose = [domain.key for domain in domains if not domain.listed]
    if tune.searcher == "grid" and loose:
        problems.append(f"tune.searcher: is grid, but {loose[0]} has no list of values: give it {{grid: [...]}}")
    if tune.searcher == "optuna" and (gridded := [domain.key for domain in domains if domain.kind == "grid"]):
        problems.append(f"tune.searcher: is optuna, but {gridded[0]} has a grid: write choice")
    size = math.prod(domain.size for domain in domains)
    if tune.searcher == "random" and domains and size < tune.num_trials:
        problems.append(
            f"tune.num_trials: is {tune.num_trials}, but there are only {size:g} combinations, and trying one twice "
            f"tells nothing: lower it to {size:g}, or widen the search"
        )
    if tune.repeats and "training.seed" in [domain.key for domain in domains]:
        problems.append("tune.repeats: trains again with other seeds, but training.seed is searched: drop one of them")
    if base is not None and tune.scheduler == "asha" and evaluations(base) <= tune.first_rung:
        problems.append(
            f"tune.scheduler: asha compares trials after evaluation {tune.first_rung}, but a run has only "
            f"{evaluations(base)}: raise training.evaluations_per_epoch or set tune.scheduler to none"
        )
    return problems


def _must_go_together(plan: Plan, subject: str) -> None:
    """Raises ConfigError where a trial's values, each possible by itself, are refused together."""
    problems: list[str] = []
    for number, values in enumerate(plan.points() or []):
        try:
            plan.trial(f"{number:04d}", "runs", values)
        except ConfigError as error:
            problems += [f"trial {number} ({values}): {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(subject, problems)
