"""Reading, checking, cutting and fingerprinting of data sets."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoray import data, data_hub, hub
from emoray.config import DataConfig
from emoray.data import Dataset, load, load_split, summary
from emoray.errors import DataError

REAL = Path(__file__).parents[2] / "shared" / "data" / "emotion"
ROWS = {
    "train": [
        ("good one", "joy"),
        ("bad one", "anger"),
        ("fine; or so", "joy"),
        ('a "quoted", one', "anger"),
    ],
    "validation": [("good two", "joy"), ("bad two", "anger")],
    "test": [("good three", "joy"), ("schön\u2028🙂", "anger")],
}
FORMATS = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "txt"]


def write(path: Path, rows: list[tuple[Any, Any]], columns: tuple[str, str] = ("text", "label")) -> Path:
    """Write rows in the format that the file's suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({name: [row[i] for row in rows] for i, name in enumerate(columns)}), path)
    elif path.suffix == ".txt":
        path.write_text("".join(f"{text};{label}\n" for text, label in rows), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t").writerows([columns, *rows])
    else:
        lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def folder(where: Path, suffix: str = "jsonl", /, **splits: list[tuple[Any, Any]]) -> Path:
    for name, rows in {**ROWS, **splits}.items():
        write(where / f"{name}.{suffix}", rows)
    return where


def read(path: Path, **keys: Any) -> Dataset:
    return load(DataConfig(dataset=str(path), **keys))


def problems(path: Path | str, **keys: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        load(DataConfig(dataset=str(path), **keys))
    return caught.value.problems


def only(found: list[str]) -> str:
    assert len(found) == 1, found
    return found[0]


# Formats, file names and folders


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_data_set(tmp_path: Path, suffix: str) -> None:
    dataset = read(folder(tmp_path / suffix, suffix))
    reference = read(folder(tmp_path / "reference"))
    assert dataset.labels == ("anger", "joy")
    assert list(dataset.splits) == ["train", "validation", "test"]
    assert dataset.splits["train"].texts == [text for text, _ in ROWS["train"]]
    assert dataset.splits["test"].texts == [text for text, _ in ROWS["test"]]
    assert dataset.splits["train"].labels.tolist() == [1, 0, 1, 0]
    assert dataset.splits["train"].labels.dtype == dataset.splits["train"].rows.dtype == np.int64
    assert dataset.splits["train"].rows.tolist() == ([2, 3, 4, 5] if suffix in ("csv", "tsv") else [1, 2, 3, 4])
    assert dataset.fingerprint == reference.fingerprint
    assert dataset.warnings == []


@pytest.mark.parametrize(
    "names",
    [
        ("training.csv", "dev.csv", "testing.csv"),
        ("emotion-train.jsonl", "emotion-val.jsonl", "emotion-test.jsonl"),
        ("Train_v2.parquet", "x.EVAL.tsv", "Test.json"),
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("train/a.jsonl", "dev/a.jsonl", "test/deep/a.jsonl"),
        ("data/train.csv", "data/validation.csv", "data/test.csv"),
    ],
)
def test_splits_by_their_usual_names(tmp_path: Path, names: tuple[str, str, str]) -> None:
    for name, split in zip(names, ROWS, strict=True):
        write(tmp_path / name, ROWS[split])
    dataset = read(tmp_path)
    assert {name: split.texts for name, split in dataset.splits.items()} == {
        name: [text for text, _ in rows] for name, rows in ROWS.items()
    }


def test_shards_are_read_in_order_and_named_in_problems(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    write(tmp_path / "train-00001-of-00002.jsonl", ROWS["train"][2:])
    write(tmp_path / "train-00000-of-00002.jsonl", ROWS["train"][:2])
    assert read(tmp_path).fingerprint == read(folder(tmp_path.parent / "whole")).fingerprint
    write(tmp_path / "train-00001-of-00002.jsonl", [*ROWS["train"][2:], ("", "joy")])
    assert only(problems(tmp_path)).startswith("train-00001-of-00002.jsonl: 1 line with an empty text (line 3)")


def test_one_split_in_several_formats_is_refused(tmp_path: Path) -> None:
    write(folder(tmp_path) / "train.csv", ROWS["train"])
    assert "train comes in several formats (train.csv, train.jsonl)" in only(problems(tmp_path))


def test_blank_lines_byte_order_mark_and_windows_ends(tmp_path: Path) -> None:
    folder(tmp_path)
    line = '{"text": "%s", "label": "%s"}'
    body = "\r\n".join(["\ufeff", line % ("one", "joy"), "", " ", line % ("two", "anger"), ""])
    (tmp_path / "train.jsonl").write_bytes(body.encode())
    train = read(tmp_path).splits["train"]
    assert (train.texts, train.rows.tolist()) == (["one", "two"], [2, 5])
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.txt").write_bytes("\ufeff\r\na;b;joy\r\nc; anger \r\n".encode())
    assert read(tmp_path).splits["train"].texts == ["a;b", "c"]


def test_csv_with_multi_line_texts_semicolons_and_other_columns(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    body = '\ufeffid; text ;label\n1;"two\nlines";joy\n\n2;"a;b";anger\n'
    (tmp_path / "train.csv").write_bytes(body.encode())
    train = read(tmp_path).splits["train"]
    assert (train.texts, train.rows.tolist()) == (["two\nlines", "a;b"], [2, 5])


def test_a_csv_text_may_be_longer_than_python_expects(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    long = "so sad " * 20_000
    (tmp_path / "train.csv").write_text(f"text,label\n{long},anger\nfine,joy\n")
    assert read(tmp_path).splits["train"].texts == [long, "fine"]


def test_other_columns_and_column_names(tmp_path: Path) -> None:
    for name, rows in ROWS.items():
        write(tmp_path / f"{name}.parquet", rows, ("tweet", "emotion"))
    assert read(tmp_path, text_column="tweet", label_column="emotion").labels == ("anger", "joy")


def test_files_that_are_no_data_are_left_alone(tmp_path: Path) -> None:
    folder(tmp_path)
    for name in (".train.jsonl", "dataset_infos.json", "LICENSE.txt", "README.md"):
        (tmp_path / name).write_text("not data")
    assert read(tmp_path).warnings == []
    (tmp_path / "extra.csv").write_text("not data")
    assert read(tmp_path).warnings == ["1 file without a split in the name not read: extra.csv."]


def test_nul_is_a_character_like_any_other(tmp_path: Path) -> None:
    assert "a\0b" in read(folder(tmp_path, train=[*ROWS["train"], ("a\0b", "joy")])).splits["train"].texts


# Labels


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "txt"])
def test_ids_without_names(tmp_path: Path, suffix: str) -> None:
    splits = {name: [(f"{name} {i}", i) for i in (3, 1, 2)] for name in ROWS}
    dataset = read(folder(tmp_path, suffix, **splits))
    assert dataset.labels == ("LABEL_1", "LABEL_2", "LABEL_3")
    assert dataset.splits["test"].labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize("ids", [(0, 1), ("0", "1"), (0.0, 1.0), ("joy", "anger"), (" joy ", "1")])
def test_ids_and_names_with_configured_labels(tmp_path: Path, ids: tuple[Any, Any]) -> None:
    splits = {name: [(f"{name} {i}", label) for i, label in enumerate(ids)] for name in ROWS}
    dataset = read(folder(tmp_path, **splits), labels=("joy", "anger"))
    assert dataset.labels == ("joy", "anger")
    assert dataset.splits["train"].labels.tolist() == [0, 1]


def test_names_that_are_numbers_are_names(tmp_path: Path) -> None:
    splits = {name: [(f"{name} {i}", i) for i in (1, 2, 3)] for name in ROWS}
    assert read(folder(tmp_path, **splits), labels=("3", "2", "1")).splits["train"].labels.tolist() == [
        2,
        1,
        0,
    ]


def test_the_six_emotions_keep_their_published_order(tmp_path: Path) -> None:
    emotions = ["sadness", "joy", "love", "anger", "fear", "surprise"]
    splits = {name: [(f"{name} {e}", e) for e in sorted(emotions)] for name in ROWS}
    assert read(folder(tmp_path / "six", **splits)).labels == tuple(emotions)
    seven = {name: [*rows, (f"{name} x", "calm")] for name, rows in splits.items()}
    assert read(folder(tmp_path / "seven", **seven)).labels == tuple(sorted([*emotions, "calm"]))


def test_class_label_names_stored_in_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {"label": {"names": ["joy", "anger"], "_type": "ClassLabel"}}
    for name in ROWS:
        table = pa.table({"text": [f"{name} a", f"{name} b"], "label": [1, 0]})
        meta = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(meta), tmp_path / f"{name}.parquet")
    dataset = read(tmp_path)
    assert (dataset.labels, dataset.splits["train"].labels.tolist()) == (("joy", "anger"), [1, 0])
    assert read(tmp_path, labels=("anger", "joy")).splits["train"].labels.tolist() == [0, 1]


# Problems

LINE = '{"text": "x", "label": "joy"}\n'


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ('{"text": " \\t", "label": "joy"}', ["train.jsonl: 1 line with an empty text (line 5)"]),
        ('{"text": null, "label": "joy"}', ["1 line whose text is not a string (line 5)", "null or absent"]),
        ('{"label": "joy"}', ["not a string (line 5)"]),
        ('{"text": 7, "label": "joy"}', ["not a string (line 5)", "the first is 7"]),
        ('{"text": "x", "label": null}', ["1 line without a label", "(line 5)"]),
        ('{"text": "x", "label": " "}', ["1 line without a label", "(line 5)"]),
        ('{"text": "x", "label": -1}', ["1 line without a label", "(line 5)"]),
        ('{"text": "x", "label": NaN}', ["1 line without a label", "(line 5)"]),
        ('{"text": "x"}', ["1 line without a label", "(line 5)"]),
        ('{"text": "x", "label": ["joy"]}', ["neither a name nor an id (line 5)", "['joy']"]),
        ('{"text": "x", "label": true}', ["neither a name nor an id (line 5)", "True"]),
        ('{"text": "x", "label": 0.5}', ["neither a name nor an id (line 5)", "0.5"]),
        ('{"text": "x", "label": 1}', ["the label 1 (line 5)", "the labels are anger, joy"]),
        ('{"text": "x", "label": "joy"', ["1 line of broken JSON (line 5)", "delimiter"]),
        ("[" * 100_000, ["1 line of broken JSON (line 5)"]),
        ('"text"', ["1 line of JSON that is not an object (line 5)"]),
        ('{"text": "x \\ud83d", "label": "joy"}', ["lone surrogate", "(line 5)"]),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, body: str, parts: list[str]) -> None:
    folder(tmp_path)
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(body + "\n")
    found = only(problems(tmp_path))
    assert all(part in found for part in parts), found


def test_every_problem_is_found_and_rows_are_counted(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "train.jsonl").write_text(LINE + '{"text": "", "label": "joy"}\n' * 7 + "{\n" + LINE)
    write(tmp_path / "validation.jsonl", [("x", None), (3, "joy"), ("y", "anger")])
    (tmp_path / "test.jsonl").write_bytes(b"\n" + LINE.encode() + b'{"text": "caf\xe9", "label": "joy"}\n')
    found = problems(tmp_path)
    assert sorted(problem.split(":")[0] for problem in found) == (
        ["test.jsonl"] + ["train.jsonl"] * 2 + ["validation.jsonl"] * 2
    )
    text = "\n".join(found)
    assert "7 lines with an empty text (lines 2, 3, 4, 5, 6, ...)" in text
    assert "1 line of broken JSON (line 9)" in text
    assert "test.jsonl: 1 line not in UTF-8 (line 3): byte 14 of line 3 is 0xe9; save the file as UTF-8" in text


def test_an_unknown_label_gets_the_nearest(tmp_path: Path) -> None:
    path = folder(tmp_path, validation=[*ROWS["validation"], ("x", "jooy")])
    assert "the label 'jooy' (did you mean 'joy'?) (line 3)" in only(problems(path))
    many = folder(tmp_path, validation=[*ROWS["validation"], *((f"x{i}", f"name{i}") for i in range(9))])
    assert "4 more labels outside the set" in problems(many)[-1]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_missing_columns(tmp_path: Path, suffix: str) -> None:
    for name, rows in ROWS.items():
        write(tmp_path / f"{name}.{suffix}", rows, ("txt", "class"))
    found = problems(tmp_path)
    assert len(found) == 6
    assert "no column 'text' (did you mean 'txt'?); its columns are txt, class: set data.text_column" in found[0]
    assert "no column 'label'" in found[1]
    assert "set data.label_column" in found[1]


@pytest.mark.parametrize(
    ("name", "body", "parts"),
    [
        (
            "train.csv",
            b"text,label\nx,joy,3\ny\n",
            ["2 lines with a wrong number of fields (lines 2, 3)", "has 2"],
        ),
        ("train.csv", b'text,label\n"x" y,joy\nz,joy\n', ["1 line that can't be taken apart (line 2)"]),
        ("train.csv", b'text,label\na,joy\n"x,joy\nz,joy\n', ["can't be taken apart (line 3)"]),
        ("train.csv", b"text,label\n", ["train: has no rows (train.csv)"]),
        ("train.csv", b"text,label\nx\xff,joy\ny,anger\n", ["not in UTF-8 (line 2)", "0xff"]),
        ("train.jsonl", b"", ["train.jsonl: is empty"]),
        ("train.jsonl", b"\n \n", ["train.jsonl: is empty"]),
        ("train.jsonl", b'[{"text": "x", "label": "joy"}]', ["JSON array"]),
        ("train.jsonl", LINE.encode("utf-16"), ["is UTF-16, but must be UTF-8"]),
        ("train.txt", b"x;joy\nno label\ny;anger\n", ["1 line without a ';' before the label (line 2)"]),
        ("train.parquet", b"nothing of the sort", ["train.parquet: is not a readable Parquet file"]),
        ("train.parquet", b"", ["train.parquet: is empty"]),
    ],
)
def test_bad_files(tmp_path: Path, name: str, body: bytes, parts: list[str]) -> None:
    folder(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / name).write_bytes(body)
    found = only(problems(tmp_path))
    assert all(part in found for part in parts), found


def test_parquet_strings_that_are_not_utf8(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder(tmp_path, "parquet")
    raw = pa.array([b"fine", b"\xff"], pa.binary())
    bad = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": bad, "label": ["joy", "anger"]}), tmp_path / "train.parquet")
    assert "train.parquet: 1 row whose 'text' is not in UTF-8 (row 2)" in only(problems(tmp_path))


def test_a_split_must_hold_every_label(tmp_path: Path) -> None:
    found = problems(folder(tmp_path / "a", validation=[("x", "joy")], test=[("y", "anger")]))
    assert [problem.split(":")[0] for problem in found] == ["validation", "test"]
    assert "no row with the label 'anger' (2 in train)" in found[0]
    found = problems(folder(tmp_path / "b"), labels=("joy", "anger", "calm"))
    assert len(found) == 3
    assert found[0].startswith("train: has no row with the label 'calm':")
    found = problems(folder(tmp_path / "c", **{name: [(name, "joy")] for name in ROWS}))
    assert "only one label, 'joy'" in only(found)


def test_no_train_split(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    assert "no train split among validation, test" in only(problems(tmp_path))


def test_paths_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'train.jsonl'?" in only(problems("data/trian.jsonl"))
    assert "'dota' is not in '.' (did you mean 'data'?)" in only(problems("./dota/emotion/train.jsonl"))
    assert "is a URI" in only(problems("s3://bucket/emotion"))
    assert "no such file" in only(problems(tmp_path / "nothing"))
    assert "not a usable path" in only(problems("~no-such-user-here/data"))
    (tmp_path / "empty").mkdir()
    assert "the folder holds no file that ends in .jsonl" in only(problems("empty"))
    assert "in its folders data" not in only(problems("empty"))
    folder(tmp_path / "clone" / "split")
    assert "there are some in its folders split: name one of these" in only(problems("clone"))
    (tmp_path / "x.xlsx").write_text("x")
    assert "ends in '.xlsx'" in only(problems("x.xlsx"))
    write(tmp_path / "both" / "train-test.csv", ROWS["train"])
    assert "names more than one split (test and train)" in problems("both")[0]


def test_quickstart_is_the_folder_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "QUICKSTART", folder(tmp_path / "there"))
    assert load(DataConfig(dataset="quickstart")).labels == ("anger", "joy")
    monkeypatch.setattr(data, "QUICKSTART", tmp_path / "not there")
    assert "install emoray again" in only(problems("quickstart"))


# Missing splits are cut out of train


def many(rows: int, seed: int = 0) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    texts = [f"text {draw.randrange(rows * 10)}" for _ in range(rows)]
    return [(text, draw.choices(["joy", "anger", "rare"], [70, 25, 5])[0]) for text in texts]


def held(dataset: Dataset, name: str) -> list[tuple[str, int]]:
    return sorted(zip(dataset.splits[name].texts, dataset.splits[name].labels.tolist(), strict=True))


def test_a_cut_is_stratified_whole_and_the_same_in_any_order(tmp_path: Path) -> None:
    rows = many(2000)
    dataset = read(write(tmp_path / "all.jsonl", rows))
    shuffled = random.Random(1).sample(rows, len(rows))
    other = read(write(tmp_path / "other.csv", shuffled))
    for name in ROWS:
        assert held(dataset, name) == held(other, name)
    assert sorted(held(dataset, "train") + held(dataset, "validation") + held(dataset, "test")) == sorted(
        (text, dataset.labels.index(label)) for text, label in rows
    )
    assert summary(dataset)["shared_texts"] == {"train/validation": 0, "train/test": 0, "validation/test": 0}
    total = np.bincount(np.concatenate([split.labels for split in dataset.splits.values()]))
    torn = {name: part["repeats"]["contradictions"] for name, part in summary(dataset)["splits"].items()}
    for name in ("validation", "test"):
        # Texts with contradicting labels move whole, so only they can upset a label's share.
        slack = 1 + torn[name] + 0.1 * sum(torn.values())
        assert np.all(np.abs(np.bincount(dataset.splits[name].labels) - 0.1 * total) <= slack)
        assert abs(len(dataset.splits[name].texts) - 200) <= 3
        told = [warning for warning in dataset.warnings if warning.startswith(f"{name}: the data set has none, so ")]
        assert "2,000 rows" in only(told)
    train = dataset.splits["train"]
    assert [rows[number - 1][0] for number in train.rows] == train.texts
    assert bool(np.all(np.diff(train.rows) > 0))


def test_only_the_missing_split_is_cut(tmp_path: Path) -> None:
    folder(tmp_path, train=many(400))
    write(tmp_path / "test.jsonl", [(f"new {label}", label) for label in ("joy", "anger", "rare")])
    (tmp_path / "validation.jsonl").unlink()
    dataset = read(tmp_path, validation_fraction=0.25)
    assert len(dataset.splits["test"].texts) == 3
    assert abs(len(dataset.splits["validation"].texts) - 100) <= 3
    assert [w.split(":")[0] for w in dataset.warnings if "has none" in w] == ["validation"]


def test_small_and_lopsided_cuts(tmp_path: Path) -> None:
    three = [(f"{label} {i}", label) for i in range(3) for label in ("joy", "anger")]
    dataset = read(write(tmp_path / "three.jsonl", three), validation_fraction=0.49)
    assert [len(split.texts) for split in dataset.splits.values()] == [2, 2, 2]
    copies = [*three, *[("joy 0", "joy")] * 50, *[("joy 1", "joy")] * 50, *[("joy 2", "joy")] * 50]
    dataset = read(write(tmp_path / "copies.jsonl", copies))
    assert all(set(split.labels.tolist()) == {0, 1} for split in dataset.splits.values())
    found = problems(write(tmp_path / "two.jsonl", [*three, ("one", "rare"), ("two", "rare"), ("two", "rare")]))
    assert "too few different texts with the label 'rare' to cut validation and test" in only(found)


# Warnings, fingerprint, summary


def test_doubts_are_told_with_counts_and_rows(tmp_path: Path) -> None:
    extra = [("good one", "joy"), ("good one", "anger"), ("bad two", "anger"), ("good one", "joy")]
    dataset = read(folder(tmp_path, train=ROWS["train"] + extra))
    assert dataset.warnings == [
        "train: 2 exact duplicates of an earlier row (rows 5, 8).",
        "train: 1 text with contradicting labels (row 6); in all, 3 rows repeat an earlier text.",
        "train and validation share 1 text, in validation (row 2).",
    ]
    assert summary(dataset)["splits"]["train"]["repeats"] == {"rows": 2, "texts": 3, "contradictions": 1}


def test_the_fingerprint_sees_every_change(tmp_path: Path) -> None:
    a, b = ROWS["test"]
    variants = [
        ROWS["test"],
        [b, a],
        [a, b, b],
        [(a[0], b[1]), (b[0], a[1])],
        [(a[0] + " ", a[1]), b],
        [(a[0] + b[0], a[1]), ("x", b[1])],
    ]
    prints = [read(folder(tmp_path / str(i), test=rows)).fingerprint for i, rows in enumerate(variants)]
    prints.append(read(tmp_path / "0", labels=("joy", "anger")).fingerprint)
    assert len(set(prints)) == len(prints)
    assert all(len(value) == 64 for value in prints)


def test_summary_is_plain_json(tmp_path: Path) -> None:
    report = summary(read(folder(tmp_path)))
    assert json.loads(json.dumps(report)) == report
    assert report["splits"]["train"]["labels"] == {"anger": 2, "joy": 2}
    assert report["splits"]["train"]["words"] == {"min": 2, "mean": 2.5, "median": 2.5, "p95": 3.0, "max": 3}


real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/emotion beside the repository")


@real
def test_the_known_facts_of_the_real_data() -> None:
    report = summary(read(REAL))
    assert report["labels"] == ["sadness", "joy", "love", "anger", "fear", "surprise"]
    counts = {name: list(split["labels"].values()) for name, split in report["splits"].items()}
    assert counts == {
        "train": [4666, 5362, 1304, 2159, 1937, 572],
        "validation": [550, 704, 178, 275, 212, 81],
        "test": [581, 695, 159, 275, 224, 66],
    }
    assert report["splits"]["train"]["repeats"] == {"rows": 1, "texts": 31, "contradictions": 30}
    assert report["splits"]["validation"]["repeats"] == {"rows": 0, "texts": 2, "contradictions": 2}
    assert report["splits"]["test"]["repeats"] == {"rows": 0, "texts": 0, "contradictions": 0}
    assert report["shared_texts"] == {"train/validation": 5, "train/test": 11, "validation/test": 3}
    assert len(report["warnings"]) == 6


@real
def test_the_real_data_as_published_ids_is_the_same_data_set(tmp_path: Path) -> None:
    named = read(REAL)
    for name, split in named.splits.items():
        write(tmp_path / f"{name}.parquet", list(zip(split.texts, split.labels.tolist(), strict=True)))
    assert read(tmp_path, labels=named.labels).fingerprint == named.fingerprint


# The Hub

SCRIPT = """
import sys, time
from emoray.config import DataConfig
from emoray.data import load
from emoray.errors import DataError
start = time.perf_counter()
try:
    load(DataConfig(dataset="owner/name"))
except DataError as error:
    print(len(error.problems), error.problems[0])
print(time.perf_counter() - start)
"""


def test_a_hub_out_of_reach_is_one_sentence_and_fast(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HOME": str(tmp_path)}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=tmp_path, capture_output=True, text=True)
    sentence, seconds = done.stdout.splitlines()
    assert sentence.startswith("1 'owner/name' is not a path here, the Hugging Face Hub is not in reach")
    assert "set data.dataset to a local file or folder" in sentence
    assert "HF_HOME" in sentence
    assert float(seconds) < 10
    assert "Retry" not in done.stderr
    assert "Traceback" not in done.stderr


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_answers", lambda: pytest.fail("the network was tried"))
    assert "offline mode is on and no copy of it is cached" in only(problems("owner/no-such-name"))
    assert not datasets.config.HF_HUB_OFFLINE, "the switch must be put back"


def test_a_hub_that_swallows_requests_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(hub, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: time.sleep(2))
    start = time.perf_counter()
    hub._answers.cache_clear()
    assert not hub._answers()
    hub._answers.cache_clear()
    assert time.perf_counter() - start < 1


def test_a_hub_data_set_brings_its_label_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    label = datasets.ClassLabel(names=["joy", "anger"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})

    def loaded(name: str) -> datasets.DatasetDict:
        assert name == "owner/name"
        rows: dict[str, dict[str, list[Any]]]
        rows = {n: {"text": [t for t, _ in r], "label": [label for _, label in r]} for n, r in ROWS.items()}
        rows["unsupervised"] = {"text": ["x"], "label": [-1]}
        return datasets.DatasetDict({n: datasets.Dataset.from_dict(r, features=features) for n, r in rows.items()})

    monkeypatch.setattr(hub, "_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", loaded)
    dataset = load(DataConfig(dataset="owner/name"))
    assert dataset.labels == ("joy", "anger")
    assert dataset.splits["train"].labels.tolist() == [0, 1, 0, 1]
    assert dataset.warnings == ["1 split of the Hub data set not read: unsupervised."]
    found = problems("owner/name", text_column="txt")
    assert len(found) == 3
    assert found[0].startswith("train: no column 'txt' (did you mean 'text'?)")

    def missing(name: str) -> datasets.DatasetDict:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    assert "no data set on the Hub that you may read" in only(problems("owner/name"))


@pytest.mark.parametrize("name", ["dair-ai/emotion", "imdb"])
def test_hub_ids(name: str) -> None:
    assert data_hub.is_id(name)


@pytest.mark.parametrize("name", ["a/b/c", "./a", "/a", "a.csv", "data/train.jsonl", "a\\b", "s3://a/b", "../a", "a/"])
def test_no_hub_ids(name: str) -> None:
    assert not data_hub.is_id(name)


def test_neither_ray_nor_datasets_is_imported() -> None:
    heavy = ("ray", "torch", "datasets", "pyarrow", "pandas")
    code = f"import sys, emoray.data; print([name for name in {heavy} if name in sys.modules])"
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_ids_without_names_mean_the_same_to_the_model_that_came_of_them(tmp_path: Path) -> None:
    path = folder(tmp_path, **{name: [(f"{name} {i}", i) for i in (1, 2)] for name in ROWS})
    labels = ("LABEL_1", "LABEL_2", "LABEL_3")
    split = load_split(DataConfig(dataset=str(path), labels=labels), "test")
    assert split.labels.tolist() == [0, 1], "not places in the list"


def test_minus_one_is_no_label_whatever_the_file(tmp_path: Path) -> None:
    for suffix in ("jsonl", "csv"):
        (tmp_path / suffix).mkdir()
        path = folder(tmp_path / suffix, suffix, train=[*ROWS["train"], ("one more", -1)])
        assert any("without a label" in problem for problem in problems(path)), suffix
