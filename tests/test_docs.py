"""The documentation is true: its tree names every file, its links lead somewhere, its commands and keys exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel
from typer.main import get_command

from emoray.cli import app
from emoray.config import TrainConfig
from emoray.serve_config import ServeConfig
from emoray.tune_config import TuneConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```[a-z]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path.relative_to(ROOT)} does not say what it is"
    return docstring.splitlines()[0].removesuffix(".")


def test_the_tree_has_every_file_with_its_sentence() -> None:
    lines = {line.strip().split(maxsplit=1)[0]: line for line in README.splitlines() if line.startswith("  ")}
    for path in sorted((ROOT / "emoray").rglob("*.py")):
        if path.name == "__init__.py" or path.parent.name == "routes":
            continue
        sentence = first_sentence(path)
        assert any(line.strip().startswith(path.name + " ") and sentence in line for line in README.splitlines()), (
            f"README's tree lacks: {path.name} {sentence}"
        )
    for name in [name for name in lines if re.fullmatch(r"[a-z_0-9]+\.py", name)]:
        assert list((ROOT / "emoray").rglob(name)), f"README's tree has {name}, which is gone"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:|#", target):
            assert (document.parent / target.partition("#")[0]).exists(), target


def commands() -> Iterator[list[str]]:
    """Every `emoray ...` in the documentation, as words: in blocks a line, in running text what is between ticks."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        if document.name == "decisions.md":
            continue  # history: what it names may be gone
        text = text.replace("\\\n", " ")
        blocks = [line.partition(" #")[0] for block in FENCED.findall(text) for line in block.splitlines()]
        quoted = re.findall(r"`(emoray [^`]+)`", FENCED.sub("", text))
        for line in [*blocks, *quoted]:
            if re.match(r"emoray [a-z]", line) and "..." not in line.split()[1]:
                yield shlex.split(line.replace("\n", " "))


KNOWN: dict[str, click.Command] = get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_commands_and_their_options_exist(words: list[str]) -> None:
    name = words[1]
    assert name in KNOWN, f"no command {name}"
    options = {option for parameter in KNOWN[name].params for option in parameter.opts}
    for word in words[2:]:
        if word == "--":
            break  # what follows is another command's
        if word.startswith("--"):
            assert word.partition("=")[0] in options, f"emoray {name} has no {word}"


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        inner: Any = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys(inner, f"{prefix}{name}.")


def test_config_keys_exist() -> None:
    known = {key for model in (TrainConfig, ServeConfig, TuneConfig) for key in keys(model)}
    sections = {key.partition(".")[0] for key in known if "." in key}
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS if path.name != "decisions.md")
    named = {key for key in re.findall(r"`([a-z]+\.[a-z_.]+)(?:=[^`]*)?`", text) if key.partition(".")[0] in sections}
    files = {path.name for path in ROOT.rglob("*.*") if ".venv" not in path.parts}
    assert named - files - known == set()
    assert len(named) > 20


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets
