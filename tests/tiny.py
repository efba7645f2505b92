"""A tiny data set, vocabulary and run, for tests: everything that several test files need as a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoray.storage import Storage

LABELS = ("calm", "cross", "glad", "sad")
_WORDS = {
    "calm": "quiet evening lake breathing slowly tea",
    "cross": "shouting again late nobody listens furious",
    "glad": "sunshine party laughing friends wonderful dance",
    "sad": "alone rain crying farewell empty house",
}
_FRAMES = ("i feel {} and {} today", "{}, {}: that is how it was", "so {} after all this {}", "they were {} then {}")


def sentences(label: str) -> list[str]:
    """60 different sentences of a label, some of them much longer than others."""
    words = _WORDS[label].split()
    pairs = [(a, b) for a in words for b in words if a != b]
    found = [_FRAMES[i % len(_FRAMES)].format(*pair) for i, pair in enumerate(pairs * 2)]
    return [f"{text} ({' '.join(words[: i % 6])})" if i >= len(pairs) else text for i, text in enumerate(found)]


def pieces() -> list[str]:
    """Letters, and every other word whole."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789,.:;!?()'-"]
    words = sorted({word for label in LABELS for word in _WORDS[label].split()})[::2]
    frames = ["i", "feel", "and", "today", "that", "is", "how", "it", "was", "so", "after", "all", "this", "they"]
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return list(dict.fromkeys([*specials, *letters, *(f"##{letter}" for letter in letters[:36]), *frames, *words]))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def train_here(overrides: list[str]) -> Path:
    """What a worker of `emoray train` does, in this process and without Ray.

    Returns:
        The run's folder.
    """
    import torch

    from emoray import config as cfg
    from emoray import model
    from emoray.finish import finish
    from emoray.run import CONFIG, Attempt, open_run
    from emoray.task import prepare
    from emoray.training import Alone, train
    from emoray.world import World

    config = cfg.load(None, overrides)
    task = prepare(config)
    state = model.load(config.model, task.labels, config.training.seed).state_dict()
    run = open_run(config.run)
    attempt = Attempt.begin(run, task.identity)
    attempt.write(CONFIG, config.to_yaml())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        finish(*train(task, state, World(), attempt, Alone()), attempt)
    finally:
        torch.set_num_threads(threads)
    assert run.local_path is not None
    return run.local_path


@dataclass(frozen=True)
class Answer:
    """What a command left: its exit status and both streams."""

    status: int
    out: str
    err: str


Emoray = Callable[..., Answer]


def object_store(folder: Path) -> Storage:
    """A folder reached as an object store is: file by file, with no local path, no rename and no exclusive write."""
    return _ObjectStore(str(folder))


class _ObjectStore(Storage):
    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.local_path = None

    def __truediv__(self, name: str) -> Storage:
        return _ObjectStore(f"{self.location}/{name}")
