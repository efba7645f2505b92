"""Defaults < YAML < overrides; every problem at once; a config that is written down means the same when read."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from emoray.config import TrainConfig, load, parse
from emoray.config_files import flatten
from emoray.errors import ConfigError
from emoray.wording import nearest

CONFIGS = Path(__file__).parents[1] / "configs"
SECTIONS = {name: field.annotation for name, field in TrainConfig.model_fields.items()}
DOCUMENTED = """
run: {name: emotion, storage_path: runs}
model: {pretrained: bert-base-multilingual-cased, max_length: 128}
data: {dataset: dair-ai/emotion, text_column: text, label_column: label}
training:
  seed: 42
  num_epochs: 2
  learning_rate: 2.0e-5
  train_batch_size: 64
  eval_batch_size: 64
  global_batch_size: null
  adam_beta1: 0.9
  adam_beta2: 0.999
  adam_epsilon: 1.0e-8
  weight_decay: 0.0
  lr_scheduler_type: linear
  warmup_ratio: 0.0
  max_grad_norm: 1.0
  precision: auto
  metric_for_best_model: f1
workers: {num_workers: 1, use_gpu: auto, cpus_per_worker: null, max_failures: 3}
"""


def problems(*overrides: str, text: str | None = None, folder: Path | None = None) -> list[str]:
    path = None
    if text is not None:
        assert folder is not None
        path = folder / "config.yaml"
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return caught.value.problems


# Where values come from


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("training: {seed: 1, num_epochs: 5}\nrun:\n")
    config = load(path, ["training.seed=2", "training.seed=3"])
    assert (config.training.seed, config.training.num_epochs, config.training.learning_rate) == (3, 5, 2e-5)
    assert config.run == load(None).run, "an empty section means the defaults"
    path.write_text("")
    assert load(path) == load(str(path)) == load(None) == TrainConfig()


def test_every_key_has_a_docstring_and_a_default() -> None:
    for name, section in SECTIONS.items():
        for key, field in section.model_fields.items():
            assert field.description, f"{name}.{key}"
            assert not field.is_required(), f"{name}.{key}"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("training.learning_rate=3e-4", "training", "learning_rate", 3e-4),
        ("training.learning_rate=3.0e-4", "training", "learning_rate", 3e-4),
        ("training.learning_rate= 1e-3 ", "training", "learning_rate", 1e-3),
        (" training.seed =7", "training", "seed", 7),
        ("training.max_steps=null", "training", "max_steps", None),
        ("training.max_steps=", "training", "max_steps", None),
        ("training.max_steps=1_000", "training", "max_steps", 1000),
        ("training.checkpoint_every_minutes=5", "training", "checkpoint_every_minutes", 5.0),
        ("training.compact_vocabulary=on", "training", "compact_vocabulary", "on"),
        ("training.packing=off", "training", "packing", "off"),
        ("training.packing='off'", "training", "packing", "off"),
        ("training.packing=auto", "training", "packing", "auto"),
        ("model.from_scratch=true", "model", "from_scratch", True),
        ("model.pretrained=a=b", "model", "pretrained", "a=b"),
        ("data.labels=[sad, glad]", "data", "labels", ("sad", "glad")),
        ("data.labels=[1, 2]", "data", "labels", ("1", "2")),
        ("data.labels=null", "data", "labels", None),
        ("data.label_column=1", "data", "label_column", "1"),
        ("run.name=2026", "run", "name", "2026"),
        ("workers.num_workers=3", "workers", "num_workers", 3),
        ("workers.use_gpu=false", "workers", "use_gpu", False),
        ("workers.use_gpu=auto", "workers", "use_gpu", "auto"),
    ],
)
def test_overrides_are_yaml(override: str, section: str, key: str, value: Any) -> None:
    found = getattr(getattr(load(None, [override]), section), key)
    assert found == value and type(found) is type(value)


def test_elastic() -> None:
    config = load(None, ["workers.num_workers=[1, 4]", "training.global_batch_size=64"])
    assert (config.workers.min_workers, config.workers.max_workers, config.workers.elastic) == (1, 4, True)
    assert not load(None, ["workers.num_workers=[2, 2]"]).workers.elastic
    assert load(None, ["workers.num_workers=3"]).workers.max_workers == 3


def test_batch_size() -> None:
    assert load(None).batch_size(3) == 192
    assert load(None, ["training.global_batch_size=64"]).batch_size(3) == 64


# What is wrong


def test_all_problems_at_once(tmp_path: Path) -> None:
    text = """
trainig: {seed: 1}
run: {nme: x}
model: {max_length: 3, learning_rate: 1, from_scratch: perhaps}
training: {learning_rate: fast, num_epochs: 0, adam_beta1: 1.0, precision: fp16}
workers: {num_workers: two}
"""
    found = problems("nonsense", "training.warmup_ratio=2", text=text, folder=tmp_path)
    expected = [
        "'nonsense' is not an override: write section.key=value without spaces, e.g. training.learning_rate=3e-5",
        "trainig: unknown section (did you mean 'training'?)",
        "run.nme: unknown key (did you mean 'name'?)",
        "model.max_length: is 3, but should be greater than or equal to 4",
        "model.learning_rate: unknown key (did you mean 'training.learning_rate'?)",
        "model.from_scratch: is 'perhaps', but must be true or false",
        "training.learning_rate: is 'fast', but must be a number",
        "training.num_epochs: is 0, but should be greater than or equal to 1",
        "training.adam_beta1: is 1.0, but should be less than 1",
        "training.precision: is 'fp16', but should be 'auto', 'fp32' or 'bf16'",
        "training.warmup_ratio: is 2, but should be less than 1",
        "workers.num_workers: is 'two', but must be a whole number, or must be a list",
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    "override",
    [
        "",
        "=3",
        "seed",
        "training.seed",
        "--training.seed",
        "training.seed:3",
        " = ",
        ".seed=3",
        "training.=3",
        "a..b=3",
    ],
)
def test_what_is_no_override(override: str) -> None:
    (problem,) = problems(override)
    assert "is not an override" in problem and f"'{override}'" in problem


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training=3", "training: is 3, but must be a section"),
        ("seed=3", "seed: unknown section (did you mean 'training.seed'?)"),
        ("training.seed.x=3", "training.seed: "),
        ("training.seed=[1]", "training.seed: is [1], but must be a whole number"),
        ("training.seed=4.5", "training.seed: is 4.5, but must be a whole number"),
        ("training.seed=null", "training.seed: is null, but must be a whole number"),
        ("training.seed=4294967296", "training.seed: is 4294967296, but should be less than 4294967296"),
        ("training.learning_rate=.nan", "training.learning_rate: is nan, but should be a finite number"),
        ("training.learning_rate=yes", "training.learning_rate: is True, but must be a number, not true or false"),
        ("training.compact_vocabulary=1", "training.compact_vocabulary: is 1, but should be 'auto', 'on' or 'off'"),
        ("run.name=", "run.name: is null, but must be text"),
        ("run.name=a/b", "run.name: is 'a/b', but must be letters, digits"),
        ("run.name=.hidden", "run.name: is '.hidden', but must be letters, digits"),
        ("run.storage_path=''", "run.storage_path: is '', but should have at least 1 character"),
        ("data.labels=[a, a]", "data: labels must hold at least two names, each once"),
        ("data.labels=[a]", "data: labels must hold at least two names, each once"),
        ("data.text_column=label", "data: text_column and label_column are both 'label'"),
        (
            "workers.num_workers=[1, 2, 3]",
            "workers.num_workers: is [1, 2, 3], but must be a whole number, or holds too many",
        ),
        ("workers.num_workers=[4, 2]", "workers: num_workers must be [min, max] with min <= max, not [4, 2]"),
    ],
)
def test_one_problem(override: str, said: str) -> None:
    (problem,) = problems(override)
    assert problem.startswith(said) and "\n" not in problem


def test_problems_travel_between_processes() -> None:
    error = ConfigError("config.yaml", ["a: wrong", "b: wrong too"])
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "config.yaml: 2 problems\n  - a: wrong\n  - b: wrong too"
    assert again.problems == error.problems


def test_nearest() -> None:
    assert nearest("learnin_rate", ["learning_rate", "seed"]) == " (did you mean 'learning_rate'?)"
    assert nearest("x", ["learning_rate", "seed"]) == ""


def test_frozen() -> None:
    config = load(None)
    with pytest.raises(ValidationError):
        config.training.seed = 7  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.training = load(None).training  # type: ignore[misc]
    assert hash(config.training) == hash(load(None).training)


# What a config decides


def test_recipe_holds_what_decides_the_weights() -> None:
    same = [
        "run.name=other",
        "run.storage_path=/elsewhere",
        "run.on_existing=replace",
        "workers.max_failures=9",
        "workers.cpus_per_worker=2",
        "workers.use_gpu=false",
        "workers.wait_for_nodes_s=60",
        "training.eval_batch_size=8",
        "training.compact_vocabulary=on",
        "training.checkpoint_every_steps=5",
        "training.checkpoint_every_minutes=null",
        "training.keep_checkpoints=5",
        "training.logging_steps=1",
        "data.dataset=elsewhere",  # the fingerprint of what it gives is compared instead
    ]
    assert load(None, same).recipe() == load(None).recipe()
    other = [
        "training.seed=7",
        "training.learning_rate=1e-3",
        "training.micro_batch_tokens=256",
        "training.packing=off",
        "training.train_batch_size=8",
        "training.global_batch_size=64",
        "model.dropout=0.1",
        "model.max_length=64",
        "workers.num_workers=2",
    ]
    for override in other:
        assert load(None, [override]).recipe() != load(None).recipe(), override


def test_recipe_with_a_global_batch_is_that_of_any_number_of_workers() -> None:
    fixed = "training.global_batch_size=64"
    one = load(None, [fixed]).recipe()
    for more in (["workers.num_workers=4"], ["workers.num_workers=[1, 8]"], ["training.train_batch_size=16"]):
        assert load(None, [fixed, *more]).recipe() == one


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


# Round trips


def again(config: TrainConfig) -> TrainConfig:
    return parse(yaml.safe_load(config.to_yaml()))


def test_a_resolved_config_means_the_same() -> None:
    odd = [
        "run.name=1e3",
        "data.dataset='a: b # c'",
        "data.labels=['on', 'null', '1', ' spaced ', grün, 'yes']",
        "training.packing=off",
        "training.compact_vocabulary=on",
        "training.adam_epsilon=1e-12",
        "workers.num_workers=[1, 4]",
        "training.global_batch_size=64",
    ]
    for config in (load(None), load(None, odd)):
        assert again(config) == config
        assert parse(config.model_dump(mode="json")) == config
        assert again(config).recipe() == config.recipe()


def bounds(field: Any) -> list[Any]:
    """The limits of a numeric key, inside unions too."""
    inner = [limit for part in get_args(field.annotation) for limit in getattr(part, "__metadata__", ())]
    flat = [limit for one in [*field.metadata, *inner] for limit in getattr(one, "metadata", [one])]
    return [limit for limit in flat if isinstance(limit, (Ge, Gt, Le, Lt))]


def numeric_keys() -> dict[str, tuple[type, list[Any]]]:
    """Dotted key -> int or float, and its limits."""
    found: dict[str, tuple[type, list[Any]]] = {}
    for name, section in SECTIONS.items():
        for key, kind in section.__annotations__.items():
            if kind.startswith("PositiveInt"):
                found[f"{name}.{key}"] = int, [Ge(1)]
            elif kind.startswith("Fraction"):
                found[f"{name}.{key}"] = float, [Ge(0), Lt(1)]
            elif "Number" in kind:
                found[f"{name}.{key}"] = (
                    int if kind.startswith("Annotated[int") else float,
                    bounds(section.model_fields[key]),
                )
    return found


NUMERIC = numeric_keys()


def values(key: str) -> st.SearchStrategy[Any]:
    kind, limits = NUMERIC[key]
    low = max(limit.ge if isinstance(limit, Ge) else limit.gt for limit in limits if isinstance(limit, (Ge, Gt)))
    high = min(
        (limit.le if isinstance(limit, Le) else limit.lt for limit in limits if isinstance(limit, (Le, Lt))),
        default=10**6,
    )
    if kind is int:
        return st.integers(low + any(isinstance(x, Gt) for x in limits), high - any(isinstance(x, Lt) for x in limits))
    return st.floats(
        low,
        high,
        exclude_min=any(isinstance(limit, Gt) for limit in limits),
        exclude_max=any(isinstance(limit, Lt) for limit in limits),
    )


def test_the_numeric_keys_are_found() -> None:
    assert {"training.learning_rate", "training.seed", "model.max_length", "workers.num_workers"} <= NUMERIC.keys()
    assert NUMERIC["training.learning_rate"] == (float, [Gt(0), Le(1)]) and len(NUMERIC) >= 25


@settings(max_examples=200, deadline=None)
@given(data=st.data(), key=st.sampled_from(sorted(NUMERIC)))
def test_any_valid_number_round_trips(data: st.DataObject, key: str) -> None:
    value = data.draw(values(key), label=key)
    spelling = data.draw(st.sampled_from([repr(value), f"{value:g}" if isinstance(value, int) else f"{value:.17e}"]))
    if isinstance(value, int):
        spelling = str(value)
    section, name = key.split(".")
    config = load(None, [f"{key}={spelling}"])
    found = getattr(getattr(config, section), name)
    assert found == value and math.copysign(1, found) == math.copysign(1, value)
    assert again(config) == config


@settings(max_examples=60, deadline=None)
@given(data=st.data(), key=st.sampled_from(sorted(NUMERIC)))
def test_numbers_below_the_limit_are_refused(data: st.DataObject, key: str) -> None:
    value = data.draw(st.one_of(st.integers(-(10**9), -1), st.floats(-1e9, -1e-9)))
    (problem,) = problems(f"{key}={value!r}")
    assert problem.startswith((f"{key}: is {value!r}, but ", f"{key}: is '{value!r}', but "))


# The configs that ship


@pytest.mark.parametrize("name", ["emotion.yaml", "quickstart.yaml"])
def test_configs_that_ship_are_valid(name: str) -> None:
    load(CONFIGS / name)


def test_emotion_is_the_documented_recipe() -> None:
    config = load(CONFIGS / "emotion.yaml")
    documented = yaml.safe_load(DOCUMENTED)
    documented["training"]["adam_epsilon"] = 1e-8
    for section, keys in documented.items():
        found = getattr(config, section).model_dump()
        assert {key: found[key] for key in keys} == keys
    assert yaml.safe_load((CONFIGS / "emotion.yaml").read_text(encoding="utf-8")) == yaml.safe_load(DOCUMENTED)
    assert config == TrainConfig(), "the recipe is the default too"


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("training:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ConfigError, match=r"the key 'seed' is there twice.*line 3"):
        load(tmp_path / "c.yaml")
