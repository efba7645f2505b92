"""A checkpoint that is damaged in any way is named and never used; the last good one is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from tiny import object_store

from emoray import checkpoint
from emoray.checkpoint import MANIFEST, fetch, name_of, newest_good, step_of, steps, verify, write
from emoray.errors import CheckpointError, FencedError, StorageError
from emoray.storage import Storage

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 9, "training/progress.json": b'{"step": 1}'}


def fill(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def allowed() -> None:
    """This attempt owns the run."""


@pytest.fixture(params=["local", "objects"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A run's folder with checkpoints of steps 5, 10 and 20."""
    folder = Storage(str(tmp_path / "run")) if request.param == "local" else object_store(tmp_path / "run")
    for step in (5, 20, 10):
        write(folder, name_of(step), fill, allowed)
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [truncate, lengthen, flip, Path.unlink]


def test_names() -> None:
    assert name_of(250) == "checkpoints/step-00000250"
    assert step_of(name_of(250)) == 250


def test_what_is_written_is_whole(run: Storage) -> None:
    assert steps(run) == [5, 10, 20]
    folder, damaged = newest_good(run)
    assert damaged == [] and folder is not None
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert verify(folder).keys() == FILES.keys()
    below, _ = newest_good(run, below=20)
    assert below is not None and (below / MANIFEST).exists()
    assert newest_good(run, below=5) == (None, [])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(name: str, damage: Callable[[Path], None], run: Storage, tmp_path: Path) -> None:
    place = tmp_path / "run" / name_of(20)
    damage(place / name)
    with pytest.raises(CheckpointError, match=name) as caught:
        fetch(run, name_of(20))
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=name):
        verify(place)
    folder, damaged = newest_good(run)
    assert folder is not None and len(damaged) == 1 and name in damaged[0]
    if run.local_path is not None:
        assert folder == tmp_path / "run" / name_of(10)


def test_every_file_of_a_real_model(trained_run: Path, tmp_path: Path) -> None:
    """All files that training writes are covered, one bit each."""
    newest = max((trained_run / "checkpoints").iterdir())
    for source in (trained_run / "best", newest):
        names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
        assert {"model.safetensors", "emoray.json", "config.json", "tokenizer.json", MANIFEST} <= set(names)
        assert ("training/optimizer.safetensors" in names) == (source is newest)
        for name in names:
            copy = Path(shutil.copytree(source, tmp_path / "copy"))
            verify(copy)
            flip(copy / name)
            with pytest.raises(CheckpointError) as caught:
                verify(copy)
            assert name in str(caught.value)
            shutil.rmtree(copy)


def test_a_damaged_manifest(run: Storage, tmp_path: Path) -> None:
    manifest = tmp_path / "run" / name_of(20) / MANIFEST
    for content in (
        b"",
        b"{",
        b"[]",
        b'{"files": 3}',
        b'{"files": {"config.json": {}}}',
        b"\xff\xfe",
        b'{"files": [1]}',
    ):
        manifest.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"manifest\.json: is damaged"):
            fetch(run, name_of(20))
    manifest.unlink()
    with pytest.raises(CheckpointError, match=r"has no manifest.json, so it is not a checkpoint, or was not finished"):
        fetch(run, name_of(20))


def test_a_file_too_many(run: Storage, tmp_path: Path) -> None:
    (tmp_path / "run" / name_of(20) / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: is not listed in manifest.json: remove it"):
        fetch(run, name_of(20))


def test_a_manifest_leads_nowhere_else(run: Storage, tmp_path: Path) -> None:
    """A file outside the folder can't stand in for one inside."""
    place = tmp_path / "run" / name_of(20)
    manifest = json.loads((place / MANIFEST).read_text())
    shutil.move(place / "config.json", place.parent / "config.json")
    manifest["files"]["../config.json"] = manifest["files"].pop("config.json")
    (place / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        fetch(run, name_of(20))


def test_all_damaged(run: Storage, tmp_path: Path) -> None:
    for step in (5, 10, 20):
        truncate(tmp_path / "run" / name_of(step) / "model.safetensors")
    folder, damaged = newest_good(run)
    assert folder is None and len(damaged) == 3
    assert newest_good(Storage(str(tmp_path / "no run"))) == (None, [])


def test_what_is_no_checkpoint_is_passed_over(run: Storage, tmp_path: Path) -> None:
    for name in ("notes.txt", "step-x", "step-00000030.old", "old-step-00000030"):
        (tmp_path / "run" / "checkpoints" / name).mkdir()
    assert steps(run) == [5, 10, 20]


def test_a_failed_write_leaves_nothing(run: Storage, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))

    def full(folder: Path) -> None:
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"step-00000030: can't be written: .*No space left"):
        write(run, name_of(30), full, allowed)
    assert set(tmp_path.rglob("*")) == before


def test_a_fenced_write_leaves_nothing(run: Storage, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))

    def fenced() -> None:
        raise FencedError("a newer attempt")

    with pytest.raises(FencedError):
        write(run, name_of(30), fill, fenced)
    assert set(tmp_path.rglob("*")) == before


def test_an_upload_that_broke_off_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = object_store(tmp_path / "run")
    write(run, name_of(5), fill, allowed)
    growing = Storage.growing

    def breaks_off(self: Storage, name: str) -> AbstractContextManager[object]:
        if name.endswith("progress.json"):
            raise OSError("connection lost")
        return growing(self, name)

    monkeypatch.setattr(Storage, "growing", breaks_off)
    with pytest.raises(StorageError, match="connection lost"):
        write(run, name_of(10), fill, allowed)
    folder, damaged = newest_good(run)
    assert folder is not None and len(damaged) == 1 and "has no manifest.json" in damaged[0]


def test_facts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no emoray.json: it is not a model that emoray trained"):
        checkpoint.facts(tmp_path)
    (tmp_path / "emoray.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"emoray.json: is not valid JSON"):
        checkpoint.facts(tmp_path)
    (tmp_path / "emoray.json").write_text('{"labels": ["grün"]}', encoding="utf-8")
    assert checkpoint.facts(tmp_path) == {"labels": ["grün"]}
