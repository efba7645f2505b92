"""`emoray predict` on Ray Data: pieces of the input go to a pool of actors, which score and write them."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import ray

from emoray import batch_input, checkpoint, run, signals
from emoray.batch_format import Format
from emoray.batch_input import Input
from emoray.batch_output import Output
from emoray.batch_rows import Piece
from emoray.classifier import find_model
from emoray.config import WorkersConfig
from emoray.errors import InterruptedRunError, RunError
from emoray.on_ray import cluster
from emoray.on_ray.cluster import Placement
from emoray.on_ray.scorer import Job, Scorer
from emoray.process import WORKER_ENVIRONMENT
from emoray.run import Attempt, Lease
from emoray.storage import Storage
from emoray.wording import count

_POLL_S = 0.2
_PROCESS_BYTES = 1e9
"""Memory of an actor beside its model."""
_NO_LIMIT = 1_000_000
_TRIES = 3
"""How often a piece whose actor died is given to another: a row that kills actors must not do so for ever."""


class Watcher(Protocol):
    """Shows a person, or a log, what happens."""

    def say(self, line: str) -> None:
        """A sentence."""

    def rows(self, done: int, total: int, faults: int) -> None:
        """So many rows are scored, of which so many have an error."""


@dataclass(frozen=True)
class Request:
    """What `emoray predict` was asked.

    Attributes:
        model: a run's folder, its best/, or a checkpoint; path or URI.
        sources: paths, URIs, folders and globs.
        output: a file or a folder.
        text_column: None takes the one that the model was trained on.
        kind: of the output's files; None goes by its name, else by the input.
        prefix: of the new columns' names.
        on_existing: "resume", "fail" or "replace".
        workers: `num_workers` is the most actors at once.
        all_room: as many actors as there is room for, instead.
    """

    model: str
    sources: Sequence[str]
    output: str
    text_column: str | None = None
    kind: str | None = None
    prefix: str = ""
    on_existing: str = "resume"
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    all_room: bool = True


def predict_on_ray(request: Request, watcher: Watcher) -> dict[str, Any]:
    """Score all rows, or those that are left.

    Returns:
        The summary: `rows`, `errors`, `labels` (rows of each), `parts`, `output`, `model`.

    Raises:
        InterruptedRunError: it was asked to stop; the same command goes on.
        EmorayError: whatever a person must mend.
    """
    work = look(request, watcher)
    output = work.output
    if request.on_existing != "replace":
        remedy = "choose another --output, or start over with --on-existing replace"
        run.refuse_changed(output.home, work.identity, "the results of another input or model", remedy)
        if (summary := output.finished(piece.number for piece in work.found.pieces)) is not None:
            watcher.say(f"{output.location} is finished; --on-existing replace would score it anew.")
            return summary
    with cluster.session(watcher.say):
        placement = _place(request, work.model_bytes, watcher)
        if request.on_existing == "replace":
            output.clear()
        attempt = Attempt.begin(output.home, work.identity)
        output.sweep()
        notes = _Pool(work, attempt, placement, watcher).run()
        summary = _summary(work, notes)
        output.finish(len(work.found.pieces), work.form, summary, attempt)
        return summary


@dataclass(frozen=True)
class Work:
    """What there is to do, known before Ray is.

    Attributes:
        model: its `location` and `fingerprint`.
        identity: what decides the output, as `run.Attempt` keeps it.
    """

    model: dict[str, str]
    model_bytes: int
    text_column: str
    found: Input
    form: Format
    output: Output
    identity: dict[str, Any]

    def job(self, attempt: Attempt, cpus: int, use_gpu: bool) -> Job:
        """What its actors must know."""
        place = (self.output.location, self.output.kind, attempt.number)
        return Job(self.model, *place, self.text_column, self.form, cpus, use_gpu)


def look(request: Request, watcher: Watcher) -> Work:
    """Look at model, input and output, and refuse what can't be."""
    source = find_model(request.model)
    folder = checkpoint.fetch(source)
    facts = checkpoint.facts(folder)
    column = request.text_column or facts.get("config", {}).get("data", {}).get("text_column", "text")
    files = batch_input.find(request.sources)
    output = Output(request.output, request.kind, files[0].kind)
    output.must_be_usable(request.sources, request.on_existing)
    size = sum(file.size for file in files)
    watcher.say(f"Looking through {count(len(files), 'file')}, {size / 1e6:,.1f} MB")
    found = batch_input.cut(files, column)
    form = Format(output.kind, request.prefix, tuple(facts["labels"]), found.columns, found.schema)
    form.must_not_clash()
    model = {"location": source.location, "fingerprint": checkpoint.fingerprint(folder)}
    options = {"text_column": column, "format": output.kind, "prefix": request.prefix}
    identity = {"recipe": {"input": found.prints, **options}, "model": model["fingerprint"]}
    model_bytes = sum(Storage(str(folder)).files().values())
    return Work(model, model_bytes, column, found, form, output, identity)


def _summary(work: Work, notes: dict[int, dict[str, Any]]) -> dict[str, Any]:
    labels: Counter[str] = Counter()
    for note in notes.values():
        labels.update(note["labels"])
    errors = sum(note["errors"] for note in notes.values())
    model = f"{work.model['location']}@{work.model['fingerprint']}"
    about = {"parts": len(work.found.pieces), "output": work.output.location, "model": model}
    return {"rows": work.found.rows, "errors": errors, "labels": dict(sorted(labels.items())), **about}


def _cpus(model_bytes: int) -> int:
    """CPUs of an actor: one, unless so many models would take more memory than there is.

    Two processes of one thread are as fast as two threads (673 and 685 texts/s); many threads get in each other's way.
    """
    need = _PROCESS_BYTES + model_bytes * 1.5
    nodes = cluster.live_nodes()
    return max((math.ceil(node.get("CPU", 0) * need / node.get("memory", math.inf)) for node in nodes), default=1) or 1


def _place(request: Request, model_bytes: int, watcher: Watcher) -> Placement:
    """Decide what each actor gets, how many there are at first, and at most, where nodes come.

    Raises:
        ClusterError: there is no room for one.
    """
    cpus = request.workers.cpus_per_worker or _cpus(model_bytes)
    workers = request.workers.model_copy(update={"num_workers": 1, "cpus_per_worker": cpus})
    one = cluster.place(workers)
    room = max(1, sum(cluster.fits(node, one.resources) for node in cluster.live_nodes()))
    now = room if request.all_room else min(room, request.workers.max_workers)
    cluster.wait_for_room(workers, one, watcher.say)
    watcher.say(f"Scoring with {count(now, 'actor')} {one.each}")
    return replace(one, min_workers=now, max_workers=_NO_LIMIT if request.all_room else request.workers.max_workers)


class _Pool:
    """One pass over the pieces that are left, watched, so that signals and newer commands stop it."""

    def __init__(self, work: Work, attempt: Attempt, placement: Placement, watcher: Watcher) -> None:
        self._found, self._attempt, self._placement = work.found, attempt, placement
        self._job = work.job(attempt, placement.cpus, placement.use_gpu)
        self._watcher = watcher
        self._notes = work.output.done()
        self._signals: list[int] = []

    def run(self) -> dict[int, dict[str, Any]]:
        """What is known of each part, once all are there."""
        left = [piece for piece in self._found.pieces if piece.number not in self._notes]
        if self._notes:
            self._watcher.say(f"Going on: {len(self._notes):,} of {len(self._found.pieces):,} parts are there already")
        if not left:
            return self._notes
        self._show()
        pipeline = ray.remote(num_cpus=0, label_selector=cluster.on_this_node())(Pipeline).remote()
        try:
            with signals.noted() as self._signals:
                self._listen(pipeline.run.options(num_returns="streaming").remote(left, self._job, self._placement))
        except (ray.exceptions.RayError, StopIteration) as error:
            self._heed_signals()  # one that went to Ray's processes too has ended them first
            raise RunError(
                f"Scoring was given up: {_reason(error)}. The same command goes on with the parts that are left."
            ) from error
        finally:
            with suppress(Exception):
                ray.kill(pipeline)  # and with it all actors, which it owns
        return self._notes

    def _listen(self, stream: Any) -> None:
        lease = Lease(self._attempt)
        while len(self._notes) < len(self._found.pieces):
            self._heed_signals()
            lease.look()  # the room that a newer command needs is let go at once
            if not ray.wait([stream], timeout=_POLL_S)[0]:
                continue
            news = ray.get(next(stream))
            if news["error"]:
                raise pickle.loads(news["error"])
            self._notes[news["number"]] = json.loads(news["note"])
            self._show()

    def _heed_signals(self) -> None:
        if self._signals:
            raise InterruptedRunError("Stopped; the same command goes on with the parts that are left.", self._signals)

    def _show(self) -> None:
        rows = sum(note["rows"] for note in self._notes.values())
        self._watcher.rows(rows, self._found.rows, sum(note["errors"] for note in self._notes.values()))


class Pipeline:
    """Ray Data, in a process of its own: what it prints goes to Ray's logs, and its end ends all its actors."""

    def run(self, left: list[Piece], job: Job, placement: Placement) -> Iterator[dict[str, Any]]:
        """What the actors return, as it comes: a block a piece, to whichever actor is free."""
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        first, most = min(placement.min_workers, len(left)), min(placement.max_workers, len(left))
        items = [{"piece": json.dumps(asdict(piece))} for piece in left]
        yield from (
            ray.data.from_items(items, override_num_blocks=len(items))
            .map(
                Scorer,
                fn_constructor_args=[job],
                compute=ray.data.ActorPoolStrategy(
                    min_size=1, max_size=most, initial_size=first, max_tasks_in_flight_per_actor=2
                ),
                num_cpus=placement.cpus,
                num_gpus=placement.gpus if placement.use_gpu else None,
                runtime_env={"env_vars": WORKER_ENVIRONMENT},
                max_task_retries=_TRIES,
            )
            .iter_rows()
        )


def _reason(error: BaseException) -> str:
    if isinstance(error, StopIteration):
        return "Ray Data ended before all parts were there"
    lines = str(error).strip().splitlines()
    if any(kind in str(error) for kind in ("ActorDiedError", "ActorUnavailableError")):  # wrapped by Ray Data
        return f"a piece's actor ended without a word {_TRIES + 1} times (killed, out of memory, or a crash)"
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def summary_text(summary: dict[str, Any]) -> str:
    """What `predict_on_ray` gave, for people."""
    labels = ", ".join(f"{label} {rows:,}" for label, rows in summary["labels"].items())
    told = f"{summary['output']}: {summary['rows']:,} rows: {labels or 'no predictions'}"
    wrong = count(summary["errors"], "row")
    return f"{told}; {wrong} could not be scored: see the column `error`" if summary["errors"] else told
