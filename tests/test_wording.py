"""The pieces that messages are made of."""

from __future__ import annotations

import pytest

from emoray.wording import at, clock, count, first_line, listing, nearest


def test_counts_and_places() -> None:
    assert [count(n, "row") for n in (0, 1, 2, 1204)] == ["0 rows", "1 row", "2 rows", "1,204 rows"]
    assert at("line", [4]) == "line 4" and at("line", [4, 9]) == "lines 4, 9"
    assert at("row", list(range(1, 8))) == "rows 1, 2, 3, 4, 5, ..."
    assert listing(["a", "b"]) == "a, b" and listing([1, 2, 3], 2) == "1, 2, ... (3 in all)"


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (65.9, "1:05"), (3599, "59:59"), (3725, "1:02:05")])
def test_times(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_an_error_that_says_nothing_has_its_type_s_name() -> None:
    """`str(MemoryError())` is empty, and doctor must live to tell."""
    assert first_line(MemoryError()) == "MemoryError" and first_line(ValueError("\n")) == "ValueError"
    assert first_line(ValueError("\n  no room\nmore of it")) == "no room"


def test_the_nearest_name() -> None:
    assert nearest("learning_rat", ["learning_rate", "seed"]) == " (did you mean 'learning_rate'?)"
    assert nearest("lr", ["labels", "learning_rate"]) == " (did you mean 'learning_rate'?)"
    assert nearest("batch_size", ["eval_size", "train_batch_size"]) == " (did you mean 'train_batch_size'?)"
    assert nearest("zzz", ["learning_rate", "seed"]) == ""
