"""The real multilingual tokenizer and the real shape of mBERT, with random weights: the loss falls."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from harness import SHARED, learner_of, real_data

from emoray import config as cfg

STEPS, ROWS, BATCH = 20, 32, 8  # five times over the same real texts, so that losses can be compared


def few_rows(folder: Path) -> None:
    """The first training rows of the real data, and the rows of the other splits that have the same labels."""
    labels: set[str] = set()
    for split in ("train", "validation", "test"):
        lines = (real_data() / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        lines = lines[:ROWS] if split == "train" else [line for line in lines if json.loads(line)["label"] in labels]
        labels = labels or {json.loads(line)["label"] for line in lines}
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


@pytest.mark.slow
def test_twenty_steps(tmp_path: Path) -> None:
    encoder = SHARED / "data" / "bert-base-multilingual-cased"
    if not encoder.is_dir():
        pytest.skip("no ../shared/data/bert-base-multilingual-cased")
    few_rows(tmp_path)
    learner = learner_of(
        cfg.load(
            None,
            [
                f"model.pretrained={encoder}",
                "model.from_scratch=true",
                "model.dropout=0",
                f"data.dataset={tmp_path}",
                "training.learning_rate=1e-4",
                f"training.train_batch_size={BATCH}",
                f"training.max_steps={STEPS}",
            ],
        )
    )
    assert learner.task.hf_config.vocab_size == 119_547 and learner.task.hf_config.num_hidden_layers == 12
    assert learner.vocabulary is not None and len(learner.vocabulary.rows) < 10_000
    losses = np.array([float(learner.step(step)) for step in range(STEPS)])
    by_epoch = losses.reshape(-1, ROWS // BATCH).mean(1)
    print(by_epoch)
    assert by_epoch[-1] < by_epoch[0] - 0.1
