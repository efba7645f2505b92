"""cluster/: launcher files and the runtime environment by Ray's own checks, and what a job uploads."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).parents[1]
LAUNCHERS = ("aws", "gcp", "on-prem", "local")

Tree = dict[str, Any]


def read(name: str) -> Tree:
    tree: Tree = yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text())
    return tree


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_pass_rays_own_checks(name: str) -> None:
    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_keep_the_house_rules(name: str) -> None:
    tree = read(name)
    (head,) = [command for command in tree["head_start_ray_commands"] if "ray start" in command]
    assert head.startswith("RAY_AUTH_MODE=token ray start --head") and "--dashboard-host=127.0.0.1" in head
    for command in tree["worker_start_ray_commands"]:
        assert command == "ray stop" or command.startswith("RAY_AUTH_MODE=token ray start ")
    if name == "local":
        return
    assert "--num-cpus=0" in head
    assert tree["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    images = re.findall(r"example.com/emoray:\S+", (ROOT / "cluster" / f"{name}.yaml").read_text())
    assert images and all(re.search(r":\d+\.\d+\.\d+-[cg]pu[},]*$", image) for image in images)
    types = tree.get("available_node_types", {})
    assert not types or types["head"]["resources"] == {"CPU": 0}
    for group in (group for name, group in types.items() if name != "head"):
        assert group["min_workers"] == 0 <= group["max_workers"] and group["resources"]["GPU"] == 1
        assert group["docker"]["worker_run_options"] == ["--gpus=all"]
    assert not types or ("gpu-spot" in types and types["gpu"]["max_workers"] > 0)


def _typo(tree: Tree) -> None:
    tree["max_worker"] = tree.pop("max_workers")


def _no_such_head(tree: Tree) -> None:
    tree["head_node_type"] = "haed"


def _more_at_least_than_at_most(tree: Tree) -> None:
    tree["available_node_types"]["gpu"]["min_workers"] = 99


def _container_without_name(tree: Tree) -> None:
    del tree["docker"]["container_name"]


def _text_for_number(tree: Tree) -> None:
    tree["idle_timeout_minutes"] = "ten"


def _resources_of_no_kind(tree: Tree) -> None:
    tree["available_node_types"]["gpu"]["resources"] = ["GPU"]


@pytest.mark.parametrize("name", ["aws", "gcp"])
@pytest.mark.parametrize(
    "breaking",
    [
        _typo,
        _no_such_head,
        _more_at_least_than_at_most,
        _container_without_name,
        _text_for_number,
        _resources_of_no_kind,
    ],
)
def test_broken_launchers_are_refused(name: str, breaking: Callable[[Tree], None]) -> None:
    tree = read(name)
    breaking(tree)
    with pytest.raises(Exception):  # noqa: B017, PT011 of several kinds, Ray's own and those of jsonschema
        validate_config(prepare_config(tree))


def test_the_runtime_environment_is_one() -> None:
    environment = RuntimeEnv(**read("runtime_env"))
    assert environment["config"]["setup_timeout_seconds"] == 1800
    assert int(environment.env_vars()["RAY_JOB_STOP_WAIT_TIME_S"]) > 60, "a stop saves a checkpoint first"


def test_what_a_job_uploads_is_small_and_whole(tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    with zipfile.ZipFile(package) as archive:
        names = set(archive.namelist())
    assert {"emoray/cli.py", "configs/emotion.yaml", "pyproject.toml", "constraints.txt", "README.md"} <= names
    left = ("tests/", "benchmarks/", ".git/", ".venv/", "runs/", "docs/", "k8s/")
    assert [name for name in names if name.startswith(left)] == []
    assert package.stat().st_size < 2_000_000
