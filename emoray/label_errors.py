"""Rows that are likely mislabelled: confident learning over what models say of texts they were not trained on.

The probabilities must be out of sample: a model that has seen a wrong label may have learnt it. A test or validation
split has them from any model. For the training split the whole recipe is trained FOLDS times, each time without one
fold of the rows, and the rows of that fold are scored: slow (FOLDS - 1 times one training) and honest. Rejected:
a light classifier on the encoder's frozen embeddings, quick but so often wrong itself that its doubts mean little.

Source: Northcutt, Jiang and Chuang 2021, "Confident Learning", as cleanlab implements it (an extra).
"""

from __future__ import annotations

import csv
import hashlib
import io
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emoray import metrics
from emoray.errors import MissingExtraError
from emoray.metrics import Array
from emoray.run import Attempt
from emoray.storage import Storage

if TYPE_CHECKING:
    from emoray.config import TrainConfig
    from emoray.data import Dataset, Split
    from emoray.task import Task

FOLDS = 3
"""Parts that the training rows are dealt to; each model learns from all parts but one."""
FILTER = "both"
"""Of cleanlab's rules the one that flags what two of them agree on: with 5% of the labels of 2,000 held-out messages
flipped it found as many as cleanlab's default (93%), with fewer false alarms (15-18% of the flagged, not 19-21%)."""
COLUMNS = ("row", "label", "likely_label", "score", "text")


@dataclass(frozen=True)
class LabelError:
    """A row whose label the models doubt.

    Attributes:
        row: its place in the split, from 0.
        label: the label that the row has.
        likely: the label that the models find likeliest.
        score: how well the label fits, 0 to 1; the lower, the likelier an error.
    """

    row: int
    label: str
    likely: str
    score: float


def find(labels: tuple[str, ...], targets: Array, probabilities: Array) -> list[LabelError]:
    """The rows that are likely mislabelled, likeliest first.

    Args:
        labels: label names in the order of their ids, L of them.
        targets: the labels that the rows have, ids [n].
        probabilities: out of sample, [n, L].

    Raises:
        MissingExtraError: cleanlab isn't installed.
    """
    find_label_issues, quality = _cleanlab()
    present = np.unique(targets)  # cleanlab refuses labels that no row has
    if len(present) < 2:
        return []
    ids = np.searchsorted(present, targets)
    held = probabilities[:, present]
    held = held / np.maximum(held.sum(1, keepdims=True), np.finfo(np.float64).tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a label has few rows: the report shows how many
        flagged = find_label_issues(ids, held, filter_by=FILTER, n_jobs=1)
    scores = quality(ids, held, method="normalized_margin")
    rows = np.flatnonzero(flagged)
    rows = rows[np.lexsort((rows, scores[rows]))]
    likely = present[held.argmax(1)]
    return [LabelError(int(i), labels[targets[i]], labels[likely[i]], float(scores[i])) for i in rows]


def _cleanlab() -> tuple[Any, Any]:
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        raise MissingExtraError(
            "Finding label errors needs cleanlab, which isn't installed: pip install 'emoray[label-errors]'"
        ) from None
    return find_label_issues, get_label_quality_scores


def in_training_split(
    config: TrainConfig, dataset: Dataset, say: Callable[[str], None] = lambda _: None
) -> list[LabelError]:
    """The rows of the training split that are likely mislabelled, likeliest first.

    Args:
        config: the recipe that is trained FOLDS times, on this machine.
        dataset: its data.
        say: called with one line before each part that takes time.

    Raises:
        MissingExtraError: cleanlab isn't installed; told before anything is trained.
        DataError, ModelError, NotFiniteError: as training.
    """
    _cleanlab()
    labels, probabilities = out_of_sample(config, dataset, say)
    return find(labels, dataset.splits["train"].labels, probabilities)


def out_of_sample(
    config: TrainConfig, dataset: Dataset, say: Callable[[str], None] = lambda _: None
) -> tuple[tuple[str, ...], Array]:
    """The label names, and of each training row the probabilities [n, L] of a model that has not seen it."""
    from emoray import model
    from emoray.process import compute_on
    from emoray.task import prepare

    training = config.training.model_copy(update={"checkpoint_every_minutes": None, "keep_checkpoints": 1})
    task, split = prepare(config.model_copy(update={"training": training}), say, dataset), dataset.splits["train"]
    state = model.load(task.config.model, task.labels, config.training.seed).state_dict()
    device = compute_on(config.workers.use_gpu is not False, config.workers.cpus_per_worker)
    fold = deal(split.texts, split.labels, FOLDS)
    probabilities = np.empty((len(fold), len(task.labels)))
    for number in range(FOLDS):
        say(f"Fold {number + 1} of {FOLDS}: training on {int((fold != number).sum()):,} rows")
        probabilities[fold == number] = _without(task, state, fold != number, device)
    return task.labels, probabilities


def deal(texts: Sequence[str], targets: Array, folds: int) -> Array:
    """The fold of each row, int64 [n]: each label spread evenly, copies of a text together, always the same.

    A text with contradicting labels counts for the first of them.
    """
    label_of: dict[str, int] = {}
    for text, target in zip(texts, targets.tolist(), strict=True):
        label_of[text] = min(target, label_of.get(text, target))
    order = sorted(label_of, key=lambda text: (label_of[text], hashlib.sha256(text.encode()).digest()))
    place = {text: index % folds for index, text in enumerate(order)}
    return np.array([place[text] for text in texts], dtype=np.int64)


def _without(task: Task, state: Any, kept: Array, device: Any) -> Array:
    """Train on the rows that are kept; probabilities of the others, calibrated on validation."""
    from emoray.training import Alone, train
    from emoray.world import World

    whole = task.parts["train"]
    parts = {
        name: replace(whole, tokens=whole.tokens.take(rows), targets=whole.targets[rows], rows=whole.rows[rows])
        for name, rows in (("train", np.flatnonzero(kept)), ("test", np.flatnonzero(~kept)))
    }
    with tempfile.TemporaryDirectory(prefix="emoray-fold-") as folder:
        attempt = Attempt.begin(Storage(folder), task.identity)
        fold = replace(task, parts={**task.parts, **parts})
        learner, _ = train(fold, state, World(device=device), attempt, Alone())
        validation, held_out = learner.scores("validation"), learner.scores("test")
    assert validation is not None and held_out is not None
    return metrics.softmax(held_out, *metrics.fit_calibration(validation, task.parts["validation"].targets))


def as_csv(errors: Sequence[LabelError], split: Split) -> str:
    """A line an error: the row's number in its file, its label, the likely one, the score and the text."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for error in errors:
        number, text = int(split.rows[error.row]), split.texts[error.row]
        writer.writerow([number, error.label, error.likely, f"{error.score:.6f}", text])
    return out.getvalue()


def write_csv(path: Path, errors: Sequence[LabelError], split: Split) -> None:
    """Raises StorageError where the file can't be written."""
    Storage(str(path.absolute().parent)).write(path.name, as_csv(errors, split))
