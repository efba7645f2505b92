"""The end of a sweep: the winner's config and model, and what was learnt, as JSON, CSV, a table and a report."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from emoray import checkpoint, model_card, run, sweep_report
from emoray.config import TrainConfig
from emoray.errors import RunError
from emoray.metrics import EVALUATED
from emoray.run import Attempt
from emoray.search_space import short, shown
from emoray.sweep import RESULTS, Sweep, Trial
from emoray.wording import first_line

BEST_CONFIG = "best.yaml"
TABLE = "sweep.md"


def finish(sweep: Sweep, attempt: Attempt, say: Callable[[str], None]) -> dict[str, Any]:
    """Write all that a sweep leaves, sweep.json last.

    Returns:
        The content of sweep.json.

    Raises:
        RunError: no trial came to its end.
        FencedError: a newer attempt owns the sweep.
    """
    ranking = sweep.ranking()
    if not ranking:
        reasons = "\n".join(f"  - {trial.name}: {trial.reason or trial.state}" for trial in sweep.trials)
        raise RunError(f"{attempt.run.location}: no trial came to its end, so there is no winner:\n{reasons}")
    winner = ranking[0]
    say(f"Trial {winner.name} wins: writing its model and config")
    results = summary(sweep, run.results(attempt.run / winner.folder) or {})
    attempt.write(BEST_CONFIG, best_config(sweep, winner).to_yaml())
    _take_model(sweep, winner, attempt)
    attempt.write("sweep.csv", as_csv(sweep))
    attempt.write(TABLE, table(sweep))
    attempt.write(run.REPORT, sweep_report.render(sweep, results))
    attempt.write(RESULTS, json.dumps(results, indent=1))
    return results


def _take_model(sweep: Sweep, winner: Trial, attempt: Attempt) -> None:
    """best/ of the sweep is the winner's; a trial's own is needed no more."""
    taken = f"{checkpoint.BEST}/{checkpoint.MANIFEST}"
    if not attempt.run.exists(taken):  # else an earlier command came to its last lines
        source = checkpoint.fetch(attempt.run / winner.folder, checkpoint.BEST)

        def fill(folder: Path) -> None:
            left_out = shutil.ignore_patterns(checkpoint.MANIFEST, checkpoint.EXPORTS)
            shutil.copytree(source, folder, dirs_exist_ok=True, copy_function=shutil.copyfile, ignore=left_out)
            name, facts = sweep.plan.config.run.name, checkpoint.facts(source)
            facts["config"]["run"]["name"] = name  # what an endpoint calls the model
            card = folder / model_card.NAME
            card.write_text(model_card.renamed(card.read_text(encoding="utf-8"), name), encoding="utf-8")
            (folder / checkpoint.FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")

        checkpoint.write(attempt.run, checkpoint.BEST, fill, attempt.check)
    for trial in sweep.trials:
        attempt.check()
        attempt.run.delete(f"{trial.folder}/{checkpoint.FOLDER}")
        attempt.run.delete(f"{trial.folder}/{checkpoint.BEST}")


def best_config(sweep: Sweep, winner: Trial) -> TrainConfig:
    """The winner's training config, complete: `emoray train best.yaml` gives its figures again, to the last digit.

    The threads of a worker are part of it, since they decide the last bits.
    """
    config = sweep.plan.trial(winner.name, "runs", winner.values)
    name = f"{sweep.plan.config.run.name}-best"[-100:]
    storage = sweep.plan.config.run.storage_path
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name, "storage_path": storage})})


def summary(sweep: Sweep, winner_results: Mapping[str, Any]) -> dict[str, Any]:
    """The content of sweep.json.

    Args:
        winner_results: results.json of the winner.
    """
    winner, tuned = sweep.ranking()[0], sweep.plan.config.tune
    taken, whole = sweep.steps()
    draws = sweep.draws(winner)
    return {
        "metric": tuned.metric,
        "mode": "min" if sweep.plan.sign < 0 else "max",
        "searcher": tuned.searcher,
        "scheduler": tuned.scheduler,
        "best": {
            "trial": winner.name,
            "values": winner.values,
            "metric": sweep.plan.sign * sweep.score(winner),
            "validation": winner_results.get("best"),
            "test": winner_results.get("test"),
            **({"mean": sweep.mean(winner), "spread": sweep.spread(winner), "draws": draws} if len(draws) > 1 else {}),
        },
        "steps": {"taken": taken, "without_stopping": whole},
        "seconds": round(sum(trial.seconds for trial in sweep.trials), 1),
        "importance": sweep_report.importance(sweep),
        "trials": [trial.record() for trial in sweep.trials],
    }


def as_csv(sweep: Sweep) -> str:
    """A line a trial, for a spreadsheet."""
    keys = [domain.key for domain in sweep.plan.domains]
    extra = ["training.seed"] if any(trial.repeats is not None for trial in sweep.trials) else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "state", *keys, *extra, *EVALUATED, "epoch", "steps", "total_steps", "seconds", "reason"])
    for trial in sweep.trials:
        entry = sweep.best_evaluation(trial) or {}
        writer.writerow(
            [
                trial.name,
                trial.state,
                *(trial.values.get(key) for key in keys),
                *(trial.values.get(key, sweep.plan.base.training.seed) for key in extra),
                *(entry.get(name) for name in (*EVALUATED, "epoch")),
                trial.steps,
                trial.total_steps,
                round(trial.seconds, 1),
                trial.reason,
            ]
        )
    return out.getvalue()


def table(sweep: Sweep) -> str:
    """A Markdown table, the best trials first, and what the sweep took."""
    keys = [domain.key for domain in sweep.plan.domains]
    lines = [
        f"| Trial | {' | '.join(map(short, keys))} | State | Epochs | Steps | Accuracy | F1 | Validation Loss |",
        f"|---|{'---:|' * len(keys)}---|{'---:|' * 5}",
    ]
    for trial in sweep.best_first():
        entry = sweep.best_evaluation(trial)
        figures = [f"{entry[name]:.4f}" if entry else "-" for name in ("accuracy", "f1", "validation_loss")]
        epochs = f"{trial.evaluations[-1]['epoch']:g}" if trial.evaluations else "-"
        values = [shown(trial.values.get(key)) for key in keys]
        state = trial.state if trial.state != "failed" else f"failed: {first_line(trial.reason)[:80]}"
        cells = [trial.name, *values, state, epochs, f"{trial.steps} of {trial.total_steps}", *figures]
        lines.append(f"| {' | '.join(cells)} |")
    taken, whole = sweep.steps()
    if whole:
        lines += [
            "",
            f"Steps: {taken:,} instead of the {whole:,} of all trials to their end ({taken / whole:.0%}).",
        ]
    for trial in sweep.ranking() if sweep.plan.config.tune.repeats else []:
        spread = sweep.spread(trial)
        if spread is not None:
            draws = sweep.draws(trial)
            lines.append(
                f"Trial {trial.name} with {len(draws)} seeds: {sweep.plan.config.tune.metric} {sweep.mean(trial):.4f} "
                f"± {spread:.4f} ({', '.join(f'{draw:.4f}' for draw in draws)})."
            )
    return "\n".join(lines) + "\n"
