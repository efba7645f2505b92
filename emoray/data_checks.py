"""What the rows of a data set must satisfy: each check appends one sentence a kind of problem and goes on."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from emoray.data_formats import Rows, finding
from emoray.wording import count, listing, nearest

Ids = npt.NDArray[np.int64]
EMOTIONS = ("sadness", "joy", "love", "anger", "fear", "surprise")
"""Label order of dair-ai/emotion as published, so that ids mean the same here as in models from elsewhere."""
_DIGITS = re.compile(r"0|[1-9][0-9]{0,17}")
_NUMBERED = re.compile(rf"(?:LABEL_)?({_DIGITS.pattern})")
"""Names that a number means: `label_set` makes the second kind of ids without names."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_texts(rows: Rows, problems: list[str]) -> None:
    """Every text is a string that says something and can be encoded."""
    empty: list[int] = []
    wrong: list[int] = []
    halves: list[int] = []
    example: Any = None
    for number, text in zip(rows.numbers, rows.texts, strict=True):
        if not isinstance(text, str):
            example = text if not wrong else example
            wrong.append(number)
        elif not text or text.isspace():
            empty.append(number)
        elif not text.isascii() and _SURROGATE.search(text):
            halves.append(number)
    if empty:
        problems.append(finding(rows, empty, "with an empty text", "every row needs a text: fill or remove them"))
    if wrong:
        met = "null or absent" if example is None else f"{example!r:.40}"
        what = "whose text is not a string"
        problems.append(finding(rows, wrong, what, f"the first is {met}; every text must be a string"))
    if halves:
        what = "whose text holds a lone surrogate (half a UTF-16 character, such as \\ud83d)"
        problems.append(finding(rows, halves, what, "such a text can't be encoded: write the whole character"))


def normalise_labels(rows: Rows, problems: list[str]) -> None:
    """Labels become stripped names, ids >= 0, or None where there is a problem."""
    missing: list[int] = []
    wrong: list[int] = []
    example: Any = None
    names = rows.names
    for index, value in enumerate(rows.labels):
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a column of ids with gaps reaches files as floats
        if isinstance(value, str):
            value = value.strip()
        if value in (None, "", -1, "-1") or value != value:
            missing.append(rows.numbers[index])
            value = None
        elif isinstance(value, bool) or not isinstance(value, (str, int)):
            example = value if not wrong else example
            wrong.append(rows.numbers[index])
            value = None
        elif names is not None and isinstance(value, int) and 0 <= value < len(names):
            value = names[value]
        rows.labels[index] = value
    if missing:
        what = "without a label (null, empty or -1)"
        problems.append(finding(rows, missing, what, "every row needs a label: add or remove them"))
    if wrong:
        what = "whose label is neither a name nor an id"
        problems.append(finding(rows, wrong, what, f"the first is {example!r:.40}; write a string or an integer"))


def label_set(train: list[Rows], stated: tuple[str, ...] | None) -> tuple[tuple[str, ...], dict[str | int, int]]:
    """The label names, and the id of every value that stands for one; empty where they can't be told.

    Args:
        train: rows with normalised labels.
        stated: the names as configured, if they are.
    """
    found = {label for rows in train for label in rows.labels if label is not None}
    known = stated or next((rows.names for rows in train if rows.names), None)
    if known is None and not all(rows.whole for rows in train):
        return (), {}  # labels of the rows that could not be read would seem unknown elsewhere
    if known is None and found and all(_is_id(label) for label in found):
        numbers = sorted({int(label) for label in found})
        labels = tuple(f"LABEL_{number}" for number in numbers)
        table: dict[str | int, int] = {number: index for index, number in enumerate(numbers)}
    else:
        strings = {label for label in found if isinstance(label, str)}
        labels = known or (EMOTIONS if strings == set(EMOTIONS) else tuple(sorted(strings)))
        numerals: dict[str | int, int] = {
            int(number[1]): index for index, label in enumerate(labels) if (number := _NUMBERED.fullmatch(label))
        }
        # Names such as "1" to "5" are meant by the number 5 too. Otherwise numbers are positions, but only in
        # an order that somebody stated, not in the alphabet's.
        table = numerals or {index: index for index in range(len(labels) if known else 0)}
    table.update({str(value): index for value, index in table.items()})
    table.update({label: index for index, label in enumerate(labels)})
    return labels, table


def _is_id(label: str | int) -> bool:
    return label >= 0 if isinstance(label, int) else _DIGITS.fullmatch(label) is not None


def to_ids(rows: Rows, labels: tuple[str, ...], table: dict[str | int, int], problems: list[str]) -> Ids:
    """[rows] label ids, -1 where the row has none."""
    unknown: dict[str | int, list[int]] = {}
    ids = [-1 if label is None else table.get(label, -1) for label in rows.labels]
    for number, label, index in zip(rows.numbers, rows.labels, ids, strict=True):
        if index < 0 and label is not None:
            unknown.setdefault(label, []).append(number)
    for label, numbers in list(unknown.items())[:5]:
        what = f"with the label {label!r}{nearest(str(label), labels)}"
        remedy = f"the labels are {listing(labels)}; correct the rows or set data.labels"
        problems.append(finding(rows, numbers, what, remedy))
    if len(unknown) > 5:
        more = count(len(unknown) - 5, "more label")
        problems.append(f"{rows.where}: {more} outside the set: is data.label_column right?")
    return np.array(ids, dtype=np.int64)


def check_presence(
    splits: dict[str, list[Rows]], labels: tuple[str, ...], ids: dict[int, Ids], problems: list[str]
) -> None:
    """Every split has rows, and rows of every label.

    Args:
        splits: "train" among them.
        labels: the label set.
        ids: of each Rows, by its id(): what `to_ids` gave.
        problems: gets one sentence for each kind of problem.
    """
    nothing = np.zeros(0, dtype=np.int64)
    held = {name: np.concatenate([ids.get(id(p), nothing) for p in parts]) for name, parts in splits.items()}
    counts = {name: np.bincount(some[some >= 0], minlength=len(labels)) for name, some in held.items()}
    for name, parts in splits.items():
        # Rows that could not be read or understood might have held what seems to be lacking.
        if not all(p.whole for p in parts) or (held[name] < 0).any():
            continue
        if not any(p.numbers for p in parts):
            problems.append(
                f"{name}: has no rows ({listing([p.where for p in parts], 5)}): add some or remove the file"
            )
            continue
        if name == "train" and len(labels) == 1:
            problems.append(f"train: has only one label, '{labels[0]}', but there must be at least two to tell apart")
        lacking = [index for index in range(len(labels)) if len(held[name]) and not counts[name][index]]
        if lacking:
            of_train = ["" if name == "train" else f" ({counts['train'][index]:,} in train)" for index in lacking]
            names = listing([f"'{labels[index]}'{told}" for index, told in zip(lacking, of_train, strict=True)], 5)
            remedy = "add rows, correct misspelt labels, or set data.labels to the labels in use"
            problems.append(f"{name}: has no row with the label {names}: {remedy}")
