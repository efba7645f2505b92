"""The pieces that messages are made of: counts with nouns, short lists, times, first lines, nearest names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def count(number: int, noun: str) -> str:
    """`1 row`, `1,204 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def at(unit: str, numbers: Sequence[int]) -> str:
    """`line 4`, `lines 4, 9`, or the first five and an ellipsis."""
    shown = ", ".join(str(number) for number in numbers[:5])
    return f"{unit}{'s' if len(numbers) > 1 else ''} {shown}{', ...' if len(numbers) > 5 else ''}"


def listing(names: Sequence[Any], most: int = 10) -> str:
    """The first `most` names, and how many there are."""
    more = f", ... ({len(names):,} in all)" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest known name, else an empty string."""
    close = closest(name, names)
    return f" (did you mean '{close}'?)" if close else ""


def closest(name: str, names: Iterable[str]) -> str | None:
    """The known name that ends in this one (`batch_size`), or is spelt most like it, or has it as initials (`lr`)."""
    known = list(names)
    close = [each for each in known if each.endswith(f"_{name}")]
    close += difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    close += [each for each in known if "".join(word[:1] for word in each.split("_")) == name]
    return close[0] if close else None


def clock(seconds: float) -> str:
    """`2:05`, `1:02:05`."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def first_line(error: object) -> str:
    """What an error says, without what follows its first line; the name of its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
