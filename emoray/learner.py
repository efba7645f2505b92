"""A model that learns: one optimizer step from a step number, and its whole state as named tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from emoray import checkpoint
from emoray.cuda_graphs import FixedBatch, GraphedPasses
from emoray.dropout import seed_dropout
from emoray.errors import ModelError
from emoray.forward import Forward, PaddedBatch, score, uses_bf16
from emoray.model import learning_rates, make_optimizer, rebuild
from emoray.packed_model import is_packable
from emoray.packing import PackedBatch, send
from emoray.stopwatch import Stopwatch
from emoray.task import Task
from emoray.tokens import BatchPlan
from emoray.vocabulary import CompactVocabulary, is_exact
from emoray.world import World

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Learner:
    """Model, optimizer and batch plan of one worker.

    Args:
        task: the run's input.
        state: weights by name; read, never written, so that workers of a node can share them.
        world: the other workers; on a GPU, `process.set_up_torch` must have been called.
    """

    def __init__(self, task: Task, state: Mapping[str, Tensor], world: World) -> None:
        self.task, self.world = task, world
        self.clock = Stopwatch()
        config = task.config.training
        model = rebuild(task.hf_config, state)
        self.tokens = {name: part.tokens for name, part in task.parts.items()}
        self.vocabulary = self._compact(model) if self._may_compact(model) else None
        for parameter in model.parameters():
            parameter.data = parameter.data.to(world.device, copy=True)
        torch.nn.Module.to(model, world.device)  # buffers
        if task.config.model.freeze_embeddings:
            model.base_model.embeddings.requires_grad_(False)
        self.dropout = seed_dropout(model)
        self.forward = Forward(
            model, packed=_packed(config.packing, model), bf16=uses_bf16(config.precision, world.device)
        )
        if world.device.type == "cuda":
            # Flash attention is deterministic in strict mode alone, which unpackable encoders may not support.
            torch.use_deterministic_algorithms(True, warn_only=not self.forward.packed)
        self.model = model
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self.optimizer = make_optimizer(model, config)
        self.plan = BatchPlan(
            lengths=self.tokens["train"].lengths,
            seed=config.seed,
            batch_size=task.config.batch_size(world.size),
            packed=self.forward.packed,
            micro_batch_tokens=config.micro_batch_tokens,
        )
        self.total_steps = config.max_steps or config.num_epochs * self.plan.steps_per_epoch
        self.learning_rate = learning_rates(config, self.total_steps)
        self._label_weights = _class_weights(task)  # read at each step, which must not wait for a GPU
        self._weights = None if self._label_weights is None else self._label_weights.to(world.device)
        self._graphs = self._graphed() if self.forward.can_be_captured else None
        self._parallel = self.forward if self._graphs else _parallel(self.forward, world, config.gradient_compression)

    def _graphed(self) -> GraphedPasses:
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        longest = int(self.tokens["train"].lengths.max())
        return GraphedPasses(self._loss, learning, longest, self.world, self.task.config.training.gradient_compression)

    def _may_compact(self, model: nn.Module) -> bool:
        config = self.task.config
        wanted = config.training.compact_vocabulary
        if wanted == "off":
            return False
        exact = is_exact(model, config.training.weight_decay, config.model.freeze_embeddings)  # type: ignore[arg-type]
        if wanted == "on" and not exact:
            raise ModelError(
                "training.compact_vocabulary is on, but for this encoder, or with model.freeze_embeddings, the result "
                "would not be the same: set it to auto"
            )
        return exact

    def _compact(self, model: nn.Module) -> CompactVocabulary:
        vocabulary = CompactVocabulary(model, self.tokens.values())  # type: ignore[arg-type]
        self.tokens = {name: vocabulary.remap(tokens) for name, tokens in self.tokens.items()}
        return vocabulary

    def step(self, step: int) -> Tensor:
        """One optimizer step.

        Returns:
            This worker's part of the batch's mean loss, a scalar on the device; the parts add up over workers.
        """
        denominator = self._weight(self.plan.samples(step))
        pieces = self.plan.micro_batches(step, self.world.rank, self.world.size)
        loss = self._replayed(step, pieces, denominator) if self._graphs else self._launched(step, pieces, denominator)
        self._update(step)
        self.clock.lap("update")
        return loss

    def _replayed(self, step: int, pieces: Sequence[NDArray[np.int64]], denominator: float) -> Tensor:
        """Gradients of the micro-batches, by CUDA graphs."""
        assert self._graphs is not None
        loss = torch.zeros((), device=self.world.device)
        for rows in pieces:
            batch, targets = self._batch(step, rows)
            assert isinstance(batch, PackedBatch)
            loss += self._graphs.run(batch, targets, denominator)
            self.clock.lap("backward")  # the forward pass too
        self._graphs.sum_gradients()
        self.clock.lap("backward")
        return loss

    def _launched(self, step: int, pieces: Sequence[NDArray[np.int64]], denominator: float) -> Tensor:
        """Gradients of the micro-batches, kernel by kernel."""
        loss = torch.zeros((), device=self.world.device)
        # Without a text of its own a worker must still take part in the sum of gradients, with zeros.
        factor = float(self.world.size) if pieces else 0.0  # DDP averages, so it is undone here
        pieces = pieces or [self.plan.samples(step)[:1]]
        for place, rows in enumerate(pieces):
            with nullcontext() if place == len(pieces) - 1 else self._unsynchronised():
                batch, targets = self._batch(step, rows)
                batch, device = batch.to(self.world.device), self.world.device
                part = self._loss(batch, send(torch.from_numpy(targets), device)) / denominator
                self.clock.lap("forward")
                (part * factor).backward()
                self.clock.lap("backward")  # with several workers, sums of gradients too
            loss += part.detach() * (factor / self.world.size)
        return loss

    def _batch(self, step: int, rows: NDArray[np.int64]) -> tuple[PackedBatch | PaddedBatch, NDArray[np.int64]]:
        """A micro-batch and its targets, on the CPU; from here on dropout is that of its texts."""
        tokens = self.tokens["train"]
        batch = self.forward.batch([tokens[row] for row in rows])
        text, places, first = batch.places()
        seed = self.task.config.training.seed
        self.dropout.begin(seed=seed, step=step, texts=rows[text], places=places, first=first)
        self.clock.lap("batch")
        return batch, self.task.parts["train"].targets[rows]

    def _loss(self, batch: PackedBatch | FixedBatch | PaddedBatch, targets: Tensor) -> Tensor:
        """Sum of the texts' weighted cross-entropies, in nats."""
        smoothing = self.task.config.training.label_smoothing
        logits = self._parallel(batch)
        return F.cross_entropy(logits, targets, self._weights, reduction="sum", label_smoothing=smoothing)

    def _weight(self, rows: NDArray[np.int64]) -> float:
        """What a mean over these rows divides by: their number, or the sum of their labels' weights."""
        if self._label_weights is None:
            return float(len(rows))
        return float(self._label_weights[self.task.parts["train"].targets[rows]].sum())

    def _unsynchronised(self) -> AbstractContextManager[None]:
        return self._parallel.no_sync() if isinstance(self._parallel, DistributedDataParallel) else nullcontext()

    def _update(self, step: int) -> None:
        most = self.task.config.training.max_grad_norm
        if most:
            # `clip_grad_norm_`, but the fused optimizer divides where it reads the gradients anyway: a pass less.
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            self.optimizer.grad_scale = ((norm + 1e-6) / most).clamp_(min=1.0)  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        if self._graphs:
            self._graphs.clear_gradients()
        else:
            self.optimizer.zero_grad(set_to_none=True)

    def scores(self, split: str) -> NDArray[np.float32] | None:
        """Logits of a whole split, float32 [rows, labels], on worker 0; None on the others.

        The rows are dealt by length, each to one worker, and none is counted twice.
        """
        tokens = self.tokens[split]
        mine = np.argsort(-tokens.lengths, kind="stable")[self.world.rank :: self.world.size]
        logits = score(self.forward, tokens, mine, self.task.config.training.eval_batch_size)
        parts = self.world.gather((mine, logits))
        if not parts:
            return None
        rows = np.concatenate([part[0] for part in parts])
        assert len(rows) == len(tokens) and (np.bincount(rows, minlength=len(tokens)) == 1).all()
        whole = np.empty((len(tokens), logits.shape[1]), np.float32)
        whole[rows] = np.concatenate([part[1] for part in parts])
        return whole

    def tensors(self) -> dict[str, Tensor]:
        """Weights and both moments: `weights/<name>`, `exp_avg/<name>`, `exp_avg_sq/<name>`."""
        state = {f"weights/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for parameter, moments in self.optimizer.state.items():
            state.update({f"{kind}/{self.names[parameter]}": moments[kind] for kind in _MOMENTS})
        return state

    def whole_weights(self) -> dict[str, Tensor]:
        """The weights by name, on the CPU, as the encoder came: with all rows of the word table."""
        state = {f"weights/{name}": tensor.cpu() for name, tensor in self.model.state_dict().items()}
        return self.as_files(state)[0]

    def as_files(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What `tensors` gave, as the contents of the two files: whole weights, and the optimizer's state."""
        prefix = "weights/"
        weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        moments = {name: t for name, t in tensors.items() if not name.startswith(prefix)}
        if self.vocabulary is not None:
            weights[self.vocabulary.name] = self.vocabulary.expand(weights[self.vocabulary.name])
            moments["rows"] = torch.from_numpy(self.vocabulary.rows)
        return weights, moments

    def load_weights(self, folder: Path) -> None:
        """Take over the weights of a checkpoint of this run."""
        weights = load_file(folder / checkpoint.WEIGHTS)
        if self.vocabulary is not None:
            name = self.vocabulary.name
            # A copy: the checkpoint's file, which this one only maps, will be deleted.
            self.vocabulary.full = weights[name].clone()
            weights[name] = self.vocabulary.full[torch.from_numpy(self.vocabulary.rows)]
        self.model.load_state_dict(weights, strict=False)

    def load(self, folder: Path, step: int) -> None:
        """Go on from a checkpoint: weights and optimizer as they were before `step`."""
        self.load_weights(folder)
        moments = load_file(folder / checkpoint.OPTIMIZER)
        rows = moments.pop("rows", None)
        for parameter, name in self.names.items():
            if f"exp_avg/{name}" not in moments:
                continue
            state = {kind: moments[f"{kind}/{name}"] for kind in _MOMENTS}
            if parameter is self.model.get_input_embeddings().weight:
                state = {kind: self._rows_of_today(tensor, rows) for kind, tensor in state.items()}
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=self.world.device if parameter.is_cuda else "cpu"),
                **{kind: tensor.to(self.world.device, copy=True) for kind, tensor in state.items()},
            }

    def _rows_of_today(self, moment: Tensor, rows: Tensor | None) -> Tensor:
        """A moment of the word table, kept compact or whole, in the form that this run uses."""
        if rows is not None:
            whole = torch.zeros(self.task.hf_config.vocab_size, moment.shape[1])
            whole[rows] = moment
            moment = whole
        return moment if self.vocabulary is None else moment[torch.from_numpy(self.vocabulary.rows)]


def _packed(packing: str, model: nn.Module) -> bool:
    if packing == "on" and not is_packable(model):
        raise ModelError(
            f"training.packing is on, but a {type(model).__name__} can't be packed: set it to auto, or take an encoder "
            "of BERT's family"
        )
    return packing != "off" and is_packable(model)


def _class_weights(task: Task) -> Tensor | None:
    """Weights of the labels, float32 [labels], or None where all count the same."""
    if task.config.training.class_weights == "none":
        return None
    counts = np.bincount(task.parts["train"].targets, minlength=len(task.labels))
    return torch.from_numpy(counts.sum() / (len(counts) * counts)).float()


def _parallel(forward: Forward, world: World, compression: str) -> nn.Module:
    """The forward pass with gradients summed over workers, as they become ready, in buckets that they live in.

    `find_unused_parameters` keeps the buckets as they were first laid out: without it DDP lays them out anew after
    the first step, so that sums would come in another order after a restart, and other bits with them.
    """
    if world.size == 1:
        return forward
    with warnings.catch_warnings():
        # Torch 2.13 deprecates it, but says itself that nothing yet replaces it for buffers that never differ.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        parallel = DistributedDataParallel(
            forward,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            broadcast_buffers=False,
            init_sync=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=True,
        )
    if compression == "bf16":
        parallel.register_comm_hook(None, lambda _, bucket: _mean_in_bf16(bucket))  # DDP can't read late annotations
    return parallel


def _mean_in_bf16(bucket: Any) -> torch.futures.Future[Tensor]:
    """Torch's `bf16_compress_hook`, which DDP refuses on CPUs (by its name: gloo itself sums bfloat16)."""
    gradients = bucket.buffer()
    mean = gradients.to(torch.bfloat16).div_(dist.get_world_size())
    future = dist.all_reduce(mean, async_op=True).get_future()
    return future.then(lambda done: gradients.copy_(done.value()[0]))  # type: ignore[no-any-return]
