"""Imports flow one way, ray is imported under on_ray/ only, web frameworks under http/ and on_ray/ only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "emoray"
# A module imports from its own room and from those above it. A new file must be given its room here.
ROOMS = (
    ("wording", "local_http"),
    ("errors", "signals"),
    ("config", "config_files", "search_space", "tune_config", "storage", "folders", "hub", "console"),
    (
        "data",
        "data_*",
        "tokens",
        "token_cache",
        "packing",
        "packed_*",
        "cuda_graphs",
        "dropout",
        "metrics",
        "metric_modules",
        "uncertainty",
        "process",
        "world",
        "saving",
        "prediction",
        "stopwatch",
    ),
    ("forward", "vocabulary", "model", "plots", "quickstart", "attribution"),
    ("checkpoint", "run"),
    ("task", "engines", "engines.*"),
    ("learner", "progress", "training", "classifier"),
    ("batch_rows", "batch_input", "batch_format", "batch_output"),
    ("evaluation", "comparison", "label_errors", "report", "model_card"),
    ("finish", "export"),
    ("sweep", "sweep_*"),
    ("doctor", "doctor_*", "monitor", "runs"),
    ("serve_config",),
    ("http", "http.*"),
    ("on_ray", "on_ray.*"),
    ("cli",),
)
WEB = ("fastapi", "starlette", "uvicorn", "aiohttp")
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
)


def file_of(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def room_of(module: str) -> int:
    rooms = [i for i, patterns in enumerate(ROOMS) if any(fnmatch(module, pattern) for pattern in patterns)]
    assert len(rooms) == 1, f"emoray/{module.replace('.', '/')}.py is in {len(rooms)} of the ROOMS, not in one"
    return rooms[0]


def names(node: ast.AST) -> Iterator[str]:
    """Full names of what an import statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "imports name the whole path"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(file_of(module).read_text(encoding="utf-8"))


def imports(module: str, nodes: Iterator[ast.AST] | None = None) -> set[str]:
    """Modules of this package that a module imports, by their names below it."""
    found = set()
    for node in nodes or ast.walk(tree_of(module)):
        for name in names(node):
            if name.startswith("emoray."):
                parts = name.split(".")[1:]
                candidates = [".".join(parts), ".".join(parts[:-1])]
                found |= set([known for known in candidates if known in MODULES][:1])
    return found - {module}


@pytest.mark.parametrize("module", MODULES)
def test_imports_flow_one_way(module: str) -> None:
    for other in sorted(imports(module)):
        assert room_of(other) <= room_of(module), f"{module} imports {other}, which is in a later room"


def test_no_two_modules_need_each_other() -> None:
    """Among what is imported when a module is: what a function imports when it runs may lead back."""
    graph = {module: imports(module, iter(tree_of(module).body)) for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_ray_and_the_web_are_imported_in_their_rooms_only(module: str) -> None:
    for node in ast.walk(tree_of(module)):
        for name in names(node):
            library = name.split(".")[0]
            assert library != "ray" or module.split(".")[0] == "on_ray", f"{module} imports {name}"
            assert library not in WEB or module.split(".")[0] in ("http", "on_ray"), f"{module} imports {name}"


def test_lower_modules_load_without_ray() -> None:
    """In one fresh process: everything but on_ray, the command line included."""
    lower = [f"emoray.{module}" for module in MODULES if not module.startswith("on_ray")]
    code = (
        "import sys, importlib\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'ray' not in sys.modules, f'{name} loads ray'\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *lower], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module",
    ["errors", "config", "storage", "run", "checkpoint", "data", "tokens", "hub", "on_ray.channel"],
)
def test_light_modules_import_neither_torch_nor_transformers(module: str) -> None:
    """What checks input answers before the heavy libraries would be loaded: nothing at the top of these files."""
    seen: set[str] = set()
    todo = {module}
    while todo:
        current = todo.pop()
        seen.add(current)
        body = tree_of(current).body
        libraries = {name.split(".")[0] for node in body for name in names(node)}
        assert not libraries & {"torch", "transformers", "datasets", "evaluate", "matplotlib"}, current
        todo |= imports(current, iter(body)) - seen
