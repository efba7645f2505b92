"""The command line: each command loads what it needs when it runs, so that help comes at once."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emoray.errors import EmorayError, InterruptedRunError, StorageError

if TYPE_CHECKING:
    from emoray.config import TrainConfig

app = typer.Typer(
    name="emoray",
    help="Fine-tune BERT encoders for emotion classification with Ray: exactly, and without padding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, e.g. configs/emotion.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Overrides, e.g. training.learning_rate=3e-5."),
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A run's folder, its best/, or a checkpoint; path or URI.")]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON on stdout.")]


def _command(example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command under its function's name, with an example below its help."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__.strip("_").replace("_", "-")
        app.command(name, epilog=f"Example: {example}")(function)
        return function

    return register


@_command("emoray quickstart")
def quickstart() -> None:
    """Train on the data that ships in the package, classify three sentences; no network."""
    from emoray import quickstart as small
    from emoray.config import load
    from emoray.console import out

    config = load(small.config_path(), ["run.on_existing=replace"])
    small.make_encoder(Path(config.model.pretrained))
    _train(config, as_json=False)
    best = Path(config.run.storage_path) / config.run.name / "best"
    out("\nThree sentences, classified:")
    _print_predictions(str(best), list(small.SENTENCES))
    out(f"\nReport: {best.parent / 'report.html'}\nModel:  {best}")


@_command("emoray train configs/emotion.yaml run.name=mine training.learning_rate=3e-5")
def train(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Fine-tune on Ray Train; the same command goes on with a run that was stopped."""
    from emoray.config import load

    _train(load(config, overrides or []), as_json)


def _train(config: TrainConfig, as_json: bool) -> None:
    from emoray.console import TrainingDisplay, out
    from emoray.evaluation import results_table
    from emoray.on_ray.train import train as train_on_ray

    with TrainingDisplay() as display:
        results = train_on_ray(config, display)
    out(json.dumps(results) if as_json else "\n" + results_table(results).rstrip())
    if not as_json:
        folder = f"{config.run.storage_path}/{config.run.name}"
        display.say(f"Model: {folder}/best   Report: {folder}/report.html")


@_command("emoray show configs/emotion.yaml training.num_epochs=3")
def show(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print the resolved config; nothing is started."""
    from emoray.config import load
    from emoray.console import out

    resolved = load(config, overrides or [])
    out(resolved.model_dump_json(indent=1) if as_json else resolved.to_yaml().rstrip())


@_command("emoray check-data configs/emotion.yaml   or   emoray check-data my-data/")
def check_data(
    source: Annotated[str, typer.Argument(metavar="CONFIG|PATH", help="A training config, or the data itself.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Is the data well formed? Says all that training would say, without training."""
    from emoray import data
    from emoray.config import DataConfig, load
    from emoray.console import out

    if source.endswith((".yaml", ".yml")):
        config = load(source, overrides or []).data
    else:
        config = load(None, [f"data.dataset={json.dumps(source)}", *(overrides or [])]).data
    assert isinstance(config, DataConfig)
    summary = data.summary(data.load(config))
    out(json.dumps(summary, ensure_ascii=False) if as_json else _summary_text(summary))


@_command('emoray classify runs/emotion/best "i feel wonderful" "leave me alone"')
def classify(
    model: Model,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Texts; a single - reads lines from stdin.")],
    as_json: Json = False,
) -> None:
    """A quick look at a model, on this machine, without Ray."""
    if texts == ["-"]:
        texts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    _print_predictions(model, texts, as_json)


def _print_predictions(model: str, texts: list[str], as_json: bool = False) -> None:
    from dataclasses import asdict

    from emoray.classifier import Classifier
    from emoray.console import out

    for text, prediction in zip(texts, Classifier.load(model)(texts), strict=True):
        if as_json:
            out(json.dumps({"text": text, **asdict(prediction)}, ensure_ascii=False))
        else:
            runner_up = list(prediction.scores.items())[1]
            cut = "  (cut)" if prediction.truncated else ""
            out(f"{prediction.label:<10} {prediction.score:.3f}   ({runner_up[0]} {runner_up[1]:.3f}){cut}   {text}")


@_command("emoray evaluate runs/emotion --split test   or   emoray evaluate runs/emotion --data new.csv")
def evaluate(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Data to score on; default: what the model was trained on.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    report: Annotated[Path | None, typer.Option(help="Write the report there as one HTML file.")] = None,
    as_json: Json = False,
) -> None:
    """Score a model on a labelled split: headline metrics, a line a label, a report if asked for."""
    from emoray.classifier import Classifier
    from emoray.console import out
    from emoray.evaluation import evaluate as evaluate_on
    from emoray.evaluation import evaluation_text

    classifier = Classifier.load(model)
    scored = evaluate_on(classifier, data, split)
    if report is not None:
        from emoray.report import ReportInput, render

        config = classifier.facts["config"]
        shown = ReportInput(name=config["run"]["name"], config=config, test=scored)
        try:
            report.write_text(render(shown), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{report}: can't be written: {error.strerror or error}") from None
    if as_json:
        out(json.dumps({**scored.metrics(), "split": split, "labels": scored.per_label()}, ensure_ascii=False))
    else:
        out(evaluation_text(scored))


@_command("emoray doctor   or   emoray doctor configs/emotion.yaml workers.num_workers=4")
def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A training config; without one, machine and cluster only.")
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Will a run work here? Libraries, GPUs, disks, cluster; with a config, up to one real step."""
    from emoray import doctor as checks
    from emoray.console import out

    findings = checks.examine_aloud(config, overrides or [])
    if as_json:
        out(checks.as_json(findings))
    else:
        checks.show(findings)
    if checks.worst(findings) == "problem":
        sys.exit(1)


def _summary_text(summary: dict[str, Any]) -> str:
    lines = [f"{summary['source']}: {', '.join(summary['labels'])}"]
    for name, split in summary["splits"].items():
        counts = ", ".join(f"{label} {count:,}" for label, count in split["labels"].items())
        lines.append(f"  {name:<11}{split['rows']:>9,} rows, {split['words']['mean']:.1f} words on average: {counts}")
    lines += [f"  warning: {warning}" for warning in summary["warnings"]]
    return "\n".join([*lines, f"  fingerprint {summary['fingerprint']}", "The data is well formed."])


@contextmanager
def _mendable_errors() -> Iterator[None]:
    """What a user can mend is one message and exit status 1; a stop by a signal has the signal's status."""
    try:
        yield
    except InterruptedRunError as error:
        _fail(str(error))
        sys.exit(128 + (error.signal or signal.SIGINT))
    except EmorayError as error:
        _fail(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        _fail("interrupted")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _fail(message: str) -> None:
    from emoray.console import fail

    fail(message)


def main() -> None:
    """Entry point of the `emoray` command."""
    with _mendable_errors():
        app(prog_name="emoray")


if __name__ == "__main__":
    main()
