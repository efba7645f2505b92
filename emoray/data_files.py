"""Finds the files behind `data.dataset` and which split each is; `data_hub.py` does so for the Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from emoray.data_formats import FORMATS, Columns, Rows, read_file
from emoray.wording import count, listing, nearest

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing"),
}
SPLIT_OF = {alias: split for split, aliases in SPLITS.items() for alias in aliases}
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What `datasets` itself writes beside the data; never rows."""


@dataclass
class Source:
    """All that was found: raw rows a split ("train", "validation", "test"), and what to tell the user."""

    splits: dict[str, list[Rows]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_path(path: Path, columns: Columns, source: Source) -> None:
    """Read a file (all of it is train) or a folder into `source`; problems are added there, never raised."""
    try:
        if path.is_dir():
            _read_folder(path, columns, source)
        elif path.suffix.lower() in FORMATS:
            source.splits["train"] = [read_file(path, path.name, columns, source.problems)]
        else:
            known = listing(list(FORMATS))
            source.problems.append(f"'{path.name}' ends in '{path.suffix}', but only {known} are read: convert it")
    except OSError as error:
        source.problems.append(f"{error.filename or path}: can't be read: {error.strerror or error}")


def _read_folder(folder: Path, columns: Columns, source: Source) -> None:
    files = _find(folder, source) or (_find(folder / "data", source) if (folder / "data").is_dir() else {})
    if not files and not source.problems:
        deeper = sorted({p.parent.relative_to(folder).as_posix() for p in folder.glob("*/**/*") if _is_data(p)})
        hint = f"; there are some in its folders {listing(deeper)}: name one of these" if deeper else ""
        source.problems.append(f"the folder holds no file that ends in {listing(list(FORMATS))}{hint}")
    for split, paths in files.items():
        formats = sorted({FORMATS[path.suffix.lower()] for path in paths})
        if len(formats) > 1:
            names = listing([path.relative_to(folder).as_posix() for path in paths], 5)
            source.problems.append(
                f"{split} comes in several formats ({names}), so its rows might count twice: keep one of them"
            )
        source.splits[split] = [
            read_file(path, path.relative_to(folder).as_posix(), columns, source.problems) for path in paths
        ]


def _find(folder: Path, source: Source) -> dict[str, list[Path]]:
    """The data files of each split: by file name, or by the name of the folder that they are in."""
    named: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name.lower() in SPLIT_OF:
            inside = [p for p in sorted(path.rglob("*")) if _is_data(p)]
            named.setdefault(SPLIT_OF[path.name.lower()], []).extend(inside)
        elif _is_data(path):
            splits = {SPLIT_OF[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in SPLIT_OF}
            if len(splits) > 1:
                both = " and ".join(sorted(splits))
                source.problems.append(f"'{path.name}' names more than one split ({both}): rename the file")
            elif splits:
                named.setdefault(splits.pop(), []).append(path)
            else:
                unnamed.append(path)
    named = {split: named[split] for split in SPLITS if named.get(split)}
    # A licence or a read-me beside the data isn't data.
    unnamed = [p for p in unnamed if p.suffix.lower() != ".txt"] or ([] if named else unnamed)
    if named and unnamed:
        left_out = listing([path.name for path in unnamed], 5)
        source.warnings.append(f"{count(len(unnamed), 'file')} without a split in the name not read: {left_out}.")
    return named or ({"train": unnamed} if unnamed else {})


def _is_data(path: Path) -> bool:
    hidden = path.name.startswith((".", "_")) or path.name in NOT_DATA
    return path.suffix.lower() in FORMATS and not hidden and path.is_file()


def near(path: Path) -> str:
    """What exists near a path that doesn't."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    if folder != path.parent:
        missing = path.relative_to(folder).parts[0]
        return f" ('{missing}' is not in '{folder}'{nearest(missing, os.listdir(folder))})"
    entries = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    return nearest(path.name, entries) or (f" ('{folder}' holds {listing(entries, 5)})" if entries else "")
