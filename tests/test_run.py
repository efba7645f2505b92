"""Attempts: one owner at a time, whatever starts at once; the history has each step once."""

from __future__ import annotations

import json
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny import object_store

from emoray import run as runs
from emoray.errors import FencedError, RunError, RunExistsError
from emoray.run import HISTORY, Attempt, History, newest_attempt, read_history, refuse_changed
from emoray.storage import Storage

IDENTITY: dict[str, Any] = {"recipe": {"training.seed": 42, "data": {"dataset": "d"}}, "data": "0123456789abcdef"}


@pytest.fixture(params=["local", "objects"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run")) if request.param == "local" else object_store(tmp_path / "run")


def rows(*steps: int, loss: float = 1.0) -> list[dict[str, Any]]:
    return [{"step": step, "loss": loss} for step in steps]


# Attempts


def test_numbers_only_rise(run: Storage) -> None:
    assert newest_attempt(run) == 0
    assert [Attempt.begin(run, IDENTITY).number for _ in range(3)] == [1, 2, 3]
    assert newest_attempt(run) == 3
    assert run.names("attempts") == ["000001.json", "000002.json", "000003.json"]
    run.write("attempts/.writing-0badcafe", "not an attempt")
    run.write("attempts/notes.txt", "nor is this")
    assert Attempt.begin(run, IDENTITY).number == 4


def test_an_attempt_says_who_and_what(run: Storage) -> None:
    attempt = Attempt.begin(run, IDENTITY)
    content = runs.read_attempt(run, attempt.number)
    assert {"host", "pid", "started", "token", "recipe", "data"} <= content.keys()
    assert content["recipe"] == IDENTITY["recipe"] and content["data"] == IDENTITY["data"]


def test_the_older_attempt_is_fenced_off(run: Storage) -> None:
    old = Attempt.begin(run, IDENTITY)
    old.check()
    old.write("config.yaml", "old")
    new = Attempt.begin(run, IDENTITY)
    with pytest.raises(FencedError, match=r"attempt 1 stops, since attempt 2 took the run over \(process \d+ on "):
        old.check()
    with pytest.raises(FencedError):
        old.write("config.yaml", "too late")
    new.check()
    assert run.read_text("config.yaml") == "old"
    new.write("config.yaml", "new")
    assert run.read_text("config.yaml") == "new"


def test_a_command_tries_again_until_another_takes_over(run: Storage) -> None:
    first = Attempt.begin(run, IDENTITY)
    second = first.again()
    assert second.number == 2
    with pytest.raises(FencedError):
        first.check()
    second.check()
    other = Attempt.begin(run, IDENTITY)
    with pytest.raises(FencedError, match="attempt 2 stops, since attempt 3 took the run over"):
        second.again()
    assert newest_attempt(run) == other.number == 3
    other.check()


def test_a_replaced_run_fences_off_the_old_one(run: Storage) -> None:
    """Numbers go on rising when a run is deleted, or an attempt at the deleted one would own the new one."""
    old = [Attempt.begin(run, IDENTITY) for _ in range(3)][-1]
    for name in ("results.json", "history.jsonl", "best/config.json", "checkpoints/step-00000001/a"):
        old.write(name, "{}")
    runs.clear(run)
    assert run.names() == ["attempts"]
    with pytest.raises(FencedError):  # from the moment before the first file went
        old.check()
    runs.refuse_changed(run, {**IDENTITY, "recipe": {"a": 1}})  # killed here, another recipe may begin
    new = Attempt.begin(run, IDENTITY)
    assert new.number == 5
    new.check()


def test_only_a_run_is_replaced(run: Storage) -> None:
    runs.refuse_existing(run, "replace")
    run.write("letters.txt", "dear")
    with pytest.raises(RunExistsError, match=r"holds no run \(letters.txt\)"):
        runs.refuse_existing(run, "replace")
    Attempt.begin(run, IDENTITY)
    runs.refuse_existing(run, "replace")


def test_threads_that_begin_at_once_share_no_number(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path))
    together = threading.Barrier(8)

    def begin(_: int) -> list[int]:
        together.wait()
        return [Attempt.begin(folder, IDENTITY).number for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        numbers = [number for found in pool.map(begin, range(8)) for number in found]
    assert sorted(numbers) == list(range(1, 41))
    assert newest_attempt(folder) == 40


def _begin(location: str, together: Any, found: Any) -> None:
    together.wait(60)
    for _ in range(5):
        found.put(Attempt.begin(Storage(location), IDENTITY).number)


def test_processes_that_begin_at_once_share_no_number(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    together, found = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_begin, args=(str(tmp_path), together, found)) for _ in range(3)]
    for process in processes:
        process.start()
    numbers = [found.get(timeout=60) for _ in range(15)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(numbers) == list(range(1, 16))


def test_the_loser_of_a_number_takes_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On object stores two may write the same number; the one whose file was overwritten goes on to the next."""
    folder = object_store(tmp_path)
    write = Storage.write
    overtaken = False

    def overtake(self: Storage, name: str, content: str, *, exclusive: bool = False) -> None:
        nonlocal overtaken
        write(self, name, content, exclusive=exclusive)
        if not overtaken:
            overtaken = True
            write(self, name, json.dumps({**json.loads(content), "token": "another's"}))

    monkeypatch.setattr(Storage, "write", overtake)
    assert Attempt.begin(folder, IDENTITY).number == 2


# The same recipe


def test_a_run_goes_on_with_the_same_recipe_alone(run: Storage) -> None:
    refuse_changed(run, IDENTITY)
    Attempt.begin(run, IDENTITY)
    refuse_changed(run, IDENTITY)
    changed = {
        "recipe": {"training.seed": 7, "data": {"dataset": "e"}, "model.dropout": 0.1},
        "data": "fedcba9876543210",
    }
    with pytest.raises(RunExistsError) as caught:
        refuse_changed(run, changed)
    message = str(caught.value)
    assert '  - data.dataset was "d", is "e"\n' in message
    assert "  - model.dropout was null, is 0.1\n" in message
    assert "  - training.seed was 42, is 7\n" in message
    assert "  - the data was 0123456789ab..., is fedcba987654..." in message
    assert "run.on_existing=replace" in message


@pytest.mark.parametrize("content", ["", "{", "[1, 2", "\x00"])
def test_damaged_files_of_a_run_are_named(content: str, run: Storage) -> None:
    Attempt.begin(run, IDENTITY)
    run.write("attempts/000001.json", content)
    with pytest.raises(RunError, match=r"attempts/000001.json: is damaged, .*: set run.on_existing=replace"):
        refuse_changed(run, IDENTITY)
    run.write("results.json", content)
    with pytest.raises(RunError, match=r"results.json: is damaged, .*: delete it"):
        runs.results(run)


def test_results(run: Storage) -> None:
    assert runs.results(run) is None
    run.write("results.json", '{"best": {"f1": 0.5}}')
    assert runs.results(run) == {"best": {"f1": 0.5}}


# History


def test_history_goes_on_from_a_step(run: Storage) -> None:
    history = History(Attempt.begin(run, IDENTITY), 0)
    history.append(rows(1, 2, 3))
    history.append(rows(4, 5))
    history.flush()
    history.close()
    assert read_history(run) == rows(1, 2, 3, 4, 5)
    again = History(Attempt.begin(run, IDENTITY), 3)
    assert read_history(run) == rows(1, 2, 3)
    again.append(rows(4, 5, 6, loss=2.0))
    again.flush()
    again.close()
    assert read_history(run) == rows(1, 2, 3) + rows(4, 5, 6, loss=2.0)


def test_rows_are_in_a_local_file_at_once(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path))
    history = History(Attempt.begin(folder, IDENTITY), 0)
    history.append(rows(1))
    assert read_history(folder) == rows(1)
    history.close()


def test_an_old_attempt_that_goes_on_writing_is_not_seen(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path))
    old = History(Attempt.begin(folder, IDENTITY), 0)
    old.append(rows(1, 2, 3, 4))
    new = History(Attempt.begin(folder, IDENTITY), 2)
    for step in (5, 6):
        old.append(rows(step))  # it has not noticed yet
        new.append(rows(step - 2, loss=2.0))
    assert read_history(folder) == rows(1, 2) + rows(3, 4, loss=2.0)
    with pytest.raises(FencedError):
        old.flush()
    old.close()
    new.close()
    assert read_history(folder) == rows(1, 2) + rows(3, 4, loss=2.0)


def test_torn_lines_are_left_out(run: Storage) -> None:
    lines = [json.dumps(row) + "\n" for row in rows(1, 2, 3)]
    run.write(HISTORY, "".join(lines) + lines[0][:9])
    assert read_history(run) == rows(1, 2, 3)
    history = History(Attempt.begin(run, IDENTITY), 3)
    history.close()
    assert run.read_text(HISTORY) == "".join(lines)
