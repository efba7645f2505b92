"""`emoray doctor` on the machine: Python, libraries, torch, GPUs, CPUs, memory, limits, disks and ports.

Every check is small, imports what it needs when it runs, and is the same function for a laptop and for a node.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from emoray import local_http
from emoray.doctor_findings import GIB, Case, Finding, gib, ok, problem, warning
from emoray.folders import ray_temp
from emoray.storage import HALF_DONE, is_uri

CGROUP = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")
LOCK = Path(__file__).parents[1] / "constraints.txt"
"""Versions that the tests run with; a checkout has the file, a wheel doesn't."""

PORTS = (
    (8265, "/api/version", "Ray's dashboard", "end the program that holds it; Ray takes the next free port"),
    (8000, "/-/healthz", "emoray serve", "end the program that holds it, or give emoray serve http.port=8001"),
)
"""(port, page that Ray answers there, who wants it, remedy)"""

_LEAST_FILES, _ENOUGH_FILES = 1024, 8192
"""Open files: a run needs the first (sockets to each worker, shards), Ray advises the second."""

_SOCKET_BYTES = 107
"""Longest name of a Unix socket on Linux (`sun_path`, unix(7)), less the closing zero."""


def python(_: Case) -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    wanted, version = metadata.metadata("emoray")["Requires-Python"], platform.python_version()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        yield ok("Python", version)
    else:
        yield problem("Python", f"{version}, but emoray is tested with {wanted}", "make the environment with another")


def libraries(_: Case) -> Iterator[Finding]:
    """Installed versions against the ranges of pyproject.toml, then against the lock."""
    from packaging.requirements import Requirement

    tested = _tested_versions()
    wrong, other = [], []
    for requirement in map(Requirement, metadata.requires("emoray") or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = ""
        public = version.partition("+")[0]  # without +cpu, +cu130
        if not version or not requirement.specifier.contains(public, prereleases=True):
            wrong.append((requirement, version or "not installed"))
        elif public != tested.get(requirement.name, public):
            other.append(f"{requirement.name} {version} (tested: {tested[requirement.name]})")
    if wrong:
        found = ", ".join(f"{r.name} is {version}, but must be {r.specifier}" for r, version in wrong)
        yield problem("libraries", found, "pip install " + " ".join(f"'{r.name}{r.specifier}'" for r, _ in wrong))
    elif other:
        yield warning("libraries", ", ".join(other), "pip install -c constraints.txt -e . gives the tested versions")
    else:
        names = ("torch", "transformers", "ray")
        yield ok("libraries", ", ".join(f"{name} {metadata.version(name)}" for name in names))


def _tested_versions() -> dict[str, str]:
    if not LOCK.exists():
        return {}
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("#")[0].split(";")[0].strip().partition("==") for line in lines)
    return {name.strip().lower(): version.strip().partition("+")[0] for name, _, version in pairs if version}


def torch_build(case: Case) -> Iterator[Finding]:
    """What torch was built for against the driver. Within a major version of CUDA any driver does (NVIDIA's
    minor version compatibility); an older major one does not."""
    import torch

    name, built = "torch build", torch.version.cuda
    driver = cuda_driver()
    if built is None:
        if driver is not None and torch.version.hip is None:
            remedy = "install a CUDA build of torch (https://pytorch.org/get-started)"
            yield warning(name, f"{torch.__version__} computes on CPUs only, but this machine has a GPU driver", remedy)
        else:
            yield ok(name, f"{torch.__version__}, for {'ROCm' if torch.version.hip else 'CPUs'}")
        return
    wants_gpu = case.config is not None and case.config.workers.use_gpu is True
    if driver is None:
        found = f"built for CUDA {built}, but there is no NVIDIA driver here: it computes on CPUs"
        remedy = "install the driver (in a container: the NVIDIA runtime), or take torch's CPU build if there is no GPU"
        yield (problem if wants_gpu else warning)(name, found, remedy)
    elif driver[0] < int(built.split(".")[0]):
        found = f"built for CUDA {built}, but the driver is one for CUDA {driver[0]}.{driver[1]}"
        yield problem(name, found, "update the NVIDIA driver, or install a torch built for the driver's CUDA")
    elif not torch.cuda.is_available():
        found = f"built for CUDA {built}, driver for CUDA {driver[0]}.{driver[1]}, but torch can't use a GPU"
        remedy = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; a container needs --gpus all"
        yield (problem if wants_gpu else warning)(name, found, remedy)
    else:
        yield ok(name, f"{torch.__version__} for CUDA {built}, driver for CUDA {driver[0]}.{driver[1]}")


def cuda_driver() -> tuple[int, int] | None:
    """The newest CUDA that the driver here can run, e.g. (12, 4); None without a driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def gpus(_: Case) -> Iterator[Finding]:
    """Each GPU's memory, bf16 and kernels; NCCL, over which GPUs exchange gradients."""
    import torch

    if not torch.cuda.is_available():
        yield ok("GPUs", "none: training runs on CPUs")
        return
    for i in range(torch.cuda.device_count()):
        name, facts = f"GPU {i}", torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        bf16 = facts.major >= 8
        found = f"{facts.name}, {gib(free)} of {gib(total)} free, {'bf16' if bf16 else 'no bf16'}"
        # Kernels for one architecture run on later ones of its major version.
        built = [int(match[1]) for arch in torch.cuda.get_arch_list() if (match := re.match(r"sm_(\d+)", arch))]
        own = facts.major * 10 + facts.minor
        if not any(arch // 10 == facts.major and arch <= own for arch in built):
            found += f"; this torch has kernels for {', '.join(torch.cuda.get_arch_list())} only"
            yield problem(name, found, f"install a build of torch with kernels for sm_{own}")
        elif free < total / 2:
            yield warning(name, found, "end what else runs on this GPU (nvidia-smi)")
        elif not bf16:
            yield warning(name, found, "training.precision=auto takes fp32 here, which is slower")
        else:
            yield ok(name, found)
    if torch.distributed.is_nccl_available():
        yield ok("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield warning("NCCL", "this torch has none: one GPU worker at the most", "install a CUDA build for Linux")


def processor(_: Case) -> Iterator[Finding]:
    """Vector instructions, and whether a container may use fewer CPUs than programs see."""
    import torch

    features, count = torch.backends.cpu.get_cpu_capability(), os.cpu_count() or 1
    found = f"{count} CPUs, {features}, {torch.get_num_threads()} threads"
    if platform.machine() in ("x86_64", "AMD64") and not features.startswith("AVX"):
        remedy = "let the virtual machine pass the CPU through (AVX2), and unset ATEN_CPU_CAPABILITY"
        yield warning("CPUs", f"{found}: no AVX2, so training is several times slower", remedy)
    else:
        yield ok("CPUs", found)
    usable = usable_cpus()
    if usable < count:
        remedy = f"set workers.cpus_per_worker (or ray start --num-cpus) to {max(int(usable), 1)}, or raise the limit"
        yield warning("CPU limit", f"this container may use {usable:g} of {count} CPUs", remedy)


def usable_cpus() -> float:
    """CPUs that this process may really use: the fewest of the machine's, its affinity's and its cgroup's."""
    count = float(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        count = min(count, len(os.sched_getaffinity(0)))
    with suppress(OSError, ValueError):  # cgroup v2: "max 100000" or "200000 100000"
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return count if quota == "max" else min(count, int(quota) / int(period))
    with suppress(OSError, ValueError):  # cgroup v1: -1 is no limit
        quota_us = int((CGROUP / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((CGROUP / "cpu/cpu.cfs_period_us").read_text())
        return min(count, quota_us / period_us) if quota_us > 0 else count
    return count


def memory(_: Case) -> Iterator[Finding]:
    free, total = free_memory()
    found = f"{gib(free)} of {gib(total)} free"
    if free < 2 * GIB:
        yield warning("memory", found, "end other programs: Ray and one small worker want about 2 GiB")
    else:
        yield ok("memory", found)


def free_memory() -> tuple[float, float]:
    """(free, total) bytes that this process may use, by the kernel and by its cgroup, whichever has less."""
    free = total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(FileNotFoundError):  # not on Linux
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024.0 for line in lines}
        free, total = sizes["MemAvailable"], sizes["MemTotal"]
    for limit, used, statistics, idle in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # "max", or not there
            most = float(int((CGROUP / limit).read_text()))
            taken = float(int((CGROUP / used).read_text()))
            # Cached files count as used, but go when memory is wanted.
            match = re.search(rf"^{idle} (\d+)", (CGROUP / statistics).read_text(), re.MULTILINE)
            free = min(free, most - taken + (int(match[1]) if match else 0))
            total = min(total, most)
    return max(free, 0.0), total


def open_files(_: Case) -> Iterator[Finding]:
    """Ray raises the soft limit to 65536 by itself, as far as the hard one lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 65536 if hard == resource.RLIM_INFINITY else max(soft, min(hard, 65536))
    remedy = "raise the hard limit: ulimit -Hn 65536, LimitNOFILE= of systemd, or --ulimit nofile= of docker"
    if most < _ENOUGH_FILES:
        kind = problem if most < _LEAST_FILES else warning
        yield kind("open files", f"at most {most} at a time, but Ray wants {_ENOUGH_FILES}", remedy)
    else:
        yield ok("open files", f"{most} at a time")


def shared_memory(_: Case) -> Iterator[Finding]:
    """Ray's object store lies there; what doesn't fit goes through files, many times slower."""
    if not SHARED_MEMORY.is_dir():
        yield ok("shared memory", f"no {SHARED_MEMORY} on this system: Ray's object store uses files")
        return
    usage = shutil.disk_usage(SHARED_MEMORY)
    found = f"{gib(usage.free)} of {gib(usage.total)} free in {SHARED_MEMORY}"
    if usage.free < GIB:
        yield warning("shared memory", found, "docker run --shm-size=4g; in Kubernetes an emptyDir with medium: Memory")
    else:
        yield ok("shared memory", found)


def disks(case: Case) -> Iterator[Finding]:
    """Room where runs are kept. Below a gigabyte not even a small encoder's checkpoints fit."""
    if is_uri(case.storage_path):
        return
    place = existing(Path(case.storage_path))
    free = shutil.disk_usage(place).free
    found = f"{gib(free)} free"
    remedy = "make room, or set run.storage_path to a larger disk"
    if free < 5 * GIB:
        yield (problem if free < GIB else warning)("disk for runs", f"{found} in {place}", remedy)
    else:
        yield ok("disk for runs", found)


def ray_files(_: Case) -> Iterator[Finding]:
    """Ray's temporary folder: writable, room enough, and a name short enough for the sockets in it."""
    folder = Path(ray_temp())
    name, remedy = "disk for Ray", "make room there, or set RAY_TMPDIR to another folder"
    sockets = f"{folder}/ray/session_2000-01-01_00-00-00_000000_1234567/sockets/plasma_store"
    if len(os.fsencode(sockets)) > _SOCKET_BYTES:
        most = _SOCKET_BYTES - len(sockets) + len(str(folder))
        yield problem(name, f"{folder} is too long a name for Ray's sockets", f"RAY_TMPDIR: at most {most} characters")
        return
    place = existing(folder)
    if not os.access(place, os.W_OK | os.X_OK):
        yield problem(name, f"{place} can't be written", "set RAY_TMPDIR to a folder that you may write")
        return
    usage = shutil.disk_usage(place)
    full = 1 - usage.free / usage.total
    found = f"{gib(usage.free)} free in {place}, {full:.0%} full"
    if full > 0.95:  # RAY_local_fs_capacity_threshold
        yield problem(name, f"{found}: Ray stores nothing on disks more than 95% full", remedy)
    elif usage.free < 2 * GIB:
        yield warning(name, found, remedy)
    else:
        yield ok(name, found)


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def ports(case: Case) -> Iterator[Finding]:
    """The dashboard's and the service's, free or held by Ray itself."""
    if case.joined:
        return  # the cluster that is joined has its own already
    for port, page, purpose, remedy in PORTS:
        name = f"port {port}"
        if _is_free(port):
            yield ok(name, f"free for {purpose}")
        elif _answers(port, page):
            yield ok(name, "Ray answers there")
        else:
            yield warning(name, f"taken, but {purpose} wants it", remedy)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: connections that ended a minute ago hold no port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _answers(port: int, page: str) -> bool:
    try:
        with local_http.get(f"http://127.0.0.1:{port}{page}", timeout_s=1) as answer:
            return any(word in answer.read(10_000) for word in (b"ray", b"success"))
    except (OSError, ValueError):
        return False


def token_cache(_: Case) -> Iterator[Finding]:
    """Where tokens are kept, so that the same texts are never tokenised twice."""
    from emoray import token_cache as cache

    folder = cache.folder()
    place = existing(folder)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        found = f"{place} can't be written, so texts are tokenised anew for each run"
        yield warning("token cache", found, "set EMORAY_CACHE to a folder that you may write")
        return
    entries = [entry for entry in sorted(folder.glob("*")) if entry.is_dir() and not entry.name.startswith(HALF_DONE)]
    damaged = [entry.name for entry in entries if cache.read(entry) is None]
    if damaged:
        found = f"{len(damaged)} damaged in {folder}, e.g. {damaged[0]}"
        yield warning("token cache", found, f"delete {folder}: its content is made again")
    else:
        yield ok("token cache", f"{folder} can be written")
