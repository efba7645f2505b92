"""The output of `emoray predict`: parts named by their place, what is known of each, the one file they end in"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from emoray import run
from emoray.batch_format import Format
from emoray.batch_input import takes_in
from emoray.data_formats import FORMATS, suffix_of
from emoray.errors import ConfigError, DataError, RunExistsError
from emoray.run import ATTEMPTS, Attempt, read_json
from emoray.storage import Storage, absolute, below, split_name, split_options

KINDS = set(FORMATS.values()) - {"txt"}
SUMMARY = "summary.json"
_DONE, _PARTS = "done", "parts"
_READERS = 16
"""Notes are read by so many threads: on an object store each takes some 50 ms."""


class Output:
    """The place of a command's output.

    A folder holds the parts, and `_emoray/` with what is known of them. One file is put together from parts in
    `<file>.emoray/` at the end.

    Args:
        location: a path or URI; one that ends in .jsonl, .csv, .tsv or .parquet is a file, else a folder.
        kind: of the files; None takes the location's suffix, or `of_input`.
        of_input: kind of the input files.

    Raises:
        ConfigError: location and kind contradict each other.
    """

    def __init__(self, location: str, kind: str | None, of_input: str) -> None:
        self.location = "".join(split_options(absolute(location)))
        folder, self._name = split_name(self.location)
        suffix = FORMATS.get(suffix_of(self._name))
        self.is_file = suffix in KINDS
        if self.is_file and kind not in (None, suffix):
            raise ConfigError("--output", [f"'{location}' is {suffix} by its name, but --format is {kind}: change one"])
        self.kind = kind or (suffix if self.is_file and suffix else of_input)
        self._folder = Storage(folder)
        self.home = self._folder / (f"{self._name}.emoray" if self.is_file else f"{self._name}/_emoray")
        self.parts = self.home / _PARTS if self.is_file else Storage(self.location)

    def part(self, number: int) -> str:
        return f"part-{number:05d}.{self.kind}"

    def _note(self, number: int) -> str:
        return f"{_DONE}/{number:05d}.json"

    def must_be_usable(self, sources: Sequence[str], on_existing: str) -> None:
        """Raises an error where the output would be input, would cover what isn't ours, or can't be written."""
        inside = [self.location, below(self.location, self.part(0))]
        for source in sources:
            if any(takes_in(source, location) for location in inside):
                raise DataError(self.location, [f"lies in the input '{source}': choose another place for --output"])
        ours = ATTEMPTS in self.home.names()
        there = self._folder.exists(self._name)
        if (there or ours) and on_existing == "fail":
            raise RunExistsError(f"{self.location}: exists, and --on-existing is fail: choose another --output")
        if self.is_file and there and not self._folder.is_file(self._name):
            raise RunExistsError(f"{self.location}: is a folder: choose another --output")
        covers = there and not ours and (on_existing != "replace" if self.is_file else bool(self.parts.names()))
        if covers:
            remedy = ", or --on-existing replace" if self.is_file else ", or empty the folder"
            raise RunExistsError(
                f"{self.location}: exists, and `emoray predict` hasn't made it: choose another --output{remedy}"
            )
        self.home.must_be_writable()

    def clear(self) -> None:
        """Delete all but the attempts, whose numbers go on rising."""
        run.clear(self.home)
        if self.is_file:
            self._folder.delete(self._name)
            return
        for name in self.parts.names():
            if name.startswith("part-"):
                self.parts.delete(name)

    def finished(self, numbers: Iterable[int]) -> dict[str, Any] | None:
        """The summary, where nothing is left to do."""
        if not self.home.exists(SUMMARY):
            return None
        if self.is_file:
            whole = self._folder.is_file(self._name)
        else:
            whole = {self.part(number) for number in numbers} <= set(self.parts.names())
        return read_json(self.home, SUMMARY, "delete it to have it written anew") if whole else None

    def done(self) -> dict[int, dict[str, Any]]:
        """What is known of each part that is there."""
        there = set(self.parts.names())
        noted = [int(name[: -len(".json")]) for name in self.home.names(_DONE) if name[0].isdigit()]
        numbers = [number for number in noted if self.part(number) in there]
        with ThreadPoolExecutor(_READERS) as readers:
            notes = readers.map(lambda number: json.loads(self.home.read(self._note(number))), numbers)
            return dict(zip(numbers, notes, strict=True))

    def keep(self, number: int, content: bytes, note: dict[str, Any], attempt: Attempt) -> None:
        """Write a part, and then that it is there."""
        attempt.check()
        self.parts.write(self.part(number), content)
        attempt.write(self._note(number), json.dumps(note))

    def sweep(self) -> None:
        """Remove what a writer that was killed left half done."""
        for storage in (self.parts, self.home, self.home / _DONE):
            storage.sweep()
        if self.is_file:
            self._folder.sweep_file(self._name)

    def finish(self, count: int, form: Format, summary: dict[str, Any], attempt: Attempt) -> None:
        """Put the parts together where one file is wanted, and write the summary."""
        if self.is_file:
            attempt.check()
            with self._folder.growing(self._name) as sink:
                form.join((self.parts.read(self.part(number)) for number in range(count)), sink)
        attempt.write(SUMMARY, json.dumps(summary, indent=1))
        if self.is_file:
            self.home.delete(_PARTS)
            self.home.delete(_DONE)
