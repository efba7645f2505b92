"""Folders on local filesystems and on object stores: whole files, staged folders, one message for each failure."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
from tiny import object_store

from emoray import storage
from emoray.errors import StorageError
from emoray.storage import HALF_DONE, Storage, absolute, below, is_uri, may_pass, split_name

Open = Callable[[Path], Storage]
BOTH = pytest.mark.parametrize("open_at", [lambda folder: Storage(str(folder)), object_store], ids=["local", "objects"])


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_paths_and_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert absolute("runs") == str(tmp_path / "runs")
    assert absolute("~/runs") == "/home/someone/runs"
    assert absolute("s3://bucket/runs") == "s3://bucket/runs"
    assert is_uri("gs://bucket") and not is_uri("/data/s3:/x")


@pytest.mark.parametrize("uri", ["ftps://host/runs", "s4://bucket", "nonsense://", "://x"])
def test_an_unknown_uri_is_one_sentence(uri: str) -> None:
    with pytest.raises(StorageError, match="pyarrow can't open this storage") as caught:
        Storage(uri)
    assert uri in str(caught.value) and "\n" not in str(caught.value)


def test_a_password_in_a_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(StorageError, match="holds a password") as caught:
        Storage("s3://key:very-secret@bucket/runs")
    assert "very-secret" not in str(caught.value)
    Storage("gs://anonymous@bucket/runs")


def test_a_file_uri_is_a_local_folder(tmp_path: Path) -> None:
    folder = Storage(f"file://{tmp_path}/runs")
    assert folder.local_path == tmp_path / "runs"
    folder.write("a/b.txt", "text")
    assert (tmp_path / "runs" / "a" / "b.txt").read_text() == "text"


def test_without_hard_links_a_new_file_is_still_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SMB and exFAT have none."""

    def link(*_: object) -> NoReturn:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    folder = Storage(str(tmp_path))
    folder.write("a", "first", exclusive=True)
    with pytest.raises(FileExistsError):
        folder.write("a", "second", exclusive=True)
    assert folder.read_text("a") == "first" and folder.names() == ["a"]


def test_errors_that_may_pass_are_known_from_those_that_stay() -> None:
    assert may_pass(OSError(errno.ESTALE, "stale")) and not may_pass(OSError(errno.ENOSPC, "full"))
    assert may_pass(ValueError("I/O error: Stale file handle (os error 116)")) and not may_pass(ValueError("full"))
    assert may_pass(OSError("AWS Error NETWORK_CONNECTION during PutObject"), remote=True)
    assert not may_pass(OSError("AWS Error ACCESS_DENIED during PutObject"), remote=True)
    assert pickle.loads(pickle.dumps(StorageError("x", passing=True))).passing


def test_the_options_of_a_uri_stay_behind_the_names(tmp_path: Path) -> None:
    """Else all runs of `s3://bucket/runs?region=eu-west-1` had one folder."""
    place = f"file://{tmp_path}/runs/?use_mmap=0"
    for name in ("a", "b"):
        (Storage(place) / name / "c").write("name.txt", name)
        assert (tmp_path / "runs" / name / "c" / "name.txt").read_text() == name
    assert (Storage(place) / "a").location == f"file://{tmp_path}/runs/a?use_mmap=0"
    assert split_name("s3://b/runs/x.csv?region=r") == ("s3://b/runs?region=r", "x.csv")
    assert split_name("/runs/what?") == ("/runs", "what?") and split_name("/x") == ("/", "x")
    assert below("/", "x") == "/x" and below("/what?", "x") == "/what?/x"
    with pytest.raises(StorageError, match=r"runs/none\?use_mmap=0: no such file"):
        Storage(place).read("none")


@BOTH
def test_what_is_written_is_read(open_at: Open, tmp_path: Path) -> None:
    folder = open_at(tmp_path / "runs" / "r")
    assert not folder.exists() and folder.names() == [] and folder.files() == {}
    folder.write("notes/für.txt", "grün\n")
    folder.write("zeros.bin", bytes(5))
    folder.write("letters.gz", b"not compressed, whatever its name")
    assert folder.exists() and folder.exists("notes") and folder.exists("zeros.bin") and not folder.exists("nothing")
    assert folder.read_text("notes/für.txt") == "grün\n"
    assert folder.read("letters.gz") == b"not compressed, whatever its name"
    assert folder.names() == ["letters.gz", "notes", "zeros.bin"]
    assert folder.files() == {"letters.gz": 33, "notes/für.txt": 6, "zeros.bin": 5}
    assert (folder / "notes").files() == {"für.txt": 6}
    assert everything(tmp_path) == {"runs", "runs/r", *(f"runs/r/{name}" for name in [*folder.files(), "notes"])}


@BOTH
def test_a_file_is_replaced_or_kept(open_at: Open, tmp_path: Path) -> None:
    folder = open_at(tmp_path)
    folder.write("a.txt", "first", exclusive=True)
    with pytest.raises(FileExistsError):
        folder.write("a.txt", "second", exclusive=True)
    assert folder.read_text("a.txt") == "first"
    folder.write("a.txt", "third")
    assert folder.read_text("a.txt") == "third"
    assert everything(tmp_path) == {"a.txt"}


@BOTH
def test_delete(open_at: Open, tmp_path: Path) -> None:
    folder = open_at(tmp_path)
    folder.write("a/b/c.txt", "c")
    folder.write("d.txt", "d")
    folder.delete("nothing")
    folder.delete("d.txt")
    folder.delete("a")
    assert folder.files() == {} and not folder.exists("a")


@BOTH
def test_a_failure_names_the_place(open_at: Open, tmp_path: Path) -> None:
    folder = open_at(tmp_path)
    with pytest.raises(StorageError, match=f"{tmp_path}/none.txt: no such file"):
        folder.read("none.txt")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=f"{tmp_path}/file/a.txt: can't be written"):
        folder.write("file/a.txt", "a")
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "a.txt").write_text("a")
    with pytest.raises(StorageError, match="can't be"):
        (folder / "file").publish(tmp_path / "staged", "a", last="a.txt")
    shutil.rmtree(tmp_path / "staged")
    assert everything(tmp_path) == {"file"}


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    """Every reader sees one writer's whole content, and exactly one exclusive write succeeds."""
    folder = Storage(str(tmp_path))
    contents = [bytes([i]) * 200_000 for i in range(8)]

    def claim(content: bytes) -> bool:
        try:
            folder.write("claimed", content, exclusive=True)
        except FileExistsError:
            return False
        return True

    folder.write("shared", contents[0])
    with ThreadPoolExecutor(8) as pool:
        written = [pool.submit(folder.write, "shared", content) for content in contents]
        seen = [folder.read("shared") for _ in range(20)]
        won = list(pool.map(claim, contents))
        for one in written:
            one.result()
    assert set(seen) <= set(contents)
    assert won.count(True) == 1 and folder.read("claimed") == contents[won.index(True)]
    assert everything(tmp_path) == {"shared", "claimed"}


def test_a_torn_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Storage(str(tmp_path))
    folder.write("a.txt", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(StorageError, match=r"a\.txt: can't be written: .*No space left"):
        folder.write("a.txt", "new")
    assert folder.read_text("a.txt") == "old" and everything(tmp_path) == {"a.txt"}


@BOTH
def test_a_staged_folder_replaces_the_old_one(open_at: Open, tmp_path: Path) -> None:
    folder = open_at(tmp_path)
    for files in ({"a.txt": "1", "sub/b.txt": "1", "last.json": "1"}, {"a.txt": "2", "last.json": "2"}):
        with folder.staging() as stage:
            for name, content in files.items():
                (stage / name).parent.mkdir(exist_ok=True)
                (stage / name).write_text(content)
            folder.publish(stage, "to/here", last="last.json")
        assert not stage.exists()
        assert folder.read_text("to/here/a.txt") == files["a.txt"]
    assert folder.read_text("to/here/last.json") == "2"
    assert not any(name.startswith(HALF_DONE) for name in everything(tmp_path))
    assert set(folder.files()) == {"to/here/a.txt", "to/here/last.json"}


def test_the_last_file_goes_up_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = object_store(tmp_path)
    order: list[str] = []
    growing = Storage.growing
    monkeypatch.setattr(Storage, "growing", lambda self, name: (order.append(name), growing(self, name))[1])
    with folder.staging() as stage:
        for name in ("a-manifest", "b", "z"):
            (stage / name).write_text(name)
        folder.publish(stage, "x", last="a-manifest")
    assert order == ["x/b", "x/z", "x/a-manifest"]


def test_a_write_that_cannot_begin_leaves_what_was_there(tmp_path: Path) -> None:
    """An object store that is away for a moment must not cost a run its history."""
    folder = object_store(tmp_path)
    folder.write("history.jsonl", "old")

    class Away:
        def __init__(self, store: Any) -> None:
            self._store = store

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

        def open_output_stream(self, *_: Any, **__: Any) -> NoReturn:
            raise OSError("connection lost")

    folder._fs = Away(folder._fs)
    with pytest.raises(StorageError, match="connection lost"):
        folder.write("history.jsonl", "new")
    assert folder.read_text("history.jsonl") == "old"


@BOTH
def test_an_error_while_staging_leaves_nothing(open_at: Open, tmp_path: Path) -> None:
    folder = open_at(tmp_path / "run")
    stages: list[Path] = []

    def fail() -> None:
        with folder.staging() as stage:
            stages.append(stage)
            (stage / "a.txt").write_text("a")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert not stages[0].exists() and folder.files() == {}


def test_sweep_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path))
    folder.write("kept.txt", "kept")
    for start in HALF_DONE:
        (tmp_path / f"{start}folder").mkdir()
        (tmp_path / f"{start}folder" / "a").write_text("a")
        (tmp_path / f"{start}file").write_text("a")
    folder.sweep()
    assert everything(tmp_path) == {"kept.txt"}


@BOTH
def test_download(open_at: Open, tmp_path: Path) -> None:
    folder = open_at(tmp_path / "there")
    folder.write("a.txt", "a")
    folder.write("sub/deep/b.bin", bytes(3_000_000))
    folder.download(tmp_path / "here")
    assert (tmp_path / "here" / "a.txt").read_text() == "a"
    assert (tmp_path / "here" / "sub" / "deep" / "b.bin").read_bytes() == bytes(3_000_000)


@BOTH
def test_writability_is_found_out_without_a_trace(open_at: Open, tmp_path: Path) -> None:
    open_at(tmp_path / "a" / "b").must_be_writable()
    assert {name for name in everything(tmp_path) if (tmp_path / name).is_file()} == set()
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StorageError, match=f"{place}.*can't be written"):
            open_at(place).must_be_writable()
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that may not be written."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user (root?) may write everywhere")
    yield folder
    folder.chmod(0o700)


def test_a_folder_that_may_not_be_written(locked: Path) -> None:
    with pytest.raises(StorageError, match=r"you may not write in .*; choose another place"):
        Storage(str(locked / "run")).must_be_writable()
    with pytest.raises(StorageError, match="can't be written"):
        Storage(str(locked / "run")).write("a.txt", "a")
