"""The one checkpoint layout: a Hugging Face folder, what a run needs to go on, and sha256 sums written last.

step-00000250/
  config.json model.safetensors tokenizer.json ...   what transformers loads
  emoray.json                                        resolved config, labels, metrics, calibration, data, versions
  training/optimizer.safetensors progress.json       absent from best/
  manifest.json                                      size and sha256 of every other file
  onnx/                                              exports, made later, with manifests of their own
"""

from __future__ import annotations

import atexit
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from emoray.errors import CheckpointError, StorageError
from emoray.storage import Storage, may_pass

MANIFEST = "manifest.json"
FACTS = "emoray.json"
WEIGHTS = "model.safetensors"
OPTIMIZER, PROGRESS = "training/optimizer.safetensors", "training/progress.json"
"""What a run goes on from, beside the weights; not in best/."""
FOLDER, BEST = "checkpoints", "best"
"""Below a run's folder: what it goes on from, and the model that it leaves."""
EXPORTS = "onnx"
"""Folder below a model's for what is made from it later; the model's own manifest says nothing of it."""


def name_of(step: int) -> str:
    """Folder of a step's checkpoint below the run's folder."""
    return f"{FOLDER}/step-{step:08d}"


def step_of(name: str) -> int:
    return int(name.rsplit("-", 1)[-1])


def write(run: Storage, name: str, fill: Callable[[Path], None], may_write: Callable[[], None]) -> None:
    """Write a folder beside its place, sum it up and move it into place.

    Args:
        run: the run's folder.
        name: where the folder goes below it.
        fill: puts the files into the folder that it is given.
        may_write: raises where this attempt has lost the right to write; asked at the last moment.

    Raises:
        StorageError: disk full and the like; nothing is left behind.
    """
    with run.staging() as stage:
        try:
            fill(stage)
            (stage / MANIFEST).write_text(json.dumps({"files": sums(stage)}, indent=1, sort_keys=True))
            run.sync(stage)  # takes seconds, after which `may_write` is asked
        except (OSError, SafetensorError, StorageError) as error:
            may_write()  # a newer attempt sweeps away what is half written: that is not the disk's fault
            passing = error.passing if isinstance(error, StorageError) else may_pass(error)
            raise StorageError(f"{run.location}/{name}: can't be written: {error}", passing) from error
        may_write()
        run.publish(stage, name, last=MANIFEST)


def sums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and sha256 of every file below a folder but the manifest."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    with ThreadPoolExecutor() as threads:  # weights and moments side by side: on GPUs training waits for them
        digests = list(threads.map(_sha256, files))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest.

    Returns:
        The manifest's entries.

    Raises:
        CheckpointError: names the first file that is missing, too short, changed or not listed.
    """
    try:
        listed: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it is not a checkpoint, or was not finished") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder}/{MANIFEST}: is damaged: not readable as JSON with the files' sums") from None
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    present = {name for name in present if not name.startswith(f"{EXPORTS}/")}
    for name, (size, digest) in expected.items():
        path = folder / name
        if name not in present:
            raise CheckpointError(f"{path}: is missing, but {MANIFEST} lists it")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, but {MANIFEST} says {size}")
        if _sha256(path) != digest:
            raise CheckpointError(f"{path}: its sha256 differs from the one in {MANIFEST}: the file is damaged")
    for name in sorted(present - listed.keys()):
        raise CheckpointError(f"{folder / name}: is not listed in {MANIFEST}: remove it")
    return listed


def fingerprint(folder: Path) -> str:
    """12 hex digits that change with any file of a checkpoint's folder."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:12]


def fetch(storage: Storage, name: str = "") -> Path:
    """A verified local copy of a checkpoint; the folder itself where the storage is local.

    Raises:
        CheckpointError: where it is damaged or no checkpoint.
    """
    source = storage / name if name else storage
    if source.local_path is not None:
        folder = source.local_path
    else:
        folder = Path(tempfile.mkdtemp(prefix="emoray-checkpoint-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        source.download(folder)
    try:
        verify(folder)
    except CheckpointError:
        release(source, folder)
        raise
    return folder


def release(storage: Storage, folder: Path) -> None:
    """Remove what `fetch` gave, where that is a copy; else it goes when the process ends."""
    if storage.local_path is None:
        shutil.rmtree(folder, ignore_errors=True)


def newest_good(run: Storage, below: int | None = None) -> tuple[Path | None, list[str]]:
    """The last checkpoint whose sums match, and what was wrong with those after it.

    Args:
        below: look only at checkpoints of earlier steps than this one.

    Returns:
        A local folder (None where there is no good one) and one sentence a damaged checkpoint.
    """
    damaged: list[str] = []
    for step in reversed(steps(run)):
        if below is not None and step >= below:
            continue
        try:
            return fetch(run, name_of(step)), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, damaged


def steps(run: Storage) -> list[int]:
    """Steps that have a checkpoint folder, ascending, good or not."""
    return sorted(step_of(name) for name in run.names(FOLDER) if re.fullmatch(r"step-\d{8,}", name))


def facts(folder: Path) -> dict[str, Any]:
    """What emoray.json says of a model: config, labels, metrics, calibration, data, versions."""
    try:
        content: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {FACTS}: it is not a model that emoray trained") from None
    except ValueError as error:
        raise CheckpointError(f"{folder}/{FACTS}: is not valid JSON: {error}") from None
    return content
