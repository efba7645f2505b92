"""A sweep's report.html: which values were tried, what came of them, which of them mattered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from emoray import report, sweep_plots
from emoray.config_files import flatten
from emoray.metrics import TITLES
from emoray.search_space import shown

if TYPE_CHECKING:
    from emoray.metrics import Array
    from emoray.search_space import Domain
    from emoray.sweep import Sweep, Trial


def render(sweep: Sweep, results: Mapping[str, Any]) -> str:
    """The report as HTML text.

    Args:
        results: the content of sweep.json.
    """
    tuned = sweep.plan.config.tune
    title = TITLES[tuned.metric]
    return report.page(
        "sweep.html.j2",
        run={"name": sweep.plan.config.run.name},
        detail=None,
        tuned=tuned,
        title=title,
        results=results,
        winner=sweep.ranking()[0],
        rows=_rows(sweep),
        keys=[domain.key for domain in sweep.plan.domains],
        pictures=pictures(sweep, title),
        repeats=[(trial, sweep.mean(trial), sweep.spread(trial), sweep.draws(trial)) for trial in sweep.ranking()]
        if tuned.repeats
        else [],
        recipe=report.sections(_shared(sweep)),
    )


def _shared(sweep: Sweep) -> dict[str, Any]:
    """The base's keys that no trial changes, dotted."""
    own = {"training.metric_for_best_model", *(domain.key for domain in sweep.plan.domains)}
    base = flatten(sweep.plan.base.model_dump(mode="json"))
    return {key: value for key, value in base.items() if key not in own and not key.startswith("run.")}


def pictures(sweep: Sweep, title: str) -> list[tuple[str, str]]:
    """Captions and pictures: the metric against each key, all keys at once, the curves, what mattered."""
    dots = [(trial, sweep.plan.sign * sweep.score(trial)) for trial in sweep.search if trial.evaluations]
    if not dots:
        return []
    found = [
        (f"{title} against {domain.key}", sweep_plots.against(domain, dots, title)) for domain in sweep.plan.domains
    ]
    curves = [(trial, [sweep.plan.sign * value for value in sweep.curve(trial)]) for trial, _ in dots]
    found.append(("Learning curves; a cross is where a trial was stopped", sweep_plots.curves(curves, title)))
    if len(sweep.plan.domains) > 1:
        found.append(
            ("All keys at once; strong lines came to their end", sweep_plots.parallel(sweep.plan.domains, dots, title))
        )
    if weights := importance(sweep):
        found.append(("Which key mattered: share of the variation that it explains alone", sweep_plots.bars(weights)))
    return found


def importance(sweep: Sweep) -> dict[str, float]:
    """Share of the metric's variance over trials that each key explains by itself, adjusted for its freedom; 0 to 1.

    Trials are compared at their first rung, which all have passed. Of numbers a parabola (over the logarithm where they
    were drawn so), of a few listed values their means. With a handful of trials it is a hint, no more.
    """
    rungs = sweep.plan.rungs()
    trials = [trial for trial in sweep.search if trial.evaluations]
    scores = np.array([max(sweep.curve(trial)[: rungs[0] if rungs else None]) for trial in trials])
    if len(trials) < 5 or not np.isfinite(scores).all() or np.ptp(scores) == 0:
        return {}
    return {domain.key: round(_explained(domain, trials, scores), 4) for domain in sweep.plan.domains}


def _explained(domain: Domain, trials: list[Trial], scores: Array) -> float:
    values = [trial.values[domain.key] for trial in trials]
    if domain.listed:
        groups = [np.array([value == other for value in values]) for other in domain.args]
        groups = [group for group in groups if group.any()]
        fitted = sum((scores[group].mean() * group for group in groups), np.zeros(len(scores)))
        freedom = len(groups) - 1
    else:
        x = np.array([math.log(v) if domain.kind == "loguniform" else float(v) for v in values])
        freedom = min(2, len(set(values)) - 1)
        x = (x - x.mean()) / (x.std() or 1.0)
        fitted = np.polyval(np.polyfit(x, scores, freedom), x)
    left = len(scores) - 1 - freedom
    if freedom < 1 or left < 1:
        return 0.0
    unexplained = ((scores - fitted) ** 2).sum() / ((scores - scores.mean()) ** 2).sum()
    return float(np.clip(1 - unexplained * (len(scores) - 1) / left, 0, 1))


def _rows(sweep: Sweep) -> list[dict[str, Any]]:
    """A line a trial, the best first."""
    return [
        {
            "trial": trial,
            "values": [shown(trial.values.get(domain.key)) for domain in sweep.plan.domains],
            "best": sweep.best_evaluation(trial),
            "epochs": trial.evaluations[-1]["epoch"] if trial.evaluations else None,
        }
        for trial in sweep.best_first()
    ]
