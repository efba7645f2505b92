"""`emoray doctor`: faults set up on purpose are found, each with its remedy; on a sound machine nothing is."""

from __future__ import annotations

import io
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from tiny import Emoray, write_rows

from emoray import doctor, doctor_machine, doctor_memory, doctor_step, hub
from emoray.doctor_findings import GIB, Finding
from emoray.on_ray import doctor as ray_doctor

Usage = namedtuple("Usage", "total used free")
Look = Callable[..., Finding]


@pytest.fixture(autouse=True)
def sound(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What depends on who else uses this machine is set to a sound one; each test then breaks one thing."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 50 * GIB, 50 * GIB))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1048576))
    monkeypatch.setattr(doctor_machine, "CGROUP", Path("/nonexistent"))
    monkeypatch.setattr(doctor_machine, "_is_free", lambda _: True)
    monkeypatch.setattr(ray_doctor, "get_num_cpus", lambda: 4)
    monkeypatch.setattr(ray_doctor, "free_memory", lambda: (16 * GIB, 16 * GIB))
    with tempfile.TemporaryDirectory(prefix="ed-", dir="/tmp") as short:  # sockets lie below, and their names are short
        monkeypatch.setenv("RAY_TMPDIR", short)
        yield


@pytest.fixture
def look(tiny_overrides: list[str], tmp_path: Path) -> Look:
    """Runs a check, with those it builds on, on the tiny config with some overrides; gives the one finding."""

    def run(check: str, *overrides: str, name: str | None = None) -> Finding:
        base = [*tiny_overrides, f"run.storage_path={tmp_path / 'runs'}"]
        wanted = ["config", "cluster", "data", "encoder", "workers", check]
        findings = doctor.examine(None, [*base, *overrides], checks=wanted)
        (found,) = [finding for finding in findings if finding.name == (name or check)]
        return found

    return run


def bare(check: str, name: str | None = None) -> Finding:
    """The finding of a check without a config."""
    (found,) = [f for f in doctor.examine(checks=[check]) if f.name == (name or check)]
    return found


def is_found(finding: Finding, status: str, *words: str, remedy: str) -> None:
    assert finding.status == status, finding
    for word in words:
        assert word in finding.found, finding
    assert remedy in finding.remedy, finding


def test_nothing_on_a_sound_machine(monkeypatch: pytest.MonkeyPatch, tiny_overrides: list[str], tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_step, "STEP_LIMIT_S", 300)  # a busy machine is none of the faults
    fitting = "model.max_length=64"  # the tiny config's 32 cuts some texts
    findings = doctor.examine(None, [*tiny_overrides, f"run.storage_path={tmp_path / 'runs'}", fitting])
    assert [f for f in findings if f.status != "ok"] == []
    assert not any(f.remedy for f in findings)
    assert {"one step", "memory fits", "data", "workers", "run", "cluster"} <= {f.name for f in findings}
    assert not (tmp_path / "runs").exists()


def test_without_a_config_only_the_machine_is_looked_at() -> None:
    findings = doctor.examine()
    assert [f for f in findings if f.status != "ok"] == []
    assert not {"config", "data", "encoder", "one step"} & {f.name for f in findings}


def _versions(monkeypatch: pytest.MonkeyPatch, **fake: str) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: fake.get(name) or real(name))


def test_library_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    _versions(monkeypatch, transformers="4.57.0")
    is_found(bare("libraries"), "problem", "transformers is 4.57.0", remedy="pip install 'transformers")


def test_library_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "evaluate":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    is_found(bare("libraries"), "problem", "evaluate is not installed", remedy="pip install 'evaluate")


def test_library_other_than_tested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lock = tmp_path / "constraints.txt"
    lock.write_text("rich==13.0.1  # a comment\n")
    monkeypatch.setattr(doctor_machine, "LOCK", lock)
    is_found(bare("libraries"), "warning", "(tested: 13.0.1)", remedy="-c constraints.txt")


def test_python_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.18")
    is_found(bare("Python"), "problem", "3.9.18", ">=3.10", remedy="another")


def test_cuda_build_without_driver(monkeypatch: pytest.MonkeyPatch, look: Look) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(doctor_machine, "cuda_driver", lambda: None)
    is_found(bare("torch build"), "warning", "12.8", "no NVIDIA driver", remedy="install the driver")
    is_found(look("torch build", "workers.use_gpu=true"), "problem", "no NVIDIA driver", remedy="install the driver")


def test_driver_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(doctor_machine, "cuda_driver", lambda: (11, 4))
    is_found(bare("torch build"), "problem", "12.8", "11.4", remedy="update the NVIDIA driver")


def test_gpu_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(doctor_machine, "cuda_driver", lambda: (12, 8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    is_found(bare("torch build"), "warning", "can't use a GPU", remedy="CUDA_VISIBLE_DEVICES")


def test_cpu_build_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(doctor_machine, "cuda_driver", lambda: (12, 8))
    is_found(bare("torch build"), "warning", "CPUs only", remedy="install a CUDA build")


@pytest.mark.parametrize(
    ("major", "free", "status", "word", "remedy"),
    [
        (9, 70, "ok", "bf16", ""),
        (9, 8, "warning", "8.0 GiB of 80.0 GiB", "end what else"),
        (7, 70, "warning", "no bf16", "fp32"),
        (6, 70, "problem", "kernels for", "sm_60"),
    ],
)
def test_gpu(monkeypatch: pytest.MonkeyPatch, major: int, free: int, status: str, word: str, remedy: str) -> None:
    """Not sound where busy, without bf16, or of an architecture that this torch has no kernels for."""
    facts = SimpleNamespace(name="Some GPU", major=major, minor=0)
    fakes: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda _: facts,
        "mem_get_info": lambda _: (free * GIB, 80 * GIB),
        "get_arch_list": lambda: ["sm_70", "sm_80", "sm_90"],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    is_found(bare("GPUs", name="GPU 0"), status, word, remedy=remedy)
    is_found(bare("GPUs", name="NCCL"), "warning", "has none", remedy="install")


def test_cpu_without_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    is_found(bare("CPUs"), "warning", "no AVX2", remedy="ATEN_CPU_CAPABILITY")


@pytest.mark.parametrize(
    "files",
    [
        {"cpu.max": "150000 100000\n"},
        {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"},
    ],
)
def test_container_with_few_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str]) -> None:
    _cgroup(monkeypatch, tmp_path, files)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    is_found(bare("CPUs", name="CPU limit"), "warning", "1.5 of 64", remedy="cpus_per_worker")


def _cgroup(monkeypatch: pytest.MonkeyPatch, folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    monkeypatch.setattr(doctor_machine, "CGROUP", folder)


def test_container_with_little_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    most = 2**30
    files = {
        "memory.max": f"{most}\n",
        "memory.current": f"{most // 2}\n",
        "memory.stat": f"anon 1\ninactive_file {most // 4}\n",
    }
    _cgroup(monkeypatch, tmp_path, files)
    assert doctor_machine.free_memory() == (0.75 * most, most)
    is_found(bare("memory"), "warning", "0.8 GiB of 1.0 GiB", remedy="end other programs")


@pytest.mark.parametrize(("limit", "status"), [(256, "problem"), (4096, "warning")])
def test_few_open_files(monkeypatch: pytest.MonkeyPatch, limit: int, status: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    is_found(bare("open files"), status, str(limit), remedy="ulimit")


def test_small_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_machine, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**26, 0, 2**26))  # docker's default
    is_found(bare("shared memory"), "warning", "64 MiB", remedy="--shm-size")


@pytest.mark.parametrize(("free", "status"), [(0.2, "problem"), (3, "warning")])
def test_no_space_for_runs(monkeypatch: pytest.MonkeyPatch, free: float, status: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, free * GIB))
    is_found(bare("disk for runs"), status, "free in", remedy="run.storage_path")


def test_disk_too_full_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000 * GIB, 970 * GIB, 30 * GIB))
    is_found(bare("disk for Ray"), "problem", "97% full", remedy="RAY_TMPDIR")


def test_name_too_long_for_rays_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 60)
    finding = bare("disk for Ray")
    is_found(finding, "problem", "too long", remedy="at most")
    most = int(finding.remedy.split("at most ")[1].split()[0])
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * (most - len("/tmp/")))
    assert bare("disk for Ray").status == "ok"


def test_port_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        monkeypatch.setattr(doctor_machine, "PORTS", ((port, "/", "the service", "take another"),))
        is_found(bare("ports", name=f"port {port}"), "warning", "taken", remedy="take another")


def test_storage_that_cannot_be_written(look: Look, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = look("storage", f"run.storage_path={tmp_path / 'file' / 'runs'}")
    is_found(finding, "problem", "is not a folder", remedy="run.storage_path")
    finding = look("storage", "run.storage_path=nonsense://bucket")
    is_found(finding, "problem", "nonsense://bucket", remedy="run.storage_path")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which not even root can write")
def test_storage_that_even_root_cannot_write(look: Look) -> None:
    is_found(look("storage", "run.storage_path=/proc/runs"), "problem", "/proc", remedy="run.storage_path")


def test_damaged_token_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMORAY_CACHE", str(tmp_path))
    entry = tmp_path / "tokens" / "0123abcd"
    entry.mkdir(parents=True)
    (entry / "ids.npy").write_bytes(b"\x93NUMPY cut off")
    is_found(bare("token cache"), "warning", "1 damaged", "0123abcd", remedy="delete")
    monkeypatch.setenv("EMORAY_CACHE", str(entry / "ids.npy"))
    is_found(bare("token cache"), "warning", "can't be written", remedy="EMORAY_CACHE")


@pytest.mark.parametrize(
    ("mode", "status", "word", "remedy"),
    [("tokn", "problem", "tokn", "set it to token"), ("disabled", "warning", "run code", "RAY_AUTH_MODE=token")],
)
def test_ray_auth_mode(monkeypatch: pytest.MonkeyPatch, mode: str, status: str, word: str, remedy: str) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    is_found(bare("Ray auth"), status, word, remedy=remedy)


def test_ray_token_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = SimpleNamespace(instance=lambda: SimpleNamespace(has_token=lambda ignore_auth_mode: False))
    monkeypatch.setattr(ray_doctor, "AuthenticationTokenLoader", loader)
    assert bare("Ray auth").status == "ok"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    is_found(bare("Ray auth"), "problem", "no", "127.0.0.1:6379", remedy="RAY_AUTH_TOKEN")


def test_ray_token_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a process of its own: Ray remembers the first token that it finds."""
    program = "from emoray import doctor; print(doctor.as_json(doctor.examine(checks=['Ray auth'])))"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nothing"))
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    (finding,) = json.loads(answer.stdout)["findings"]
    is_found(Finding(**finding), "problem", "can't be read", remedy="RAY_AUTH_TOKEN_PATH")


def test_ray_address_to_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{_free_port()}")
    is_found(bare("cluster"), "problem", "no connection", remedy="RAY_ADDRESS=local")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_ray_address_of_another_kind(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    is_found(bare("cluster"), "problem", address, remedy="host:6379")


def test_ray_address_of_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_doctor, "_GCS_S", 0.5)
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))  # Ray takes 127.0.0.1 for the address that others see
        holder.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{holder.getsockname()[1]}")
        is_found(bare("cluster"), "problem", "not as a Ray", "no answer within", remedy="check the port")


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({"ray_version": "2.51.0", "python_version": platform.python_version()}, ["Ray is 2.51.0 there"]),
        ({"ray_version": ray.__version__, "python_version": "3.10.2"}, ["Python is 3.10.2 there"]),
    ],
)
def test_other_versions_on_the_cluster(
    monkeypatch: pytest.MonkeyPatch, there: dict[str, str], words: list[str]
) -> None:
    monkeypatch.setattr(ray_doctor, "_unreachable", lambda _: None)
    monkeypatch.setattr(ray_doctor, "GcsClient", lambda address: None)
    monkeypatch.setattr(ray_doctor.usage_lib, "get_cluster_metadata", lambda _: there)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    is_found(bare("cluster"), "problem", *words, remedy="same versions on all nodes")


def test_config_with_a_typo(look: Look) -> None:
    finding = look("config", "training.learning_rat=1e-3", "training.num_epochs=none")
    is_found(finding, "problem", "did you mean 'learning_rate'", "training.num_epochs", remedy="correct these keys")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, look: Look, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "_answers", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    named = "model.pretrained=nobody/no-encoder", "data.dataset=nobody/no-data"
    is_found(look("Hub", *named), "problem", "out of reach", *named, remedy="HF_HOME")
    (tmp_path / "models--nobody--no-encoder").mkdir()
    finding = look("Hub", *named)
    is_found(finding, "problem", named[1], remedy="HF_HOME")
    assert named[0] not in finding.found
    is_found(look("Hub", named[0]), "warning", "cached copies", remedy="HF_HUB_OFFLINE=1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert look("Hub", named[0]).status == "ok"
    is_found(look("Hub", *named), "problem", "HF_HUB_OFFLINE", named[1], remedy="HF_HOME")


def test_missing_column(look: Look) -> None:
    finding = look("data", "data.text_column=sentence")
    is_found(finding, "problem", "sentence", remedy="data.dataset and its columns")


def test_doubtful_data(look: Look, tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)]
    write_rows(tmp_path / "data" / "train.jsonl", [*rows, {"text": "text 0", "label": "b"}])
    is_found(look("data", f"data.dataset={tmp_path / 'data'}"), "warning", "contradicting labels", remedy="rows")


def test_model_folder_without_tokenizer(look: Look, tiny_encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    folder.mkdir()
    shutil.copy(tiny_encoder / "config.json", folder)
    is_found(look("encoder", f"model.pretrained={folder}"), "problem", "tokenizer", remedy="whole folder")
    (folder / "config.json").write_text('{"model_type": "be')
    is_found(look("encoder", f"model.pretrained={folder}"), "problem", "config", remedy="whole folder")


def test_texts_longer_than_max_length(look: Look) -> None:
    is_found(look("encoder", "model.max_length=6"), "warning", "get cut", remedy="raise model.max_length")


def test_max_length_over_positions(look: Look) -> None:
    is_found(look("encoder", "model.max_length=128"), "problem", "64 positions", remedy="model.max_length")


def test_run_of_another_recipe(look: Look, trained_run: Path) -> None:
    same = f"run.storage_path={trained_run.parent}", f"run.name={trained_run.name}"
    assert look("run", *same).status == "ok"
    is_found(look("run", *same, "training.seed=7"), "problem", "training.seed was 42", remedy="another run.name")
    is_found(look("run", *same, "run.on_existing=fail"), "problem", "exists", remedy="another run.name")


def test_too_many_workers(look: Look) -> None:
    finding = look("workers", "workers.num_workers=5")
    is_found(finding, "problem", "5 x (1 CPU, 0 GPU)", "room for 4", remedy="lower workers.num_workers")
    finding = look("workers", "workers.num_workers=5", "workers.wait_for_nodes_s=60")
    is_found(finding, "warning", "room for 4", remedy="autoscaler")


def test_gpu_asked_for_but_none(look: Look) -> None:
    is_found(look("workers", "workers.use_gpu=true"), "problem", "1 GPU", remedy="workers.use_gpu=false")


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, look: Look) -> None:
    monkeypatch.setattr(ray_doctor, "free_memory", lambda: (1.2 * GIB, 16 * GIB))
    finding = look("memory fits", "workers.num_workers=3")
    is_found(finding, "problem", "room for 2 workers, asked for 3", remedy="lower training.micro_batch_tokens")


def test_no_space_for_checkpoints(monkeypatch: pytest.MonkeyPatch, look: Look) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(GIB, 0, 2**20))
    is_found(look("memory fits", name="disk fits"), "problem", "1 MiB are free", remedy="training.keep_checkpoints")


def test_memory_needed_is_that_of_the_tensors(tiny_overrides: list[str]) -> None:
    """Weights, gradients and moments as a learner really holds them after a step."""
    from emoray import config as cfg
    from emoray import model
    from emoray.learner import Learner
    from emoray.task import prepare
    from emoray.world import World

    config = cfg.load(None, tiny_overrides)
    task = prepare(config)
    need = doctor_memory.memory_needed(task, 1)
    learner = Learner(task, model.load(config.model, task.labels, 42).state_dict(), World())
    parameters = 4 * sum(parameter.numel() for parameter in learner.model.parameters())
    learner.step(0)
    moments = sum(t.nbytes for name, t in learner.tensors().items() if name.startswith("exp_avg"))
    assert (need.weights, need.gradients, need.moments) == (parameters, parameters, moments)


@pytest.mark.usefixtures("torch_settings")
def test_broken_weights(monkeypatch: pytest.MonkeyPatch, look: Look, tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    (folder / "model.safetensors").write_bytes(b"no weights")
    monkeypatch.setattr(doctor_step, "run_step", doctor_step.step)  # in this process: another takes seconds
    finding = look("one step", f"model.pretrained={folder}", "model.from_scratch=false")
    is_found(finding, "problem", "weights can't be loaded", remedy="whole folder")


@pytest.mark.parametrize(
    ("answer", "status", "word", "remedy"),
    [
        ({"returncode": -9, "stdout": b"", "stderr": b""}, "problem", "killed", "lower training.micro_batch_tokens"),
        ({"returncode": 1, "stdout": b"", "stderr": b"x\nOops: 1\n"}, "problem", "Oops: 1", "report"),
        (
            {"stdout": b'noise\n{"loss": NaN, "seconds": 1, "tokens": 9, "memory": 1, "device": "CPU"}'},
            "problem",
            "nan",
            "precision=fp32",
        ),
        (None, "warning", "not done after", "takes long"),
    ],
)
def test_step_that_fails(
    monkeypatch: pytest.MonkeyPatch, look: Look, answer: dict[str, Any] | None, status: str, word: str, remedy: str
) -> None:
    """Killed, ended, not finite, too slow."""

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        if answer is None:
            raise subprocess.TimeoutExpired(command, 60)
        return SimpleNamespace(**answer)

    monkeypatch.setattr(subprocess, "run", run)
    is_found(look("one step"), status, word, remedy=remedy)


def test_a_check_that_fails_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> Iterator[Finding]:
        yield Finding("memory", "ok", "so far")
        raise KeyError("MemAvailable")

    monkeypatch.setattr(doctor_machine, "memory", fails)
    first, second = doctor.examine(checks=["memory"])
    assert first.status == "ok"
    is_found(second, "problem", "this check itself failed", "KeyError", remedy="report")


def test_a_library_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "emoray.on_ray.doctor", None)
    is_found(bare("Ray auth"), "problem", "can't be loaded", remedy="install emoray anew")


def test_command(emoray: Emoray, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {name: doctor.CHECKS[name] for name in ("Python", "disk for runs")}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    sound = emoray("doctor")
    assert sound.status == 0 and "All is well." in sound.out
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(GIB, GIB, 0))
    full = emoray("doctor", "--json")
    assert full.status == 1
    answer = json.loads(full.out)
    assert answer["status"] == "problem"
    assert [finding["status"] for finding in answer["findings"]] == ["ok", "problem"]
    assert "1 problem" in emoray("doctor").out


def test_overrides_alone_are_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = doctor.examine("training.sed=1", checks=["config"])
    is_found(finding, "problem", "did you mean 'seed'", remedy="correct")


def test_table_on_a_terminal() -> None:
    from rich.console import Console

    console = Console(force_terminal=True, width=100, record=True, color_system=None, file=io.StringIO())
    doctor.show([Finding("ports", "warning", "8265 [taken]", "end it"), Finding("config", "ok", "fine")], console)
    text = console.export_text()
    assert "8265 [taken]" in text and "Remedy" in text and "1 warning" in text
