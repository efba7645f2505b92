"""Any kind of config file as one frozen, checked section: defaults < YAML file < dotted overrides.

Every problem is told at once, with its dotted path, the value, the rule and the nearest valid name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from emoray.errors import ConfigError
from emoray.wording import closest, listing, nearest


def _refuse_bool(value: object) -> object:
    """YAML's `yes` and `true` would pass as the number 1 otherwise."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Number = BeforeValidator(_refuse_bool)
PositiveInt = Annotated[int, Number, Field(ge=1)]
# YAML reads a bare `on` as true and `off` as false.
Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda value: ("on" if value else "off") if isinstance(value, bool) else value),
]
Fraction = Annotated[float, Number, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A frozen part of a config that refuses keys it doesn't know."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


C = TypeVar("C", bound=Section)


def load_as(schema: type[C], path: str | Path | None, overrides: Iterable[str] = ()) -> C:
    """A whole config of one kind.

    Args:
        path: the YAML file; None starts from the defaults.
        overrides: `key.path=value`, later ones win; values are YAML: `3e-5`, `[1, 4]` are what they are there.

    Raises:
        ConfigError: with every problem found.
    """
    overrides, subject = list(overrides), "config" if path is None else str(path)
    tree = {} if path is None else read_yaml(path)
    problems = override_tree(tree, overrides)
    try:
        return validate(tree, schema, subject, problems)
    except ConfigError as error:
        raise blame(subject, overrides, error.problems) from None


def override(config: C, overrides: Iterable[str], subject: str = "config") -> C:
    """A checked config with `key.path=value` overrides on it.

    Raises:
        ConfigError: with every problem found.
    """
    tree = config.model_dump(mode="json")
    return validate(tree, type(config), subject, override_tree(tree, overrides))


def blame(subject: str, overrides: Sequence[str], problems: list[str]) -> ConfigError:
    """The error of a file with overrides on it, named after what is to be mended: the file, the overrides, or both."""
    beginnings: list[str] = []
    for text in overrides:
        key = text.partition("=")[0].strip()
        section, _, name = key.partition(".")
        beginnings += [f"'{text}'", f"{key}:", f"{key}.", f"{section}: {name}", f"{section}: unknown"]
    theirs = [problem for problem in problems if problem.startswith(tuple(beginnings))]
    if theirs:
        subject = "overrides" if len(theirs) == len(problems) else f"{subject} and overrides"
    return ConfigError(subject, problems)


class _NoKeyTwice(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word, although YAML 1.2 forbids them (3.2.1.3)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The tree that a config file holds, unchecked.

    Raises:
        ConfigError: it can't be read, or is not YAML with sections.
    """
    if Path(path).is_dir() or Path(path).suffix in (".csv", ".tsv", ".jsonl", ".parquet", ".txt"):
        remedy = f"give one, e.g. configs/emotion.yaml; data goes into an override, data.dataset={path}"
        raise ConfigError(str(path), [f"is no config, but data or a folder: {remedy}"])
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(p.name for p in Path(path).parent.glob("*.y*ml")) if Path(path).parent.is_dir() else []
        raise ConfigError(str(path), [f"no such file{nearest(Path(path).name, beside)}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"can't be read as UTF-8 text: {error}"]) from None
    try:
        tree = yaml.load(text, _NoKeyTwice)
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [f"not valid YAML: {' '.join(str(error).split())}"]) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(str(path), [f"holds a {type(tree).__name__}, but must hold sections such as 'training:'"])
    return tree


def override_tree(tree: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Set `key.path=value` overrides in a tree; returns what is wrong with them."""
    return [problem for text in overrides if (problem := _apply(tree, text))]


def _apply(tree: dict[str, Any], override: str) -> str | None:
    """Set one dotted key in the tree; returns the problem, if any."""
    key, equals, value = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        return (
            f"'{override}' is not an override: write section.key=value without spaces, e.g. training.learning_rate=3e-5"
        )
    *parents, leaf = key.strip().split(".")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return f"{key}: the value '{value}' is not valid YAML: quote it"
    for parent in parents:
        child = tree.setdefault(parent, {})
        if child is None:
            child = tree[parent] = {}
        if not isinstance(child, dict):
            return f"{key}: '{parent}' holds {child!r}, not a section"
        tree = child
    tree[leaf] = parsed
    return None


def validate(tree: dict[str, Any], schema: type[C], subject: str, problems: list[str]) -> C:
    """A tree as a checked config.

    Args:
        problems: what was found before; told together with what is found now.

    Raises:
        ConfigError: with every problem.
    """
    # An empty section in YAML is null; it means the defaults.
    tree = {k: ({} if v is None and _is_section(schema, k) else v) for k, v in tree.items()}
    try:
        config = schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(subject, problems + _sentences(error, schema)) from None
    if problems:
        raise ConfigError(subject, problems)
    return config


def _is_section(schema: type[BaseModel], key: str) -> bool:
    field = schema.model_fields.get(key)
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _sentences(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """Pydantic's findings as sentences, one a dotted key (alternatives of a union are joined)."""
    found: dict[str, list[str]] = {}
    for item in error.errors():
        path, owner = _locate(item["loc"], schema)
        if item["type"] in ("extra_forbidden", "invalid_key"):
            kind = "section" if owner is schema else "key"
            names = f"; there are {listing(list(owner.model_fields), 50)}"
            sentence = f"unknown {kind}{_suggest(path, owner, schema) or names}"
        elif not path:
            sentence = str(item["msg"]).removeprefix("Value error, ")
        else:
            rule = _RULES.get(item["type"]) or re.sub("^(Value error, |Input |String )", "", str(item["msg"]))
            value = "null" if item["input"] is None else repr(item["input"])
            sentence = rule if isinstance(item["input"], (dict, Section)) else f"is {value}, but {rule}"
        found.setdefault(path, [])
        if sentence not in found[path]:
            found[path].append(sentence)
    return [f"{path}: {_join(sentences)}" if path else _join(sentences) for path, sentences in found.items()]


# Where pydantic's own words speak of Python or of patterns.
_RULES = {
    "model_type": "must be a section of 'key: value' lines",
    "string_pattern_mismatch": "must be letters, digits, '.', '-' and '_' (1 to 100, the first a letter or digit)",
    "tuple_type": "must be a list",
    "too_long": "holds too many",
    "dict_type": "must be a section of 'key: value' lines",
    "string_type": "must be text",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
}


def _join(sentences: Sequence[str]) -> str:
    first, *rest = sentences
    return first + "".join(f", or {sentence.split(', but ')[-1]}" for sentence in rest)


def _locate(loc: tuple[int | str, ...], schema: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """Dotted path of a pydantic location and the section it is in, without the names of union branches."""
    owner, path = schema, []
    for part in loc:
        path.append(str(part))
        field = owner.model_fields.get(str(part))
        if field is None:
            break
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            owner = field.annotation
            continue
        break
    return ".".join(path), owner


def _suggest(path: str, owner: type[BaseModel], schema: type[BaseModel]) -> str:
    """A key of this very name in another section, else the nearest one in the same section, else in the others."""
    name, elsewhere = path.rsplit(".", 1)[-1], {}
    for section in filter(lambda key: _is_section(schema, key), schema.model_fields):
        other: Any = schema.model_fields[section].annotation
        if other is not owner:
            elsewhere.update({key: f"{section}.{key}" for key in other.model_fields})
    if name not in elsewhere and (here := nearest(name, owner.model_fields)):
        return here
    there = closest(name, elsewhere)
    return f" (did you mean '{elsewhere[there]}'?)" if there else ""


def plain(value: Any) -> str:
    """A value as a config file has it, on one line, with all its digits."""
    if isinstance(value, str):
        return value
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).removesuffix("...\n").strip()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
