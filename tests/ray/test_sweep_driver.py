"""What a sweep's driver makes of what it finds, without Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

from emoray.errors import EmorayError, StorageError
from emoray.on_ray.stints import Course, Library, Stints
from emoray.on_ray.tune import _Driver
from emoray.run import Attempt
from emoray.search_space import Domain
from emoray.storage import Storage
from emoray.sweep import Sweep
from emoray.tune_config import load

ROOT = Path(__file__).parents[2]


class Table:
    """A sweep whose search is over, and whose repeats no record knows."""

    def __init__(self) -> None:
        self.trials = [SimpleNamespace(name="0000", over=True)]

    @property
    def over(self) -> bool:
        return all(trial.over for trial in self.trials)

    def settle(self) -> list[Any]:
        if len(self.trials) == 1:
            self.trials.append(SimpleNamespace(name="0000-seed43", over=False))
        return []


def test_a_sweep_that_was_killed_in_its_first_repeat_goes_on_with_it() -> None:
    driver = _Driver.__new__(_Driver)
    table = Table()
    driver.sweep, driver.signals = table, []  # type: ignore[assignment]
    driver.course = SimpleNamespace(error=None, stopping=None)  # type: ignore[assignment]
    driver._show = lambda: None  # type: ignore[method-assign]
    driver._mind = lambda thread: thread.join()  # type: ignore[method-assign]

    def fit() -> None:
        table.trials[1].over = True

    driver._fit = fit  # type: ignore[method-assign]
    driver.run()
    assert table.over and len(table.trials) == 2


def test_an_error_in_what_ray_tune_calls_ends_the_sweep_in_its_own_words() -> None:
    stints = Stints.__new__(Stints)
    stopped: list[bool] = []
    stints._course = SimpleNamespace(error=None, stopping=None)  # type: ignore[assignment]
    stints.stop = lambda: stopped.append(True)  # type: ignore[method-assign]
    error: EmorayError = StorageError("/sweep: can't be written: no space left")
    with stints._errors_end_the_sweep():
        raise error
    assert stints._course.error is error and "no space" in str(stints._course.stopping) and stopped == [True]


def test_suggested_values_that_do_not_go_together_fail_their_trial_alone(tmp_path: Path) -> None:
    """Optuna can name such values; ended by them, the sweep would meet them again at each further command."""
    sweep = Sweep(load(ROOT / "configs" / "tune.yaml", ["tune.searcher=optuna", "tune.num_trials=1"]), [])
    sweep.add({"training.weight_decay": 0.01, "training.compact_vocabulary": "on"})
    stints = Stints.__new__(Stints)
    attempt = Attempt.begin(Storage(str(tmp_path)), {"recipe": {}})
    stints._course, stints._sweep, stints._at_once, stints._live = Course(sweep, attempt), sweep, 1, {}
    stints._suggestions = SimpleNamespace(add=lambda: False)  # type: ignore[assignment]
    assert stints.suggest("a") == Searcher.FINISHED
    assert stints._course.error is None and sweep.trials[0].state == "failed"
    assert "compact_vocabulary is on" in sweep.trials[0].reason


@pytest.mark.parametrize(
    ("kind", "args", "value", "found"),
    [
        ("choice", (1e-5, 3.1623e-5), 3.1623e-5, 3.1623e-5),
        ("loguniform", (1e-5, 1e-3), 0.000123456, 0.0001235),
        ("quniform", (4096.0, 16384.0, 128.0), 16256.0, 16256.0),
        ("randint", (2, 6), 3, 3),
    ],
)
def test_suggested_values_are_short_where_they_may_be(kind: Any, args: Any, value: Any, found: Any) -> None:
    assert Domain("k", kind, args).rounded(value) == found


def test_what_trials_share_is_kept_for_those_that_run_alone() -> None:
    library = Library.__new__(Library)
    library._most = 2
    shelf, made = {"base": 0}, []

    def take(key: str) -> None:
        library._kept(shelf, key, lambda: made.append(key) or len(made))

    for key in ("a", "b", "base", "a", "c", "d", "base", "d"):
        take(key)
    assert list(shelf) == ["base", "c", "d"] and made == ["a", "b", "c", "d"]
    take("a")
    assert list(shelf) == ["base", "d", "a"]
    library._most = 5
    for key in ("x", "y", "z"):
        take(key)
        assert list(shelf)[:3] == ["base", "d", "a"]
