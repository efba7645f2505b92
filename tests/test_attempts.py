"""Who may write a run: a number that only rises, one for each start of workers."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from emoray.errors import FencedError
from emoray.run import Attempt, newest_attempt
from emoray.storage import Storage

IDENTITY = {"recipe": {"training.seed": 1}, "data": "f" * 64}


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def test_the_newest_has_the_run(run: Storage) -> None:
    older, newer = Attempt.begin(run, IDENTITY), Attempt.begin(run, IDENTITY)
    newer.write("config.yaml", "new")
    with pytest.raises(FencedError, match="attempt 1 stops, since attempt 2 took the run over"):
        older.write("config.yaml", "old")
    assert run.read_text("config.yaml") == "new"


def test_workers_that_are_started_again_fence_off_those_before(run: Storage) -> None:
    """A worker that a broken network cut off belongs to the same command, and must write no more all the same."""
    command = Attempt.begin(run, IDENTITY)
    cut_off = command.again()
    cut_off.check()
    started_again = command.again()
    started_again.check()
    with pytest.raises(FencedError):
        cut_off.check()


def test_workers_of_an_older_command_do_not_take_the_run_back(run: Storage) -> None:
    older = Attempt.begin(run, IDENTITY)
    older.again()
    newer = Attempt.begin(run, IDENTITY)
    with pytest.raises(FencedError, match=f"since attempt {newer.number} took the run over"):
        older.again()
    newer.check()


def test_attempts_that_begin_at_the_same_time_get_numbers_of_their_own(run: Storage) -> None:
    numbers: list[int] = []
    barrier = threading.Barrier(8)

    def begin() -> None:
        barrier.wait()
        numbers.append(Attempt.begin(run, IDENTITY).number)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 9))
    assert newest_attempt(run) == 8
