"""Reach a Ray cluster, or start one here, and ask whether it can give what a config wants."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from emoray.config import WorkersConfig
from emoray.errors import ClusterError
from emoray.wording import first_line

_SETTINGS = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's Train tab
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a worker's end is noticed in half a second, not two
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # a notice of preemption often comes only seconds ahead
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # how often it is reported that there is still no room
    "RAY_USAGE_STATS_ENABLED": "0",
}

_GCS_WAIT = ("RAY_gcs_server_port_wait_time_s", "5")
"""For so long Ray tries to join a cluster that listens: its usual 20 s would pass with a wrong token, too."""

_KNOCK_S = 10.0
"""How long the host of a named cluster may take to accept a connection, in seconds."""

_BUSY_S = 60
"""How long resources that the cluster has may be held by others before that is an error, in seconds."""


@dataclass(frozen=True)
class Placement:
    """What each worker of a run gets.

    Attributes:
        min_workers, max_workers: equal where the run isn't elastic.
        cpus: CPUs, and threads, of a worker.
        use_gpu: whether workers take GPUs.
        gpus: share of a GPU that each takes then.
    """

    min_workers: int
    max_workers: int
    cpus: int
    use_gpu: bool
    gpus: float = 1.0

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.use_gpu else {})}

    @property
    def elastic(self) -> bool:
        return self.min_workers < self.max_workers

    @property
    def each(self) -> str:
        """What a worker gets, in words."""
        return f"({amounts(self.resources)})"


def connect() -> bool:
    """Join the cluster that RAY_ADDRESS, a Ray job or a local `ray start` names, else start one on this machine.

    Returns:
        Whether one was started here (and ends with this process).

    Raises:
        ClusterError: where the named cluster can't be reached.
    """
    for name, value in _SETTINGS.items():  # what runs with an earlier ray.init() reads them too, when it starts
        os.environ.setdefault(name, value)
    _hush()
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address not in (None, "", "auto", "local"):
            knock(address)
            os.environ.setdefault(*_GCS_WAIT)
        ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, namespace="emoray")
    except Exception as error:  # Ray raises bare ones too, where a process of its own doesn't come up
        reason = first_line(error).rstrip(".")
        if address in (None, "", "auto", "local"):
            where, remedy = "a Ray cluster", "See Ray's logs in /tmp/ray/session_latest/logs, and `emoray doctor`."
        else:
            where = f"the cluster at RAY_ADDRESS={address}"
            remedy = "Check that it runs, and RAY_AUTH_MODE and its token."
        raise ClusterError(f"Can't reach {where}: {reason}. {remedy}") from None
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler ends with status 15; whoever asked for the end expects 143.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    return ray._private.worker._global_node is not None and ray._private.worker._global_node.is_head()


@contextmanager
def session(say: Callable[[str], None]) -> Iterator[str | None]:
    """Ray for the time of a command: joined, or started here and ended afterwards. Gives the dashboard's address."""
    say("Connecting to Ray")
    started = connect()
    try:
        yield dashboard()
    finally:
        if started:
            shutdown()


def knock(address: str) -> None:
    """Raises OSError where nothing listens at `host:port`: `ray.init` would try for a quarter of an hour."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():  # not so `auto` and `local`, which need no port
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()


_REPLACED = ("A worker died or was killed", "Raylet is terminated", "The node with node id")
"""How Ray's own words on dead workers and nodes begin: ours say which worker, where, at which step, what follows."""

_MEANT = (
    "PYTHON worker processes have been started on node",  # ours, such as the drivers of a sweep's trials, take no CPU
    "ServeController.graceful_shutdown failed",  # Ray Serve is being ended
)
"""Parts of warnings of Ray's about what is meant."""


def _hush() -> None:
    """Keep Ray from printing what we say better, with pages of its logs; all else that it has to say is printed."""
    from ray._private import worker

    print_all = worker.print_to_stdstream

    def print_the_rest(data: dict[str, Any], ignore_prefix: bool) -> None:
        lines = [
            line
            for line in data["lines"]
            if not line.startswith(_REPLACED) and not any(meant in line for meant in _MEANT)
        ]
        if lines:
            print_all({**data, "lines": lines}, ignore_prefix)

    if print_all.__name__ != print_the_rest.__name__:
        worker.print_to_stdstream = print_the_rest


def warn_of_lost_storage(location: str, say: Callable[[str], None]) -> None:
    """Say so where a run would lie in the folder that Ray unpacks for a job, and deletes when it wants the room."""
    if "/runtime_resources/working_dir_files/" in location:
        say(f"Warning: {location} is the job's own folder, and Ray deletes it: set run.storage_path to keep the run")


def on_this_node() -> dict[str, str]:
    """Label selector for an actor that must live as long as this process."""
    return {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}


def place(workers: WorkersConfig) -> Placement:
    """Decide what each worker gets.

    Raises:
        ClusterError: says what was asked and what there is, unless `wait_for_nodes_s` lets nodes come.
    """
    placement, _ = place_side_by_side(workers, 1)
    return placement


def place_side_by_side(workers: WorkersConfig, most: int | None) -> tuple[Placement, int]:
    """Decide what each worker gets where several runs of the same size share the cluster.

    Args:
        most: how many runs at once; None is as many as there are GPUs for, or one on each node without GPUs: a run on
            all of a node's CPUs ends sooner, and fewer at once know more of each other.

    Returns:
        What each worker gets, and how many runs there is room for at once: at least one, at most `most`.

    Raises:
        ClusterError: as `place`.
    """
    nodes = live_nodes()
    placement, room, runs = arrange(workers, nodes, most)
    if room < workers.min_workers and not workers.wait_for_nodes_s:
        raise ClusterError(": ".join(too_little(workers, placement, nodes, room)))
    return placement, runs


def arrange(workers: WorkersConfig, nodes: list[dict[str, float]], most: int | None) -> tuple[Placement, int, int]:
    """What each worker gets, for how many such there is room, and how many runs that makes at once (at least one).

    Args:
        nodes: what each has, idle.
        most: as of `place_side_by_side`.
    """
    use_gpu = any(node.get("GPU", 0) for node in nodes) if workers.use_gpu == "auto" else workers.use_gpu
    gpus, size = workers.gpus_per_worker if use_gpu else 0.0, workers.max_workers
    if most is None and use_gpu:
        wanted = max(1, sum(fits(node, {"GPU": gpus}) for node in nodes) // size)
    else:
        wanted = most or max(1, sum(node.get("CPU", 0) >= 1 for node in nodes) // size)
    cpus = workers.cpus_per_worker or even_share(nodes, size * wanted, gpus)
    placement = Placement(workers.min_workers, size, cpus, use_gpu, workers.gpus_per_worker)
    room = sum(fits(node, placement.resources) for node in nodes)
    runs = max(1, room // size)
    return placement, room, runs if most is None and workers.cpus_per_worker else min(runs, wanted)


def wait_for_room(workers: WorkersConfig, placement: Placement, say: Callable[[str], None]) -> None:
    """Ask for a placement group of the smallest size, which also asks an autoscaler, and give it back.

    Ray Train would wait without a word, and for an elastic run without an end.

    Raises:
        ClusterError: where there is no room within the time that the config gives.
    """
    limit = max(workers.wait_for_nodes_s, _BUSY_S)
    group = ray.util.placement_group([placement.resources] * placement.min_workers)
    try:
        ready = group.ready()
        for waited in range(int(limit)):
            if ray.wait([ready], timeout=1)[0]:
                return
            if waited == 2:
                say(f"Waiting up to {limit:g} s for {placement.min_workers} x {placement.each}")
    finally:
        ray.util.remove_placement_group(group)
    free = amounts(ray.available_resources())
    raise ClusterError(
        f"The cluster gave no room for {placement.min_workers} x {placement.each} in {limit:g} s (free now: {free}): "
        "end what else runs there (an endpoint: `serve shutdown -y`), lower workers.num_workers or "
        "workers.cpus_per_worker, or raise workers.wait_for_nodes_s where nodes take longer to come."
    )


def live_nodes() -> list[dict[str, float]]:
    """Resources of each living node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def fits(node: dict[str, float], wanted: dict[str, float]) -> int:
    """How many workers a node has room for."""
    return int(min(node.get(name, 0) / amount + 1e-6 for name, amount in wanted.items()))  # 1 // 0.1 is 9


def even_share(nodes: list[dict[str, float]], num_workers: int, gpus: float) -> int:
    """The most CPUs a worker can have so that all workers fit; at least one.

    Beside a GPU at most eight: batches are prepared by one thread, and other jobs want CPUs too.
    """
    most = int(max((node.get("CPU", 0) for node in nodes), default=1))
    if gpus:
        most = min(most, 8)
    for cpus in range(most, 1, -1):
        wanted = {"CPU": float(cpus), **({"GPU": gpus} if gpus else {})}
        if sum(fits(node, wanted) for node in nodes) >= num_workers:
            return cpus
    return 1


def too_little(
    workers: WorkersConfig, placement: Placement, nodes: list[dict[str, float]], room: int
) -> tuple[str, str]:
    """What was asked for and what there is, and the remedy."""
    there = "; ".join(f"node {i + 1}: {amounts(node)}" for i, node in enumerate(nodes[:8]))
    remedy = "lower workers.num_workers or workers.cpus_per_worker"
    if workers.use_gpu is True:
        remedy += ", set workers.use_gpu=false"
    return (
        f"workers.num_workers asks for {placement.min_workers} x {placement.each}, but the cluster has room for {room} "
        f"({there})",
        f"{remedy}, add nodes, or set workers.wait_for_nodes_s where an autoscaler brings them.",
    )


def amounts(resources: dict[str, float]) -> str:
    """`4 CPU, 1 GPU`."""
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def shutdown() -> None:
    """End a cluster that was started here, or leave one that was joined."""
    ray.shutdown()


def dashboard() -> str | None:
    """Address of the dashboard, if one runs."""
    url = ray._private.worker.get_dashboard_url()
    return f"http://{url}" if url else None
