"""Runs on Ray clusters of their own, and what a run leaves that nothing happened to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # for benchmarks/, wherever pytest is started

from benchmarks.disturb import SHORT, Bench, Left, SmallCluster, left_by
from emoray import config as cfg
from emoray import model
from emoray.finish import finish
from emoray.quickstart import config_path
from emoray.run import Attempt, open_run
from emoray.task import prepare
from emoray.training import Alone, train
from emoray.world import World


@pytest.fixture(autouse=True)
def _no_cluster_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have one."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Bench(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


@pytest.fixture(scope="session")
def cluster(bench: Bench) -> Iterator[SmallCluster]:
    """A head without CPUs; each test adds the nodes that it wants, and takes them away."""
    with bench.cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def undisturbed(bench: Bench) -> Left:
    """What a run on one worker leaves that nothing happened to, not even Ray."""
    config = cfg.load(config_path(), bench.overrides("undisturbed", SHORT))
    task, run = prepare(config), open_run(config.run)
    state = model.load(config.model, task.labels, config.training.seed).state_dict()
    attempt = Attempt.begin(run, task.identity)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    finish(*train(task, state, World(), attempt, Alone()), attempt)
    torch.set_num_threads(threads)
    assert run.local_path is not None
    return left_by(run.local_path)
