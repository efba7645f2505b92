"""A sweep's trials: what happened to each, how far each may go now, and who is best. No clock, no order of arrival."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from emoray.errors import RunError
from emoray.run import Attempt, best_evaluation
from emoray.storage import Storage
from emoray.tune_config import Plan

TRIALS = "trials"
RECORD = "trial.json"
RESULTS = "sweep.json"

State = Literal["pending", "running", "waiting", "stopped", "finished", "failed"]


@dataclass
class Trial:
    """One training run of a sweep, as far as it is known.

    Attributes:
        name: of its folder below `trials/`.
        values: dotted key -> value.
        repeats: number of the trial that this one repeats with another seed; None for trials of the search itself.
        state: waiting is between two stints, until the others of its group have come as far.
        reason: why it failed or was stopped.
        evaluations: of the run so far, in order.
        total_steps: optimizer steps of a whole run; 0 while that isn't known.
        optimizer: what the workers' own optimizer held before the first step, and their batch size.
        seconds: for which its workers were there.
    """

    name: str
    values: dict[str, Any]
    repeats: int | None = None
    state: State = "pending"
    reason: str = ""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    total_steps: int = 0
    optimizer: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    # What a person sees of a trial that runs; not kept.
    step: int = 0
    epoch: float = 0.0
    left_s: float | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps that count: those up to its last evaluation."""
        return int(self.evaluations[-1]["step"]) if self.evaluations else 0

    def rest(self) -> None:
        """It is not trained now, and may go on later."""
        self.state = "waiting" if self.evaluations else "pending"

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ("stopped", "finished", "failed")

    @property
    def folder(self) -> str:
        """Below the sweep's folder."""
        return f"{TRIALS}/{self.name}"

    def record(self) -> dict[str, Any]:
        """What is kept of it."""
        return {k: v for k, v in asdict(self).items() if k not in ("step", "epoch", "left_s")}


@dataclass(frozen=True)
class Stop:
    """Where one trial stands among others.

    Attributes:
        until: the evaluation that it may train to now; math.inf is the end of its run.
        out: whether it was stopped there.
    """

    until: float
    out: bool = False


def successive_halving(
    curves: Sequence[Sequence[float]],
    ended: Sequence[bool],
    failed: Sequence[bool],
    rungs: Sequence[int],
    factor: int,
) -> list[Stop]:
    """How far each trial may train: asynchronous successive halving (Li et al. 2020) in the order of trials.

    Trials come in groups of `factor` squared. A rung is decided for a group when all of it, and the groups before it,
    have come there: those of the group go on that are among the best 1/factor of all trials there so far. So the
    outcome depends on figures alone, never on which trial happened to be faster; later groups don't keep earlier ones
    waiting.

    Args:
        curves: of each trial the metric after each evaluation, more is better.
        ended: which will have no further evaluations: finished, stopped or failed.
        failed: which of them failed; they hold no place at a rung that they didn't come to.
        rungs: numbers of evaluations, ascending.
    """
    stops = [Stop(math.inf)] * len(curves)
    alive = list(range(len(curves)))
    group = factor**2
    for rung in rungs:
        came: list[int] = []
        kept: list[int] = []
        decided = True
        for first in range(0, len(curves), group):
            members = [n for n in alive if first <= n < first + group]
            decided = decided and all(len(curves[n]) >= rung or ended[n] for n in members)
            if not decided:
                for n in members:
                    stops[n] = Stop(rung)
                continue
            came += [n for n in members if len(curves[n]) >= (rung if failed[n] else 1)]
            best = sorted(came, key=lambda n: (-max(curves[n][:rung]), n))[: -(-len(came) // factor)]
            kept += [n for n in members if n in best]
            for n in members:
                if n not in best:
                    stops[n] = Stop(rung, out=True)
        alive = kept
    return stops


def median_stopping(curves: Sequence[Sequence[float]], ended: Sequence[bool], first: int) -> list[Stop]:
    """How far each trial may train: the median rule of Vizier (Golovin et al. 2017), in the order of trials.

    A trial is stopped where its best so far is below the median of the running means of the trials before it, of which
    there must be three. It isn't kept waiting for them: it trains on, and what came after its stop doesn't count.

    Args:
        first: the first evaluation that a trial may be stopped at.
    """
    stops = [Stop(math.inf)] * len(curves)
    for place in range(first, max(map(len, curves), default=0) + 1):
        for n, curve in enumerate(curves):
            before = [m for m in range(n) if not (stops[m].out and stops[m].until < place)]
            if any(len(curves[m]) < place and not ended[m] for m in before):
                break  # and whoever comes later waits for this one too
            means = [sum(curves[m][:place]) / place for m in before if len(curves[m]) >= place]
            if len(curve) < place or stops[n].out or len(means) < 3:
                continue
            if max(curve[:place]) < statistics.median(means):
                stops[n] = Stop(place, out=True)
    return stops


class Sweep:
    """All trials of a sweep, and what follows from what is known of them.

    Args:
        plan: the checked config.
        values: of each trial, in order; those that a searcher has yet to name come by `add`.
    """

    def __init__(self, plan: Plan, values: Sequence[Mapping[str, Any]]) -> None:
        self.plan = plan
        self.trials: list[Trial] = []
        for point in values:
            self.add(point)
        self.planned = len(values) or plan.config.tune.num_trials

    def add(self, values: Mapping[str, Any], repeats: int | None = None, name: str | None = None) -> Trial:
        trial = Trial(name or f"{len(self.trials):04d}", dict(values), repeats)
        self.trials.append(trial)
        return trial

    def __getitem__(self, name: str) -> Trial:
        return next(trial for trial in self.trials if trial.name == name)

    @property
    def search(self) -> list[Trial]:
        """The trials of the search itself."""
        return [trial for trial in self.trials if trial.repeats is None]

    def score(self, trial: Trial) -> float:
        """The best of its evaluations, more is better; -inf without any."""
        return max(self.curve(trial), default=-math.inf)

    def curve(self, trial: Trial) -> list[float]:
        """The metric after each evaluation, more is better."""
        return [self.plan.sign * entry[self.plan.column] for entry in trial.evaluations]

    def best_evaluation(self, trial: Trial) -> dict[str, Any] | None:
        """The evaluation that a trial is judged by, the earliest of equals."""
        return best_evaluation(trial.evaluations, self.plan.config.tune.metric)

    def best_first(self) -> list[Trial]:
        """All trials: those that came to their end before those that were stopped, and these before the others."""
        order = {"finished": 0, "stopped": 1}
        return sorted(self.trials, key=lambda t: (order.get(t.state, 2), -self.score(t), t.name))

    def settle(self) -> list[Trial]:
        """Draw all conclusions from what is known; gives the trials that were stopped by it.

        A trial that trained on beyond the evaluation where it is stopped is cut there.
        """
        trials = self.search
        stopped = []
        for trial, stop in zip(trials, self._stops(), strict=True):
            if not stop.out or trial.state in ("failed", "stopped"):
                continue
            if trial.state != "finished" or len(trial.evaluations) > stop.until:
                del trial.evaluations[int(stop.until) :]
                trial.state = "stopped"
                trial.reason = f"after evaluation {len(trial.evaluations)}, where others were better"
                stopped.append(trial)
        self._add_repeats()
        return stopped

    def _stops(self) -> list[Stop]:
        tune = self.plan.config.tune
        pending = max(0, self.planned - len(self.search))  # of a group, trials without values are still to come
        curves = [self.curve(trial) for trial in self.search] + [[]] * pending
        ended = [trial.over for trial in self.search] + [False] * pending
        if tune.scheduler == "asha":
            failed = [trial.state == "failed" for trial in self.search] + [False] * pending
            stops = successive_halving(curves, ended, failed, self.plan.rungs(), tune.reduction_factor)
        elif tune.scheduler == "median":
            stops = median_stopping(curves, ended, tune.first_rung)
        else:
            stops = [Stop(math.inf)] * len(curves)
        return stops[: len(self.search)]

    def _add_repeats(self) -> None:
        """Once the search is over: the best few again, with other seeds."""
        tune = self.plan.config.tune
        over = len(self.search) == self.planned and all(trial.over for trial in self.search)
        known = {trial.name for trial in self.trials}
        for trial in self._finished()[: tune.repeat_best] if over else []:
            for again in range(1, tune.repeats + 1):
                values = {**trial.values, "training.seed": self.plan.base.training.seed + again}
                name = f"{trial.name}-seed{values['training.seed']}"
                if name not in known:
                    self.add(values, repeats=int(trial.name), name=name)

    def ready(self) -> Iterator[tuple[Trial, float]]:
        """Trials that may train now, those that are furthest first, and up to which evaluation; math.inf is the end."""
        stops = dict(zip((trial.name for trial in self.search), self._stops(), strict=True))
        found = []
        for trial in self.trials:
            until = stops.get(trial.name, Stop(math.inf)).until
            if trial.state in ("pending", "waiting") and len(trial.evaluations) < until:
                found.append((trial, until))
        yield from sorted(found, key=lambda item: -len(item[0].evaluations))

    @property
    def over(self) -> bool:
        return len(self.search) == self.planned and all(trial.over for trial in self.trials)

    def _finished(self) -> list[Trial]:
        """The finished trials of the search, best first, each by its own figure."""
        finished = [trial for trial in self.search if trial.state == "finished"]
        return sorted(finished, key=lambda trial: (-self.score(trial), trial.name))

    def ranking(self) -> list[Trial]:
        """The finished trials of the search, best first: by the mean over seeds where there are repeats."""
        finished = self._finished()
        repeated = [trial for trial in finished if len(self.draws(trial)) > 1]
        return sorted(repeated or finished, key=lambda trial: (-self.plan.sign * self.mean(trial), trial.name))

    def draws(self, trial: Trial) -> list[float]:
        """The metric of a trial and of its repeats, as the user reads it."""
        others = [t for t in self.trials if t.repeats is not None and t.repeats == int(trial.name)]
        return [self.plan.sign * self.score(t) for t in (trial, *others) if t.state == "finished"]

    def mean(self, trial: Trial) -> float:
        """Of the metric over seeds, as the user reads it."""
        return statistics.fmean(self.draws(trial))

    def spread(self, trial: Trial) -> float | None:
        """Standard deviation over seeds, of the sample; None of one draw."""
        draws = self.draws(trial)
        return statistics.stdev(draws) if len(draws) > 1 else None

    def steps(self) -> tuple[int, int]:
        """Optimizer steps that the search took, and those that it would have taken without stopping anyone."""
        known = [trial for trial in self.search if trial.total_steps]
        return sum(trial.steps for trial in known), sum(trial.total_steps for trial in known)

    def kept(self) -> set[str]:
        """Names of the finished trials whose best/ may still be wanted."""
        tune = self.plan.config.tune
        if tune.scheduler == "median" and not self.over:  # a trial that finished may yet turn out to have been stopped
            return {trial.name for trial in self.search}
        return {trial.name for trial in self._finished()[: tune.repeat_best if tune.repeats else 1]}


def read_records(folder: Storage, sweep: Sweep) -> None:
    """Take over what an earlier command kept of each trial.

    Raises:
        RunError: a record is damaged, or of other values.
    """
    for name in folder.names(TRIALS):
        if not folder.exists(f"{TRIALS}/{name}/{RECORD}"):
            continue
        try:
            kept = Trial(**json.loads(folder.read(f"{TRIALS}/{name}/{RECORD}")))
        except (ValueError, TypeError) as error:
            raise RunError(
                f"{folder.location}/{TRIALS}/{name}/{RECORD}: is damaged ({error}): delete it, and the trial goes on "
                "from its checkpoints"
            ) from None
        if kept.state == "running":
            kept.rest()
        place = next((n for n, trial in enumerate(sweep.trials) if trial.name == kept.name), None)
        if place is None:
            sweep.trials.append(kept)
        else:
            sweep.trials[place] = kept
    sweep.trials.sort(key=lambda trial: (trial.repeats is not None, trial.name))


def write_record(trial: Trial, attempt: Attempt) -> None:
    """Keep what is known of a trial.

    Raises:
        FencedError: a newer attempt at the sweep has taken over.
    """
    attempt.write(f"{trial.folder}/{RECORD}", json.dumps(trial.record(), indent=1))
