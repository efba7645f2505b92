"""Pydantic's findings as a sentence for the caller: which field, and what it must be. What was sent is never shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from emoray.wording import nearest

_MOST = 3
"""Findings in one sentence: more of them only repeat each other."""

_RULES = {
    "missing": "is missing",
    "string_type": "must be a string",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "string_pattern_mismatch": "must not be empty or blank",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "string_unicode": "must be valid Unicode",
}


def findings(error: ValidationError) -> list[ErrorDetails]:
    """What pydantic found, without the input: it may be large, and it is the caller's text."""
    return error.errors(include_url=False, include_input=False)


def sentence(found: Sequence[ErrorDetails], model: type[BaseModel]) -> str:
    """The first few findings, each with its field's place, e.g. `texts[3]: must be a string`."""
    parts: dict[str, None] = {}
    for place, item in enumerate(found):
        if len(parts) == _MOST:  # there may be a hundred thousand more
            return "; ".join(parts) + f"; and {len(found) - place} more like these"
        parts.setdefault(_finding(item, model))
    return "; ".join(parts)


def _finding(item: Any, model: type[BaseModel]) -> str:
    place = _place(item["loc"])
    if item["type"] == "extra_forbidden":
        field = str(item["loc"][-1])[:64]
        return f"{place[:100]}: no such field{nearest(field, model.model_fields)}"
    if item["type"] == "value_error":
        rule = str(item["ctx"]["error"])
    else:
        rule = _RULES.get(item["type"]) or str(item["msg"]).replace("Input should", "must")
    return f"{place}: {rule}" if place else f"the body {rule}"


def _place(loc: tuple[int | str, ...]) -> str:
    """`inputs[0].data[2]` of ("inputs", 0, "data", 2)."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc]
    return "".join(parts).removeprefix(".")
