"""`emoray export`: a model as an ONNX graph for the engines, kept only if it agrees with the model itself."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoray import checkpoint, metrics
from emoray.classifier import Classifier, find_model
from emoray.data import QUICKSTART
from emoray.engines import Wanted
from emoray.engines.choice import exports_for
from emoray.engines.exports import FACTS, FORMAT, GRAPH, Export, Precision, cache, find, read
from emoray.errors import CheckpointError, DataError, EmorayError, MissingExtraError
from emoray.evaluation import rows_for
from emoray.storage import Storage
from emoray.tokens import Tokens
from emoray.wording import first_line

MAY_LOSE = 0.005
"""Accuracy that int8 may lose on the validation split: half a point."""
FP32_MAY_DIFFER = 0.001
"""What a score of the float32 graph may differ by from its model's; it does by some 1e-6."""
ROWS = 4000
"""Rows of the validation split that are compared, at the most."""
SAMPLE = 320
"""Texts from which int8 takes its scales."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Reference:
    """What the torch model says of the rows that exports are compared on.

    Attributes:
        targets: None where the texts have no labels.
        sample: texts from which int8 takes its scales: of the training split, where there is one.
    """

    split: str
    tokens: Tokens
    targets: NDArray[np.int64] | None
    logits: NDArray[np.float32]
    sample: Tokens


def export(location: str, precisions: Sequence[Precision], data: str | None = None, say: Say = print) -> list[Export]:
    """Write exports beside a model, each compared with it.

    Args:
        location: of a model, as `Classifier.load` takes it.
        data: labelled data to compare on, its validation split; None takes what the model was trained on.

    Returns:
        The exports, in the order of `precisions`; one that loses too much is there without its graph.

    Raises:
        DataError: int8 is asked for, and there is no labelled data to compare on.
        MissingExtraError, CheckpointError, ModelError, StorageError: it can't be made.
    """
    model = find_model(location)
    folder = checkpoint.fetch(model)
    try:
        return _write(model / checkpoint.EXPORTS, folder, precisions, data, say)
    finally:
        checkpoint.release(model, folder)


def ensure_for(engine: Wanted, model: Storage, folder: Path, say: Say) -> None:
    """See to it that an engine finds its exports of a model; where they can't be made, `auto` does without.

    Args:
        model, folder: its place, and what `checkpoint.fetch` gave of it.

    Raises:
        MissingExtraError, CheckpointError, ModelError, StorageError: they can't be made for an engine that was named.
    """
    try:
        ensure(model, folder, exports_for(engine), say)
    except EmorayError as error:
        if engine != "auto":
            raise
        say(f"There is no export of {model.location}: {first_line(error)}")


def ensure(model: Storage, folder: Path, precisions: Sequence[Precision], say: Say) -> None:
    """See to it that a model has good exports, beside it or in the cache; what is damaged or stale is made anew.

    Where int8 can't be compared with the model on labelled data, it is noted as not accepted.

    Raises:
        MissingExtraError, CheckpointError, ModelError, StorageError: they can't be made.
    """
    if all(_is_good(folder, precision) for precision in precisions):
        return
    with _alone(cache(checkpoint.fingerprint(folder))):
        missing = [precision for precision in precisions if not _is_good(folder, precision)]
        if not missing:
            return
        say(f"Exporting {model.location} for the engine onnx ({', '.join(missing)}); this is done once")
        place = model / checkpoint.EXPORTS
        if model.local_path is None or not os.access(folder, os.W_OK):
            place = Storage(str(cache(checkpoint.fingerprint(folder))))
        _write(place, folder, missing, None, say, strict=False)


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One process of this machine at a time makes a model's exports: the others then find them."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_suffix(".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _is_good(folder: Path, precision: Precision) -> bool:
    try:
        return find(folder, precision) is not None
    except CheckpointError:
        return False


def _write(
    place: Storage, folder: Path, precisions: Sequence[Precision], data: str | None, say: Say, strict: bool = True
) -> list[Export]:
    _need_libraries()
    model = Classifier.from_folder(folder, device="cpu")
    reference = _reference(model, data, strict and "int8" in precisions, say)
    made: list[Export] = []
    with tempfile.TemporaryDirectory(prefix="emoray-export-") as name:
        plain = Path(name) / GRAPH
        pad_id = _trace(folder, plain)
        for precision in precisions:

            def fill(stage: Path, precision: Precision = precision) -> None:
                facts = {"source": checkpoint.fingerprint(folder), "pad_id": pad_id}
                _fill(stage, plain, precision, reference, model.calibration, facts)

            checkpoint.write(place, precision, fill, lambda: None)
            made.append(read(checkpoint.fetch(place, precision), checkpoint.fingerprint(folder)))
    return made


def _trace(folder: Path, file: Path) -> int:
    """Write a model's graph, and return the token that pads batches."""
    from emoray.engines import graph, pytorch

    model = pytorch.load_model(folder)
    with _hushed():
        return graph.export(model, file)


@contextmanager
def _hushed() -> Iterator[None]:
    """The libraries advise on what isn't used here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _need_libraries() -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            raise MissingExtraError(
                f"An export needs {library}, which isn't installed: pip install 'emoray[onnx]'"
            ) from None


def _fill(
    stage: Path,
    plain: Path,
    precision: Precision,
    reference: _Reference,
    calibration: metrics.Calibration,
    facts: dict[str, Any],
) -> None:
    """Graph and facts of one export."""
    from emoray.engines.onnx import OnnxEngine

    file = stage / GRAPH
    if precision == "int8":
        from emoray.engines.int8 import quantize

        with _hushed():
            quantize(plain, file, reference.sample, facts["pad_id"])
    else:
        shutil.copy(plain, file)
    engine = OnnxEngine("onnx", file, reference.logits.shape[1], facts["pad_id"])
    facts = {
        **facts,
        "format": FORMAT,
        "precision": precision,
        "bytes": file.stat().st_size,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxruntime")},
        **_compare(precision, reference, engine.forward(reference.tokens), calibration),
    }
    if not facts["accepted"]:
        file.unlink()
    (stage / FACTS).write_text(json.dumps(facts, indent=1))


def _reference(classifier: Classifier, data: str | None, need_labels: bool, say: Say) -> _Reference:
    """The validation split where it can be had; else sentences of the package, which say how far labels agree."""
    try:
        rows = rows_for(classifier, data, "validation")
    except EmorayError as error:
        if need_labels or data is not None:
            raise DataError(
                "the validation split of the model's data",
                [f"is needed to compare int8 with the model, and can't be had ({error}): name data with --data"],
            ) from None
        say(f"No labelled data to compare on ({first_line(error)}): int8 is left out")
        lines = (QUICKSTART / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        logits, tokens = classifier.logits([json.loads(line)["text"] for line in lines])
        return _Reference("sentences of the package", tokens, None, logits, tokens)
    kept = _spread(len(rows.texts), ROWS)  # of all of a file, which may be sorted by label
    logits, tokens = classifier.logits([rows.texts[i] for i in kept])
    seen = rows_for(classifier, data, "train").texts if data is None else rows.texts
    sample = classifier.encode([seen[i] for i in _spread(len(seen), SAMPLE)])
    return _Reference("validation", tokens, np.asarray(rows.labels)[kept], logits, sample)


def _spread(size: int, most: int) -> NDArray[np.int64]:
    """Places of at most so many rows, at equal distances."""
    return np.unique(np.linspace(0, size - 1, most).astype(np.int64))


def _compare(
    precision: Precision, reference: _Reference, logits: NDArray[np.float32], calibration: metrics.Calibration
) -> dict[str, Any]:
    """Parity, and what follows from it."""
    ours, theirs = (metrics.softmax(given, *calibration) for given in (logits, reference.logits))
    parity: dict[str, Any] = {
        "split": reference.split,
        "rows": len(logits),
        "same_label": int((logits.argmax(1) == reference.logits.argmax(1)).sum()),
        "largest_difference": round(float(np.abs(ours - theirs).max()), 6),
    }
    reason = None
    if precision == "fp32" and not parity["largest_difference"] <= FP32_MAY_DIFFER:  # so that NaN doesn't either
        differs = f"{parity['largest_difference']:.2g}"
        reason = f"a score differs from its model's by {differs}, and {FP32_MAY_DIFFER} is the limit"
    elif reference.targets is None:
        if precision == "int8":
            reason = "int8 was not compared on labelled data: `emoray export MODEL --precision int8 --data ...`"
    else:
        of_graph, of_model = (metrics.compute(given, reference.targets) for given in (logits, reference.logits))
        for key in ("accuracy", "f1"):
            parity[key], parity[f"{key}_of_model"] = round(of_graph[key], 6), round(of_model[key], 6)
        lost = of_model["accuracy"] - of_graph["accuracy"]
        if lost > MAY_LOSE:
            limit = f"{100 * MAY_LOSE:g} is the limit"
            reason = f"{precision} loses {100 * lost:.2f} points of accuracy on validation, and {limit}"
    return {"parity": parity, "accepted": reason is None, "reason": reason}


def as_dict(made: Export) -> dict[str, Any]:
    """For `--json`."""
    return {"folder": str(made.folder), **made.facts}


def text(made: Export) -> str:
    """One export in two lines, for a terminal."""
    facts, parity = made.facts, made.facts["parity"]
    figures = ", ".join(
        f"{name} {parity[key]:.4f} ({parity[key + '_of_model']:.4f})"
        for key, name in (("accuracy", "accuracy"), ("f1", "F1"))
        if key in parity
    )
    state = "" if made.accepted else f"\n  NOT USED: {facts['reason']}"
    return (
        f"{facts['precision']}: {made.folder} ({facts['bytes'] / 2**20:.0f} MB)\n"
        f"  {parity['split']}: {parity['same_label']:,} of {parity['rows']:,} labels as the model's, scores within "
        f"{parity['largest_difference']:.2g}{'; ' + figures if figures else ''}{state}"
    )
