"""What the tests share: a tiny encoder, a tiny data set, a run trained on them, and the command line in-process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import LABELS, Answer, Emoray, pieces, sentences, train_here, write_rows

from emoray import cli


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokens are not kept in the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMORAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of jsonl: four labels, 160 rows to train on, 32 for validation, 48 for test."""
    folder = tmp_path_factory.mktemp("data")
    splits = {"train": slice(0, 40), "validation": slice(40, 48), "test": slice(48, 60)}
    for split, part in splits.items():
        columns = [sentences(label)[part] for label in LABELS]
        rows = [
            {"text": text, "label": label}
            for texts in zip(*columns, strict=True)
            for text, label in zip(texts, LABELS, strict=True)
        ]
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a two-layer BERT and a WordPiece tokenizer; for `model.from_scratch`.

    The pieces are written down, not trained: the trainer of `tokenizers` gives other pieces from run to run.
    """
    from transformers import BertConfig, BertTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {piece: i for i, piece in enumerate(pieces())}
    BertTokenizer(vocab=vocabulary, do_lower_case=True).save_pretrained(folder)
    BertConfig(
        vocab_size=len(vocabulary) + 3,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # the usual 0.02 takes this size long to leave
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_overrides(tiny_encoder: Path, tiny_data: Path) -> list[str]:
    """Overrides of the default config that train the tiny encoder on the tiny data; a run takes a second or two."""
    return [
        f"model.pretrained={tiny_encoder}",
        "model.from_scratch=true",
        "model.max_length=32",
        "model.dropout=0",
        f"data.dataset={tiny_data}",
        "training.num_epochs=10",
        "training.learning_rate=2e-3",
        "training.train_batch_size=16",
        "training.checkpoint_every_minutes=null",
        "workers.use_gpu=false",
        "workers.cpus_per_worker=1",
    ]


@pytest.fixture(scope="session")
def trained_run(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on the tiny data; tests that damage it work on a copy."""
    folder = tmp_path_factory.mktemp("runs")
    return train_here([*tiny_overrides, "run.name=tiny", f"run.storage_path={folder}"])


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """What a command sets for its process is put back: tests share theirs."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture
def emoray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Emoray:
    """The real command line, run in this process: `emoray("show", "config.yaml")`."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["emoray", *map(str, arguments)])
        capsys.readouterr()
        status: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return Answer(int(status or 0), out, err)

    return run
