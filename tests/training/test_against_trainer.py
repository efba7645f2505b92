"""transformers.Trainer, fed the same samples in the same order from the same weights, sees the same losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Configure, learner_of, minilm, real_data
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from emoray import config as cfg
from emoray import model
from emoray.config import TrainConfig
from emoray.learner import Learner
from emoray.task import Task, prepare
from emoray.world import World

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")

STEPS = 20
RECIPE = ("model.dropout=0", "training.max_grad_norm=1.0", f"training.max_steps={STEPS}")
TINY = (*RECIPE, "training.learning_rate=1e-2")  # random weights move little at a smaller one, and would hide mistakes
FORMS = [
    ("training.packing='on'",),
    ("training.packing='off'",),
    ("training.packing='on'", "training.micro_batch_tokens=128"),
    ("training.packing='off'", "training.micro_batch_tokens=128"),
    ("training.compact_vocabulary='off'",),
]


class Ordered(Trainer):  # type: ignore[misc]
    """Takes its batches as they are given, padded to their longest text, and notes each loss before rounding."""

    def __init__(self, batches: list[dict[str, Tensor]], weights: Tensor | None, **given: Any) -> None:
        super().__init__(**given)
        self.batches, self.label_weights, self.losses = batches, weights, []

    def get_train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.batches, batch_size=None)

    def training_step(self, *given: Any, **more: Any) -> Tensor:
        loss = super().training_step(*given, **more)
        self.losses.append(float(loss))
        return loss

    def compute_loss(self, model: Any, inputs: Mapping[str, Tensor], *given: Any, **more: Any) -> Any:
        if self.label_weights is None:
            return super().compute_loss(model, inputs, *given, **more)
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return F.cross_entropy(logits, inputs["labels"], self.label_weights)


def batches_of(task: Task, steps: list[NDArray[np.int64]]) -> list[dict[str, Tensor]]:
    """Our samples of each step as Trainer's collator would give them."""
    part = task.parts["train"]
    found = []
    for rows in steps:
        texts = [torch.from_numpy(part.tokens[row].astype(np.int64)) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": torch.from_numpy(part.targets[rows])})
    return found


def compare(config: TrainConfig, folder: Path, label_weights: bool = False) -> None:
    training = config.training
    task = prepare(config)
    weights = model.load(config.model, task.labels, training.seed)
    learner = Learner(task, {name: tensor.clone() for name, tensor in weights.state_dict().items()}, World())
    ours = [float(learner.step(step)) for step in range(STEPS)]
    counts = torch.from_numpy(np.bincount(task.parts["train"].targets)).float()
    trainer = Ordered(
        batches_of(task, [learner.plan.samples(step) for step in range(STEPS)]),
        counts.sum() / (len(counts) * counts) if label_weights else None,
        model=weights,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=config.batch_size(1),
            learning_rate=training.learning_rate,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_epsilon=training.adam_epsilon,
            weight_decay=training.weight_decay,
            lr_scheduler_type=training.lr_scheduler_type,
            warmup_steps=round(training.warmup_ratio * STEPS),
            max_grad_norm=training.max_grad_norm,
            label_smoothing_factor=training.label_smoothing,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
    )
    trainer.remove_callback(TrainerCallback)
    trainer.train()
    assert len(trainer.losses) == STEPS
    print("largest difference of losses", max(abs(np.array(ours) - trainer.losses)))
    np.testing.assert_allclose(ours, trainer.losses, atol=1e-4, rtol=0)
    assert max(ours) - min(ours) > 0.05


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
def test_tiny(form: tuple[str, ...], configure: Configure, tmp_path: Path) -> None:
    compare(configure(*TINY, *form), tmp_path / "trainer")


@pytest.mark.parametrize(
    "change",
    [
        ("training.label_smoothing=0.1",),
        ("training.weight_decay=0.05",),
        ("training.lr_scheduler_type=cosine", "training.warmup_ratio=0.25"),
        ("training.max_grad_norm=0.05", "training.adam_beta1=0.8", "training.adam_epsilon=1e-6"),
    ],
    ids=" ".join,
)
def test_other_recipes(change: tuple[str, ...], configure: Configure, tmp_path: Path) -> None:
    compare(configure(*TINY, *change), tmp_path / "trainer")


def test_class_weights(configure: Configure, tmp_path: Path) -> None:
    """The mean that a batch's weighted losses have in torch: divided by the weights, not by the number of texts."""
    config = configure(*TINY, "training.class_weights=balanced", "training.micro_batch_tokens=128")
    compare(config, tmp_path / "trainer", label_weights=True)


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_torchs_own(weighted: bool, smoothing: float, packing: str, configure: Configure) -> None:
    """Cut into micro-batches or not, a step's loss is cross_entropy's mean over the whole batch."""
    weights = "balanced" if weighted else "none"
    for most in (128, 16384):
        learner = learner_of(
            configure(
                "model.dropout=0",
                f"training.packing='{packing}'",
                f"training.label_smoothing={smoothing}",
                f"training.class_weights={weights}",
                f"training.micro_batch_tokens={most}",
            )
        )
        rows = learner.plan.samples(10)
        with torch.no_grad():
            logits = learner.forward(learner.forward.batch([learner.tokens["train"][row] for row in rows]))
        targets = learner.task.parts["train"].targets
        counts = np.bincount(targets)
        balance = torch.from_numpy(len(targets) / (len(counts) * counts)).float() if weighted else None
        expected = F.cross_entropy(logits, torch.from_numpy(targets[rows]), balance, label_smoothing=smoothing)
        assert float(learner.step(10)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS[:2], ids=" ".join)
def test_real_weights_and_texts(form: tuple[str, ...], tmp_path: Path) -> None:
    """All-MiniLM-L6-v2 on the emotion data."""
    given = [
        f"model.pretrained={minilm()}",
        f"data.dataset={real_data()}",
        "training.train_batch_size=16",
        "training.learning_rate=2e-4",
    ]
    compare(cfg.load(None, [*given, *RECIPE, *form]), tmp_path / "trainer")
