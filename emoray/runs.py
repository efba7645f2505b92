"""All runs and sweeps of a storage path beside each other: state, figures, time, and where their configs differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from emoray import checkpoint, run, sweep
from emoray.config import parse
from emoray.config_files import plain
from emoray.errors import EmorayError, StorageError
from emoray.storage import Storage, absolute, split_name
from emoray.wording import clock, count

_SHOWN = (("validation", "f1"), ("validation", "accuracy"), ("test", "f1"), ("test", "accuracy"))


@dataclass(frozen=True)
class RunSummary:
    """What is known of one run.

    Attributes:
        name: of its folder.
        state: "finished", "unfinished" or "damaged".
        started: when its first attempt began, as ISO 8601; None where that isn't known.
        attempts: how often it was begun or gone on with.
        seconds: of training, up to its last checkpoint; None before one.
        step: the last one with a checkpoint.
        validation: figures of the best evaluation; empty where there was none.
        test: figures of the test split; empty before the end.
        recipe: dotted config keys and the data's fingerprint, all that decides the weights.
        problem: what is wrong, where it is damaged.
        trials: how many trials a sweep has had so far, whose winner the figures are of; None for a run.
    """

    name: str
    state: str
    started: str | None = None
    attempts: int = 0
    seconds: float | None = None
    step: int | None = None
    validation: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    trials: int | None = None


def read(storage_path: str) -> list[RunSummary]:
    """The runs of a storage path (or the one run that it is), the best on validation first.

    Args:
        storage_path: as `run.storage_path`: a path or URI.

    Raises:
        StorageError: it isn't there, or holds no run.
    """
    place = Storage(absolute(storage_path))
    if not place.exists():
        raise StorageError(f"{storage_path}: no such folder; give the run.storage_path of your runs")
    if place.exists(run.ATTEMPTS):
        return [_summary(place, split_name(place.location)[1])]
    found = [_summary(place / name, name) for name in place.names() if place.exists(f"{name}/{run.ATTEMPTS}")]
    if not found:
        raise StorageError(f"{storage_path}: holds no run; give the run.storage_path of your runs")
    return sorted(found, key=lambda one: (one.state != "finished", -float(one.validation.get("f1", -1)), one.name))


def _summary(folder: Storage, name: str) -> RunSummary:
    try:
        if folder.exists(sweep.TRIALS):
            return _sweep(folder, name)
        attempts = run.newest_attempt(folder)
        first, last = (run.read_attempt(folder, number) for number in (1, attempts))
        config = parse(yaml.safe_load(folder.read_text(run.CONFIG)), f"{folder.location}/{run.CONFIG}")
        results = run.results(folder)
        progress = _progress(folder)
        metric = config.training.metric_for_best_model
        best = results["best"] if results else run.best_evaluation(progress.get("evaluations") or [], metric)
    except (EmorayError, yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        return RunSummary(name, "damaged", problem=" ".join(str(error).split()))
    return RunSummary(
        name=name,
        state="finished" if results else "unfinished",
        started=first["started"],
        attempts=attempts,
        seconds=progress.get("seconds"),
        step=progress.get("step"),
        validation=best or {},
        test=(results or {}).get("test") or {},
        recipe={**config.recipe(), "data": last["data"][:12]},
    )


def _sweep(folder: Storage, name: str) -> RunSummary:
    finished = folder.exists(sweep.RESULTS)
    results = run.read_json(folder, sweep.RESULTS, "delete it to have it written anew") if finished else {}
    best = results.get("best") or {}
    return RunSummary(
        name=name,
        state="finished" if finished else "unfinished",
        started=run.read_attempt(folder, 1)["started"],
        attempts=run.newest_attempt(folder),
        seconds=results.get("seconds"),
        validation=best.get("validation") or {},
        test=best.get("test") or {},
        trials=len(folder.names(sweep.TRIALS)),
    )


def _progress(folder: Storage) -> dict[str, Any]:
    steps = checkpoint.steps(folder)
    name = f"{checkpoint.name_of(steps[-1])}/{checkpoint.PROGRESS}" if steps else ""
    return dict(json.loads(folder.read(name))) if name and folder.exists(name) else {}


def differences(runs: Sequence[RunSummary]) -> dict[str, dict[str, Any]]:
    """The keys in which the recipes of whole runs differ: key -> run -> value (null where the key doesn't count)."""
    whole = [one for one in runs if one.recipe]
    keys = sorted({key for one in whole for key in one.recipe})
    table = {key: {one.name: one.recipe.get(key) for one in whole} for key in keys}
    return {key: row for key, row in table.items() if len({json.dumps(value) for value in row.values()}) > 1}


def as_dict(runs: Sequence[RunSummary]) -> dict[str, Any]:
    """For `--json`."""
    return {"runs": [one.__dict__ for one in runs], "differences": differences(runs)}


def text(runs: Sequence[RunSummary]) -> str:
    """A line a run, the best first, with what sets its recipe apart."""
    changed = differences(runs)
    width = max(4, *(len(one.name) for one in runs))
    lines = [f"{'run':<{width}}  {'state':<10}  {'validation':>17}  {'test':>17}  {'training':>9}  started"]
    lines.append(f"{'':<{width}}  {'':<10}  {'F1':>8} {'accuracy':>8}  {'F1':>8} {'accuracy':>8}")
    for one in runs:
        cells = [_figure(getattr(one, split), key) for split, key in _SHOWN]
        figures = f"{cells[0]} {cells[1]}  {cells[2]} {cells[3]}"
        taken = "-" if one.seconds is None else clock(one.seconds)
        started = (one.started or "")[:16].replace("T", " ")
        lines.append(f"{one.name:<{width}}  {one.state:<10}  {figures}  {taken:>9}  {started}".rstrip())
        trials = None if one.trials is None else f"sweep: {count(one.trials, 'trial')}, in {one.name}/{sweep.TRIALS}"
        apart = [f"{key}={plain(row[one.name])}" for key, row in changed.items() if one.name in row]
        lines += [f"{'':<{width}}  {part}" for part in (one.problem, trials, ", ".join(apart)) if part]
    return "\n".join(lines)


def _figure(figures: dict[str, Any], key: str) -> str:
    return f"{figures[key]:>8.4f}" if key in figures else f"{'-':>8}"
