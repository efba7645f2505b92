"""Reads, checks and fingerprints a labelled data set.

    dataset = load(DataConfig(dataset="data/emotion"))
    dataset.splits["train"].texts, dataset.splits["train"].labels

What is wrong with a data set is found in one pass and raised as one DataError; what is merely doubtful
(duplicates, contradictions, texts shared by two splits) is told in `Dataset.warnings`; nothing is removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emoray import data_hub
from emoray.config import DataConfig
from emoray.data_checks import Ids, check_presence, check_texts, label_set, normalise_labels, to_ids
from emoray.data_files import SPLITS, Source, near, read_path
from emoray.data_formats import Columns, Rows
from emoray.errors import DataError
from emoray.wording import at, count, listing

QUICKSTART = Path(__file__).parent / "quickstart_data"


@dataclass(frozen=True)
class Split:
    """One split; row i is (texts[i], labels[i])."""

    name: str
    """"train", "validation" or "test"."""
    texts: list[str]
    labels: Ids
    """[rows], ids into Dataset.labels."""
    rows: Ids
    """[rows], 1-based line (Parquet and Hub: row) numbers in the file that the row came from."""
    languages: list[str] | None = None
    """What `data.language_column` holds of each row, "unknown" where it is empty; None without that column."""


@dataclass(frozen=True)
class Dataset:
    """A checked data set with exactly the splits "train", "validation" and "test"."""

    labels: tuple[str, ...]
    """Label names in order of their ids."""
    splits: dict[str, Split]
    fingerprint: str
    """sha256 over the label names and every split's texts and label ids, whatever the file format."""
    notes: list[str]
    """What was done to it, one sentence each: the splits that were cut out of train."""
    doubts: list[str]
    """What a person should look at, one sentence each, with counts."""
    source: str
    """`data.dataset` as configured."""

    @property
    def warnings(self) -> list[str]:
        """Both, as reports and model cards have them."""
        return [*self.notes, *self.doubts]


def load(config: DataConfig) -> Dataset:
    """Read the data set that a config names and check all of it.

    Args:
        config: `dataset` is "quickstart" (the data in the package), a file or folder of jsonl, csv, tsv,
            parquet or `text;label` txt, else a Hub id. Splits come from file and folder names (a single
            file is all train); a missing validation or test split is cut out of train.

    Returns:
        The data set; its order of rows is that of the files.

    Raises:
        DataError: with every problem found.
    """
    source = _read(config)
    problems = source.problems
    everything = [rows for split in source.splits.values() for rows in split]
    if "train" not in source.splits and (everything or not problems):
        found = listing(list(source.splits)) or "what was read"
        problems.append(f"no train split among {found}: add one, e.g. train.jsonl")
    for rows in everything:
        check_texts(rows, problems)
        normalise_labels(rows, problems)
    labels, table = label_set(source.splits.get("train", []), config.labels)
    ids = {id(rows): to_ids(rows, labels, table, problems) for rows in everything} if labels else {}
    if "train" in source.splits:
        check_presence(source.splits, labels, ids, problems)
    if problems:
        raise DataError(config.dataset, problems)
    splits = {name: _join(name, parts, ids) for name, parts in source.splits.items()}
    cut = _cut(splits, labels, config.validation_fraction, problems)
    if problems:
        raise DataError(config.dataset, problems)
    splits = {name: splits[name] for name in SPLITS}
    doubts = [*source.warnings, *_doubts(splits)]
    return Dataset(labels, splits, _fingerprint(labels, splits), cut, doubts, config.dataset)


def load_split(config: DataConfig, name: str) -> Split:
    """Read and check one split to score a model on; a data set without named splits counts as that split.

    Args:
        config: `labels` must be the model's.
        name: "train", "validation" or "test".

    Raises:
        DataError: with every problem found.
    """
    assert config.labels is not None
    source = _read(config)
    problems = source.problems
    parts = source.splits.get(name) or (source.splits["train"] if list(source.splits) == ["train"] else [])
    if not parts and not problems:
        problems.append(f"has no {name} split; there are {listing(list(source.splits))}")
    for rows in parts:
        check_texts(rows, problems)
        normalise_labels(rows, problems)
    labels, table = label_set(parts, config.labels)
    ids = {id(rows): to_ids(rows, labels, table, problems) for rows in parts}
    if problems:
        raise DataError(config.dataset, problems)
    return _join(name, parts, ids)


def summary(dataset: Dataset) -> dict[str, Any]:
    """What `emoray check-data` shows, as JSON-able values.

    Returns:
        `source`, `fingerprint`, `labels`, `warnings`; `splits`, each with `rows`, rows a label, lengths in
        `words` and `characters` (min, mean, median, p95, max) and `repeats`; `shared_texts`, e.g.
        {"train/test": 5}.
    """
    splits = {}
    for name, split in dataset.splits.items():
        counts = np.bincount(split.labels, minlength=len(dataset.labels))
        splits[name] = {
            "rows": len(split.texts),
            "labels": {label: int(number) for label, number in zip(dataset.labels, counts, strict=True)},
            "words": _lengths([len(text.split()) for text in split.texts]),
            "characters": _lengths([len(text) for text in split.texts]),
            "repeats": {kind: len(found) for kind, found in _repeats(split).items()},
        }
    return {
        "source": dataset.source,
        "fingerprint": dataset.fingerprint,
        "labels": list(dataset.labels),
        "splits": splits,
        "shared_texts": {f"{a}/{b}": len(texts) for (a, b), texts in _shared(dataset.splits).items()},
        "warnings": list(dataset.warnings),
    }


def summary_text(summary: dict[str, Any]) -> str:
    """What `summary` gave, for people."""
    lines = [f"{summary['source']}: {', '.join(summary['labels'])}"]
    for name, split in summary["splits"].items():
        counts = ", ".join(f"{label} {count:,}" for label, count in split["labels"].items())
        lines.append(f"  {name:<11}{split['rows']:>9,} rows, {split['words']['mean']:.1f} words on average: {counts}")
    lines += [f"  warning: {warning}" for warning in summary["warnings"]]
    if "label_errors" in summary:
        found = summary["label_errors"]
        lines.append(f"  {found['rows']:,} rows of train are likely mislabelled, likeliest first: {found['path']}")
    return "\n".join([*lines, f"  fingerprint {summary['fingerprint']}", "The data is well formed."])


def _read(config: DataConfig) -> Source:
    source = Source()
    columns = Columns(config.text_column, config.label_column, config.language_column)
    name = config.dataset
    try:
        path = QUICKSTART if name == "quickstart" else Path(name).expanduser()
        here = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        source.problems.append(f"is not a usable path: {error}")
        return source
    if here:
        read_path(path, columns, source)
    elif name == "quickstart":
        source.problems.append("the quickstart data is missing from this installation: install emoray again")
    elif data_hub.is_id(name):
        data_hub.read(name, columns, source, near(path) if path.parent.is_dir() else "")
    elif "://" in name:
        source.problems.append("is a URI, but data.dataset must be a local path or a Hub id: copy the data here")
    else:
        source.problems.append(
            f"no such file or folder{near(path)}, and not of the form of a Hub id (owner/name): correct data.dataset"
        )
    return source


def _join(name: str, parts: list[Rows], ids: dict[int, Ids]) -> Split:
    return Split(
        name,
        [text for rows in parts for text in rows.texts],
        np.concatenate([ids[id(rows)] for rows in parts]),
        np.concatenate([np.array(rows.numbers, dtype=np.int64) for rows in parts]),
        _languages(parts),
    )


def _languages(parts: list[Rows]) -> list[str] | None:
    held = [language for rows in parts if rows.languages is not None for language in rows.languages]
    return [str(language or "").strip() or "unknown" for language in held] or None


def _cut(splits: dict[str, Split], labels: tuple[str, ...], fraction: float, problems: list[str]) -> list[str]:
    """Cut the missing splits out of train, in place; returns what to tell the user.

    Which rows go is a pure function of the texts and labels: whole texts, in the order of their sha256, a
    label at a time (a text with contradicting labels counts for the first of them). Copies of a text stay
    together, so no cut makes a text leak into another split.
    """
    missing = [name for name in ("validation", "test") if name not in splits]
    if not missing:
        return []
    train = splits["train"]
    where: dict[str, list[int]] = {}
    for index, text in enumerate(train.texts):
        where.setdefault(text, []).append(index)
    label_of = train.labels.tolist()
    strata: list[list[str]] = [[] for _ in labels]
    for text, indices in where.items():
        strata[min(label_of[index] for index in indices)].append(text)
    scarce = [f"'{label}'" for label, texts in zip(labels, strata, strict=True) if len(texts) <= len(missing)]
    if scarce:
        problems.append(
            f"train: too few different texts with the label {listing(scarce, 5)} to cut "
            f"{' and '.join(missing)} out of train, which takes {len(missing) + 1} a label: "
            "add rows, or files for these splits"
        )
        return []
    home = np.zeros(len(train.texts), dtype=np.int64)
    for texts in strata:
        texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
        size = sum(len(where[text]) for text in texts)
        target = max(1, min(round(fraction * size), (size - 1) // len(missing)))
        for part in range(1, len(missing) + 1):
            texts = _move(texts, where, home, part, target, keep=len(missing) - part + 1)
    told = []
    for part, name in enumerate(missing, 1):
        splits[name] = _take(train, name, home == part)
        told.append(
            f"{name}: the data set has none, so {len(splits[name].texts):,} of train's "
            f"{count(len(train.texts), 'row')} were cut out for it (data.validation_fraction {fraction}, "
            "the same share of each label, always the same rows)."
        )
    splits["train"] = _take(train, "train", home == 0)
    return told


def _move(texts: list[str], where: dict[str, list[int]], home: Ids, part: int, target: int, keep: int) -> list[str]:
    """Move about `target` rows from the front of `texts` to a part; at least `keep` stay and are returned."""
    moved = 0
    stay: list[str] = []
    for index, text in enumerate(texts):
        if moved + len(where[text]) <= target and len(stay) + len(texts) - index > keep:
            home[where[text]] = part
            moved += len(where[text])
        else:
            stay.append(text)
    if not moved:  # every text has more copies than rows are wanted
        rarest = min(texts, key=lambda text: len(where[text]))
        home[where[rarest]] = part
        stay.remove(rarest)
    return stay


def _take(split: Split, name: str, mask: npt.NDArray[np.bool_]) -> Split:
    kept = np.flatnonzero(mask)
    languages = None if split.languages is None else [split.languages[i] for i in kept]
    return Split(name, [split.texts[i] for i in kept], split.labels[mask], split.rows[mask], languages)


def _fingerprint(labels: tuple[str, ...], splits: dict[str, Split]) -> str:
    """sha256; lengths go in before the bytes, so that no two data sets spell the same stream."""
    digest = hashlib.sha256()

    def add(strings: Sequence[str]) -> None:
        encoded = [string.encode() for string in strings]
        digest.update(np.array([len(encoded), *map(len, encoded)], dtype="<i8").tobytes())
        digest.update(b"".join(encoded))

    add(labels)
    for name in SPLITS:
        add([name])
        add(splits[name].texts)
        digest.update(splits[name].labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _repeats(split: Split) -> dict[str, list[int]]:
    """Indices of rows that repeat an earlier row or text, and of those that give a text its second label."""
    found: dict[str, list[int]] = {"rows": [], "texts": [], "contradictions": []}
    if len(set(split.texts)) == len(split.texts):
        return found
    labels: dict[str, list[int]] = {}
    for index, (text, label) in enumerate(zip(split.texts, split.labels.tolist(), strict=True)):
        earlier = labels.setdefault(text, [])
        if earlier:
            found["texts"].append(index)
        if label in earlier:
            found["rows"].append(index)
            continue
        earlier.append(label)
        if len(earlier) == 2:
            found["contradictions"].append(index)
    return found


def _shared(splits: dict[str, Split]) -> dict[tuple[str, str], set[str]]:
    texts = {name: set(split.texts) for name, split in splits.items()}
    pairs = (("train", "validation"), ("train", "test"), ("validation", "test"))
    return {(a, b): texts[a] & texts[b] for a, b in pairs}


def _doubts(splits: dict[str, Split]) -> list[str]:
    """Warnings on repeated texts within and across splits."""
    told = []
    for name, split in splits.items():
        found = _repeats(split)
        if found["rows"]:
            number = len(found["rows"])
            told.append(f"{name}: {count(number, 'exact duplicate')} of an earlier row{_at(split, found['rows'])}.")
        if found["contradictions"]:
            number, again = len(found["contradictions"]), count(len(found["texts"]), "row")
            place = _at(split, found["contradictions"])
            verb = "repeats" if len(found["texts"]) == 1 else "repeat"
            told.append(
                f"{name}: {count(number, 'text')} with contradicting labels{place}; "
                f"in all, {again} {verb} an earlier text."
            )
    for (a, b), texts in _shared(splits).items():
        if texts:
            place = _at(splits[b], [index for index, text in enumerate(splits[b].texts) if text in texts])
            told.append(f"{a} and {b} share {count(len(texts), 'text')}" + (f", in {b}{place}." if place else "."))
    return told


def _at(split: Split, indices: list[int]) -> str:
    """` (rows 4, 9)`; nothing where a split comes from several files, whose numbers would be ambiguous."""
    numbers = split.rows[indices].tolist()
    return f" ({at('row', numbers)})" if bool(np.all(np.diff(split.rows) > 0)) else ""


def _lengths(lengths: list[int]) -> dict[str, float]:
    array = np.array(lengths)
    return {
        "min": int(array.min()),
        "mean": round(float(array.mean()), 2),
        "median": float(np.median(array)),
        "p95": float(np.percentile(array, 95).round(1)),
        "max": int(array.max()),
    }
