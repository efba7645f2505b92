"""Rows of `emoray predict`: pieces of text and Parquet files as rows or tables, and what is wrong with a row's text"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from emoray.data_formats import records
from emoray.errors import DataError
from emoray.storage import Storage
from emoray.wording import first_line


@dataclass(frozen=True)
class Piece:
    """Rows of one input file that become one part of the output.

    Attributes:
        number: its place among all pieces, from 0.
        file: path or URI.
        kind: "jsonl", "csv" or "parquet"; tsv is csv.
        start, stop: where it lies: bytes of a text file, rows of a Parquet file.
        first: number of its first line, for messages; 1-based.
        rows: how many there are.
        digest: sha256 of its bytes; of a Parquet file, of the whole file's footer.
        names: columns of a csv file.
        delimiter: of a csv file.
    """

    number: int
    file: str
    kind: str
    start: int
    stop: int
    first: int
    rows: int
    digest: str = ""
    names: tuple[str, ...] = ()
    delimiter: str = ","


@dataclass(frozen=True)
class Row:
    """A row of a text file.

    Attributes:
        values: by column.
        fault: why it can't be read as it should be, or None.
    """

    values: dict[str, Any]
    fault: str | None = None


class Lines:
    """Lines of a text file, or of a piece of one, as strings; knows what it has given out so far.

    Args:
        stream: binary, at the beginning of a line.
        number: lines before it in the file.

    Attributes:
        offset: bytes given out.
        number: lines given out, those before included.
        digest: of the bytes since `new_digest`.
    """

    def __init__(self, stream: Any, number: int = 0) -> None:
        self._stream = stream
        self.offset, self.number = 0, number
        self._undecodable: str | None = None
        self.new_digest()

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        raw: bytes = next(self._stream)
        self.offset += len(raw)
        self.number += 1
        self.digest.update(raw)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            place = f"byte {error.start + 1} of line {self.number} is 0x{raw[error.start]:02x}"
            self._undecodable = self._undecodable or f"not in UTF-8: {place}"
            return raw.decode(errors="replace")

    def skip(self, count: int) -> None:
        """Leave out bytes, such as a byte order mark."""
        self._stream.read(count)
        self.offset += count

    def new_digest(self) -> None:
        self.digest = hashlib.sha256()

    def take_fault(self) -> str | None:
        """What was wrong with the lines since the last call."""
        fault, self._undecodable = self._undecodable, None
        return fault


def read_rows(lines: Lines, kind: str, names: tuple[str, ...], delimiter: str) -> Iterator[Row]:
    """Rows as they come; when one is given out, no line beyond it has been taken.

    Args:
        names, delimiter: of a csv file, whose header lies before.
    """
    return _jsonl_rows(lines) if kind == "jsonl" else _csv_rows(lines, names, delimiter)


def _jsonl_rows(lines: Lines) -> Iterator[Row]:
    for line in lines:
        if line.isspace():
            continue
        fault = lines.take_fault()
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Row({}, fault or f"broken JSON in line {lines.number}: {error}")
            continue
        if isinstance(row, dict):
            yield Row(row, fault)
        else:
            yield Row({}, fault or f"line {lines.number} holds JSON that is not an object")


def _csv_rows(lines: Lines, names: tuple[str, ...], delimiter: str) -> Iterator[Row]:
    for _, record in records(csv.reader(lines, delimiter=delimiter, strict=True)):
        fault = lines.take_fault()
        if isinstance(record, csv.Error):
            yield Row({}, fault or f"can't be taken apart ({record}), near line {lines.number}")
        elif record:
            if len(record) != len(names):
                fault = fault or f"has {len(record)} fields, but the header {len(names)} (line {lines.number})"
            yield Row(dict(zip(names, record, strict=False)), fault)


def rows_of(piece: Piece) -> list[Row]:
    """The rows of a piece of a text file.

    Raises:
        DataError: the file isn't what it was when it was cut into pieces.
    """
    with Storage(piece.file).opened() as stream:
        stream.seek(piece.start)
        content = stream.read(piece.stop - piece.start)
    if hashlib.sha256(content).hexdigest() != piece.digest:
        raise _changed(piece)
    lines = Lines(iter(io.BytesIO(content)), piece.first - 1)
    return list(read_rows(lines, piece.kind, piece.names, piece.delimiter))


def table_of(piece: Piece) -> Any:
    """The rows of a piece of a Parquet file, as a pyarrow table.

    Raises:
        DataError: as `rows_of`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    storage = Storage(piece.file)
    try:
        with storage.opened() as stream, pq.ParquetFile(stream) as file:
            if footer_digest(stream) != piece.digest:
                raise _changed(piece)
            tables, before = [], 0
            for group in range(file.num_row_groups):
                after = before + file.metadata.row_group(group).num_rows
                if before < piece.stop and after > piece.start:
                    table = _row_group(piece.file, group, piece.digest)
                    start = max(piece.start - before, 0)
                    tables.append(table.slice(start, min(piece.stop - before, table.num_rows) - start))
                before = after
    except pa.ArrowException as error:
        raise DataError(piece.file, [f"is not a readable Parquet file ({first_line(error)})"]) from None
    return pa.concat_tables(tables)


def footer_digest(stream: Any) -> str:
    """sha256 of a Parquet file's footer, which says of each column where it lies, its sizes and its extremes.

    Args:
        stream: of pyarrow, which may be read from any place.
    """
    stream.seek(stream.size() - 8)
    length = int.from_bytes(stream.read(4), "little")
    stream.seek(stream.size() - 8 - length)
    return hashlib.sha256(stream.read(length)).hexdigest()


@lru_cache(maxsize=1)
def _row_group(file: str, group: int, _digest: str) -> Any:
    """A row group is read once for the pieces that follow each other in it."""
    import pyarrow.parquet as pq

    with Storage(file).opened() as stream, pq.ParquetFile(stream) as opened:
        return opened.read_row_group(group)


def _changed(piece: Piece) -> DataError:
    return DataError(
        piece.file, ["has changed since this command looked at it: give it again with --on-existing replace"]
    )


def texts_in(table: Any, column: str) -> list[Any]:
    """A column's values; bytes where a string isn't in UTF-8."""
    try:
        values: list[Any] = table.column(column).to_pylist()
    except UnicodeDecodeError:
        values = table.column(column).cast("large_binary").to_pylist()
    return [_decoded(value) if isinstance(value, bytes) else value for value in values]


def _decoded(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def fault_of(text: Any) -> str | None:
    """Why a text can't be scored, as a clause; None where it can."""
    if text is None:
        return "there is no text"
    if isinstance(text, bytes):
        return "the text is not in UTF-8"
    if not isinstance(text, str):
        return f"the text is not a string, but {str(text)[:40]!r} ({type(text).__name__})"
    if not text or text.isspace():
        return "the text is empty"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"the text holds half a character (a lone surrogate, at {error.start})"
    return None
