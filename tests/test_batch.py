"""Batch scoring without Ray: files and pieces, rows that are wrong, formats, and what an output may lie on."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from tiny import LABELS, Emoray, object_store, write_rows

from emoray import batch_input, batch_output
from emoray.batch_format import Format
from emoray.batch_input import Input, cut, find, takes_in
from emoray.batch_output import Output
from emoray.batch_rows import fault_of, rows_of, table_of, texts_in
from emoray.errors import ConfigError, DataError, FencedError, RunExistsError
from emoray.prediction import Prediction
from emoray.run import Attempt

LABEL_SCORES = {"glad": 0.75, "sad": 0.25}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_input, "_ROWS", 3)


def cut_path(*paths: Path, column: str = "text") -> Input:
    return cut(find([str(path) for path in paths]), column)


def values(found: Input) -> list[Any]:
    return [row.values for piece in found.pieces for row in rows_of(piece)]


# Files and pieces


def test_jsonl_is_cut_into_all_its_rows_in_order(tmp_path: Path) -> None:
    rows = [{"id": i, "text": f"line\u2028{i}"} for i in range(8)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n", 4).rstrip(b"\n"))
    found = cut_path(path)
    assert [piece.rows for piece in found.pieces] == [3, 3, 2] and found.rows == 8
    assert [piece.number for piece in found.pieces] == [0, 1, 2]
    assert values(found) == rows
    assert found.columns == {"id": {"int"}, "text": {"str"}}
    assert cut_path(path) == found


def test_csv_is_cut_between_records_not_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    texts = ["plain", "two\nlines", 'a "quote"', "semi;colon, comma", "", "last"]
    path.write_text("id;text\n" + "".join('{};"{}"\n'.format(i, t.replace('"', '""')) for i, t in enumerate(texts)))
    found = cut_path(path)
    assert values(found) == [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    assert [piece.rows for piece in found.pieces] == [3, 3]


def test_parquet_is_cut_across_row_groups(tmp_path: Path) -> None:
    table = pa.table({"text": [f"text {i}" for i in range(10)], "n": list(range(10))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    pq.write_table(table.drop(["n"]), tmp_path / "b.parquet")
    found = cut_path(tmp_path)
    assert [piece.rows for piece in found.pieces] == [3, 3, 3, 1] * 2
    read = [table_of(piece) for piece in found.pieces]
    assert pa.concat_tables(read[:4]).equals(table)
    assert texts_in(read[-1], "text") == ["text 9"]
    assert found.schema.names == ["text", "n"]


def test_a_file_that_changes_meanwhile_is_not_scored(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * 4)
    before = cut_path(path)
    path.write_text(path.read_text().replace("a", "b"))
    assert cut_path(path).prints != before.prints
    with pytest.raises(DataError, match="has changed since"):
        rows_of(before.pieces[0])
    for texts in (["tea", "bee"], ["tea", "sea"]):  # as many rows, of the same length
        pq.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet")
        before = before if "sea" in texts else cut_path(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="has changed since"):
        table_of(before.pieces[0])


def test_files_are_found(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deeper/c.jsonl", "_emoray/x.jsonl", ".hidden.jsonl", "notes.txt"):
        write_rows(tmp_path / name, [{"text": "a"}])
    assert [file.name for file in find([str(tmp_path)])] == ["a.jsonl", "b.jsonl", "deeper/c.jsonl"]
    assert [file.name for file in find([f"{tmp_path}/*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    assert [file.name for file in find([f"{tmp_path}/dee*/"])] == ["deeper/c.jsonl"]
    assert [file.name for file in find([f"{tmp_path}/**/c*.jsonl"])] == ["deeper/c.jsonl"]
    assert takes_in("/logs/**/test.jsonl", "/logs/test.jsonl") and takes_in(
        "/logs/**/test.jsonl", "/logs/a/b/test.jsonl"
    )
    assert not takes_in("/logs/**/test.jsonl", "/logs/latest.jsonl") and takes_in("/logs/**", "/logs/a/b.csv")
    write_rows(
        tmp_path / "scored.jsonl.emoray/summary.jsonl", [{"rows": 1}]
    )  # what an earlier command knows of its output
    assert "scored.jsonl.emoray/summary.jsonl" not in [file.name for file in find([str(tmp_path)])]
    assert [file.name for file in find([f"{tmp_path}/b.jsonl", f"{tmp_path}/deeper"])] == ["1/b.jsonl", "2/c.jsonl"]
    assert takes_in(str(tmp_path), f"{tmp_path}/scored.jsonl") and takes_in(f"{tmp_path}/*.csv", f"{tmp_path}/o.csv")
    assert not takes_in(f"{tmp_path}/a.jsonl", f"{tmp_path}/scored.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"a text", "ends in '.txt', but only .jsonl"),
        ("a.jsonl", b'[{"text": "a"}]', "is one JSON array"),
        ("a.csv", b"id,words\n1,a\n", "no column 'text'; the columns are id, words"),
        ("a.csv", b"text,id,id\na,1,2\n", "names id twice"),
        ("a.csv", b"", "its first line must name the columns"),
        ("a.csv", "text\na".encode("utf-16"), "is UTF-16"),
        ("a.parquet", b"text", "can't be read"),
    ],
)
def test_what_is_no_input_is_refused(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="1 problem") as error:
        cut_path(tmp_path / name)
    assert said in str(error.value)


def test_all_that_is_wrong_with_the_names_is_told_at_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "b.csv").write_text("text\na\n")
    with pytest.raises(DataError) as error:
        find([str(path), str(path), str(tmp_path / "b.csv"), str(tmp_path / "none")])
    assert [said for said in ("named twice", "several formats", "no such file") if said in str(error.value)] == [
        "named twice",
        "several formats",
        "no such file",
    ]


# Rows that are wrong


def test_faulty_rows_are_rows_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a", "id": 1}\n{"text": \n[1]\n{"text": "\xff", "id": 2}\n{"text": "b"}\n')
    found = cut_path(path)
    rows = [row for piece in found.pieces for row in rows_of(piece)]
    assert [row.fault is None for row in rows] == [True, False, False, False, True]
    assert "broken JSON in line 2" in str(rows[1].fault)
    assert rows[2].fault == "line 3 holds JSON that is not an object"
    assert rows[3].fault == "not in UTF-8: byte 11 of line 4 is 0xff" and rows[3].values["id"] == 2

    path = tmp_path / "rows.csv"
    path.write_text('text,id\na,1\nb\n"c"d,2\ne,3,4\nf,5\n')
    rows = [row for piece in cut_path(path).pieces for row in rows_of(piece)]
    faults = [row.fault for row in rows]
    assert faults[1] == "has 1 fields, but the header 2 (line 3)" and faults[3] == (
        "has 3 fields, but the header 2 (line 5)"
    )
    assert "can't be taken apart" in str(faults[2]) and rows[4].values == {"text": "f", "id": "5"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a", None),
        (None, "there is no text"),
        (" \n", "the text is empty"),
        (3.5, "the text is not a string, but '3.5' (float)"),
        (b"\xff", "the text is not in UTF-8"),
        ("a\ud800", "the text holds half a character (a lone surrogate, at 1)"),
    ],
)
def test_fault_of_a_text(text: Any, said: str | None) -> None:
    assert fault_of(text) == said


# Formats


def encoded(path: Path, kind: str, prefix: str = "") -> tuple[Format, bytes]:
    """All parts of a file's rows, of which the second has no prediction, joined."""
    found = cut_path(path)
    form = Format(kind, prefix, ("glad", "sad"), found.columns, found.schema)
    form.must_not_clash()
    parts = []
    for piece in found.pieces:
        kept = table_of(piece) if piece.kind == "parquet" else rows_of(piece)
        verdicts: list[Any] = [Prediction("glad", 0.75, LABEL_SCORES, False, 4)] * piece.rows
        if piece.number == 0:
            verdicts[1] = "there is no text"
        parts.append(form.encode(kept, verdicts, header=piece.number == 0))
    sink = io.BytesIO()
    form.join(parts, sink)
    return form, sink.getvalue()


ROWS = [
    {"text": "a, \u2028 b", "n": 1, "tags": ["x"], "mixed": 1},
    {"text": None, "n": None, "ok": True},
    {"text": 'say "c"', "n": 2.5, "mixed": "two"},
    {"text": "half \ud800", "n": 4, "extra": 1},
]


def test_jsonl_out_keeps_every_value(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    _, content = encoded(path, "jsonl")
    first, second, *others = [json.loads(line) for line in content.split(b"\n") if line]
    assert first == {
        **ROWS[0],
        "label": "glad",
        "score": 0.75,
        "scores": LABEL_SCORES,
        "truncated": False,
        "tokens": 4,
        "error": None,
    }
    new = dict.fromkeys(("label", "score", "scores", "truncated", "tokens"))
    assert second == {**ROWS[1], **new, "error": "there is no text"}
    assert [{key: row[key] for key in ROWS[i + 2]} for i, row in enumerate(others)] == ROWS[2:]


def test_parquet_and_csv_out_have_one_schema(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    table = pq.read_table(io.BytesIO(encoded(path, "parquet")[1]))
    assert table.column("n").to_pylist() == [1.0, None, 2.5, 4.0]
    assert table.column("tags").to_pylist() == ['["x"]', None, None, None]
    assert table.column("mixed").to_pylist() == ["1", None, "two", None]
    assert table.column("ok").to_pylist() == [None, True, None, None]
    assert table.column("scores").to_pylist() == [LABEL_SCORES, None, LABEL_SCORES, LABEL_SCORES]
    form, content = encoded(path, "csv")
    read = pyarrow.csv.read_csv(io.BytesIO(content), parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
    assert read.column_names == ["text", "n", "tags", "mixed", "ok", "extra", *form.added_columns]
    assert read.column("scores.sad").to_pylist() == [0.25, None, 0.25, 0.25]
    assert read.column("text").to_pylist()[::2] == [ROWS[0]["text"], ROWS[2]["text"]]


def test_parquet_keeps_types_and_becomes_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table(
        {"text": pa.array(["a", "b", "a", "c"]).dictionary_encode(), "raw": [b"\xff", None, b"x", b""], "l": [[1]] * 4}
    )
    pq.write_table(table, path)
    scored = pq.read_table(io.BytesIO(encoded(path, "parquet")[1]))
    assert scored.select(["text", "raw", "l"]).to_pylist() == table.to_pylist()
    assert scored.column("error").to_pylist() == [None, "there is no text", None, None]
    lines = [json.loads(line) for line in encoded(path, "jsonl")[1].splitlines()]
    assert [line["raw"] for line in lines] == ["\ufffd", None, "x", ""]


def test_an_empty_input_gives_an_empty_output(tmp_path: Path) -> None:
    (tmp_path / "none.csv").write_text("text,id\n")
    assert encoded(tmp_path / "none.csv", "csv")[1].startswith(b"text,id,label,score,scores.glad,")
    assert pq.read_table(io.BytesIO(encoded(tmp_path / "none.csv", "parquet")[1])).num_rows == 0


def test_columns_of_the_same_name_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "score": 1, "label": "glad"}] * 2)
    with pytest.raises(DataError, match=r"has columns label, score already.*--prefix predicted_"):
        encoded(path, "jsonl")
    assert b'"label": "glad", "predicted_label": "glad"' in encoded(path, "jsonl", "predicted_")[1]


# Where the output lies


def test_the_output_of_two_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an object store too: parts are kept with a note, one file is put together, only the newer command writes."""
    form = Format("jsonl", "", ("glad",), {"text": {"str"}})
    for store in (batch_output.Storage, lambda location: object_store(Path(location))):
        monkeypatch.setattr(batch_output, "Storage", store)
        output = Output(str(tmp_path / f"{store.__name__.strip('<>')}.jsonl"), None, "csv")
        identity = {"recipe": {"input": {"a": "1"}}, "model": "2"}
        older = Attempt.begin(output.home, identity)
        output.keep(0, b"first\n", {"rows": 1}, older)
        output.parts.write(output.part(1), b"half")  # killed before it was noted
        newer = Attempt.begin(output.home, identity)
        with pytest.raises(FencedError):
            output.keep(1, b"old\n", {"rows": 1}, older)
        assert output.done() == {0: {"rows": 1}}
        output.keep(1, b"second\n", {"rows": 1}, newer)
        assert output.finished([0, 1]) is None
        output.finish(2, form, {"rows": 2}, newer)
        assert Path(output.location).read_bytes() == b"first\nsecond\n"
        assert output.finished([0, 1]) == {"rows": 2} and output.home.names() == ["attempts", "summary.json"]
        output.must_be_usable([str(tmp_path / "input")], "resume")
        with pytest.raises(RunExistsError, match="--on-existing is fail"):
            output.must_be_usable([str(tmp_path / "input")], "fail")
        output.clear()
        assert not Path(output.location).exists() and output.home.names() == ["attempts"]


def test_outputs_that_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is csv by its name, but --format is parquet"):
        Output("out.csv", "parquet", "csv")
    (tmp_path / "mine.csv").write_text("a,b\n")
    for place, existing in (("mine.csv", "resume"), ("", "resume"), ("", "replace")):
        with pytest.raises(RunExistsError, match="hasn't made it"):
            Output(str(tmp_path / place), None, "csv").must_be_usable(["elsewhere"], existing)
    Output(str(tmp_path / "mine.csv"), None, "csv").must_be_usable(["elsewhere"], "replace")
    with pytest.raises(DataError, match="lies in the input"):
        Output(str(tmp_path / "out"), None, "csv").must_be_usable([str(tmp_path)], "resume")


def test_the_command_refuses_before_ray_starts(emoray: Emoray, trained_run: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": LABELS[0]}])
    output = tmp_path / "scored.csv"
    for arguments, status, said in (
        ((path, "--output", output), 1, "has a column label already"),
        ((path, "--output", output, "--text-column", "words"), 1, "no column 'words'"),
        ((path, "--output", output, "--format", "xml"), 2, "'xml' is not one of 'jsonl', 'csv', 'tsv', 'parquet'"),
        ((tmp_path / "none", "--output", output), 1, "there is no such file"),
        ((path, "workers.num_wrokers=3", "--output", output), 1, "did you mean 'num_workers'"),
        (("workers.num_workers=3", "--output", output), 2, "names no input"),
    ):
        answer = emoray("predict", trained_run, *arguments)
        assert (answer.status, answer.out) == (status, "") and said in answer.err, answer.err
        assert "Connecting to Ray" not in answer.err and "Traceback" not in answer.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]


def test_csv_rows_that_readers_find_hard(tmp_path: Path) -> None:
    """A blank line before the header, a text longer than Python's own limit, with line breaks."""
    path = tmp_path / "hard.csv"
    long = "a long text\n" * 20_000
    path.write_text(f'\n\ntext,id\n"{long}",1\nshort,2\n')
    assert values(cut_path(path)) == [{"text": long, "id": "1"}, {"text": "short", "id": "2"}]


def test_a_lone_carriage_return_ends_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a\rb", "c", "d\re")))
    _, content = encoded(path, "csv")
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    assert [row["text"] for row in rows] == ["a\rb", "c", "d\re"]
    assert (
        pyarrow.csv.read_csv(
            io.BytesIO(content), parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True)
        ).num_rows
        == 3
    )


def test_parquet_of_large_numbers_and_of_texts_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "n": n}) + "\n" for n in (2**60, 0.5)))
    _, content = encoded(path, "parquet")
    assert pq.read_table(io.BytesIO(content)).column("n").to_pylist() == [float(2**60), 0.5]
    table = pa.table({"text": pa.array([b"caf\xc3\xa9", None, b"\xff"], pa.binary())})
    assert texts_in(table, "text") == ["caf\u00e9", None, b"\xff"]


def test_what_others_keep_beside_an_output_file_stays(tmp_path: Path) -> None:
    (tmp_path / ".old-backup").mkdir()
    (tmp_path / ".old-backup" / "letters.txt").write_text("dear diary")
    (tmp_path / ".staging-1").mkdir()
    for name in (".writing-scored.csv-0123", ".writing-other.csv-0123", ".writing-7"):
        (tmp_path / name).write_text("half")
    Output(str(tmp_path / "scored.csv"), None, "csv").sweep()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".old-backup", ".staging-1", ".writing-other.csv-0123", ".writing-7"}
