"""Exports of a model: where they lie, what they say of themselves, and whether they may be used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emoray import checkpoint
from emoray.errors import CheckpointError, ModelError
from emoray.folders import cache_folder

Precision = Literal["fp32", "int8"]
PRECISIONS: dict[str, Precision] = {"onnx": "fp32", "onnx-int8": "int8"}
"""Engine -> the export that it runs."""
GRAPH, FACTS = "model.onnx", "export.json"
FORMAT = 1
"""Rises with every change of the graph: an export of another number is stale."""


@dataclass(frozen=True)
class Export:
    """An export whose sums match, of the model that it lies beside.

    Attributes:
        folder: model.onnx, export.json, and a manifest; without the graph where it was refused.
        facts: what export.json says: precision, parity with the torch model, whether it is accepted and else why not.
    """

    folder: Path
    facts: dict[str, Any]

    @property
    def accepted(self) -> bool:
        return bool(self.facts["accepted"])

    def must_be_accepted(self) -> None:
        """Raises ModelError for one that did not agree with its model."""
        if not self.accepted:
            raise ModelError(f"{self.folder}: {self.facts['reason']}")


def cache(fingerprint: str) -> Path:
    """Where exports go whose model lies where nothing can be written."""
    return cache_folder() / "onnx" / fingerprint


def locate(folder: Path, precision: Precision) -> tuple[Path, Path]:
    """The places of an export: beside the model, and in the cache."""
    beside, cached = folder / checkpoint.EXPORTS, cache(checkpoint.fingerprint(folder))
    return beside / precision, cached / precision


def find(folder: Path, precision: Precision) -> Export | None:
    """The export of a model; None where there is none.

    Raises:
        CheckpointError: it is damaged, or of another model or another version of the graph.
    """
    refused: CheckpointError | None = None
    for place in locate(folder, precision):
        if place.exists():
            try:
                return read(place, checkpoint.fingerprint(folder))
            except CheckpointError as error:
                refused = refused or error  # where nothing can be written beside a model, a newer one is in the cache
    if refused is not None:
        raise refused
    return None


def read(place: Path, source: str) -> Export:
    """The export of a folder.

    Args:
        source: fingerprint of the model that it must be of.

    Raises:
        CheckpointError: it is damaged, or of another model or another version of the graph.
    """
    remedy = "`emoray export` writes it anew"
    try:
        checkpoint.verify(place)
        facts: dict[str, Any] = json.loads((place / FACTS).read_text(encoding="utf-8"))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {remedy}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place}/{FACTS}: can't be read: {error}; {remedy}") from None
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{place}: is of format {facts.get('format')}, and this version reads {FORMAT}; {remedy}")
    if facts.get("source") != source:
        raise CheckpointError(f"{place}: was made from model {facts.get('source')}, and this is {source}; {remedy}")
    return Export(place, facts)
