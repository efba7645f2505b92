"""Sweeps on real Ray clusters: values reach the workers, kills change nothing, every node has work."""

from __future__ import annotations

import hashlib
import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.disturb import Bench, Command, SmallCluster, steps_in, wait_for_end, workers_below
from emoray import checkpoint
from emoray.config_files import flatten
from emoray.sweep import Sweep
from emoray.tune_config import load

pytestmark = pytest.mark.ray

SEARCH = {
    "training.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "training.train_batch_size": {"choice": [8, 16, 32]},
    "training.weight_decay": {"choice": [0.0, 0.01]},
}
STEPS_OF = {8: 20, 16: 10, 32: 5}  # an epoch of 160 rows
EPOCHS = 2
EVALUATIONS = 4


@pytest.fixture(scope="module")
def sweep_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "tune.yaml"
    tune = {"num_trials": 4, "max_concurrent": 2, "seed": 1, "reduction_factor": 4}  # one rung, then the end
    path.write_text(yaml.safe_dump({"search": SEARCH, "tune": tune}))
    return path


@pytest.fixture(scope="module")
def overrides(tiny_overrides: list[str], bench: Bench) -> list[str]:
    """Overrides for short runs with four evaluations."""
    return [
        *tiny_overrides,
        f"training.num_epochs={EPOCHS}",
        "training.evaluations_per_epoch=2",
        "training.logging_steps=1",
        "training.checkpoint_every_steps=3",
        f"run.storage_path={bench.folder / 'runs'}",
    ]


def start(bench: Bench, sweep_file: Path, name: str, *overrides: str, address: str = "local") -> Command:
    name = f"sweep-{name}"  # the bench is shared with the tests of training, which have runs of their own
    command = bench.start(name, ["tune", str(sweep_file), f"run.name={name}", *overrides], address)
    command.patience_s *= 4  # workers are started once a rung
    return command


@pytest.fixture(scope="module")
def small(bench: Bench, cluster: SmallCluster, sweep_file: Path, overrides: list[str]) -> Path:
    """The folder of a sweep of two trials to their end, on a cluster that runs already."""
    two = ("tune.num_trials=2", "tune.scheduler=none")
    with cluster.node(cpus=2):
        command = start(bench, sweep_file, "small", *overrides, *two, address=cluster.address)
        assert command.status() == 0, command.output
    return command.run


@pytest.fixture(scope="module")
def undisturbed(bench: Bench, sweep_file: Path, overrides: list[str]) -> Path:
    """The folder of a sweep that nothing happened to."""
    command = start(bench, sweep_file, "calm", *overrides)
    assert command.status() == 0, command.output
    return command.run


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())  # type: ignore[no-any-return]


def essence(folder: Path) -> dict[str, Any]:
    """What two sweeps of one recipe must have in common, to the last bit."""
    results = results_of(folder)
    trials = [{k: t[k] for k in ("name", "values", "state", "evaluations", "optimizer")} for t in results["trials"]]
    model = folder / "best" / "model.safetensors"
    weights = hashlib.sha256(model.read_bytes()).hexdigest()
    return {"trials": trials, "best": results["best"], "steps": results["steps"], "weights": weights}


def test_sampled_values_reach_the_workers(small: Path) -> None:
    """The resolved config, the optimizer that the worker made, and the steps that it did."""
    trials = results_of(small)["trials"]
    assert len({json.dumps(trial["values"]) for trial in trials}) == 2
    for trial in trials:
        values, folder = trial["values"], small / "trials" / trial["name"]
        resolved = flatten(yaml.safe_load((folder / "config.yaml").read_text()))
        assert values.items() <= resolved.items()
        rate, size = values["training.learning_rate"], values["training.train_batch_size"]
        assert trial["optimizer"]["lr"] == rate
        assert trial["optimizer"]["weight_decay"] == values["training.weight_decay"]
        assert trial["optimizer"]["batch_size"] == size
        history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        assert history[0]["learning_rate"] == pytest.approx(rate)
        assert trial["total_steps"] == EPOCHS * STEPS_OF[size]
        assert len(history) == trial["evaluations"][-1]["step"]


@pytest.mark.slow
def test_asha_spends_less_than_half_of_the_steps(undisturbed: Path) -> None:
    """Counted in the histories of all trials, against what they would have had."""
    trials = results_of(undisturbed)["trials"]
    done = [len(steps_in(undisturbed / "trials" / trial["name"] / "history.jsonl")) for trial in trials]
    whole = [EPOCHS * STEPS_OF[trial["values"]["training.train_batch_size"]] for trial in trials]
    assert results_of(undisturbed)["steps"] == {"taken": sum(done), "without_stopping": sum(whole)}
    assert sum(done) < sum(whole) / 2
    assert sorted(len(trial["evaluations"]) for trial in trials) == [1, 1, 1, EVALUATIONS]


def test_what_a_sweep_leaves(small: Path) -> None:
    assert {path.name for path in small.iterdir()} == {
        "attempts",
        "best",
        "best.yaml",
        "config.yaml",
        "report.html",
        "sweep.csv",
        "sweep.json",
        "sweep.md",
        "trials",
        "workers.json",
    }
    checkpoint.verify(small / "best")
    left = [path for path in small.glob("trials/*/*") if path.name in ("best", "checkpoints")]
    assert not left, "the losers' checkpoints, and what the winner's was copied from"


@pytest.mark.slow
def test_the_best_config_gives_the_reported_metric_again(bench: Bench, undisturbed: Path) -> None:
    best = results_of(undisturbed)["best"]
    command = bench.start("sweep-calm-best", ["train", str(undisturbed / "best.yaml")])
    assert command.status() == 0, command.output
    results = json.loads((command.run / "results.json").read_text())
    assert results["best"] == best["validation"] and results["best"]["f1"] == best["metric"]
    assert results["test"] == best["test"]
    weights = [folder / "best" / "model.safetensors" for folder in (command.run, undisturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow  # tests/test_sweep.py ends and begins sweeps anew without Ray
def test_killed_and_given_again(bench: Bench, sweep_file: Path, overrides: list[str], undisturbed: Path) -> None:
    """SIGKILL to the driver at any step of the first rung; then to the end."""
    first = start(bench, sweep_file, "killed", *overrides)
    some = random.randint(2, 12)
    first.wait_until(lambda: _steps(first.run / "trials") >= some, "steps of the first trials")
    first.kill()
    second = start(bench, sweep_file, "killed", *overrides)
    assert second.status() == 0, second.output
    assert essence(second.run) == essence(undisturbed)
    third = start(bench, sweep_file, "killed", *overrides)
    assert third.status() == 0 and "is finished; run.on_existing=replace" in third.output


@pytest.mark.slow
def test_killed_when_a_trial_is_over(bench: Bench, sweep_file: Path, overrides: list[str], undisturbed: Path) -> None:
    first = start(bench, sweep_file, "killed-late", *overrides)
    trials, stopped = first.run / "trials", '"state": "stopped"'
    first.wait_until(lambda: any(stopped in path.read_text() for path in trials.glob("*/trial.json")), "a stopped one")
    before = {path.parent.name: path.stat().st_mtime_ns for path in trials.glob("*/history.jsonl")}
    over = [path.parent.name for path in trials.glob("*/trial.json") if stopped in path.read_text()]
    first.kill()
    second = start(bench, sweep_file, "killed-late", *overrides)
    assert second.status() == 0, second.output
    assert essence(second.run) == essence(undisturbed)
    after = {path.parent.name: path.stat().st_mtime_ns for path in trials.glob("*/history.jsonl")}
    assert all(before[trial] == after[trial] for trial in over), "what was over is not trained again"


def _steps(trials: Path) -> int:
    return sum(len(steps_in(history)) for history in trials.glob("*/history.jsonl"))


@pytest.mark.slow
def test_a_trial_that_fails_is_told_and_the_sweep_goes_on(bench: Bench, tmp_path: Path, overrides: list[str]) -> None:
    path = tmp_path / "tune.yaml"
    search = {"model.max_length": {"choice": [16, 128]}}  # the encoder has 64 positions
    path.write_text(yaml.safe_dump({"search": search, "tune": {"searcher": "grid", "scheduler": "none"}}))
    command = start(bench, path, "failing", *overrides, "training.num_epochs=1")
    assert command.status() == 0, command.output
    good, bad = results_of(command.run)["trials"]
    assert (good["state"], bad["state"]) == ("finished", "failed")
    assert "model.max_length is 128" in bad["reason"] and "Trial 0001 failed: model.max_length is 128" in command.output
    assert yaml.safe_load((command.run / "best.yaml").read_text())["model"]["max_length"] == 16


@pytest.mark.slow  # tests/ray/test_disturbed.py asks for too many without a sweep
def test_more_workers_than_there_are(bench: Bench, sweep_file: Path, overrides: list[str]) -> None:
    command = start(bench, sweep_file, "greedy", *overrides, "workers.num_workers=64")
    assert command.status() == 1
    assert "workers.num_workers asks for 64 x (1 CPU, 0 GPU), but the cluster has room for" in command.output
    assert "Traceback" not in command.output
    assert not command.run.exists(), "nothing was begun"


@pytest.mark.slow
def test_stopped_by_ctrl_c(bench: Bench, sweep_file: Path, overrides: list[str]) -> None:
    """Trials save their checkpoints and end their workers; the exit status is that of the signal."""
    command = start(bench, sweep_file, "interrupted", *overrides)
    trials = command.run / "trials"
    command.wait_until(lambda: _steps(trials) >= 1, "a first step")
    workers = workers_below(command.process.pid)
    command.process.send_signal(signal.SIGINT)
    assert command.status() == 130, command.output
    assert "the same command goes on with the sweep" in command.output
    wait_for_end(workers)
    for history in trials.glob("*/history.jsonl"):
        steps = steps_in(history)
        assert not steps or (history.parent / checkpoint.name_of(steps[-1])).is_dir(), "no step is lost"


@pytest.mark.slow
def test_eight_trials_keep_four_nodes_busy(
    bench: Bench, cluster: SmallCluster, sweep_file: Path, overrides: list[str]
) -> None:
    """One worker a trial, two CPUs a node: with eight trials at once every node has two workers."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        nodes = [stack.enter_context(cluster.node(cpus=2)) for _ in range(4)]
        more = ("tune.num_trials=8", "tune.max_concurrent=8", "tune.scheduler=none", "training.num_epochs=400")
        command = start(bench, sweep_file, "wide", *overrides, *more, address=cluster.address)
        placed: list[int] = []

        def all_busy() -> bool:
            placed[:] = [len(cluster.workers(node)) for node in nodes]
            return placed == [2, 2, 2, 2]

        command.wait_until(all_busy, f"two workers on each node, not {placed}")
        command.wait_until(
            lambda: len([h for h in (command.run / "trials").glob("*/history.jsonl") if steps_in(h)]) == 8,
            "eight trials",
        )
        assert all_busy(), placed
        command.terminate()
        assert command.status() == 143, command.output


# Data and weights


def test_trials_share_data_and_weights(monkeypatch: pytest.MonkeyPatch, tiny_overrides: list[str]) -> None:
    """Each is read once, whatever the number of trials; once more where values change what is read."""
    from emoray.on_ray import stints, train
    from emoray.task import prepare

    prepared = []
    for module in (stints, train):
        monkeypatch.setattr(module.ray, "put", id)
    monkeypatch.setattr(stints, "prepare", lambda config: prepared.append(config) or prepare(config))
    search = "search={training.learning_rate: {loguniform: [1e-4, 1e-2]}, model.max_length: {choice: [16, 32]}}"
    path = Path(__file__).parents[2] / "configs" / "tune.yaml"
    plan = load(path, ["base=null", *tiny_overrides, search, "tune.num_trials=8"])
    library = stints.Library(plan, prepare(plan.base), "weights", most=4)
    given = [library.of(plan.trial(f"{n:04d}", "runs", values)) for n, values in enumerate(plan.points() or [])]
    assert [config.model.max_length for config in prepared] == [16]
    assert {len({thing[name] for thing in given}) for name in ("task", "state")} == {2, 1}
    other = library.of(plan.trial("0008", "runs", {"training.seed": 7}))
    assert other["state"] != "weights", "the head's first weights are drawn from the seed"
    assert other["task"] in {thing["task"] for thing in given}


# Values that depend on earlier trials


def test_optuna_asks_and_tells_in_the_order_of_trials() -> None:
    """Whoever is faster, trial n is drawn from what trials 0 .. n - 2 reached; and a restart draws the same."""
    pytest.importorskip("optuna")
    from emoray.on_ray.tune_search import Suggestions

    plan = load(
        Path(__file__).parents[2] / "configs" / "tune.yaml",
        ["tune.searcher=optuna", "tune.num_trials=14", "tune.seed=5"],
    )

    def play(order: random.Random, sweep: Sweep, most: int = 10**6) -> Sweep:
        suggestions = Suggestions(sweep, lag=2)
        running: list[Any] = []
        while not sweep.over and most:
            most -= 1
            while len(running) < 2 and (next(sweep.ready(), None) is not None or suggestions.add()):
                trial, until = next(sweep.ready())
                trial.state = "running"
                running.append((trial, until))
            trial, until = running.pop(order.randrange(len(running)))
            while len(trial.evaluations) < min(until, 8):
                place = len(trial.evaluations) + 1
                value = 0.9 - abs(trial.values["training.learning_rate"] - 2e-4) * 1000 + place / 100
                trial.evaluations.append({"f1": value, "step": place, "epoch": place / 4})
            trial.state = "finished" if len(trial.evaluations) == 8 else "waiting"
            sweep.settle()
        return sweep

    whole = play(random.Random(0), Sweep(plan, []))
    for seed in range(1, 6):
        other = play(random.Random(seed), Sweep(plan, []))
        assert [t.record() for t in other.trials] == [t.record() for t in whole.trials]
    half = play(random.Random(3), Sweep(plan, []), most=9)
    again = Sweep(plan, [])
    again.trials = half.trials
    for trial in again.trials:
        if trial.state == "running":
            trial.state = "waiting" if trial.evaluations else "pending"
    assert [t.record() for t in play(random.Random(4), again).trials] == [t.record() for t in whole.trials]
    rates = [trial.values["training.learning_rate"] for trial in whole.trials]
    assert len(set(rates)) == 14
