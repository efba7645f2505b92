"""The command line: each command loads what it needs when it runs, so that help comes at once."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from emoray.engines import Wanted
from emoray.errors import EmorayError, InterruptedRunError, StorageError
from emoray.wording import nearest

if TYPE_CHECKING:
    from emoray.config import TrainConfig
    from emoray.data import Dataset

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


def _keys(example: str) -> Any:
    """The argument that takes overrides."""
    return typer.Argument(metavar="[KEY.PATH=VALUE]...", help=f"Config keys to override, e.g. {example}.")


Overrides = Annotated[list[str] | None, _keys("training.learning_rate=3e-5")]
TuneConfig = Annotated[str, typer.Argument(metavar="CONFIG", help="A sweep's YAML file, e.g. configs/tune.yaml.")]
TuneOverrides = Annotated[list[str] | None, _keys("tune.num_trials=8")]
ServeOverrides = Annotated[list[str] | None, _keys("http.port=8080")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A run's folder or name, its best/, or a checkpoint; path or URI.")
]
Engine = Annotated[
    Wanted, typer.Option(metavar="ENGINE", help="torch, onnx, onnx-int8 (see `emoray export`), or auto: the fastest.")
]
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
    """Train on the package's own data; no network."""
    from emoray import quickstart as small
    from emoray.config import load
    from emoray.console import out
    from emoray.console import say as tell
    from emoray.run import open_run
    from emoray.storage import below

    config = load(small.config_path(), ["run.on_existing=replace"])
    if open_run(config.run).exists():
        tell("Training anew what an earlier quickstart left")
    small.make_encoder(Path(config.model.pretrained))
    _train(config, as_json=False)
    out("\nThree sentences, classified:")
    _print_predictions(below(config.run.storage_path, config.run.name), list(small.SENTENCES))


@_command("emoray train configs/emotion.yaml run.name=mine training.learning_rate=3e-5")
def train(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Fine-tune on Ray Train, or resume a run.

    The same command goes on with a run that was stopped.
    """
    from emoray.config import load

    _train(load(config, overrides or []), as_json)


def _train(config: TrainConfig, as_json: bool) -> None:
    from emoray.checkpoint import BEST
    from emoray.console import TrainingDisplay, out
    from emoray.evaluation import results_table
    from emoray.on_ray.train import train as train_on_ray
    from emoray.run import REPORT
    from emoray.storage import below

    with TrainingDisplay() as display:
        results = train_on_ray(config, display)
    out(json.dumps(results) if as_json else "\n" + results_table(results).rstrip())
    if not as_json:
        folder = below(config.run.storage_path, config.run.name)
        display.say(f"Model: {below(folder, BEST)}   Report: {below(folder, REPORT)}")


@_command("emoray tune configs/tune.yaml model.pretrained=my-encoder/ tune.num_trials=8")
def tune(config: TuneConfig, overrides: TuneOverrides = None, as_json: Json = False) -> None:
    """Sweep on Ray Tune, or resume a sweep.

    Leaves best.yaml, the winner's config, and best/, its model; the same command goes on with a sweep that was stopped.
    """
    from emoray.console import out
    from emoray.tune_config import load

    plan = load(config, overrides or [])
    from emoray.on_ray.tune import sweep_on_ray
    from emoray.storage import Storage, absolute, below
    from emoray.sweep_console import SweepDisplay

    with SweepDisplay() as display:
        results = sweep_on_ray(plan, display)
    folder = below(plan.config.run.storage_path, plan.config.run.name)
    if as_json:
        out(json.dumps(results))
        return
    from emoray.checkpoint import BEST
    from emoray.run import REPORT
    from emoray.sweep_results import BEST_CONFIG, TABLE

    out("\n" + Storage(absolute(folder)).read_text(TABLE).rstrip())
    places = {"Config": BEST_CONFIG, "Model": BEST, "Report": REPORT}
    display.say("   ".join(f"{title}: {below(folder, name)}" for title, name in places.items()))


@_command("emoray show configs/emotion.yaml training.num_epochs=3")
def show(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print the resolved config, of any kind; nothing is started."""
    from emoray import config as train_config
    from emoray import serve_config, tune_config
    from emoray.config_files import Section, read_yaml
    from emoray.console import out

    tree, given = read_yaml(config), overrides or []
    resolved: Section
    if "search" in tree:
        resolved = tune_config.load(config, given).to_config()
    elif tree.keys() & {"http", "replicas"}:
        resolved = serve_config.load(config, given)
    else:
        resolved = train_config.load(config, given)
    out(resolved.model_dump_json(indent=1) if as_json else resolved.to_yaml().rstrip())


@_command("emoray check-data configs/emotion.yaml   or   emoray check-data my-data/")
def check_data(
    source: Annotated[str, typer.Argument(metavar="CONFIG|PATH", help="A training config, or the data itself.")],
    overrides: Overrides = None,
    label_errors: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="Train a config's recipe on parts of the training split and write the rows there that are likely "
            "mislabelled; takes twice as long as training. Give a CONFIG then, not a path.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a data set; reports all that training would."""
    from emoray import data
    from emoray.config import load
    from emoray.console import out

    named = source.endswith((".yaml", ".yml"))
    given = overrides or []
    config = load(source, given) if named else load(None, [f"data.dataset={json.dumps(source)}", *given])
    dataset = data.load(config.data)
    summary = data.summary(dataset)
    if label_errors is not None:
        summary["label_errors"] = _write_label_errors(config, dataset, label_errors)
    out(json.dumps(summary, ensure_ascii=False) if as_json else data.summary_text(summary))


def _write_label_errors(config: TrainConfig, dataset: Dataset, path: Path) -> dict[str, Any]:
    from emoray import label_errors
    from emoray.console import TrainingDisplay

    with TrainingDisplay() as display:
        found = label_errors.in_training_split(config, dataset, display.say)
    label_errors.write_csv(path, found, dataset.splits["train"])
    return {"path": str(path), "rows": len(found)}


@_command('emoray classify runs/emotion/best "i feel wonderful" "leave me alone"')
def classify(
    model: Model,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Texts; a single - reads lines from stdin.")],
    explain: Annotated[
        bool, typer.Option("--explain", help="Say which words pulled the prediction, and which way.")
    ] = False,
    engine: Engine = "torch",
    as_json: Json = False,
) -> None:
    """A quick look at a model, on this machine, without Ray."""
    if texts == ["-"]:
        texts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    _print_predictions(model, texts, as_json, explain, engine)


def _print_predictions(
    model: str, texts: list[str], as_json: bool = False, explain: bool = False, engine: Wanted = "torch"
) -> None:
    from dataclasses import asdict

    from emoray.classifier import Classifier
    from emoray.console import out

    classifier = Classifier.load(model, engine=engine)
    explanations = classifier.explain(texts) if explain else [None] * len(texts)
    for text, prediction, explanation in zip(texts, classifier(texts), explanations, strict=True):
        if as_json:
            words = {} if explanation is None else {"words": [asdict(word) for word in explanation.words]}
            out(json.dumps({"text": text, **asdict(prediction), **words}, ensure_ascii=False))
        else:
            runner_up = list(prediction.scores.items())[1]
            cut = "  (cut)" if prediction.truncated else ""
            out(f"{prediction.label:<10} {prediction.score:.3f}   ({runner_up[0]} {runner_up[1]:.3f}){cut}   {text}")
            if explanation is not None:
                out(f"{'':<17}{explanation.text()}")


@_command("emoray evaluate runs/emotion --split test   or   emoray evaluate runs/a runs/b --data new.csv")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL [MODEL]", help="A run's folder, its best/, or a checkpoint; two are compared."),
    ],
    data: Annotated[str | None, typer.Option(help="Data to score on; default: what the model was trained on.")] = None,
    split: Annotated[
        Literal["train", "validation", "test"], typer.Option(metavar="SPLIT", help="train, validation or test.")
    ] = "test",
    text_column: Annotated[str | None, typer.Option(help="Column of the texts; default: as in training.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels; default: as in training.")] = None,
    language_column: Annotated[
        str | None, typer.Option(help="Column that holds the language: figures for each one.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report there as one HTML file.")] = None,
    engine: Engine = "torch",
    as_json: Json = False,
) -> None:
    """Score a model, or compare two, on labelled data.

    Two are scored on the same rows: do they differ by more than chance?
    """
    from emoray.classifier import Classifier
    from emoray.console import out
    from emoray.console import say as tell
    from emoray.evaluation import as_dict, evaluation_text, rows_for, score_on

    if len(models) > 2:
        raise typer.BadParameter(f"compares two models, not {len(models)}", param_hint="MODEL")
    if len(models) == 2 and report is not None:
        raise typer.BadParameter(
            "a report is of one model: leave out --report, or name one model", param_hint="--report"
        )
    classifiers = [Classifier.load(model, engine=engine) for model in models]
    columns = {"text_column": text_column, "label_column": label_column, "language_column": language_column}
    rows = rows_for(classifiers[0], data, split, **columns)
    if len(classifiers) == 2:
        from emoray.comparison import comparison_text, on_same_rows

        found = on_same_rows((classifiers[0], classifiers[1]), (models[0], models[1]), rows)
        out(json.dumps(found.as_dict(), ensure_ascii=False) if as_json else comparison_text(found))
        return
    scored = score_on(classifiers[0], rows)
    if report is not None:
        from emoray.report import of_evaluation, render

        try:
            report.write_text(render(of_evaluation(classifiers[0], scored)), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{report}: can't be written: {error.strerror or error}") from None
        tell(f"Report: {report}")
    out(json.dumps(as_dict(scored), ensure_ascii=False) if as_json else evaluation_text(scored))


@_command("emoray predict runs/emotion reviews.jsonl --output scored.parquet")
def predict(
    model: Model,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT... [KEY.PATH=VALUE]...",
            help="Files of jsonl, csv, tsv or Parquet, folders, globs; also URIs. Overrides: workers.num_workers=4.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(help="One file (.jsonl, .csv, .tsv, .parquet), or a folder for many; a path or URI."),
    ],
    text_column: Annotated[
        str | None, typer.Option(help="Column of the texts; default: the one that the model was trained on.")
    ] = None,
    file_format: Annotated[
        Literal["jsonl", "csv", "tsv", "parquet"] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="jsonl, csv, tsv or parquet; default: by the output's name, else as the input.",
        ),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Begins the names of the new columns, e.g. predicted_.")] = "",
    on_existing: Annotated[
        Literal["resume", "fail", "replace"],
        typer.Option(help="What is there already: resume, fail or replace.", metavar="WHAT"),
    ] = "resume",
    as_json: Json = False,
) -> None:
    """Score files on Ray Data, row by row.

    The same command goes on where it was stopped.
    """
    overrides = [given for given in inputs if re.match(r"[a-z]+\.[a-z_]+=", given)]
    sources = [given for given in inputs if given not in overrides]
    if not sources:
        raise typer.BadParameter("names no input", param_hint="INPUT")
    if others := [given for given in overrides if not given.startswith("workers.")]:
        raise typer.BadParameter(f"'{others[0]}' means nothing here: only workers.* can be overridden")

    from emoray.config import load
    from emoray.console import ScoringDisplay, out

    workers = load(None, overrides).workers
    from emoray.on_ray.predict import Request, predict_on_ray, summary_text

    all_room = not any(given.startswith("workers.num_workers=") for given in overrides)
    request = Request(model, sources, output, text_column, file_format, prefix, on_existing, workers, all_room)
    with ScoringDisplay() as display:
        summary = predict_on_ray(request, display)
    out(json.dumps(summary, ensure_ascii=False) if as_json else summary_text(summary))


@_command("emoray export runs/emotion   or   emoray export runs/emotion --precision int8")
def export(
    model: Model,
    precision: Annotated[
        Literal["fp32", "int8"] | None,
        typer.Option(metavar="fp32|int8", help="One of the two; default: both.", show_default=False),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data to compare on, its validation split; default: the model's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write ONNX graphs beside a model, checked against it.

    int8 is used only if it loses no more than half a point of accuracy.
    """
    from emoray import export as exports
    from emoray.console import out
    from emoray.console import say as tell

    made = exports.export(model, ("fp32", "int8") if precision is None else (precision,), data, tell)
    if as_json:
        out(json.dumps([exports.as_dict(found) for found in made]))
    else:
        out("\n".join(exports.text(found) for found in made))
    if not all(found.accepted for found in made):
        sys.exit(1)


@_command("emoray runs   or   emoray runs s3://bucket/runs")
def runs(
    storage_path: Annotated[
        str, typer.Argument(metavar="[STORAGE_PATH]", help="Where runs are kept: a path or URI.")
    ] = "runs",
    as_json: Json = False,
) -> None:
    """List runs: state, figures, time, where they differ."""
    from emoray import runs as found
    from emoray.console import out

    listed = found.read(storage_path)
    out(json.dumps(found.as_dict(listed), ensure_ascii=False) if as_json else found.text(listed))


@_command("emoray serve runs/emotion http.port=8080   or   emoray serve configs/serve.yaml")
def serve(
    source: Annotated[
        str, typer.Argument(metavar="CONFIG|MODEL", help="A serving config, or a run's name, a model's folder or URI.")
    ],
    overrides: ServeOverrides = None,
    as_json: Json = False,
) -> None:
    """Serve a model over HTTP on Ray Serve, or change it.

    Run again with another model, the endpoint changes without dropping a request.
    """
    from dataclasses import asdict

    from emoray.console import out
    from emoray.console import say as tell
    from emoray.on_ray.serve_command import endpoint, wait_for_the_end
    from emoray.serve_config import load

    if source.endswith((".yaml", ".yml")):
        config = load(source, overrides or [])
    else:
        config = load(None, [f"model={json.dumps(source)}", *(overrides or [])])
    with endpoint(config, tell) as ready:
        out(json.dumps(asdict(ready)) if as_json else ready.text())
        if ready.is_here:
            wait_for_the_end()
            tell("Stopping: requests that are under way are answered first")


@_command("emoray submit --detach -- train configs/emotion.yaml run.storage_path=s3://bucket/runs")
def submit(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="-- COMMAND...", help="A command of emoray's, e.g. train CONFIG.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="The cluster's dashboard; default: RAY_API_SERVER_ADDRESS, or this machine's.")
    ] = None,
    working_dir: Annotated[str, typer.Option(help="Folder to upload; .gitignore and .rayignore say what isn't.")] = ".",
    runtime_env: Annotated[
        str | None, typer.Option(help="For clusters that lack emoray: cluster/runtime_env.yaml.")
    ] = None,
    retries: Annotated[int, typer.Option(help="How often a job that is lost is submitted again, to go on.")] = 0,
    detach: Annotated[bool, typer.Option("--detach", help="Don't follow the job.")] = False,
    follow: Annotated[str | None, typer.Option(metavar="JOB", help="Follow a job that was submitted before.")] = None,
) -> None:
    """Run a command as a job on a cluster.

    Follows its log, and exits with 0 (succeeded), 1 (failed) or 3 (stopped).
    """
    from emoray.console import say as tell
    from emoray.on_ray import jobs

    known = sorted(str(each.name) for each in app.registered_commands)
    if command and command[0] not in known:
        raise typer.BadParameter(f"there is no '{command[0]}'{nearest(command[0], known)}", param_hint="COMMAND")
    try:
        if follow is not None:
            status = jobs.told(follow, jobs.follow(jobs.connect(address), follow, tell), tell)
        else:
            order = jobs.Order(command or [], address, working_dir, runtime_env, retries)
            status = jobs.submit(order, detach, tell)
    except KeyboardInterrupt:
        tell("No longer followed; the job goes on (`ray job stop` ends it, `emoray submit --follow` follows it again)")
        status = 128 + signal.SIGINT
    sys.exit(status)


@_command("emoray monitor")
def monitor(
    port: Annotated[int, typer.Option(help="Where Prometheus listens, on this machine alone.")] = 9090,
    as_json: Json = False,
) -> None:
    """Start Prometheus on this machine's Ray clusters.

    Says where to look; Ctrl-C ends it.
    """
    from dataclasses import asdict

    from emoray.console import out
    from emoray.monitor import watch

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with watch(port) as (where, process):
        out(json.dumps(asdict(where)) if as_json else where.text())
        process.wait()


@_command("emoray doctor   or   emoray doctor configs/emotion.yaml workers.num_workers=4")
def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A training config; without one, machine and cluster only.")
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Will a run work here?

    Libraries, GPUs, disks, cluster; with a config, up to one real step.
    """
    from emoray import doctor as checks
    from emoray.console import out

    findings = checks.examine_aloud(config, overrides or [])
    if as_json:
        out(checks.as_json(findings))
    else:
        checks.show(findings)
    if checks.worst(findings) == "problem":
        sys.exit(1)


@contextmanager
def _mendable_errors() -> Iterator[None]:
    """What a user can mend is one message and exit status 1; a stop by a signal has the signal's status."""
    try:
        yield
    except InterruptedRunError as error:
        _fail(str(error))
        sys.exit(128 + next(iter(error.signals), signal.SIGINT))
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


def _refuse_keys_as_options(command: str, arguments: list[str]) -> None:
    """Raises EmorayError for `--training.seed=3` and `--learning-rate 3e-5`, as other trainers have it."""
    for argument in arguments:
        name, _, value = argument[2:].partition("=")
        if not argument.startswith("--") or name in ("json", "label-errors", "help"):
            continue
        keys = [name] if re.fullmatch(r"[a-z]+(\.[a-z_]+)+", name) else []
        if not keys and command in ("train", "tune", "show", "check-data", "doctor"):
            from emoray.config import TrainConfig
            from emoray.config_files import flatten

            keys = [key for key in flatten(TrainConfig().model_dump()) if key.endswith(f".{name.replace('-', '_')}")]
        if keys:
            raise EmorayError(f"{argument}: config keys have no dashes: write {keys[0]}={value or 'VALUE'}")


def main() -> None:
    """Entry point of the `emoray` command."""
    with _mendable_errors():
        _refuse_keys_as_options("".join(sys.argv[1:2]), sys.argv[2:])
        app(prog_name="emoray")


if __name__ == "__main__":
    main()
