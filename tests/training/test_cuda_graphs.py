"""A GPU's way through a step: its graphs called where none can be captured and, on a GPU, the graphs themselves."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import Configure, folder_of, last_weights, outcome, run_workers
from test_workers import MEANINGLESS, RECIPE, differences
from torch import Tensor

from emoray import model
from emoray.config import TrainConfig
from emoray.cuda_graphs import TEXTS, TOKENS, _numbers
from emoray.learner import Learner
from emoray.packing import pack
from emoray.process import set_up_torch
from emoray.task import prepare
from emoray.world import World

has_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
FEW = (*RECIPE, "training.max_steps=15")  # past an epoch's end, whose batch has fewer texts than there are workers
UNEVEN = ("training.class_weights=balanced", "training.label_smoothing=0.1")


def trained(config: TrainConfig, size: int = 1, as_on_gpu: bool = False) -> tuple[dict[str, Tensor], list[float]]:
    assert run_workers(config, size, as_on_gpu=as_on_gpu).finished
    return last_weights(folder_of(config)), outcome(folder_of(config)).losses


@pytest.mark.parametrize(("size", "overrides"), [(1, UNEVEN), (4, ())], ids=["weighted and smoothed", "four workers"])
def test_same_weights(size: int, overrides: tuple[str, ...], configure: Configure) -> None:
    """What micro-batches are padded with adds nothing; nor does it matter to how many workers they are dealt."""
    expected, losses = trained(configure(*FEW, *overrides))
    weights, found = trained(configure(*FEW, *overrides), size, as_on_gpu=True)
    assert max(off for name, off in differences(weights, expected).items() if not name.endswith(MEANINGLESS)) < 1e-5
    np.testing.assert_allclose(found, losses, rtol=1e-5)


def test_compressed_gradients(configure: Configure) -> None:
    _, losses = trained(configure(*FEW), 2, as_on_gpu=True)
    _, rough = trained(configure(*FEW, "training.gradient_compression=bf16"), 2, as_on_gpu=True)
    assert rough != losses
    np.testing.assert_allclose(rough, losses, rtol=0.02)


def test_shapes_are_few() -> None:
    """Micro-batches of all sizes up to 2048 tokens and 64 texts have at most 64 shapes."""
    draw = np.random.default_rng(0)
    shapes = set()
    for texts in range(1, 65):
        batch = pack([np.ones(draw.integers(1, 32), np.int64) for _ in range(texts)])
        up = -(-batch.n_tokens // TOKENS) * TOKENS, -(-texts // TEXTS) * TEXTS
        shapes.add(up)
        assert len(_numbers(batch, np.zeros(texts, np.int64), *up)) == 2 * up[0] + 3 * up[1] + 2
    assert len(shapes) <= 16 * 4


# --- on a GPU -----------------------------------------------------------------------------------------------------


def gpu_learner(config: TrainConfig) -> Learner:
    device = torch.device("cuda")
    set_up_torch(2, device)
    task = prepare(config)
    state = model.load(config.model, task.labels, config.training.seed).state_dict()
    learner = Learner(task, state, World(device=device))
    assert learner._graphs is not None
    return learner


def kept(learner: Learner) -> dict[str, Tensor]:
    return {name: copy.deepcopy(tensor.cpu()) for name, tensor in learner.tensors().items()}


def steps(learner: Learner, begin: int, end: int) -> dict[str, Tensor]:
    for step in range(begin, end):
        learner.step(step)
    return kept(learner)


@pytest.mark.gpu
@has_gpu
@pytest.mark.parametrize("overrides", [(), ("training.micro_batch_tokens=128", *UNEVEN)])
def test_the_same_bits_each_time(overrides: tuple[str, ...], configure: Configure, tmp_path: Path) -> None:
    """A run that goes on from step 7 records its graphs anew, and at other batches."""
    from safetensors.torch import save_file

    config = configure("model.dropout=0.2", *overrides)
    once = steps(gpu_learner(config), 0, 15)
    again = gpu_learner(config)
    weights, moments = again.as_files(steps(again, 0, 7))
    (tmp_path / "training").mkdir()
    save_file(weights, tmp_path / "model.safetensors")
    save_file(moments, tmp_path / "training" / "optimizer.safetensors")
    resumed = gpu_learner(config)
    resumed.load(tmp_path, 7)
    found = steps(resumed, 7, 15)
    assert all(torch.equal(found[name], tensor) for name, tensor in once.items())


@pytest.mark.gpu
@has_gpu
def test_gradients_are_those_of_float32_on_a_cpu(configure: Configure) -> None:
    config = configure("model.dropout=0", "training.max_grad_norm=0")
    learner = gpu_learner(config)
    task = prepare(config)
    plain = Learner(task, model.load(config.model, task.labels, config.training.seed).state_dict(), World())
    for each in (learner, plain):
        each._update = lambda step: None  # type: ignore[method-assign]
    assert float(learner.step(3)) == pytest.approx(float(plain.step(3)), rel=0.01)
    grads = [torch.cat([p.grad.flatten().cpu() for p in each.model.parameters()]) for each in (learner, plain)]  # type: ignore[union-attr]
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 0.03
