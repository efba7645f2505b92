"""A run's folder: who may write it, its history, its results.

Attempts at a run are numbered. Whoever starts one writes `attempts/<number>.json` with the next number; the
highest number owns the run, and every attempt looks there before it writes. So a second driver, a job's retry
or a worker cut off by a broken network can never write over the newer one.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from emoray.config import RunConfig, column_and_sign
from emoray.config_files import flatten
from emoray.errors import FencedError, RunError, RunExistsError, StorageError
from emoray.storage import Storage, absolute, may_pass

ATTEMPTS = "attempts"
HISTORY = "history.jsonl"
RESULTS = "results.json"
CONFIG = "config.yaml"
REPORT = "report.html"
_MOST_CHANGES = 30
_LOOK_EVERY_S = 2.0
_CLEARED = "cleared"
"""Marks an attempt that only fences others off: it has no recipe that a later one could differ from."""


def open_run(config: RunConfig) -> Storage:
    """The folder of a run or a sweep; it needn't exist yet."""
    return Storage(absolute(config.storage_path)) / config.name


def results(run: Storage) -> dict[str, Any] | None:
    """The results of a finished run, else None."""
    return read_json(run, RESULTS, "delete it to have it written anew") if run.exists(RESULTS) else None


def best_evaluation(evaluations: Sequence[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The best of a run's evaluations, the earliest of equals; None where there is none.

    Args:
        metric: as `training.metric_for_best_model`.
    """
    column, sign = column_and_sign(metric)
    return max(evaluations, key=lambda entry: sign * float(entry[column]), default=None)


def refuse_existing(run: Storage, on_existing: str) -> None:
    """Raises RunExistsError where the folder holds what isn't to be continued, or isn't ours to delete.

    Args:
        on_existing: as `run.on_existing`.
    """
    if on_existing == "fail" and run.exists():
        raise RunExistsError(f"{run.location}: exists, and run.on_existing is fail: choose another run.name")
    names = run.names() if on_existing == "replace" else []
    if names and ATTEMPTS not in names:
        raise RunExistsError(
            f"{run.location}: holds no run ({', '.join(names[:3])}), so run.on_existing=replace does not delete it: "
            "choose another run.name or empty the folder"
        )


def clear(run: Storage, but: str = "") -> None:
    """Delete all of a run but its attempts, whose numbers go on rising.

    All earlier attempts are fenced off first: one that still trains could leave a checkpoint of its recipe behind.

    Args:
        but: one more name that stays.
    """
    Attempt.begin(run, {"recipe": {}, _CLEARED: True})
    for name in run.names():
        if name not in (ATTEMPTS, but):
            run.delete(name)


def read_json(run: Storage, name: str, remedy: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(run.read(name))
    except ValueError as error:
        raise RunError(f"{run.location}/{name}: is damaged, not valid JSON ({error}): {remedy}") from None
    return content


class Attempt:
    """One attempt at a run: the number that lets it write, and the checks that go with it.

    Args:
        run: the run's folder.
        number: this attempt's number, from `begin`.
    """

    def __init__(self, run: Storage, number: int) -> None:
        self.run = run
        self.number = number

    @staticmethod
    def begin(run: Storage, identity: Mapping[str, Any]) -> Attempt:
        """Take the run over: all earlier attempts may write no more.

        Args:
            identity: what decides the weights: `{"recipe": {...}, "data": fingerprint, "tokenizer": fingerprint}`.
        """
        return Attempt(run, _claim(run, {"command": uuid.uuid4().hex, **identity}))

    def again(self) -> Attempt:
        """The next attempt of the same command: the workers of this one may write no more.

        Raises:
            FencedError: where another command has taken the run over.
        """
        mine = read_attempt(self.run, self.number)
        return Attempt(self.run, _claim(self.run, mine, successor_of=self))

    def check(self) -> None:
        """Raises FencedError where a newer attempt has taken the run over."""
        newest = newest_attempt(self.run)
        if newest > self.number:
            raise self._fenced(newest)

    def _fenced(self, newest: int) -> FencedError:
        who = read_attempt(self.run, newest)
        return FencedError(
            f"{self.run.location}: attempt {self.number} stops, since attempt {newest} took the run over "
            f"(process {who['pid']} on {who['host']}, {who['started']}); nothing was written after that"
        )

    def must_be_seen(self, remedy: str) -> None:
        """Raises StorageError where this node doesn't see what the driver wrote, or can't write beside it."""
        if not self.run.exists(_attempt_file(self.number)):
            raise StorageError(f"can't see the folder {self.run.location}: {remedy}, e.g. NFS or s3://")
        self.run.must_be_writable()

    def write(self, name: str, content: bytes | str) -> None:
        """Write a file of the run, unless a newer attempt owns it."""
        self.check()
        self.run.write(name, content)


class Lease:
    """Looks now and then whether an attempt still owns its run; a storage that is away for a moment is forgiven.

    Whoever writes asks again, and isn't.
    """

    def __init__(self, attempt: Attempt) -> None:
        self._attempt, self._looked = attempt, time.monotonic()

    def look(self) -> None:
        """Raises FencedError where a newer attempt has taken the run over; asks only every few seconds."""
        if time.monotonic() - self._looked < _LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        with suppress(StorageError):
            self._attempt.check()


def _claim(run: Storage, content: Mapping[str, Any], successor_of: Attempt | None = None) -> int:
    """Write the next attempt's file, so that it owns the run.

    Args:
        successor_of: claim only where the newest attempt is of the same command.
    """
    while True:
        newest = newest_attempt(run)
        if successor_of is not None and read_attempt(run, newest)["command"] != content["command"]:
            raise successor_of._fenced(newest)
        token = uuid.uuid4().hex
        who = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        name = _attempt_file(newest + 1)
        try:
            run.write(name, json.dumps({**content, **who, "token": token}, indent=1), exclusive=True)
        except FileExistsError:
            continue
        # Object stores have no exclusive write: of two that wrote the same number, the last one has it.
        if read_attempt(run, newest + 1)["token"] == token:
            return newest + 1


def _attempt_file(number: int) -> str:
    return f"{ATTEMPTS}/{number:06d}.json"


def newest_attempt(run: Storage) -> int:
    """Highest number of an attempt at this run; 0 where there was none."""
    return max((int(name[:6]) for name in run.names(ATTEMPTS) if name[:6].isdigit()), default=0)


def read_attempt(run: Storage, number: int) -> dict[str, Any]:
    """What an attempt wrote when it began: its host and process, and the run's identity."""
    return read_json(run, _attempt_file(number), "set run.on_existing=replace to begin the run anew")


def refuse_changed(
    run: Storage,
    identity: Mapping[str, Any],
    holds: str = "a run of another recipe",
    remedy: str = "choose another run.name, or set run.on_existing=replace to delete it",
) -> None:
    """Raises RunExistsError with the differences where the run was begun with another recipe or other data.

    Args:
        holds: what it is then, for the message.
        remedy: what to do other than to give back the old values.
    """
    newest = newest_attempt(run)
    if newest == 0:
        return
    before = read_attempt(run, newest)
    if before.get(_CLEARED):
        return
    old, new = flatten(before["recipe"]), flatten(identity["recipe"])
    changes = [
        f"{key} was {json.dumps(old.get(key))}, is {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    for name in sorted(identity.keys() - {"recipe"}):
        if before.get(name) != identity[name]:
            changes.append(f"the {name} was {str(before.get(name))[:12]}..., is {identity[name][:12]}... (fingerprint)")
    if changes:
        more = [f"... ({len(changes)} differences)"] if len(changes) > _MOST_CHANGES else []
        listed = "\n".join(f"  - {change}" for change in [*changes[:_MOST_CHANGES], *more])
        raise RunExistsError(
            f"{run.location}: holds {holds}, so it can't be continued:\n{listed}\nRestore the old values, {remedy}."
        )


class History:
    """`history.jsonl`: one line a step, each step once, whatever happened in between.

    The file is taken over with the lines up to `step` and replaced through a rename: an earlier attempt that
    still holds it open goes on writing into a file that no one sees.

    Args:
        attempt: the attempt that writes.
        step: the step that training goes on from.
    """

    def __init__(self, attempt: Attempt, step: int) -> None:
        self._attempt = attempt
        self.rows = [row for row in read_history(attempt.run) if row["step"] <= step]
        self._stream: IO[str] | None = None
        self.flush()

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows; on a local filesystem they are in the file at once, elsewhere at the next `flush`."""
        self.rows += rows
        if self._stream is None:
            return
        try:
            self._stream.write("".join(json.dumps(row) + "\n" for row in rows))
            self._stream.flush()
        except OSError as error:
            stream, self._stream = self._stream, None
            with suppress(OSError):  # it would try to write the rest once more
                stream.close()
            raise StorageError(
                f"{self._attempt.run.location}/{HISTORY}: can't be written: {error}", may_pass(error)
            ) from error

    def flush(self) -> None:
        """Write the whole history, unless a newer attempt owns the run."""
        self.close()
        self._attempt.write(HISTORY, "".join(json.dumps(row) + "\n" for row in self.rows))
        if self._attempt.run.local_path is not None:
            self._stream = (self._attempt.run.local_path / HISTORY).open("a", encoding="utf-8")

    def settle(self) -> None:
        """Bring all rows to where a power cut can't take them: a checkpoint that follows must not know more steps."""
        stream = self._stream
        if stream is None:
            self.flush()
            return
        try:
            os.fsync(stream.fileno())
        except OSError as error:
            raise StorageError(
                f"{self._attempt.run.location}/{HISTORY}: can't be written: {error}", may_pass(error)
            ) from error

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def read_history(run: Storage) -> list[dict[str, Any]]:
    """Rows of history.jsonl, ascending by step; a line torn by a crash is left out."""
    if not run.exists(HISTORY):
        return []
    rows = []
    for line in run.read_text(HISTORY).splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
