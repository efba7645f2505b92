"""`emoray doctor`: will a run work here? A list of small checks, each with a remedy for what it finds.

    for finding in examine("configs/emotion.yaml"):
        print(finding.status, finding.name, finding.found, finding.remedy)

Nothing is trained and nothing is left behind, but for cached tokens. Without a config it takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib import import_module

from rich.console import Console
from rich.table import Table
from rich.text import Text

from emoray.doctor_findings import Case, Check, Finding, Status, problem
from emoray.errors import EmorayError
from emoray.wording import count

_COLOURS: dict[Status, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def _at(module: str, name: str) -> Check:
    """A check whose module is loaded when it runs: a library that can't be is a finding too."""

    def check(case: Case) -> Iterator[Finding]:
        yield from getattr(import_module(f"emoray.{module}"), name)(case)

    return check


CHECKS: dict[str, Check] = {
    "config": _at("doctor_config", "config"),
    "Python": _at("doctor_machine", "python"),
    "libraries": _at("doctor_machine", "libraries"),
    "torch build": _at("doctor_machine", "torch_build"),
    "GPUs": _at("doctor_machine", "gpus"),
    "CPUs": _at("doctor_machine", "processor"),
    "memory": _at("doctor_machine", "memory"),
    "open files": _at("doctor_machine", "open_files"),
    "shared memory": _at("doctor_machine", "shared_memory"),
    "disk for runs": _at("doctor_machine", "disks"),
    "disk for Ray": _at("doctor_machine", "ray_files"),
    "storage": _at("doctor_config", "storage"),
    "token cache": _at("doctor_machine", "token_cache"),
    "Ray auth": _at("on_ray.doctor", "auth"),
    "cluster": _at("on_ray.doctor", "joined_cluster"),
    "ports": _at("doctor_machine", "ports"),
    "Hub": _at("doctor_config", "the_hub"),
    "data": _at("doctor_config", "dataset"),
    "encoder": _at("doctor_config", "encoder"),
    "run": _at("on_ray.doctor", "run_folder"),
    "workers": _at("on_ray.doctor", "room"),
    "memory fits": _at("doctor_memory", "fits"),
    "one step": _at("doctor_step", "one_step"),
}
"""In this order: later checks build on what earlier ones put into the case."""


def examine(
    path: str | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
    checks: Sequence[str] | None = None,
) -> list[Finding]:
    """Run the checks.

    Args:
        path: a training config; without one, and without overrides, only machine and cluster are looked at.
        overrides: as for every command.
        say: called with the name of each check before it runs.
        checks: names out of CHECKS; None runs all.
    """
    if path is not None and "=" in path and not path.endswith((".yaml", ".yml")):
        overrides, path = [path, *overrides], None  # `emoray doctor workers.num_workers=4`: on top of the defaults
    case, findings = Case(path, list(overrides)), []
    for name, check in CHECKS.items():
        if checks is None or name in checks:
            say(name)
            findings += _outcome(name, check, case)
    return findings


def examine_aloud(path: str | None, overrides: Sequence[str]) -> list[Finding]:
    """As `examine`; a person at a terminal sees which check runs."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return examine(path, overrides)
    with console.status("Looking around") as status:
        return examine(path, overrides, lambda name: status.update(f"Checking: {name}"))


def _outcome(name: str, check: Check, case: Case) -> list[Finding]:
    """A check's findings; one that fails itself is a finding too, never a traceback."""
    findings: list[Finding] = []
    try:
        findings.extend(check(case))
    except ImportError as error:
        findings.append(problem(name, f"a library can't be loaded: {error}", "install emoray anew in an empty venv"))
    except EmorayError as error:
        findings.append(problem(name, str(error), "mend this first; what depends on it was not checked"))
    except Exception as error:
        found = f"this check itself failed: {type(error).__name__}: {error}"
        findings.append(problem(name, found, "report this, please; what depends on it was not checked"))
    return findings


def worst(findings: Sequence[Finding]) -> Status:
    """The gravest status of all."""
    statuses = {finding.status for finding in findings}
    return "problem" if "problem" in statuses else "warning" if "warning" in statuses else "ok"


def as_json(findings: Sequence[Finding]) -> str:
    """One line: `status`, the gravest, and `findings`, each with `name`, `status`, `found` and `remedy`."""
    content = {"status": worst(findings), "findings": [asdict(finding) for finding in findings]}
    return json.dumps(content, ensure_ascii=False)


def show(findings: Sequence[Finding], console: Console | None = None) -> None:
    """A table on a terminal; in a log a line or two a finding, which no width cuts."""
    console = console or Console(highlight=False)
    if console.is_terminal:
        table = Table(expand=True)
        for title, ratio in (("", None), ("Check", None), ("Found", 3), ("Remedy", 2)):
            table.add_column(title, ratio=ratio, overflow="fold")
        for finding in findings:
            status = Text(finding.status, _COLOURS[finding.status])
            table.add_row(status, Text(finding.name), Text(finding.found), Text(finding.remedy))
        console.print(table)
    else:
        for finding in findings:
            lines = [f"{finding.status:<8} {finding.name}: {finding.found}"]
            lines += [f"{'':<8} -> {finding.remedy}"] * bool(finding.remedy)
            console.print("\n".join(lines), markup=False, soft_wrap=True)
    counts = {status: sum(f.status == status for f in findings) for status in ("problem", "warning")}
    told = [count(number, status) for status, number in counts.items() if number]
    console.print(", ".join(told) or "All is well.", markup=False)
