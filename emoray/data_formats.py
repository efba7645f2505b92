"""Reads one file of jsonl, csv, tsv, txt or Parquet into raw rows with their numbers.

Readers append one sentence to `problems` for each kind of problem and go on. What the rows must satisfy is
decided in `data_checks.py`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from emoray.wording import at, count, first_line, listing, nearest

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
}


_LONGEST = 1 << 24
"""Characters of a csv field; by Python's own limit, 131,072, a long text would end its row."""


class Columns(NamedTuple):
    """Names of the columns that are read."""

    text: str
    label: str
    language: str | None = None
    """None where languages are not asked for."""

    def names(self) -> list[str]:
        """Each name once."""
        return list(dict.fromkeys(name for name in self if name is not None))


@dataclass
class Rows:
    """Raw rows of one file or one Hub split; the lists run in parallel."""

    where: str
    unit: str
    """What `numbers` count, for messages: "line" or "row", 1-based."""
    numbers: list[int] = field(default_factory=list)
    texts: list[Any] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    names: tuple[str, ...] | None = None
    """What integer labels mean, where the source says so (a ClassLabel column)."""
    languages: list[Any] | None = None
    """As read; None where no language column was asked for."""
    whole: bool = True
    """False where a problem kept some rows from being read."""

    def add(self, number: int, text: Any, label: Any, language: Any = None) -> None:
        self.numbers.append(number)
        self.texts.append(text)
        self.labels.append(label)
        if self.languages is not None:
            self.languages.append(language)


def finding(rows: Rows, numbers: Sequence[int], what: str, remedy: str) -> str:
    """One sentence on all rows with the same problem."""
    return f"{rows.where}: {count(len(numbers), rows.unit)} {what} ({at(rows.unit, numbers)}): {remedy}"


def read_file(path: Path, where: str, columns: Columns, problems: list[str]) -> Rows:
    """Read one file by its suffix.

    Args:
        path: the file.
        where: its name in messages.
        columns: names of the columns to read.
        problems: gets one sentence for each kind of problem.
    """
    kind = FORMATS[path.suffix.lower()]
    rows = Rows(where, "row" if kind == "parquet" else "line")
    rows.languages = None if columns.language is None else []
    before = len(problems)
    try:
        if path.stat().st_size == 0:
            problems.append(f"{where}: is empty: remove the file or fill it")
        elif kind == "parquet":
            _read_parquet(path, rows, columns, problems)
        else:
            text = _decode(path.read_bytes(), rows, problems)
            if not text.strip():
                problems.extend([f"{where}: is empty: remove the file or fill it"] if len(problems) == before else [])
            elif kind == "jsonl":
                _read_jsonl(text, rows, columns, problems)
            elif kind == "txt":
                _read_txt(text, rows, columns, problems)
            else:
                _read_csv(text, rows, columns, problems, "\t" if kind == "tsv" else ",")
    except OSError as error:
        problems.append(f"{where}: can't be read: {error.strerror or error}")
    rows.whole = len(problems) == before
    return rows


def is_utf16(head: bytes) -> bool:
    return head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


NOT_UTF8 = "is UTF-16, but must be UTF-8: save it as UTF-8"
ONE_ARRAY = "is one JSON array, but must hold one object a line: convert it (jq -c '.[]')"


def suffix_of(name: str) -> str:
    """`.csv` of `a/b.CSV`; nothing where a name has none."""
    last = name.rsplit("/", 1)[-1]
    return f".{last.rsplit('.', 1)[-1].lower()}" if "." in last else ""


def _decode(raw: bytes, rows: Rows, problems: list[str]) -> str:
    """UTF-8 with or without a byte order mark; undecodable bytes are reported and replaced."""
    if is_utf16(raw):
        problems.append(f"{rows.where}: {NOT_UTF8}")
        return ""
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        pass
    bad, first = [], ""
    for number, line in enumerate(raw.split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            bad.append(number)
            first = first or f"byte {error.start + 1} of line {number} is 0x{line[error.start]:02x}"
    problems.append(finding(rows, bad, "not in UTF-8", f"{first}; save the file as UTF-8"))
    return raw.decode(errors="replace")


def _column_problem(where: str, column: str, existing: Sequence[str], key: str) -> str:
    return (
        f"{where}: no column '{column}'{nearest(column, existing)}; its columns are {listing(existing)}: "
        f"set data.{key} (of `emoray evaluate`: --{key.replace('_', '-')}) to one of them"
    )


def missing_columns(where: str, columns: Columns, existing: Sequence[str]) -> list[str]:
    keys = ("text_column", "label_column", "language_column")
    wanted = [(column, key) for column, key in zip(columns, keys, strict=True) if column is not None]
    return [_column_problem(where, column, existing, key) for column, key in wanted if column not in existing]


def _read_jsonl(text: str, rows: Rows, columns: Columns, problems: list[str]) -> None:
    if text.lstrip().startswith("["):
        problems.append(f"{rows.where}: {ONE_ARRAY}")
        return
    broken: list[int] = []
    others: list[int] = []
    seen: dict[str, None] = {}
    first = ""
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            broken.append(number)
            first = first or f"line {number}: {error}"
            continue
        if not isinstance(row, dict):
            others.append(number)
            continue
        seen.update(dict.fromkeys(row))
        rows.add(number, row.get(columns.text), row.get(columns.label), row.get(columns.language or ""))
    if broken:
        problems.append(finding(rows, broken, "of broken JSON", f"{first}; each line must be one whole JSON object"))
    if others:
        problems.append(finding(rows, others, "of JSON that is not an object", 'write {"text": ..., "label": ...}'))
    _drop_unless_columns(rows, columns, list(seen), problems)


def _drop_unless_columns(rows: Rows, columns: Columns, seen: list[str], problems: list[str]) -> None:
    """A column that no row has is one problem, not one a row."""
    missing = missing_columns(rows.where, columns, seen) if rows.numbers else []
    if missing:
        problems.extend(missing)
        rows.numbers, rows.texts, rows.labels = [], [], []
        rows.languages = None if rows.languages is None else []


def _read_txt(text: str, rows: Rows, columns: Columns, problems: list[str]) -> None:
    bare = []
    if columns.language is not None:
        problems.append(_column_problem(rows.where, columns.language, ["text", "label"], "language_column"))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace():
            continue
        words, semicolon, label = line.rstrip("\r").rpartition(";")
        if not semicolon:
            bare.append(number)
            continue
        rows.add(number, words, label)
    if bare:
        problems.append(finding(rows, bare, "without a ';' before the label", "write text;label"))


def _read_csv(text: str, rows: Rows, columns: Columns, problems: list[str], delimiter: str) -> None:
    header, first = text.lstrip("\r\n").split("\n", 1)[0], ""
    delimiter = delimiter_of(header, columns.names(), delimiter)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    broken: list[int] = []
    uneven: list[int] = []
    places: list[int] = []
    for number, record in records(reader):
        if isinstance(record, csv.Error):
            broken.append(number)
            first = first or f"{record}"
        elif not names and record:
            names = [name.strip() for name in record]
            missing = missing_columns(rows.where, columns, names)
            if missing:
                problems.extend(f"{sentence} (the first line must name the columns)" for sentence in missing)
                return
            places = [names.index(column) for column in columns if column is not None]
        elif record and len(record) != len(names):
            uneven.append(number)
        elif record:
            rows.add(number, *(record[place] for place in places))
    if broken:
        remedy = f"{first}; put texts with quotes or separators in quotes and double the quotes inside"
        problems.append(finding(rows, broken, "that can't be taken apart", remedy))
    if uneven:
        remedy = f"the header has {len(names)}; put texts that hold {delimiter!r} in double quotes"
        problems.append(finding(rows, uneven, "with a wrong number of fields", remedy))


def delimiter_of(header: str, columns: Sequence[str], usual: str) -> str:
    """What separates the fields of a csv file: spreadsheets in many countries write semicolons; its header settles it.

    Args:
        columns: names that the header must hold.
        usual: taken where it fits as well as others, or none does.
    """
    for delimiter in (usual, ";", "\t", ","):
        if set(columns) <= {name.strip().strip('"') for name in header.split(delimiter)}:
            return delimiter
    return usual


def records(reader: Any) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Records with the line they start on; the reader itself goes on after a broken one."""
    csv.field_size_limit(_LONGEST)
    while True:
        number = reader.line_num + 1
        try:
            yield number, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, error


def _read_parquet(path: Path, rows: Rows, columns: Columns, problems: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            missing = missing_columns(rows.where, columns, schema.names)
            if missing:
                problems.extend(missing)
                return
            table = file.read(columns=columns.names())
    except pa.ArrowException as error:
        problems.append(f"{rows.where}: is not a readable Parquet file ({first_line(error)}): write it again")
        return
    rows.names = _class_names(schema.metadata, columns.label)
    take_table(table, rows, columns, problems)


def take_table(table: Any, rows: Rows, columns: Columns, problems: list[str]) -> None:
    """Fill `rows` from a pyarrow table that has all columns."""
    rows.numbers = list(range(1, table.num_rows + 1))
    values: list[list[Any]] = []
    for name in columns:
        if name is None:
            continue
        try:
            values.append(table.column(name).to_pylist())
        except UnicodeDecodeError:
            bad = [n for n, v in enumerate(table.column(name).cast("large_binary").to_pylist(), 1) if not _is_utf8(v)]
            problems.append(finding(rows, bad, f"whose '{name}' is not in UTF-8", "write it again in UTF-8"))
            rows.numbers = []
            return
    rows.texts, rows.labels = values[:2]
    rows.languages = values[2] if columns.language is not None else None


def _is_utf8(value: bytes | None) -> bool:
    try:
        return value is None or value.decode() is not None
    except UnicodeDecodeError:
        return False


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """What the ids mean, from the features that `datasets` stores in the Parquet files it writes."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(feature["names"]) if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None
