"""Predictions beside the columns of their rows, as jsonl, csv or Parquet"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emoray.errors import DataError
from emoray.prediction import Prediction
from emoray.wording import listing

_GROUP_ROWS = 65_536
"""Rows of a row group, where parts are joined to one Parquet file."""


@dataclass(frozen=True)
class Format:
    """How the output looks: the same for every part.

    Attributes:
        kind: "jsonl", "csv", "tsv" or "parquet".
        prefix: begins the name of each new column.
        labels: of the model, in the order of their ids.
        columns: of the input, with the kinds of value in each, as in `Input`.
        schema: pyarrow schema of the input's columns where it is Parquet, else None.
    """

    kind: str
    prefix: str
    labels: tuple[str, ...]
    columns: Mapping[str, set[str]]
    schema: Any = None

    @property
    def added_columns(self) -> list[str]:
        """Names of the columns that are added. In csv a label's score is a column of its own."""
        scores = [f"scores.{label}" for label in self.labels] if self.kind in ("csv", "tsv") else ["scores"]
        return [f"{self.prefix}{name}" for name in ("label", "score", *scores, "truncated", "tokens", "error")]

    def must_not_clash(self) -> None:
        """Raises DataError where the input has a column of the same name as a new one."""
        both = [name for name in self.added_columns if name in self.columns]
        if both:
            raise DataError(
                "The input",
                [
                    f"has {'columns' if len(both) > 1 else 'a column'} {listing(both)} already, where predictions go: "
                    "name theirs otherwise, e.g. --prefix predicted_, or rename yours"
                ],
            )

    def encode(self, kept: Any, verdicts: Sequence[Prediction | str], header: bool) -> bytes:
        """A part of the output.

        Args:
            kept: the input's rows: a list of `batch_rows.Row`, or a pyarrow table.
            verdicts: of each row the prediction, or why there is none.
            header: whether a csv part names its columns.
        """
        added = [self._added(verdict) for verdict in verdicts]
        if self.kind == "parquet":
            return self._parquet(kept, added)
        rows = [row.values for row in kept] if isinstance(kept, list) else _rows(kept)
        if self.kind == "jsonl":
            return b"".join(_json_line({**row, **values}) for row, values in zip(rows, added, strict=True))
        return self._csv([{**row, **values} for row, values in zip(rows, added, strict=True)], header)

    def _added(self, verdict: Prediction | str) -> dict[str, Any]:
        if isinstance(verdict, str):
            return {**dict.fromkeys(self.added_columns), f"{self.prefix}error": verdict}
        scores: list[Any] = [verdict.scores[label] for label in self.labels]
        if self.kind not in ("csv", "tsv"):
            scores = [dict(zip(self.labels, scores, strict=True))]
        values = (verdict.label, verdict.score, *scores, verdict.truncated, verdict.tokens, None)
        return dict(zip(self.added_columns, values, strict=True))

    def _csv(self, rows: list[dict[str, Any]], header: bool) -> bytes:
        text, names = io.StringIO(), [*self.columns, *self.added_columns]
        delimiter = "\t" if self.kind == "tsv" else ","
        writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
        quoting = csv.writer(text, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        if header:
            writer.writerow(names)
        for row in rows:
            cells = [_cell(row.get(name)) for name in names]
            # Before Python 3.13 a lone \r is left unquoted, which readers take for a line's end.
            (quoting if any(isinstance(cell, str) and "\r" in cell for cell in cells) else writer).writerow(cells)
        return text.getvalue().encode(errors="backslashreplace")

    def _parquet(self, kept: Any, added: list[dict[str, Any]]) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = self._whole_schema()
        if isinstance(kept, list):
            arrays = [_array([row.values.get(name) for row in kept], schema.field(name).type) for name in self.columns]
        else:
            there = set(kept.column_names)
            arrays = [
                kept.column(name).cast(schema.field(name).type, safe=False)  # whole numbers beyond 2**53 as floats
                if name in there
                else pa.nulls(len(added), schema.field(name).type)
                for name in self.columns
            ]
        arrays += [pa.array([values[name] for values in added], schema.field(name).type) for name in self.added_columns]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink)
        return sink.getvalue()

    def _whole_schema(self) -> Any:
        import pyarrow as pa

        scores = pa.struct([(label, pa.float64()) for label in self.labels])
        types = (pa.string(), pa.float64(), scores, pa.bool_(), pa.int32(), pa.string())
        new = [pa.field(name, kind) for name, kind in zip(self.added_columns, types, strict=True)]
        if self.schema is not None:
            return pa.schema([*self.schema, *new], metadata=self.schema.metadata)
        return pa.schema([*(pa.field(name, _type(kinds)) for name, kinds in self.columns.items()), *new])

    def join(self, parts: Iterable[bytes], sink: Any) -> None:
        """Put parts, of which only the first has a header, together in one file."""
        if self.kind != "parquet":
            empty = True
            for part in parts:
                sink.write(part)
                empty = False
            if empty:
                sink.write(self.encode([], [], header=True))
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        waiting: list[Any] = []
        with pq.ParquetWriter(sink, self._whole_schema()) as writer:
            for part in parts:
                waiting.append(pq.read_table(io.BytesIO(part)))
                if sum(table.num_rows for table in waiting) >= _GROUP_ROWS:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting = []
            if waiting:
                writer.write_table(pa.concat_tables(waiting))


def _json_line(row: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False, default=_plain) + "\n").encode()
    except UnicodeEncodeError:  # half a character, which JSON can only hold as an escape
        return (json.dumps(row, default=_plain) + "\n").encode()


def _plain(value: Any) -> str:
    """Values of Parquet that JSON doesn't know."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(value.isoformat()) if hasattr(value, "isoformat") else str(value)


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bool, list, dict)):
        return json.dumps(value, ensure_ascii=False, default=_plain)
    return value if isinstance(value, (int, float)) else _plain(value)


def _type(kinds: set[str]) -> Any:
    """The Parquet type of a column of a text file; where its values are of several types, text."""
    import pyarrow as pa

    if kinds == {"bool"}:
        return pa.bool_()
    if kinds == {"int"}:
        return pa.int64()
    return pa.float64() if kinds in ({"float"}, {"int", "float"}) else pa.string()


def _array(values: list[Any], kind: Any) -> Any:
    import pyarrow as pa

    if kind == pa.string():
        values = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        try:
            return pa.array(values, kind)
        except UnicodeEncodeError:
            values = [v if v is None else v.encode(errors="backslashreplace").decode() for v in values]
    if kind == pa.float64():
        values = [None if v is None else float(v) for v in values]  # whole numbers beyond 2**53, too
    return pa.array(values, kind)


def _rows(table: Any) -> list[dict[str, Any]]:
    """A table's rows; strings that are not in UTF-8 as far as they are."""
    import pyarrow as pa

    columns = []
    for column in table.columns:
        try:
            columns.append(column.to_pylist())
        except UnicodeDecodeError:
            columns.append([_plain(v) if v is not None else None for v in column.cast(pa.large_binary()).to_pylist()])
    return [dict(zip(table.column_names, values, strict=True)) for values in zip(*columns, strict=True)]
