"""The README.md that travels with a model: what it is, how to use it, what was measured, where it is weak.

Hub-compatible front matter and Markdown. Every figure comes from the arguments; what isn't known isn't said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from emoray.config_files import plain
from emoray.evaluation import Scored, results_table
from emoray.metrics import TITLES

NAME = "README.md"
_TYPES = {"accuracy": "accuracy", "f1": "f1", "macro_f1": "f1", "loss": "loss"}
"""The figures of a card, and what the Hub calls each."""
_FEW = 100  # rows of a label below which its figures are called uncertain


@dataclass(frozen=True, eq=False)
class CardInput:
    """All that a model card is made of.

    Args:
        name: of the model.
        labels: label names in the order of their ids.
        dataset: what it was trained on, as the reader may see it.
        sizes: split -> rows.
        fingerprint: of the data's texts and labels.
        recipe: dotted config key -> value.
        results: the content of results.json.
        validation: the model's outputs on validation.
        test: the same on test, of which the details are.
        base_model: Hub id of the encoder; None for a local folder or random weights.
        dataset_id: Hub id of the data set; None for files.
        max_length: tokens at which texts were cut.
        warnings: what the data check found, one sentence each.
        facts: name -> value: versions, hardware, duration.
    """

    name: str
    labels: Sequence[str]
    dataset: str
    sizes: Mapping[str, int]
    fingerprint: str
    recipe: Mapping[str, Any]
    results: Mapping[str, Any]
    validation: Scored
    test: Scored
    max_length: int
    base_model: str | None = None
    dataset_id: str | None = None
    warnings: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def render(card: CardInput) -> str:
    """The text of README.md."""
    shown = card.test
    parts = [
        f"---\n{_front_matter(card)}---",
        f"# {_cell(card.name)}",
        _summary(card),
        "## How to use it",
        _usage(card),
        "## Results",
        results_table({"epochs": card.results["epochs"]}).rstrip(),
        _headline(card),
        f"Each label on {shown.split}:",
        _labels(shown),
        "## Calibration",
        _calibration(shown),
        "## Limits",
        _limits(card),
        "## Recipe",
        _table(("Key", "Value"), ((f"`{key}`", f"`{plain(value)}`") for key, value in card.recipe.items())),
        "## Data",
        _data(card),
        "## Versions" if card.facts else "",
        _table(("", ""), card.facts.items()) if card.facts else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def renamed(text: str, name: str) -> str:
    """A card that `render` made, under another name."""
    _, front, body = text.split("---\n", 2)
    content = yaml.safe_load(front)
    content["model-index"][0]["name"] = name
    _, begin, after = body.split("\n", 2)
    assert begin.startswith("# ")
    return f"---\n{_yaml(content)}---\n\n# {_cell(name)}\n{after}"


def _front_matter(card: CardInput) -> str:
    figures = card.test.metrics()
    metrics = [{"type": kind, "name": TITLES[key], "value": round(figures[key], 6)} for key, kind in _TYPES.items()]
    dataset = {"name": card.dataset, "type": card.dataset_id or card.dataset, "split": card.test.split}
    content: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "base_model": card.base_model,
        "datasets": [card.dataset_id] if card.dataset_id else None,
        "metrics": ["accuracy", "f1"],
        "tags": ["emoray", "text-classification"],
        "model-index": [
            {
                "name": card.name,
                "results": [
                    {
                        "task": {"type": "text-classification", "name": "Text Classification"},
                        "dataset": dataset,
                        "metrics": metrics,
                    }
                ],
            }
        ],
    }
    known = {key: value for key, value in content.items() if value is not None}
    return _yaml(known)


def _yaml(content: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def _summary(card: CardInput) -> str:
    start = "A text classifier trained with emoray"
    if card.base_model:
        start = f"[{card.base_model}](https://huggingface.co/{card.base_model}) fine-tuned with emoray"
    names = ", ".join(_cell(label) for label in card.labels)
    return (
        f"{start}: it gives a text one of {len(card.labels)} labels ({names}). "
        f"Accuracy on {card.test.split} ({len(card.test):,} rows): {card.test.metrics()['accuracy']:.4f}."
    )


def _usage(card: CardInput) -> str:
    return f"""With transformers:

```python
from transformers import pipeline

classify = pipeline("text-classification", model="path/to/this/folder")
classify("a text to classify", truncation=True, max_length={card.max_length})  # [{{"label": ..., "score": ...}}]
```

With emoray, which also calibrates the scores ({card.test.calibration}):

```python
import emoray

classify = emoray.Classifier.load("path/to/this/folder")
classify(["a text to classify"])
```

Both give the same labels; the scores of the transformers pipeline are those before calibration."""


def _headline(card: CardInput) -> str:
    """Validation and test side by side, with intervals."""
    splits = [card.validation, card.test]
    columns = [(split.metrics(), split.intervals()) for split in splits]
    rows = [["Rows", *(f"{len(split):,}" for split in splits)]]
    for key in _TYPES:
        cells = [f"{found[key]:.4f} ({low[key][0]:.3f}–{low[key][1]:.3f})" for found, low in columns]
        rows.append([TITLES[key], *cells])
    table = _table(("", *(split.split for split in splits)), rows)
    return f"The model that was kept, with 95% intervals (bootstrap; of the accuracy Wilson's):\n\n{table}"


def _labels(shown: Scored) -> str:
    return _table(
        ("Label", "Precision", "Recall", "F1", "Support"),
        (
            [
                row["label"],
                *(f"{row[key]:.4f}" for key in ("precision", "recall", "f1")),
                f"{row['support']:,}",
            ]
            for row in shown.per_label()
        ),
    )


def _calibration(shown: Scored) -> str:
    if shown.calibration.is_none:
        return (
            f"The probabilities are softmax(logits), without calibration. On {shown.split}, the expected "
            f"calibration error (15 bins) is {shown.ece():.4f} and the Brier score {shown.brier():.4f}."
        )
    return (
        f"Calibrated on validation with {shown.calibration}: probabilities are softmax(-(distance to the highest logit "
        f"/ temperature) ** power), power 1 where none is named. On {shown.split}, the expected calibration error "
        f"(15 bins) is "
        f"{shown.ece(calibrated=False):.4f} before and {shown.ece():.4f} after; the Brier score "
        f"{shown.brier(calibrated=False):.4f} and {shown.brier():.4f}."
    )


def _limits(card: CardInput) -> str:
    """What the measurements themselves say against the model."""
    shown = card.test
    table = [row for row in shown.per_label() if row["support"] > 0]
    weakest = min(table, key=lambda row: (row["f1"], row["label"]))
    found = [
        f"Weakest label: {_cell(weakest['label'])}, F1 {weakest['f1']:.4f} on {weakest['support']:,} rows of "
        f"{shown.split}.",
        "Each text gets exactly one of the labels above, also where none or several fit.",
        f"The figures hold for texts like those of {_cell(card.dataset)}; on others they are unknown.",
    ]
    few = [f"{_cell(row['label'])} ({row['support']})" for row in shown.per_label() if row["support"] < _FEW]
    if few:
        found.append(f"Labels with fewer than {_FEW} rows in {shown.split}, so uncertain: {', '.join(few)}.")
    cut = int(shown.truncated.sum())
    found.append(f"Texts are cut at {card.max_length:,} tokens: {cut:,} of {len(shown):,} in {shown.split} were.")
    found += [f"Data check: {_cell(warning)}" for warning in card.warnings]
    return "\n".join(f"- {line}" for line in found)


def _data(card: CardInput) -> str:
    rows = [["Data set", card.dataset], *([f"{split} rows", f"{n:,}"] for split, n in card.sizes.items())]
    return _table(("", ""), [*rows, ["Fingerprint", f"`{card.fingerprint}`"]])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that can't break out of a line or a table's cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
