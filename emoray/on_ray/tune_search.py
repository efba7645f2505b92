"""Values of trials that depend on earlier ones: Ray Tune's Optuna searcher, asked and told in the order of trials."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from typing import Any

from ray import tune

from emoray.errors import ConfigError
from emoray.search_space import Domain
from emoray.sweep import Sweep, Trial


class Suggestions:
    """Adds trials to a sweep whose values a searcher names; nothing to do where all are known from the start.

    Trial n is asked for when trials 0 .. n - `lag` have come to their first rung (or their end), and the searcher knows
    just these: so the values depend on figures and on `lag`, never on who was faster.

    Raises:
        ConfigError: Optuna is wanted, but not installed.
    """

    def __init__(self, sweep: Sweep, lag: int) -> None:
        self._sweep, self._lag = sweep, lag
        self._told = 0
        self._asked = 0
        self._searcher = _optuna(sweep) if sweep.plan.config.tune.searcher == "optuna" else None

    def add(self) -> bool:
        """Add the next trial, if its values can be known now; those that a record holds are asked for again first."""
        if self._searcher is None:
            return False
        while self._asked < self._sweep.planned:
            if not self._tell(self._asked - self._lag + 1):
                return False
            suggested = self._searcher.suggest(f"{self._asked:04d}")
            values = {
                domain.key: domain.rounded(suggested[domain.key.replace(".", ":")])
                for domain in self._sweep.plan.domains
            }
            self._asked += 1
            if self._asked > len(self._sweep.search):
                self._sweep.add(values)
                return True
        return False

    def _tell(self, count: int) -> bool:
        """Tell the searcher of the first `count` trials; False where one of them isn't far enough."""
        assert self._searcher is not None
        while self._told < count:
            trial = self._sweep.search[self._told]
            score = self._first_score(trial)
            if score is None and trial.state != "failed":
                return False
            result = None if score is None else {"score": score}
            with contextlib.redirect_stderr(None):
                self._searcher.on_trial_complete(f"{self._told:04d}", result, error=score is None)
            self._told += 1
        return True

    def _first_score(self, trial: Trial) -> float | None:
        """All trials are judged after as many evaluations: those that go on would look better for that alone."""
        rungs = self._sweep.plan.rungs()
        curve = self._sweep.curve(trial)
        if rungs and (len(curve) >= rungs[0] or (trial.over and curve)):
            return max(curve[: rungs[0]])
        return max(curve) if trial.over and curve else None


def _optuna(sweep: Sweep) -> Any:
    must_have_optuna()
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(logging.ERROR)
    # Ray Tune takes a dot or a slash in a name for a path.
    space = {domain.key.replace(".", ":"): _domain(domain) for domain in sweep.plan.domains}
    return OptunaSearch(space=space, metric="score", mode="max", seed=sweep.plan.config.tune.seed)


def must_have_optuna() -> None:
    """Raises ConfigError where Optuna isn't installed."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "config",
            ["tune.searcher: is optuna, which isn't installed here: pip install emoray[optuna], or use random"],
        )


def _domain(domain: Domain) -> Any:
    if domain.listed:
        return tune.choice(list(domain.args))
    return getattr(tune, domain.kind)(*domain.args)
