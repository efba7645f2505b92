"""Training only the embedding rows that the data uses gives what training the whole table gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from harness import (
    Configure,
    Script,
    folder_of,
    last_weights,
    learner_of,
    outcome,
    run_training,
    sha256_of,
    weights_of,
)
from safetensors.torch import load_file
from torch import Tensor

from emoray import checkpoint, model
from emoray.checkpoint import OPTIMIZER
from emoray.config import TrainConfig
from emoray.errors import InterruptedRunError
from emoray.learner import Learner
from emoray.task import prepare
from emoray.training import Wish
from emoray.world import World

STEPS = 50
ON, OFF = "training.compact_vocabulary='on'", "training.compact_vocabulary='off'"
TABLE = "bert.embeddings.word_embeddings.weight"
PACKINGS = ["training.packing='on'", "training.packing='off'"]


def after_steps(config: TrainConfig, steps: int = STEPS) -> Learner:
    learner = learner_of(config)
    assert (learner.vocabulary is not None) == (config.training.compact_vocabulary != "off")
    for step in range(steps):
        learner.step(step)
    return learner


@pytest.mark.parametrize("packing", PACKINGS)
def test_same_bits_without_clipping(packing: str, configure: Configure) -> None:
    """With the encoder's dropout on: masks depend on the texts, not on the table."""
    recipe = ("training.max_grad_norm=0", "training.num_epochs=5", packing)
    whole, compact = (weights_of(after_steps(configure(*recipe, choice))) for choice in (OFF, ON))
    assert sha256_of(compact) == sha256_of(whole)
    start = weights_of(learner_of(configure(*recipe, OFF)))
    assert not torch.equal(start[TABLE], whole[TABLE])


@pytest.mark.parametrize("packing", PACKINGS)
def test_same_weights_with_clipping(packing: str, configure: Configure) -> None:
    """The norm sums the same squares in another grouping, so it may differ in its last bit."""
    recipe = ("training.max_grad_norm=0.1", "training.num_epochs=5", "model.dropout=0", packing)
    whole, compact = (weights_of(after_steps(configure(*recipe, choice))) for choice in (OFF, ON))
    for name, tensor in whole.items():
        if name.endswith("attention.self.key.bias"):
            continue  # its gradient is zero but for rounding: see test_workers.py
        torch.testing.assert_close(compact[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_a_whole_run(configure: Configure) -> None:
    """Checkpoints, evaluations and the final model are those of the whole table."""
    recipe = ("training.max_grad_norm=0", "training.num_epochs=5")
    whole, compact = (run_training(configure(*recipe, choice)) for choice in (OFF, ON))
    assert last_weights(whole)[TABLE].shape == last_weights(compact)[TABLE].shape
    one, other = outcome(whole), outcome(compact)
    assert one.sums["last weights"] == other.sums["last weights"] and one.sums["best"] == other.sums["best"]
    assert one.losses == other.losses and one.results == other.results


def test_rows_that_no_training_text_uses(configure: Configure) -> None:
    """Those of validation and test are in the compact table and stay as they were; others come from the whole one."""
    config = configure(ON)
    learner = learner_of(config)
    before = weights_of(learner)[TABLE]
    for step in range(11):
        learner.step(step)
    after = weights_of(learner)[TABLE]
    task = learner.task
    trained = set(np.unique(np.asarray(task.parts["train"].tokens.ids)).tolist())
    seen = set(np.unique(np.asarray(task.parts["validation"].tokens.ids)).tolist())
    assert learner.vocabulary is not None
    assert seen - trained <= set(learner.vocabulary.rows.tolist())
    assert len(seen - trained) > 3 and len(learner.vocabulary.rows) < 0.6 * len(before)
    untouched = sorted(set(range(len(before))) - trained)
    assert torch.equal(after[untouched], before[untouched])
    assert not torch.equal(after[sorted(trained)], before[sorted(trained)])


@pytest.mark.parametrize("packing", PACKINGS)
def test_validation_reads_the_same_rows(packing: str, configure: Configure) -> None:
    whole, compact = (after_steps(configure(choice, packing, "training.max_grad_norm=0"), 8) for choice in (OFF, ON))
    for split in ("validation", "test"):
        np.testing.assert_array_equal(whole.scores(split), compact.scores(split))


@pytest.mark.parametrize(("first", "then"), [(ON, OFF), (OFF, ON)])
def test_a_run_goes_on_in_the_other_form(first: str, then: str, configure: Configure) -> None:
    """The optimizer's state is read whichever way it was written."""
    recipe = ("training.max_grad_norm=0", "training.num_epochs=3")
    undisturbed = outcome(run_training(configure(*recipe, then)))
    begun = configure(*recipe, first)
    with pytest.raises(InterruptedRunError):
        run_training(begun, Script({9: Wish.STOP}))
    saved = load_file(folder_of(begun) / checkpoint.name_of(9) / OPTIMIZER)
    assert ("rows" in saved) == (first == ON)
    changed = begun.training.model_copy(update={"compact_vocabulary": "off" if then == OFF else "on"})
    assert outcome(run_training(begun.model_copy(update={"training": changed}))) == undisturbed


def test_other_texts_may_be_added_later(configure: Configure) -> None:
    """Rows are saved by their ids, so a state of other rows than today's is read right."""
    config = configure(ON)
    learner = after_steps(config, 5)
    weights, moments = learner.as_files(learner.tensors())
    whole = after_steps(configure(OFF), 5)
    expected = dict(whole.as_files(whole.tensors())[1])
    found = torch.zeros_like(expected[f"exp_avg/{TABLE}"])
    found[moments["rows"]] = moments[f"exp_avg/{TABLE}"]
    torch.testing.assert_close(found, expected[f"exp_avg/{TABLE}"], atol=1e-7, rtol=0)
    assert weights[TABLE].shape == (learner.task.hf_config.vocab_size, 32)


@pytest.mark.parametrize(
    "override", ["training.weight_decay=0.01", "model.freeze_embeddings=true", "training.compact_vocabulary='off'"]
)
def test_off_where_it_would_not_be_exact(override: str, configure: Configure) -> None:
    assert learner_of(configure(override)).vocabulary is None


def test_an_encoder_that_counts_positions_from_its_padding_id_keeps_its_table(configure: Configure) -> None:
    from transformers import RobertaConfig

    config = configure("training.packing='off'")
    task = prepare(config)
    shape = {"vocab_size": 800, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = RobertaConfig(**shape, intermediate_size=32, max_position_embeddings=64, num_labels=3, pad_token_id=0)
    task = replace(task, hf_config=roberta)
    from transformers import RobertaForSequenceClassification

    state = RobertaForSequenceClassification(roberta).state_dict()
    assert Learner(task, state, World()).vocabulary is None


def test_the_given_weights_are_only_read(configure: Configure) -> None:
    """Workers of a node share them."""
    config = configure(ON)
    task = prepare(config)
    state: dict[str, Tensor] = dict(model.load(config.model, task.labels, 1).state_dict())
    before = sha256_of(state)
    learner = Learner(task, state, World())
    for step in range(3):
        learner.step(step)
    assert sha256_of(state) == before
