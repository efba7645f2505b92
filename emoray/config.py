"""What `emoray train` reads: `configs/emotion.yaml`, as frozen, checked sections.

`load("configs/emotion.yaml", ["training.learning_rate=3e-5"])` gives a whole config, or raises one ConfigError with
every problem. How files, overrides and problems are handled is config_files.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from emoray.config_files import Fraction, Number, PositiveInt, Section, Switch, flatten, load_as, validate
from emoray.errors import ConfigError

BestMetric = Literal["f1", "macro_f1", "accuracy", "loss"]
"""What checkpoints and trials are compared by, on validation."""


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "emotion"
    """The run's folder name: letters, digits, dot, dash and underscore. The same name continues the run."""
    storage_path: Annotated[str, Field(min_length=1)] = "runs"
    """Where runs are kept: a path or a URI that pyarrow can write (s3://, gs://, NFS)."""
    on_existing: Literal["resume", "fail", "replace"] = "resume"
    """What to do when the run's folder exists: continue it, refuse, or delete it and start anew."""


class ModelConfig(Section):
    pretrained: Annotated[str, Field(min_length=1)] = "bert-base-multilingual-cased"
    """Hub id of an encoder, or a folder with its config, tokenizer and weights."""
    max_length: Annotated[int, Number, Field(ge=4, le=8192)] = 128
    """Longest text in tokens, special tokens included; longer texts are cut."""
    from_scratch: bool = False
    """Random weights drawn from the seed instead of pretrained ones; only config and tokenizer are read."""
    freeze_embeddings: bool = False
    """Leave the embedding tables as they are."""
    dropout: Fraction | None = None
    """Dropout probability everywhere in the encoder and its head; null keeps the encoder's own."""


class DataConfig(Section):
    dataset: Annotated[str, Field(min_length=1)] = "dair-ai/emotion"
    """Hub id; file or folder of jsonl, csv, tsv or parquet; or `quickstart`, the data in the package."""
    text_column: Annotated[str, Field(min_length=1)] = "text"
    """Column that holds the text."""
    label_column: Annotated[str, Field(min_length=1)] = "label"
    """Column that holds the label's name or id."""
    language_column: Annotated[str, Field(min_length=1)] | None = None
    """Column that holds the language, for a table a language; null has none. Training doesn't look at it."""
    labels: tuple[str, ...] | None = None
    """The label names in order of their ids; null takes them from the data."""
    validation_fraction: Annotated[float, Number, Field(gt=0, lt=0.5)] = 0.1
    """Share cut out of train, stratified and always the same rows, where a split is missing."""

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> DataConfig:
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError("labels must hold at least two names, each once")
        return self

    @model_validator(mode="after")
    def _columns_differ(self) -> DataConfig:
        if self.text_column == self.label_column:
            raise ValueError(f"text_column and label_column are both '{self.text_column}': name two columns")
        if self.language_column in (self.text_column, self.label_column):
            raise ValueError(f"language_column is '{self.language_column}', which holds the text or the label")
        return self


class TrainingConfig(Section):
    seed: Annotated[int, Number, Field(ge=0, lt=2**32)] = 42
    """Fixes the order of samples, dropout and new weights."""
    num_epochs: PositiveInt = 2
    """Passes over the training split."""
    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps, whatever the number of epochs; the schedule ends there too."""
    learning_rate: Annotated[float, Number, Field(gt=0, le=1)] = 2.0e-5
    """Peak learning rate."""
    train_batch_size: PositiveInt = 64
    """Texts a step, per worker."""
    eval_batch_size: PositiveInt = 64
    """Texts an evaluation batch, per worker."""
    global_batch_size: PositiveInt | None = None
    """Texts a step over all workers; set, it replaces train_batch_size and keeps the recipe at any size."""
    micro_batch_tokens: Annotated[int, Number, Field(ge=128)] = 16384
    """A worker's share of a batch is computed in pieces of at most so many tokens; gradients add up."""
    adam_beta1: Fraction = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Fraction = 0.999
    """Decay of Adam's second moment."""
    adam_epsilon: Annotated[float, Number, Field(gt=0)] = 1.0e-8
    """Adam's epsilon."""
    weight_decay: Annotated[float, Number, Field(ge=0, lt=1)] = 0.0
    """Decoupled weight decay (AdamW), not on biases and norms; 0 is plain Adam."""
    lr_scheduler_type: Literal["linear", "cosine", "polynomial", "constant", "constant_with_warmup"] = "linear"
    """Shape of the learning rate after warm-up, by the names of transformers."""
    warmup_ratio: Fraction = 0.0
    """Share of all steps over which the learning rate rises from 0."""
    max_grad_norm: Annotated[float, Number, Field(ge=0)] = 1.0
    """Clip the gradient's global L2 norm; 0 switches clipping off."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs each label by rows / (labels * rows with that label), as scikit-learn does."""
    label_smoothing: Fraction = 0.0
    """Share of a label's probability that is spread over all labels."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 autocast on GPUs that have it, else fp32."""
    metric_for_best_model: BestMetric = "f1"
    """Validation metric that picks best/ (loss: the lowest; the others: the highest)."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after so many evaluations in a row without a better metric; null never stops early."""
    evaluations_per_epoch: PositiveInt = 1
    """Evaluations, each with a checkpoint, at equal distances within an epoch; the last one at its end."""
    packing: Switch = "auto"
    """Texts end to end in one row, without padding; `auto` where the encoder allows it."""
    compact_vocabulary: Switch = "auto"
    """Train only the embedding rows that the data uses; `auto` where the result is exactly the same."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """Send gradients between workers in bf16: half the bytes, rounded sums."""
    checkpoint_every_steps: PositiveInt | None = None
    """A checkpoint every so many steps, beside the one at each epoch's end."""
    checkpoint_every_minutes: Annotated[float, Number, Field(gt=0)] | None = 10.0
    """A checkpoint after so many minutes without one; null switches it off."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints stay; the best one stays always."""
    logging_steps: PositiveInt = 10
    """Losses are read back from the device, and written to history.jsonl, every so many steps."""


class WorkersConfig(Section):
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Number of training workers, or [min, max]: elastic between them."""
    use_gpu: Literal["auto"] | bool = "auto"
    """Workers on GPUs; `auto` where the cluster has any."""
    gpus_per_worker: Annotated[float, Number, Field(gt=0, le=1)] = 1.0
    """Share of a GPU that a worker takes, e.g. 0.5 for two trials of a sweep on one GPU."""
    cpus_per_worker: PositiveInt | None = None
    """CPUs, and threads, of a worker; null is an even share of the machine."""
    max_failures: Annotated[int, Number, Field(ge=0)] = 3
    """How often a run that failed is taken up again from its last checkpoint."""
    wait_for_nodes_s: Annotated[float, Number, Field(ge=0)] = 0.0
    """How long an autoscaler may take to bring the nodes that are missing, in seconds; 0 where nodes don't come."""

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def elastic(self) -> bool:
        return self.min_workers < self.max_workers

    @model_validator(mode="after")
    def _range_is_ordered(self) -> WorkersConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers must be [min, max] with min <= max, not {list(self.num_workers)}")  # type: ignore[arg-type]
        return self

    @model_validator(mode="after")
    def _workers_of_a_run_share_no_gpu(self) -> WorkersConfig:
        if self.gpus_per_worker < 1 and self.max_workers > 1:
            raise ValueError(
                f"gpus_per_worker is {self.gpus_per_worker:g} with {self.max_workers} workers, but NCCL wants a GPU "
                "for each worker of a run: set gpus_per_worker to 1 or num_workers to 1"
            )
        return self


# Keys that change where, how fast or how often, but never which weights come out.
_NOT_THE_RECIPE = (
    "run.",
    "workers.",
    "data.",  # the fingerprint of what it gives is compared instead
    "training.eval_batch_size",
    "training.compact_vocabulary",
    "training.checkpoint_",
    "training.keep_checkpoints",
    "training.logging_steps",
)


class TrainConfig(Section):
    """A whole training run: `configs/emotion.yaml`."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    workers: WorkersConfig = WorkersConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> TrainConfig:
        size, workers = self.training.global_batch_size, self.workers
        if workers.elastic and size is None:
            raise ValueError(
                f"workers.num_workers is {list(workers.num_workers)}: "  # type: ignore[arg-type]
                "an elastic run needs training.global_batch_size, so that each step means the same at any size"
            )
        if size is not None and size < workers.max_workers:
            raise ValueError(
                f"training.global_batch_size is {size}, less than one text for each of "
                f"{workers.max_workers} workers: raise it or lower workers.num_workers"
            )
        if self.training.compact_vocabulary == "on" and self.training.weight_decay > 0:
            raise ValueError(
                "training.compact_vocabulary is on, but training.weight_decay also shrinks unused rows: "
                "set compact_vocabulary to auto or weight_decay to 0"
            )
        return self

    def batch_size(self, num_workers: int) -> int:
        """Texts a step over all workers."""
        return self.training.global_batch_size or self.training.train_batch_size * num_workers

    def texts_a_worker(self, num_workers: int) -> int:
        """Texts a step of the worker that gets most."""
        return -(-self.batch_size(num_workers) // num_workers)

    def recipe(self) -> dict[str, Any]:
        """The dotted keys that decide which weights come out, with their values."""
        keys = {k: v for k, v in flatten(self.model_dump(mode="json")).items() if not k.startswith(_NOT_THE_RECIPE)}
        if self.training.global_batch_size is None:
            keys["workers.num_workers"] = self.workers.max_workers
        else:
            del keys["training.train_batch_size"]
        return keys


def column_and_sign(metric: str) -> tuple[str, float]:
    """An evaluation's column that a `BestMetric` is, and 1 where more of it is better, else -1."""
    return ("validation_loss", -1.0) if metric == "loss" else (metric, 1.0)


def load(path: str | Path | None, overrides: Iterable[str] = ()) -> TrainConfig:
    """A training config: defaults < YAML file < `key.path=value` overrides. See `load_as`.

    Raises:
        ConfigError: with every problem found.
    """
    try:
        return load_as(TrainConfig, path, overrides)
    except ConfigError as error:
        if any(problem.startswith("search: unknown section") for problem in error.problems):
            remedy = "give it to `emoray tune`, or here the config that it names as base"
            raise ConfigError(error.subject, [f"is a sweep's config: {remedy}"]) from None
        raise


def parse(tree: Mapping[str, Any], subject: str = "config") -> TrainConfig:
    """Check a config that is already a tree of dicts, e.g. one stored with a checkpoint."""
    return validate(dict(tree), TrainConfig, subject, [])
