"""The input of `emoray predict`: finds its files and cuts them into pieces, a function of their content alone."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from emoray.batch_rows import Lines, Piece, footer_digest, read_rows
from emoray.data_files import NOT_DATA
from emoray.data_formats import FORMATS, NOT_UTF8, ONE_ARRAY, delimiter_of, is_utf16, suffix_of
from emoray.errors import DataError
from emoray.storage import Storage, absolute, below, split_name, split_options
from emoray.wording import first_line, listing, nearest

_READ = {suffix: kind for suffix, kind in FORMATS.items() if kind != "txt"}
_ROWS = 2048
"""Rows of a piece: few enough that a kill costs little, enough for batches of texts of the same length."""
_MOST_ROWS, _MOST_BYTES = 65_536, 1 << 26
"""A piece is held in memory."""
_PIECES = 2000
"""So many pieces at most, where that doesn't make them too large: each is a file."""
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class File:
    """An input file.

    Attributes:
        name: what it is called in messages and among the input's fingerprints: its place below what was given.
        location: path or URI.
        kind: "jsonl", "csv", "tsv" or "parquet".
    """

    name: str
    location: str
    kind: str
    size: int


@dataclass
class Input:
    """What there is to score.

    Attributes:
        pieces: in the order of their rows.
        prints: fingerprint of each file, by name.
        columns: of all files, in order of first appearance, with the JSON kinds of value met in text files (empty for
            Parquet).
        schema: a pyarrow schema of all columns where the files are Parquet, else None.
    """

    kind: str
    pieces: list[Piece] = field(default_factory=list)
    prints: dict[str, str] = field(default_factory=dict)
    columns: dict[str, set[str]] = field(default_factory=dict)
    schema: Any = None

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)


def find(sources: Sequence[str]) -> list[File]:
    """The files behind paths, URIs, folders and globs: in the order given, sorted within a folder or glob.

    Raises:
        DataError: all that is wrong with them.
    """
    found: list[File] = []
    problems: list[str] = []
    for number, source in enumerate(sources):
        files = _find(source, problems)
        prefix = f"{number + 1}/" if len(sources) > 1 else ""
        found += [replace(file, name=prefix + file.name) for file in files]
    twice = sorted(location for location, times in Counter(file.location for file in found).items() if times > 1)
    problems += [f"{location}: is named twice, so its rows would count twice" for location in twice]
    kinds = sorted({file.kind for file in found})
    if len({kind.replace("tsv", "csv") for kind in kinds}) > 1:
        problems.append(f"comes in several formats ({listing(kinds)}): score them one after the other")
    if problems:
        raise DataError(" ".join(sources[:3]), problems)
    return found


def _find(source: str, problems: list[str]) -> list[File]:
    location = absolute(source)
    storage = Storage(location)
    (place, options), (_, name) = split_options(location), split_name(location)
    if storage.is_file():
        kind = _READ.get(suffix_of(name))
        if kind is None:
            problems.append(f"'{source}' ends in '{suffix_of(name)}', but only {listing(list(_READ))} are read")
            return []
        with storage.opened() as stream:
            return [File(name, location, kind, stream.size())]
    pattern = None
    if not storage.exists() and (magic := _MAGIC.search(place)) is not None:
        pattern = place
        storage = Storage(place[: magic.start()].rsplit("/", 1)[0] + options)
    if not storage.exists():
        problems.append(f"'{source}': there is no such file or folder")
        return []
    files = [
        File(name, below(storage.location, name), _READ[suffix_of(name)], size)
        for name, size in sorted(storage.files().items())
        if suffix_of(name) in _READ and not _hidden(name) and _matches(below(storage.location, name), pattern)
    ]
    if not files:
        problems.append(f"'{source}': holds no file that ends in {listing(list(_READ))}")
    return files


def _hidden(name: str) -> bool:
    """As for Ray Data, Spark and pyarrow; so what `emoray predict` notes beside its own output isn't input."""
    *folders, last = name.split("/")
    return (
        last in NOT_DATA
        or any(part.startswith((".", "_")) for part in (*folders, last))
        or any(part.endswith(".emoray") for part in folders)
    )


def _matches(location: str, pattern: str | None) -> bool:
    """Shell-like: a folder that matches is taken with all it holds, and ** is any number of folders."""
    return pattern is None or _fits(split_options(location)[0].split("/"), pattern.split("/"))


def _fits(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return True
    if wanted[0] == "**" and _fits(parts, wanted[1:]):
        return True
    rest = wanted if wanted[0] == "**" else wanted[1:]
    return bool(parts) and fnmatchcase(parts[0], wanted[0]) and _fits(parts[1:], rest)


def takes_in(source: str, location: str) -> bool:
    """Whether a file at that place would be found behind `source`."""
    source, location = split_options(absolute(source))[0], split_options(location)[0]
    return location == source or location.startswith(f"{source}/") or _matches(location, source)


def cut(files: Sequence[File], text_column: str) -> Input:
    """Read all files once, and cut them into pieces.

    Raises:
        DataError: files that can't be read at all, or no row has the text column. Rows that are wrong are no problem.
    """
    found = Input(files[0].kind.replace("tsv", "csv"))
    problems: list[str] = []
    at_least = sum(file.size for file in files) // _PIECES
    for file in files:
        if file.kind == "parquet":
            _cut_parquet(file, files, found, problems)
        else:
            _cut_text(file, text_column, at_least, found, problems)
    if found.columns and text_column not in found.columns:
        close = nearest(text_column, found.columns)
        problems.append(
            f"no column '{text_column}'{close}; the columns are {listing(list(found.columns))}: give --text-column"
        )
    if problems:
        raise DataError(listing([file.location for file in files], 3), problems)
    return found


def _cut_text(file: File, text_column: str, at_least: int, found: Input, problems: list[str]) -> None:
    with Storage(file.location).opened() as stream:
        lines = Lines(io.BufferedReader(stream, 1 << 20))
        begin = _beginning(stream, file, lines, text_column, problems)
        if begin is None:
            return
        names, delimiter = begin
        for name in names:
            found.columns.setdefault(name, set()).add("str")
        whole = hashlib.sha256()
        start, first, rows = lines.offset, lines.number + 1, 0
        lines.new_digest()

        def close() -> None:
            digest = lines.digest.hexdigest()
            whole.update(digest.encode())
            number = len(found.pieces)
            place = (start, lines.offset, first, rows, digest)
            found.pieces.append(Piece(number, file.location, found.kind, *place, names, delimiter))
            lines.new_digest()

        for row in read_rows(lines, found.kind, names, delimiter):
            rows += 1
            if not names:
                _note_kinds(row.values, found.columns)
            size = lines.offset - start
            if (rows >= _ROWS and size >= at_least) or rows >= _MOST_ROWS or size >= _MOST_BYTES:
                close()
                start, first, rows = lines.offset, lines.number + 1, 0
        if rows:
            close()
    found.prints[file.name] = hashlib.sha256(f"{names} {delimiter} {whole.hexdigest()}".encode()).hexdigest()[:12]


def _note_kinds(values: dict[str, Any], columns: dict[str, set[str]]) -> None:
    for name, value in values.items():
        kinds = columns.setdefault(name, set())
        if value is not None:
            kinds.add("big" if type(value) is int and not -(1 << 63) <= value < 1 << 63 else type(value).__name__)


def _beginning(
    stream: Any, file: File, lines: Lines, text_column: str, problems: list[str]
) -> tuple[tuple[str, ...], str] | None:
    """Names of the columns and the delimiter of a csv file; `lines` stands behind its header then.

    Returns:
        Nothing where the file isn't what its name says.
    """
    head: bytes = stream.read(4)
    stream.seek(0)
    if is_utf16(head):
        problems.append(f"{file.name}: {NOT_UTF8}")
        return None
    if head.startswith(codecs.BOM_UTF8):
        lines.skip(len(codecs.BOM_UTF8))
    if file.kind == "jsonl":
        if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            problems.append(f"{file.name}: {ONE_ARRAY}")
            return None
        return (), ""
    usual = "\t" if file.kind == "tsv" else ","
    try:
        header = next(line for line in lines if not line.isspace())
        delimiter = delimiter_of(header.rstrip("\r\n"), [text_column], usual)
        names = tuple(name.strip() for name in next(csv.reader([header], delimiter=delimiter, strict=True)))
    except (StopIteration, csv.Error):
        problems.append(f"{file.name}: its first line must name the columns")
        return None
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        problems.append(f"{file.name}: its first line names {listing(twice)} twice: rename one")
        return None
    return names, delimiter


def _cut_parquet(file: File, files: Sequence[File], found: Input, problems: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    digest = hashlib.sha256()
    try:
        with Storage(file.location).opened() as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
            stream.seek(0)
            with pq.ParquetFile(stream) as opened:
                schema, total = opened.schema_arrow, opened.metadata.num_rows
                footer = footer_digest(stream)
        schemas = [schema] if found.schema is None else [found.schema, schema]
        found.schema = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        problems.append(f"{file.name}: can't be read with the others ({first_line(error)}): write it again")
        return
    for name in schema.names:
        found.columns.setdefault(name, set())
    # Files of about the same make: as many bytes a row in each
    share = file.size * _PIECES // max(sum(other.size for other in files), 1)
    fitting = _MOST_BYTES * total // max(file.size * 4, 1)  # compressed, they are some four times as small
    rows = max(1, min(max(_ROWS, total // max(share, 1)), _MOST_ROWS, fitting))
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        place = (start, stop, start + 1, stop - start, footer)
        found.pieces.append(Piece(len(found.pieces), file.location, "parquet", *place))
    found.prints[file.name] = digest.hexdigest()[:12]
