"""`emoray doctor` on Ray: its version and auth, the cluster in reach, what each node can do, room for the workers."""

from __future__ import annotations

import logging
import os
import platform
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import ray
from ray._common.usage import usage_lib
from ray._private import services
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.utils import get_num_cpus
from ray._raylet import AuthenticationTokenLoader, GcsClient  # type: ignore[attr-defined]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from emoray import __version__, run
from emoray.doctor_findings import Case, Finding, ok, problem, warning
from emoray.doctor_machine import free_memory
from emoray.errors import ClusterError, EmorayError, StorageError
from emoray.on_ray import cluster
from emoray.storage import Storage
from emoray.task import with_absolute_paths
from emoray.wording import count, first_line

_CONNECT_S = 3.0
_GCS_S = 6.0
_NODE_S = 20.0
"""How long to wait for a connection, for the cluster's word on itself, for a task on every node; in seconds."""

T = TypeVar("T")


def auth(_: Case) -> Iterator[Finding]:
    """Ray's authentication as this process would use it."""
    mode = os.environ.get("RAY_AUTH_MODE")
    try:
        has_token = AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    except (RuntimeError, ray.exceptions.RayError) as error:
        found = f"the token can't be read: {first_line(error)}"
        yield problem("Ray auth", found, "correct RAY_AUTH_TOKEN_PATH, or make a token: ray get-auth-token --generate")
        return
    if mode not in (None, "token", "disabled"):
        yield problem("Ray auth", f"RAY_AUTH_MODE is '{mode}'", "set it to token or disabled, or unset it")
    elif mode == "disabled":
        found = "RAY_AUTH_MODE=disabled: whoever reaches the cluster's ports can run code on it"
        yield warning("Ray auth", found, "set RAY_AUTH_MODE=token, on all nodes")
    elif mode == "token" and _address_given() and not has_token:
        found = f"a token is wanted for {os.environ['RAY_ADDRESS']}, but there is none here"
        yield problem("Ray auth", found, "set RAY_AUTH_TOKEN, or copy the head's ~/.ray/auth_token here")
    else:
        yield ok("Ray auth", "by token" if has_token else "by token; it is made when Ray first starts here")


def _address_given() -> bool:
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def joined_cluster(case: Case) -> Iterator[Finding]:
    """The cluster that a run would join: in reach, of the same versions, each node able to write the storage."""
    name, given = "cluster", os.environ.get("RAY_ADDRESS", "")
    if given.startswith(("http://", "https://", "ray://")):
        found = f"RAY_ADDRESS={given} is the address for jobs or Ray Client, not of the cluster itself"
        yield problem(name, found, "use it as `ray job submit --address=... -- emoray ...`, or set it to host:6379")
        return
    services.find_gcs_addresses.cache_clear()
    try:
        address = services.canonicalize_bootstrap_address(None)
    except (ValueError, OSError) as error:
        yield problem(name, f"RAY_ADDRESS={given}: {error}", "set RAY_ADDRESS to host:6379, or unset it")
        return
    if address is None:
        case.nodes = [_this_machine()]
        yield ok(name, f"none is joined: each run starts Ray {ray.__version__} on this machine")
        return
    trouble = _unreachable(address) or _other_versions(address)
    if trouble is not None:
        yield trouble
        return
    was_there = ray.is_initialized()
    try:
        cluster.connect()
        case.joined, case.nodes = True, cluster.live_nodes()
        yield ok(name, f"{address}: Ray {ray.__version__}, {count(len(case.nodes), 'node')}, {_total(case.nodes)}")
        yield from _ask_nodes(case.storage_path)
    except ClusterError as error:
        yield problem(name, str(error), "look at `ray status` on the head, and at RAY_AUTH_MODE and its token")
    finally:
        if not was_there:
            cluster.shutdown()


def _this_machine() -> dict[str, float]:
    """Resources that Ray would find here."""
    import torch

    logging.getLogger("ray._private.utils").setLevel(logging.ERROR)
    free = free_memory()[0]
    return {"CPU": float(get_num_cpus()), "GPU": float(torch.cuda.device_count()), "memory": free}


def _total(nodes: list[dict[str, float]]) -> str:
    return ", ".join(f"{sum(node.get(kind, 0) for node in nodes):g} {kind}" for kind in ("CPU", "GPU"))


def _unreachable(address: str) -> Finding | None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except OSError as error:
        where = f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}" if _address_given() else "a cluster started here earlier"
        remedy = "start the cluster (ray start --head) or open its port; RAY_ADDRESS=local starts one for each run"
        return problem("cluster", f"{where}: no connection to {address} ({error.strerror or error})", remedy)
    return None


def _other_versions(address: str) -> Finding | None:
    """Ray joins only where Ray and Python are the same to the last digit."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        there = _within(_GCS_S, lambda: usage_lib.get_cluster_metadata(GcsClient(address=address)))
    except Exception as error:  # whatever it is that listens there
        found = f"{address} answers, but not as a Ray {ray.__version__} that lets us in: {first_line(error)}"
        remedy = "check the port (6379 is the head's), that the Ray there is the same, RAY_AUTH_MODE and its token"
        return problem("cluster", found, remedy)
    wrong = [
        f"{name} is {there[key]} there, {here} here"
        for name, key, here in (
            ("Ray", "ray_version", ray.__version__),
            ("Python", "python_version", platform.python_version()),
        )
        if there[key] != here
    ]
    if not wrong:
        return None
    return problem("cluster", f"{address}: {', '.join(wrong)}", "use the same versions on all nodes, to the last digit")


def _within(seconds: float, function: Callable[[], T]) -> T:
    """The function's value; TimeoutError after so many seconds. The thread is left to itself then."""
    box: list[tuple[T | None, Exception | None]] = []

    def call() -> None:
        try:
            box.append((function(), None))
        except Exception as error:  # handed to the caller
            box.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not box:
        raise TimeoutError(f"no answer within {seconds:g} s")
    value, error = box[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _ask_nodes(location: str) -> Iterator[Finding]:
    """Has each node the same emoray, does it see what the driver writes, and may it write beside it?"""
    storage, probe = Storage(location), f".doctor-{uuid.uuid4().hex}"
    was_there = storage.exists()
    try:
        storage.write(probe, b"")
        answers = _on_every_node(location, probe)
    except StorageError:
        return  # the check of the storage tells
    finally:
        storage.delete(probe)
        if not was_there and storage.local_path is not None and storage.local_path.is_dir():
            storage.local_path.rmdir()
    bad = {node: answer for node, answer in answers.items() if answer}
    for node, answer in bad.items():
        remedy = "set run.storage_path to a place that every node can write, e.g. NFS or s3://"
        if location not in answer:
            remedy = "install the same emoray on every node, or look at `ray status`"
        yield problem(f"node {node}", answer, remedy)
    if not bad:
        yield ok("nodes", f"{location} can be written from {count(len(answers), 'node')}")


def _on_every_node(location: str, probe: str) -> dict[str, str]:
    """Each living node -> what is wrong with it, or an empty string."""
    tasks = {}
    for node in (node for node in ray.nodes() if node["Alive"]):
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        look = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(_look)
        tasks[look.remote(location, probe, __version__)] = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
    ready, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=_NODE_S)
    answers = {tasks[task]: f"no answer within {_NODE_S:g} s" for task in late}
    for task in ready:
        try:
            answers[tasks[task]] = ray.get(task)
        except ray.exceptions.RayTaskError as error:
            answers[tasks[task]] = first_line(error.cause)
        except ray.exceptions.RayError as error:
            answers[tasks[task]] = first_line(error)
    return answers


def _look(location: str, probe: str, version: str) -> str:
    """Runs on a node: what is wrong there."""
    if __version__ != version:
        return f"emoray is {__version__} there, {version} here"
    storage = Storage(location)
    if not storage.exists(probe):
        return f"doesn't see what the driver writes to {location}"
    try:
        storage.must_be_writable()
    except StorageError as error:
        return str(error)
    return ""


def room(case: Case) -> Iterator[Finding]:
    """Workers asked for against what the machine or the cluster has, by the rule that training goes by."""
    if case.config is None or not case.nodes:
        return
    workers, nodes = case.config.workers, case.nodes
    placement, there, _ = cluster.arrange(workers, nodes, 1)
    case.uses_gpu, case.cpus = placement.use_gpu, placement.cpus
    if there >= workers.min_workers:
        yield ok("workers", f"room for {there}, asked for {workers.max_workers} {placement.each}")
        return
    found, remedy = cluster.too_little(workers, placement, nodes, there)
    if workers.wait_for_nodes_s:
        yield warning("workers", found, f"none, if the autoscaler brings them in {workers.wait_for_nodes_s:g} s")
    else:
        yield problem("workers", found, remedy)


def run_folder(case: Case) -> Iterator[Finding]:
    """Whether the run of this name can be begun or continued."""
    if case.task is None or case.config is None:
        return
    config = with_absolute_paths(case.config)
    try:
        folder = run.open_run(config.run)
        run.refuse_existing(folder, config.run.on_existing)
        if config.run.on_existing == "resume":
            run.refuse_changed(folder, replace(case.task, config=config).identity)
    except EmorayError as error:
        yield problem("run", str(error), "choose another run.name, or set run.on_existing=replace to train it anew")
    else:
        yield ok("run", f"{config.run.name} {'goes on' if folder.exists() else 'is new'}")
