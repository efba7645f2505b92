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
from collections.abc import Mapping
from typing import IO, Any

from emoray import config as cfg
from emoray.config import TrainConfig
from emoray.errors import FencedError, RunExistsError
from emoray.storage import Storage

ATTEMPTS = "attempts"
HISTORY = "history.jsonl"
RESULTS = "results.json"
CONFIG = "config.yaml"


def open_run(config: TrainConfig) -> Storage:
    """The run's folder; it needn't exist yet."""
    return Storage(config.run.storage_path) / config.run.name


def results(run: Storage) -> dict[str, Any] | None:
    """The results of a finished run, else None."""
    if not run.exists(RESULTS):
        return None
    content: dict[str, Any] = json.loads(run.read_text(RESULTS))
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
            identity: what decides the weights: `{"recipe": {...}, "data": fingerprint}`.
        """
        while True:
            number = newest_attempt(run) + 1
            token = uuid.uuid4().hex
            who = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            name = f"{ATTEMPTS}/{number:06d}.json"
            try:
                run.write(name, json.dumps({**who, "token": token, **identity}, indent=1), exclusive=True)
            except FileExistsError:
                continue
            # Object stores have no exclusive write: of two that wrote the same number, the last one has it.
            if json.loads(run.read_text(name))["token"] == token:
                return Attempt(run, number)

    def check(self) -> None:
        """Raises FencedError where a newer attempt has taken the run over."""
        newest = newest_attempt(self.run)
        if newest > self.number:
            who = json.loads(self.run.read_text(f"{ATTEMPTS}/{newest:06d}.json"))
            raise FencedError(
                f"{self.run.location}: attempt {self.number} stops, since attempt {newest} took the run over "
                f"(process {who['pid']} on {who['host']}, {who['started']}); nothing was written after that"
            )

    def write(self, name: str, content: bytes | str) -> None:
        """Write a file of the run, unless a newer attempt owns it."""
        self.check()
        self.run.write(name, content)


def newest_attempt(run: Storage) -> int:
    """Highest number of an attempt at this run; 0 where there was none."""
    return max((int(name[:6]) for name in run.names(ATTEMPTS) if name[:6].isdigit()), default=0)


def refuse_changed(run: Storage, identity: Mapping[str, Any]) -> None:
    """Raises RunExistsError with the differences where the run was begun with another recipe or other data."""
    newest = newest_attempt(run)
    if newest == 0:
        return
    before = json.loads(run.read_text(f"{ATTEMPTS}/{newest:06d}.json"))
    old, new = cfg.flatten(before["recipe"]), cfg.flatten(identity["recipe"])
    changes = [
        f"{key} was {json.dumps(old.get(key))}, is {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if before["data"] != identity["data"]:
        changes.append(
            f"the data was {before['data'][:12]}..., is {identity['data'][:12]}... (fingerprint of texts and labels)"
        )
    if changes:
        listed = "\n".join(f"  - {change}" for change in changes)
        raise RunExistsError(
            f"{run.location}: holds a run of another recipe, so it can't be continued:\n{listed}\n"
            "Give back the old values, choose another run.name, or set run.on_existing=replace to delete it."
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
        if self._stream is not None:
            self._stream.writelines(json.dumps(row) + "\n" for row in rows)
            self._stream.flush()

    def flush(self) -> None:
        """Write the whole history, unless a newer attempt owns the run."""
        self.close()
        self._attempt.write(HISTORY, "".join(json.dumps(row) + "\n" for row in self.rows))
        if self._attempt.run.local_path is not None:
            self._stream = (self._attempt.run.local_path / HISTORY).open("a", encoding="utf-8")

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
