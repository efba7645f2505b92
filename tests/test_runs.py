"""`emoray runs`: what is listed is what the runs' own files say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import Emoray, object_store, train_here

from emoray import runs
from emoray.errors import StorageError


@pytest.fixture(scope="module")
def storage(trained_run: Path, tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, another with another recipe, one that was stopped, and what is no run."""
    folder = tmp_path_factory.mktemp("many")
    shutil.copytree(trained_run, folder / "tiny")
    changes = ["training.learning_rate=1e-5", "training.max_steps=3", "run.name=slow", f"run.storage_path={folder}"]
    train_here([*tiny_overrides, *changes])
    shutil.copytree(trained_run, folder / "stopped")
    (folder / "stopped" / "results.json").unlink()
    (folder / "notes").mkdir()
    (folder / "notes" / "read.me").write_text("no run")
    (folder / "file.txt").write_text("no run")
    return folder


def test_figures_are_those_of_the_runs_files(emoray: Emoray, storage: Path) -> None:
    found = json.loads(emoray("runs", storage, "--json").out)
    assert [one["name"] for one in found["runs"]] == ["tiny", "slow", "stopped"]
    for one in found["runs"][:2]:
        results = json.loads((storage / one["name"] / "results.json").read_text())
        assert (one["state"], one["validation"], one["test"]) == ("finished", results["best"], results["test"])
        newest = sorted((storage / one["name"] / "checkpoints").iterdir())[-1]
        progress = json.loads((newest / "training" / "progress.json").read_text())
        assert (one["seconds"], one["step"]) == (progress["seconds"], progress["step"])
        first = json.loads((storage / one["name"] / "attempts" / "000001.json").read_text())
        assert one["started"] == first["started"]
    stopped = found["runs"][2]
    assert (stopped["state"], stopped["test"]) == ("unfinished", {})
    assert stopped["validation"] == found["runs"][0]["validation"]


def test_differences_are_those_of_the_recipes(emoray: Emoray, storage: Path) -> None:
    found = json.loads(emoray("runs", storage, "--json").out)["differences"]
    assert set(found) == {"training.learning_rate", "training.max_steps"}
    assert found["training.learning_rate"] == {"tiny": 2e-3, "slow": 1e-5, "stopped": 2e-3}


def test_table(emoray: Emoray, storage: Path) -> None:
    answer = emoray("runs", storage)
    assert answer.status == 0
    results = json.loads((storage / "tiny" / "results.json").read_text())
    (line,) = [line for line in answer.out.splitlines() if line.startswith("tiny ")]
    for figure in (results["best"]["f1"], results["test"]["accuracy"]):
        assert f"{figure:.4f}" in line
    assert "training.learning_rate=1.0e-05, training.max_steps=3" in answer.out


def test_one_run_can_be_named(emoray: Emoray, storage: Path) -> None:
    found = json.loads(emoray("runs", storage / "slow", "--json").out)
    assert [one["name"] for one in found["runs"]] == ["slow"]
    assert found["differences"] == {}


def test_damaged_run_is_named_and_hides_no_other(emoray: Emoray, storage: Path, tmp_path: Path) -> None:
    shutil.copytree(storage, tmp_path / "some")
    (tmp_path / "some" / "slow" / "config.yaml").write_text("training: {learning_rate: fast}")
    answer = emoray("runs", tmp_path / "some")
    assert answer.status == 0
    assert "damaged" in answer.out
    assert "training.learning_rate" in answer.out
    assert "tiny" in answer.out


def test_a_sweep_is_a_line_with_its_winner_s_figures(emoray: Emoray, storage: Path, tmp_path: Path) -> None:
    shutil.copytree(storage / "tiny", tmp_path / "runs" / "sweep" / "trials" / "0000")
    shutil.copytree(storage / "tiny" / "attempts", tmp_path / "runs" / "sweep" / "attempts")
    (tmp_path / "runs" / "sweep" / "config.yaml").write_text("search: {}")
    answer = emoray("runs", tmp_path / "runs")
    assert "unfinished" in answer.out and "sweep: 1 trial, in sweep/trials" in answer.out and answer.status == 0
    results = json.loads((storage / "tiny" / "results.json").read_text())
    content = {"best": {"validation": results["best"], "test": results["test"]}, "seconds": 61.5}
    (tmp_path / "runs" / "sweep" / "sweep.json").write_text(json.dumps(content))
    (found,) = runs.read(str(tmp_path / "runs"))
    assert (found.state, found.trials, found.test, found.seconds) == ("finished", 1, results["test"], 61.5)
    assert [one.name for one in runs.read(str(tmp_path / "runs" / "sweep" / "trials"))] == ["0000"]


def test_object_stores_are_read_alike(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = runs.read(str(storage))
    monkeypatch.setattr(runs, "Storage", lambda location: object_store(Path(location)))
    assert runs.read(str(storage)) == local


def test_nothing_there_is_said(emoray: Emoray, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such folder"):
        runs.read(str(tmp_path / "absent"))
    answer = emoray("runs", tmp_path)
    assert answer.status == 1
    assert "holds no run" in answer.err
