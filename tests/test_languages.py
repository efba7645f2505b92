"""A language column, from every format to the table a language; the figures are scikit-learn's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as sk
from tiny import Emoray, write_rows

from emoray import data
from emoray.classifier import Classifier
from emoray.config import DataConfig, load
from emoray.errors import ConfigError, DataError

LANGUAGES = ("en", "de", None, " fr ")


@pytest.fixture
def rows(tiny_data: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (tiny_data / "test.jsonl").read_text().splitlines()]
    return [{**row, "language": LANGUAGES[i % 4]} for i, row in enumerate(read)]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_every_format_has_it(kind: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / f"test.{kind}"
    if kind == "jsonl":
        write_rows(path, rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        table = [["language", "text", "label"], *([r["language"] or "", r["text"], r["label"]] for r in rows)]
        path.write_text("\n".join(mark.join(f'"{cell}"' for cell in line) for line in table) + "\n")
    config = DataConfig(dataset=str(path), labels=("calm", "cross", "glad", "sad"), language_column="language")
    split = data.load_split(config, "test")
    assert split.languages == ["en", "de", "unknown", "fr"] * 12
    assert split.texts == [row["text"] for row in rows]
    plain = data.load_split(config.model_copy(update={"language_column": None}), "test")
    assert plain.languages is None


def test_cut_splits_keep_their_languages(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    write_rows(tmp_path / "all.jsonl", rows)
    dataset = data.load(DataConfig(dataset=str(tmp_path / "all.jsonl"), language_column="language"))
    language_of = {row["text"]: (row["language"] or "unknown").strip() for row in rows}
    for split in dataset.splits.values():
        assert split.languages == [language_of[text] for text in split.texts]


def test_missing_column_is_named(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'lang'.*set data.language_column"):
        data.load(DataConfig(dataset=str(tiny_data), language_column="lang"))
    (tmp_path / "train.txt").write_text("a text;calm\n")
    with pytest.raises(DataError, match="no column 'lang'"):
        data.load(DataConfig(dataset=str(tmp_path), language_column="lang"))
    with pytest.raises(ConfigError, match="holds the text or the label"):
        load(None, ["data.language_column=text"])


def test_table_a_language(emoray: Emoray, trained_run: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "test.jsonl", rows)
    arguments = ("evaluate", trained_run, "--data", path, "--language-column", "language")
    found = json.loads(emoray(*arguments, "--json").out)["languages"]
    assert [line["name"] for line in found] == ["de", "en", "fr", "unknown"]
    predicted = [prediction.label for prediction in Classifier.load(trained_run)([row["text"] for row in rows])]
    for line, language in zip(found, ("de", "en", " fr ", None), strict=True):
        mine = [i for i, row in enumerate(rows) if row["language"] == language]
        true, said = [rows[i]["label"] for i in mine], [predicted[i] for i in mine]
        assert line["rows"] == 12
        assert line["accuracy"] == pytest.approx(sk.accuracy_score(true, said))
        assert line["f1"] == pytest.approx(sk.f1_score(true, said, average="weighted", zero_division=0))
    report = tmp_path / "report.html"
    answer = emoray(*arguments, "--report", report)
    assert "language" in answer.out
    assert all(f"{line['accuracy']:.4f}" in answer.out for line in found)
    assert 'id="languages"' in report.read_text()
    assert "language" not in emoray("evaluate", trained_run).out
    wrong = emoray("evaluate", trained_run, "--language-column", "language")
    assert wrong.status == 1
    assert "no column 'language'" in wrong.err
