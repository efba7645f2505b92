"""What a run has behind it, and the checkpoint that it is kept in, beside weights and optimizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from emoray import checkpoint
from emoray.metrics import NO_CALIBRATION, Calibration
from emoray.run import Attempt, best_evaluation
from emoray.task import Task


@dataclass
class Progress:
    """What a run has behind it, kept as JSON beside the optimizer's tensors.

    Attributes:
        step: optimizer steps done; with the config and the data it decides all that is to come.
        evaluations: one entry an evaluation: epoch, step, validation_loss, accuracy, f1, macro_f1.
        seconds: time spent training, over all attempts.
    """

    step: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @staticmethod
    def read(folder: Path) -> Progress:
        """The progress that a checkpoint was written at."""
        return Progress(**json.loads((folder / checkpoint.PROGRESS).read_text()))

    def best(self, metric: str) -> dict[str, Any] | None:
        """The best evaluation so far, the earliest of equals."""
        return best_evaluation(self.evaluations, metric)

    def stalled(self, metric: str, patience: int | None) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        best = self.best(metric)
        if patience is None or best is None:
            return False
        return len(self.evaluations) - 1 - self.evaluations.index(best) >= patience


def write_checkpoint(
    task: Task, progress: Progress, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], attempt: Attempt
) -> None:
    """Write the checkpoint of `progress.step` into the run's folder."""

    def fill(folder: Path) -> None:
        fill_model_folder(
            folder,
            task,
            dict(weights),
            metrics={"validation": progress.evaluations[-1] if progress.evaluations else None},
            calibration=NO_CALIBRATION,
        )
        (folder / checkpoint.OPTIMIZER).parent.mkdir()
        save_file(dict(moments), folder / checkpoint.OPTIMIZER)
        (folder / checkpoint.PROGRESS).write_text(json.dumps(asdict(progress), indent=1))

    checkpoint.write(attempt.run, checkpoint.name_of(progress.step), fill, attempt.check)


def fill_model_folder(
    folder: Path, task: Task, weights: dict[str, Tensor], metrics: Any, calibration: Calibration
) -> None:
    """A Hugging Face folder with emoray.json: what serving needs."""
    for name, content in task.files.items():
        (folder / name).write_bytes(content)
    save_file(weights, folder / checkpoint.WEIGHTS, metadata={"format": "pt"})
    facts = {
        "labels": list(task.labels),
        "max_length": task.config.model.max_length,
        **calibration._asdict(),
        "metrics": metrics,
        "config": task.config.model_dump(mode="json"),
        **task.facts,
    }
    (folder / checkpoint.FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False))
