"""What a sweep's driver makes of what it finds, without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from emoray.errors import EmorayError, StorageError
from emoray.on_ray.stints import Library, Stints
from emoray.on_ray.tune import _Driver
from emoray.on_ray.tune_search import _plain
from emoray.search_space import Domain


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
    with stints._told():
        raise error
    assert stints._course.error is error and "no space" in str(stints._course.stopping) and stopped == [True]


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
    assert _plain(Domain("k", kind, args), value) == found


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
