"""The end of a run: the best checkpoint scored once more, best/, the results table, the report and the model card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emoray import checkpoint, evaluation, metrics, model_card, report
from emoray.classifier import Classifier
from emoray.data import Split
from emoray.evaluation import Scored
from emoray.learner import Learner
from emoray.progress import Progress, fill_model_folder
from emoray.run import REPORT, RESULTS, Attempt, read_history
from emoray.storage import is_uri
from emoray.task import Task


def finish(learner: Learner, progress: Progress, attempt: Attempt) -> dict[str, Any] | None:
    """Score validation and test with the best weights and write all that a run leaves; results.json comes last.

    Args:
        learner: with the best weights, on every worker.

    Returns:
        The content of results.json, on worker 0; None on the others.

    Raises:
        FencedError: a newer attempt owns the run.
        StorageError: the run's folder can't be written.
    """
    validation, test = learner.scores("validation"), learner.scores("test")
    if validation is None or test is None:
        return None
    task = learner.task
    targets = task.parts["validation"].targets
    calibration = metrics.fit_calibration(validation, targets)
    scored = {
        "validation": scored_part(task, "validation", validation, calibration),
        "test": scored_part(task, "test", test, calibration),
    }
    best = progress.best(task.config.training.metric_for_best_model)
    assert best is not None
    results = evaluation.results(progress.evaluations, best, scored["test"])
    history = read_history(attempt.run)
    facts = run_facts(task, progress, history)
    asked: list[report.Insight] = []

    def fill(folder: Path) -> None:
        fill_model_folder(
            folder, task, learner.whole_weights(), {"validation": best, "test": results["test"]}, calibration
        )
        asked.append(report.insight(Classifier.from_folder(folder), scored["test"]))
        (folder / model_card.NAME).write_text(model_card.render(_card(task, results, scored, facts)), encoding="utf-8")

    checkpoint.write(attempt.run, checkpoint.BEST, fill, attempt.check)
    attempt.write(REPORT, report.render(_report(task, history, results, scored, facts, asked[-1])))
    attempt.write("results.md", evaluation.results_table(results))
    attempt.write(RESULTS, json.dumps(results, indent=1))
    return results


def scored_part(task: Task, split: str, logits: NDArray[np.float32], calibration: metrics.Calibration) -> Scored:
    """A split's logits beside its texts and targets."""
    part = task.parts[split]
    rows = Split(split, part.texts, part.targets, part.rows, part.languages)
    return Scored.of(rows, task.labels, logits, part.tokens, calibration)


def run_facts(task: Task, progress: Progress, history: list[dict[str, Any]]) -> dict[str, str]:
    """What a reader wants to know of how a run went: name -> value, as text."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    speeds = [row["tokens_per_s"] for row in history]
    return {
        "hardware": f"{device}, {task.facts['platform']}",
        "training time": f"{progress.seconds / 60:.1f} min",
        "tokens/s (median)": f"{np.median(speeds):,.0f}" if speeds else "-",
        "data fingerprint": str(task.facts["data"]["fingerprint"]),
        **{name: str(value) for name, value in task.facts["versions"].items()},
    }


def _report(
    task: Task,
    history: list[dict[str, Any]],
    results: dict[str, Any],
    scored: dict[str, Scored],
    facts: dict[str, str],
    asked: report.Insight,
) -> report.ReportInput:
    return report.ReportInput(
        name=task.config.run.name,
        config=task.config.model_dump(mode="json"),
        history=history,
        results=results,
        validation=scored["validation"],
        test=scored["test"],
        warnings=task.facts["data"]["warnings"],
        facts=facts,
        insight=asked,
    )


def _card(
    task: Task, results: dict[str, Any], scored: dict[str, Scored], facts: dict[str, str]
) -> model_card.CardInput:
    config = task.config
    return model_card.CardInput(
        name=config.run.name,
        labels=task.labels,
        dataset=_public(config.data.dataset),
        sizes=task.facts["data"]["rows"],
        fingerprint=task.facts["data"]["fingerprint"],
        recipe={key: _public(value) for key, value in config.recipe().items()},
        results=results,
        validation=scored["validation"],
        test=scored["test"],
        base_model=_hub_id(config.model.pretrained) if not config.model.from_scratch else None,
        dataset_id=_hub_id(config.data.dataset) if config.data.dataset != "quickstart" else None,
        max_length=config.model.max_length,
        warnings=task.facts["data"]["warnings"],
        facts={name: value for name, value in facts.items() if name != "data fingerprint"},
    )


def _public(value: Any) -> Any:
    """A model card travels: of a local path only the last part means something elsewhere."""
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _hub_id(name: str) -> str | None:
    return None if os.path.isabs(name) or is_uri(name) else name
