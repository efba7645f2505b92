"""What a sweep may draw: distributions over dotted keys, and values as a pure function of (seed, trial, key)"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emoray.config_files import plain
from emoray.wording import nearest

_SIZES = {"loguniform": 2, "uniform": 2, "quniform": 3, "randint": 2}
_LISTS = ("choice", "grid")
KINDS = (*_SIZES, *_LISTS)
_EXAMPLE = "{loguniform: [1.0e-5, 1.0e-3]} or {choice: [16, 32, 64]}"
_EXPONENT = re.compile(r"^[+-]?\d+[eE][+-]?\d+$")
"""YAML reads `1e-5`, without a dot, as text."""

_DIGITS = 4
_GRID_DIGITS = 10
"""Significant digits of a drawn number: a config that a person can read, and that means the same when it is read."""


@dataclass(frozen=True)
class Domain:
    """The values that one key may take.

    Attributes:
        key: dotted, e.g. `training.learning_rate`.
        kind: loguniform, uniform, quniform (low, high, step), randint (low, high; high is left out, as in Ray Tune),
            choice or grid.
        args: the numbers, or the values to choose from.
    """

    key: str
    kind: str
    args: tuple[Any, ...]

    @property
    def listed(self) -> bool:
        """Whether the values are named one by one."""
        return self.kind in _LISTS

    @property
    def size(self) -> float:
        """How many different values there are."""
        if self.listed:
            return len(self.args)
        if self.kind == "randint":
            return float(self.args[1] - self.args[0])
        if self.kind == "quniform":
            return float(self._steps)
        return math.inf

    @property
    def _steps(self) -> int:
        low, high, step = self.args
        return int((high - low) / step + 1e-9) + 1

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that must be possible where the whole domain is: the ends, or all that are listed."""
        return self.args if self.listed else tuple(self.at(share) for share in (0.0, 1 - 2**-53))

    def at(self, share: float) -> Any:
        """The value at a share (0 up to, not with, 1) of the domain."""
        if self.listed:
            return self.args[int(share * len(self.args))]
        low, high = self.args[:2]
        if self.kind == "randint":
            return low + int(share * (high - low))
        if self.kind == "quniform":
            return self.rounded(low + int(share * self._steps) * self.args[2])
        if self.kind == "loguniform":
            return self.rounded(math.exp(math.log(low) + share * (math.log(high) - math.log(low))))
        return self.rounded(low + share * (high - low))

    def rounded(self, value: Any) -> Any:
        """Digits that a person can copy; values that are listed or on a grid as they are there."""
        if self.listed or not isinstance(value, float):
            return value
        return float(f"{value:.{_GRID_DIGITS if self.kind == 'quniform' else _DIGITS}g}")


def short(key: str) -> str:
    """`learning_rate` of `training.learning_rate`."""
    return key.rpartition(".")[-1]


def shown(value: Any) -> str:
    """A value in a table."""
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def parse(tree: Mapping[str, Any], known: Sequence[str]) -> tuple[list[Domain], list[str]]:
    """Domains of a config's `search` section, and one sentence for each problem.

    Args:
        tree: nested, e.g. `{"training": {"learning_rate": {"loguniform": [1e-5, 1e-3]}}}`.
        known: the dotted keys that there are.
    """
    found: dict[str, list[Domain]] = {}
    problems = []
    for path, value in _leaves(tree):
        key, _, kind = path.rpartition(".")
        if path in known or kind not in KINDS or not key:
            problems.append(_misplaced(path, value, known))
            continue
        args, problem = _arguments(kind, value)
        if key not in known:
            problem = f"unknown key{nearest(key, known)}"
        if problem is not None:
            problems.append(f"search.{key}: {problem}")
        else:
            found.setdefault(key, []).append(Domain(key, kind, args))
    for key, domains in found.items():
        if len(domains) > 1:
            kinds = " and ".join(domain.kind for domain in domains)
            problems.append(f"search.{key}: has {kinds}, but must have one distribution")
    return [domains[0] for domains in found.values()], problems


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _misplaced(path: str, value: Any, known: Sequence[str]) -> str:
    """What is wrong with a leaf that is not `key.kind`."""
    key, _, kind = path.rpartition(".")
    if path in known:
        return (
            f"search.{path}: is {value!r}, but must be a distribution such as {_EXAMPLE}; "
            f"a fixed value goes under {path.split('.')[0]}"
        )
    if key in known:
        return f"search.{key}: unknown distribution '{kind}'{nearest(kind, KINDS)}; there are {', '.join(KINDS)}"
    return f"search.{path}: unknown key{nearest(path, known) or nearest(key, known)}"


def _arguments(kind: str, value: Any) -> tuple[tuple[Any, ...], str | None]:
    """The checked arguments of a distribution, or what is wrong with them."""
    if not isinstance(value, (list, tuple)):
        return (), f"{kind} is {value!r}, but must be a list"
    if kind in _LISTS:
        items = tuple(float(item) if isinstance(item, str) and _EXPONENT.match(item) else item for item in value)
        if not items:
            return (), f"{kind} is empty: name at least one value"
        twice = [item for place, item in enumerate(items) if item in items[:place]]
        return items, f"{kind} names {twice[0]!r} twice" if twice else None
    numbers = [_number(item) for item in value]
    wanted = "[low, high, step]" if _SIZES[kind] == 3 else "[low, high]"
    if len(numbers) != _SIZES[kind] or None in numbers:
        return (), f"{kind} is {value!r}, but must be {wanted}, all numbers"
    low, high, *step = numbers
    if not low < high:  # type: ignore[operator]
        return (), f"{kind} goes from {low:g} to {high:g}, but the first number must be the lower one"
    if kind == "loguniform" and low <= 0:  # type: ignore[operator]
        return (), f"loguniform begins at {low:g}, but must begin above 0"
    if kind == "randint" and not all(float(item).is_integer() for item in numbers):  # type: ignore[arg-type]
        return (), f"randint is {value!r}, but must be whole numbers"
    if step and not 0 < step[0] <= high - low:  # type: ignore[operator]
        return (), f"quniform has the step {step[0]:g}, but it must be above 0 and fit between {low:g} and {high:g}"
    return tuple(int(item) if kind == "randint" else item for item in numbers), None  # type: ignore[arg-type]


def _number(item: Any) -> float | int | None:
    if isinstance(item, bool):
        return None
    if isinstance(item, (int, float)):
        return item if math.isfinite(item) else None
    try:
        return float(item) if isinstance(item, str) and math.isfinite(float(item)) else None
    except ValueError:
        return None


def grid(domains: Sequence[Domain]) -> list[dict[str, Any]]:
    """Every combination of the listed values, the last key changing fastest."""
    return [
        dict(zip((domain.key for domain in domains), values, strict=True))
        for values in itertools.product(*(domain.args for domain in domains))
    ]


def draw(domains: Sequence[Domain], count: int, seed: int) -> list[dict[str, Any]]:
    """The values of trials 0 .. count - 1, no two of them alike.

    Each value is a function of (seed, trial, key) and of how often that trial's values were taken already; keys that
    have a `grid` go through its combinations in turn.
    """
    cells = grid([domain for domain in domains if domain.kind == "grid"])
    points: list[dict[str, Any]] = []
    taken = set()
    for trial in range(count):
        for again in range(10_000):
            drawn = {
                domain.key: domain.at(_share(f"{seed} {trial} {domain.key}" + f" {again}" * (again > 0)))
                for domain in domains
                if domain.kind != "grid"
            }
            point = {domain.key: {**drawn, **cells[trial % len(cells)]}[domain.key] for domain in domains}
            if (text := json.dumps(point)) not in taken:
                taken.add(text)
                points.append(point)
                break
        else:
            raise ValueError(f"trial {trial}: all combinations are taken")
    return points


def _share(words: str) -> float:
    """A number in [0, 1) that looks random and depends on the words alone, on every machine."""
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") / 2**64 * (1 - 2**-53)
