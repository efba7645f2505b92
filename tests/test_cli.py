"""The commands: help at once, the answer alone on stdout, exit statuses."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer
import yaml
from tiny import LABELS, Emoray, sentences, write_rows

from emoray import cli
from emoray import config as cfg
from emoray.errors import InterruptedRunError

COMMANDS = sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
HEAVY = ("torch", "ray", "transformers", "datasets", "evaluate", "matplotlib", "pyarrow", "numpy")
TEXTS = [sentences("glad")[48], sentences("sad")[48]]


# Help


def test_help_lists_the_commands(emoray: Emoray) -> None:
    answer = emoray("--help")
    assert answer.status == 0 and answer.err == ""
    assert {"quickstart", "train", "show", "check-data", "classify", "evaluate"} <= set(COMMANDS)
    for command in COMMANDS:
        assert f"\n  {command} " in answer.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(command: str, emoray: Emoray) -> None:
    answer = emoray(command, "-h")
    assert answer.status == 0 and answer.err == ""
    assert f"Usage: emoray {command}" in answer.out
    assert f"Example: emoray {command}" in " ".join(answer.out.split())


def test_help_loads_nothing_heavy() -> None:
    """`--help` of all commands, one after the other in one fresh process."""
    code = (
        "import sys\n"
        "from emoray.cli import app\n"
        "for arguments in [[], *([name] for name in sys.argv[1:])]:\n"
        "    try: app([*arguments, '--help'])\n"
        "    except SystemExit as end: assert not end.code, arguments\n"
        f"    loaded = set({HEAVY!r}) & sys.modules.keys()\n"
        "    assert not loaded, (arguments, loaded)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_usage_error_says_how(emoray: Emoray) -> None:
    for arguments, said in [
        (["tain"], "No such command 'tain'"),
        (["classify"], "Missing argument 'MODEL'"),
        (["submit", "--", "trian", "configs/emotion.yaml"], "there is no 'trian' (did you mean 'train'?)"),
        (["evaluate", "runs/a", "--split", "validate"], "'validate' is not one of 'train', 'validation', 'test'"),
        (["classify", "runs/a", "tea", "--engine", "tensorrt"], "'tensorrt' is not one of 'auto', 'torch', 'onnx'"),
    ]:
        answer = emoray(*arguments)
        assert answer.status == 2 and answer.out == ""
        assert said in answer.err and "Try 'emoray" in answer.err


def test_submit_refuses_before_the_upload_what_the_command_would_refuse(emoray: Emoray) -> None:
    config = "configs/emotion.yaml"
    for command, told in [
        (["train", config, "training.learning_rat=1"], "did you mean 'learning_rate'"),
        (["train", config, "run.storage_path=runs"], "run.storage_path is runs, which would lie in the job's own"),
        (["predict", "s3://b/m", "s3://b/in", "--output", "scored.csv"], "--output is scored.csv, which would lie in"),
        (["predict", "s3://b/m", "s3://b/in", "--output=scored/"], "--output is scored/, which would lie in"),
        (["evaluate", "runs/a"], "runs/a lies in runs/, which no job is sent: give an absolute path"),
    ]:
        answer = emoray("submit", "--address", "http://127.0.0.1:1", "--", *command)
        assert answer.status == 1 and told in answer.err, answer.err


# show


def test_show_knows_every_kind_of_config(emoray: Emoray) -> None:
    configs = Path(__file__).parents[1] / "configs"
    sweep = yaml.safe_load(emoray("show", configs / "tune.yaml", "tune.num_trials=3").out)
    assert sweep["tune"]["num_trials"] == 3 and sweep["base"] is None and "training" in sweep
    assert yaml.safe_load(emoray("show", configs / "serve.yaml", "http.port=1234").out)["http"]["port"] == 1234


def test_show_prints_the_resolved_config(emoray: Emoray, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("training: {num_epochs: 5}\n")
    answer = emoray("show", path, "training.seed=7")
    assert answer.status == 0 and answer.err == ""
    assert cfg.parse(yaml.safe_load(answer.out)) == cfg.load(path, ["training.seed=7"])
    answer = emoray("show", path, "training.seed=7", "--json")
    assert answer.status == 0 and answer.err == ""
    assert cfg.parse(json.loads(answer.out)) == cfg.load(path, ["training.seed=7"])


# check-data


def test_check_data(emoray: Emoray, tiny_data: Path, tmp_path: Path) -> None:
    answer = emoray("check-data", tiny_data)
    assert answer.status == 0 and answer.err == ""
    assert "train            160 rows" in answer.out
    assert "calm 40, cross 40, glad 40, sad 40" in answer.out
    assert answer.out.endswith("The data is well formed.\n")
    path = tmp_path / "config.yaml"
    path.write_text(f"data: {{dataset: {tiny_data}}}\n")
    answer = emoray("check-data", path, "--json")
    assert answer.status == 0 and answer.err == ""
    summary = json.loads(answer.out)
    assert summary["labels"] == list(LABELS)
    assert {name: split["rows"] for name, split in summary["splits"].items()} == {
        "train": 160,
        "validation": 32,
        "test": 48,
    }


def test_check_data_takes_overrides_and_odd_paths(emoray: Emoray, tmp_path: Path) -> None:
    rows = [{"message": f"{label} {i}", "feeling": label} for label in ("glad", "sad") for i in range(9)]
    path = write_rows(tmp_path / "my data, [v2]: 'new'.jsonl", rows)
    answer = emoray("check-data", path, "data.text_column=message", "data.label_column=feeling")
    assert answer.status == 0 and answer.err == ""
    assert "warning: validation: the data set has none" in answer.out


# classify


def test_classify(emoray: Emoray, trained_run: Path) -> None:
    answer = emoray("classify", trained_run, *TEXTS)
    assert answer.status == 0 and answer.err == ""
    first, second = answer.out.splitlines()
    assert first.startswith("glad ") and first.endswith(TEXTS[0])
    assert second.startswith("sad ") and second.endswith(TEXTS[1])


def test_classify_as_json(emoray: Emoray, trained_run: Path) -> None:
    answer = emoray("classify", trained_run / "best", "--json", *TEXTS, "tea " * 50)
    assert answer.status == 0 and answer.err == ""
    first, second, long = map(json.loads, answer.out.splitlines())
    assert [first["label"], second["label"]] == ["glad", "sad"]
    assert first["text"] == TEXTS[0] and not first["truncated"]
    assert next(iter(first["scores"])) == "glad" and first["scores"]["glad"] == first["score"]
    assert sorted(first["scores"]) == list(LABELS) and sum(first["scores"].values()) == pytest.approx(1)
    assert long["truncated"] and long["tokens"] == 32


def test_classify_reads_lines_from_stdin(emoray: Emoray, trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TEXTS[0]}\n\n{TEXTS[1]}\n"))
    piped = emoray("classify", trained_run, "-")
    assert piped.status == 0 and piped.err == ""
    assert piped.out == emoray("classify", trained_run, *TEXTS).out
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert emoray("classify", trained_run, "-").out == ""


def test_a_text_may_look_like_anything(emoray: Emoray, trained_run: Path) -> None:
    texts = ["", " ", "[bold red]not markup[/]", "training.seed=1", "🙂 \u202e naïve", "[SEP] [PAD]"]
    answer = emoray("classify", trained_run, "--json", "--", *texts, "--json")
    assert answer.status == 0 and answer.err == ""
    assert [json.loads(line)["text"] for line in answer.out.splitlines()] == [*texts, "--json"]


def test_a_checkpoint_classifies_too(emoray: Emoray, trained_run: Path) -> None:
    newest = sorted((trained_run / "checkpoints").iterdir())[-1]
    answer = emoray("classify", newest, TEXTS[0])
    assert answer.status == 0 and answer.out.startswith("glad ")


# evaluate


def test_evaluate(emoray: Emoray, trained_run: Path) -> None:
    answer = emoray("evaluate", trained_run)
    assert answer.status == 0 and answer.err == ""
    assert answer.out.startswith("test: 48 rows\n") and "95%" in answer.out
    for label in LABELS:
        assert f"\n  {label} " in answer.out


def test_evaluate_as_json_agrees_with_the_run(emoray: Emoray, trained_run: Path) -> None:
    test = json.loads((trained_run / "results.json").read_text())["test"]
    answer = emoray("evaluate", trained_run, "--json")
    assert answer.status == 0 and answer.err == ""
    figures = json.loads(answer.out)
    assert figures["split"] == "test" and figures["rows"] == 48
    for name in ("accuracy", "f1", "macro_f1", "loss", "ece"):
        assert figures[name] == pytest.approx(test[name], abs=1e-6)
    assert [row["label"] for row in figures["labels"]] == list(LABELS)
    assert json.loads(emoray("evaluate", trained_run, "--split", "validation", "--json").out)["rows"] == 32


def test_evaluate_on_other_data(emoray: Emoray, trained_run: Path, tmp_path: Path) -> None:
    rows = [{"text": TEXTS[0], "label": "glad"}, {"text": TEXTS[1], "label": "sad"}]
    report = tmp_path / "report.html"
    path = write_rows(tmp_path / "new.jsonl", rows)
    answer = emoray("evaluate", trained_run, "--data", path, "--report", report, "--json")
    assert answer.status == 0 and answer.err == f"Report: {report}\n"
    figures = json.loads(answer.out)
    assert figures["rows"] == 2 and figures["accuracy"] == 1.0
    assert report.read_text(encoding="utf-8").startswith("<!doctype html>")


# train, short of Ray


def test_a_finished_run_is_not_trained_again(
    emoray: Emoray, trained_run: Path, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("ray was started"))
    (tmp_path / "config.yaml").write_text("run: {name: tiny}")
    command = ["train", tmp_path / "config.yaml", *tiny_overrides, f"run.storage_path={trained_run.parent}"]
    answer = emoray(*command)
    assert answer.status == 0
    assert (trained_run / "results.md").read_text().rstrip() in answer.out
    assert "is finished" in answer.err
    answer = emoray(*command, "--json")
    assert answer.status == 0
    assert json.loads(answer.out) == json.loads((trained_run / "results.json").read_text())


@pytest.mark.parametrize(
    ("number", "error", "status"),
    [
        (signal.SIGTERM, InterruptedRunError("stopped after step 3"), 143),
        (None, InterruptedRunError("stopped after step 3"), 130),
        (None, KeyboardInterrupt(), 130),
    ],
)
def test_a_stop_has_the_status_of_its_signal(
    number: int | None, error: Any, status: int, emoray: Emoray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> NoReturn:
        error.signals = [number] if number else []
        raise error

    monkeypatch.setattr(cli, "_train", stop)
    answer = emoray("train", Path(__file__).parents[1] / "configs" / "quickstart.yaml")
    assert answer.status == status and answer.out == ""
    assert answer.err == (f"error: {error}\n" if str(error) else "")


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    """`emoray show ... | head -1`, where the reader is gone before the first line comes."""
    read, write = os.pipe()
    os.close(read)
    config = Path(__file__).parents[1] / "configs" / "emotion.yaml"
    command = [sys.executable, "-m", "emoray.cli", "show", str(config)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 1


def test_other_data_may_name_its_columns_otherwise(trained_run: Path, tmp_path: Path, emoray: Emoray) -> None:
    rows = [{"body": text, "feeling": LABELS[0]} for text in sentences(LABELS[0])[:5]]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    answer = emoray("evaluate", trained_run, "--data", path, "--text-column", "body", "--label-column", "feeling")
    assert answer.status == 0 and "test: 5 rows" in answer.out, answer.err
    assert "no column 'text'" in emoray("evaluate", trained_run, "--data", path, "--label-column", "feeling").err
