"""A tiny encoder and data set for whole training runs; see harness.py for what runs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from harness import Configure, Outcome, configure_from, outcome, run_training, run_workers, write_material

from emoray.config import TrainConfig


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and runs that are compared to the bit must have the same number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `encoder` and `data`."""
    folder = tmp_path_factory.mktemp("material")
    write_material(folder)
    return folder


@pytest.fixture
def configure(material: Path, tmp_path: Path) -> Configure:
    """`configure("training.packing='off'")`: a config of a new run on the tiny material."""
    numbers = itertools.count()

    def new(*overrides: str) -> TrainConfig:
        return configure_from(material, tmp_path / "runs", f"run.name=r{next(numbers)}", *overrides)

    return new


@pytest.fixture(scope="session")
def undisturbed(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """`undisturbed(2, "training.packing='off'")`: what a run on so many workers leaves that nothing happened to."""
    known: dict[tuple[int | str, ...], Outcome] = {}

    def find(size: int, *overrides: str) -> Outcome:
        key = (size, *overrides)
        if key not in known:
            config = configure_from(material, tmp_path_factory.mktemp("undisturbed"), *overrides)
            if size == 1:
                known[key] = outcome(run_training(config))
            else:
                assert run_workers(config, size).finished
                known[key] = outcome(Path(config.run.storage_path) / config.run.name)
        return known[key]

    return find
