"""`emoray serve`: start the endpoint, or change the one that runs, and say where it is once it answers."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.serve.context import _get_global_client

from emoray import checkpoint, local_http
from emoray.classifier import find_model, locate_model
from emoray.engines.choice import exports_for
from emoray.errors import ClusterError, ModelError
from emoray.export import ensure_for
from emoray.folders import private_folder
from emoray.http import keys as api_keys
from emoray.on_ray import cluster, guard, haproxy
from emoray.on_ray.board import Board, open_board, wish
from emoray.on_ray.serve import APP, REPORT_EVERY_S, application, resources
from emoray.serve_config import HttpConfig, ServeConfig

Say = Callable[[str], None]

PATIENCE_S = 600.0
"""How long replicas may take to come up, or to load a new model, in seconds: large models come from far away."""
_WAIT_FOR_REPLICA_S = 30.0
"""How much longer than its own time limit a request may wait in the proxy while no replica is there, in seconds."""
_CAUSE = re.compile(r"^(?:emoray\.errors\.\w+|\w*Error): (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Ready:
    """Where an endpoint is.

    Attributes:
        url: of the endpoint.
        model: `name@fingerprint` that answers.
        dashboard: None where there is none.
        is_here: it ends with this process.
        is_elsewhere: it ends with another `emoray serve` on this machine, which started it.
        needs_key: whether requests need one.
    """

    url: str
    model: str
    dashboard: str | None
    is_here: bool
    is_elsewhere: bool
    needs_key: bool

    def text(self) -> str:
        key = " -H 'Authorization: Bearer KEY'" if self.needs_key else ""
        lines = [
            f"{self.model} answers at {self.url} (a page for people; {self.url}/docs for programs)",
            f"  curl {self.url}/v1/classify{key} -H 'Content-Type: application/json' "
            '-d \'{"texts": ["i feel wonderful today"]}\'',
            f"Dashboard: {self.dashboard or 'none'}",
        ]
        if self.is_elsewhere:
            lines.append("It ends with the `emoray serve` that started it.")
        elif not self.is_here:
            lines.append("It runs on without this command; Ray's own `serve shutdown -y` ends it.")
        return "\n".join(lines)


@contextmanager
def endpoint(config: ServeConfig, say: Say) -> Iterator[Ready]:
    """An endpoint that answers. Where Ray was started for it, both end with the block.

    Raises:
        ConfigError, CheckpointError, ModelError, StorageError, ClusterError: why it can't.
    """
    keys = api_keys.load(config.auth.keys_file)
    joined = _join_own(config.http.port)
    if not joined and os.environ.get("RAY_ADDRESS", "local") == "local":
        _find_and_export(config, say)  # told at once, before anything is started
    say("Connecting to Ray")
    is_here = cluster.connect()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        if _serve_that_runs() is None:  # else the port is held by the endpoint that is to be changed
            config = config.model_copy(update={"http": _free(config.http)})
        _need_room(config)
        with ThreadPoolExecutor(1) as beside:
            proxies = beside.submit(_start_serve, config, is_here)
            url = _address(config, proxies)
            say("Starting the endpoint")
            board, number = _deploy(config, keys, say)
            proxies.result()
        _until_ready(url)  # which also wakes an endpoint that sleeps
        model = _until_all_have(board, number)
        with _found_by_others(config.http.port, is_here):
            yield Ready(url, model, cluster.dashboard(), is_here, joined, bool(keys))
    finally:
        node = ray.get_runtime_context().get_node_id() if is_here else ""
        if is_here:
            with suppress(Exception):  # the end comes anyway
                serve.shutdown()
        cluster.shutdown()
        if is_here:
            haproxy.tidy(node)


def _find_and_export(config: ServeConfig, say: Say) -> None:
    """Raises where there is no model; one without its exports gets them here, once, and not in every replica."""
    model = find_model(config.model)
    if not exports_for(config.engine):
        return
    folder = checkpoint.fetch(model)
    try:
        ensure_for(config.engine, model, folder, say)
    finally:
        checkpoint.release(model, folder)


def wait_for_the_end() -> None:
    """Return on Ctrl-C or SIGTERM."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()


def _serve_that_runs() -> Any:
    """A client of the cluster's Ray Serve, or None."""
    return _get_global_client(raise_if_no_controller_running=False)


def _free(http: HttpConfig) -> HttpConfig:
    """The http section with a port that is free here."""
    try:
        with socket.create_server((http.host, http.port)) as listener:
            return http.model_copy(update={"port": listener.getsockname()[1]})
    except OSError as error:
        raise ClusterError(
            f"http.host={http.host} http.port={http.port}: can't listen there: {error.strerror}. "
            "End what listens there, or set http.port to another (0 takes a free one)."
        ) from None


def _need_room(config: ServeConfig) -> None:
    """Raises ClusterError where no node could ever hold a replica."""
    cpus, gpus = resources(config.replicas)
    nodes, wanted = cluster.live_nodes(), {"CPU": cpus, "GPU": gpus}
    if not any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
        there = "; ".join(cluster.amounts(node) for node in nodes)
        raise ClusterError(
            f"A replica wants {cluster.amounts(wanted)}, and no node has so much ({there}): "
            "lower replicas.num_cpus or replicas.num_gpus."
        )


def _start_serve(config: ServeConfig, is_here: bool) -> None:
    """Start Ray Serve where it doesn't run, and return when its proxies listen."""
    limits = config.limits
    environment = {
        **guard.environment(limits),
        # How often replicas report what scaling is decided by; Ray Serve wants it below `_LOOK_BACK_S` of serve.py.
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": f"{REPORT_EVERY_S:g}",
    }
    if config.http.proxy == "haproxy" or (config.http.proxy == "auto" and is_here and haproxy.is_there()):
        folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "emoray-haproxy"
        cpus, timeout_s = os.cpu_count() or 1, limits.timeout_s + _WAIT_FOR_REPLICA_S
        environment |= haproxy.environment(folder, config.http, cpus, timeout_s, limits.max_queued_requests)
    serve.start(
        http_options={
            "host": config.http.host,
            "port": config.http.port,
            "request_timeout_s": limits.timeout_s + _WAIT_FOR_REPLICA_S,
        },
        controller_options={"runtime_env": {"env_vars": environment}},
    )


def _address(config: ServeConfig, proxies: Future[None]) -> str:
    """The endpoint's address, as soon as Ray Serve's controller runs: replicas can start while the proxies do.

    Raises:
        ClusterError: Ray Serve runs already, and listens elsewhere.
    """
    while (client := _serve_that_runs()) is None:
        if proxies.done():
            proxies.result()
        time.sleep(0.05)
    running = client.http_config
    if (running.host, running.port) != (config.http.host, config.http.port):
        raise ClusterError(
            f"Ray Serve listens on {running.host}:{running.port} in this cluster, and can't be told otherwise while it "
            f"runs: give http.host={running.host} http.port={running.port}, or end it with Ray's `serve shutdown -y`."
        )
    host = "127.0.0.1" if running.host in ("0.0.0.0", "::") else running.host
    return f"http://{host}:{running.port}"


def _deploy(config: ServeConfig, keys: api_keys.Keys, say: Say) -> tuple[Board, int]:
    """Deploy; returns the board and the number of the change that brings the config's model."""
    board = open_board(APP)
    config = config.model_copy(update={"model": locate_model(config.model, os.getcwd())})
    runs = _has_replicas() and bool(board.alive())
    if runs:
        number = _change(board, config, say)  # first, so that a model that is refused leaves the old config
    else:
        board.wipe()
        number = 1
    target = serve.RunTarget(target=application(config, keys, os.getcwd()), name=APP, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)
    try:
        _until_running(say)
    except ModelError:
        if not runs:
            serve.delete(APP)
        raise
    return board, number


def _has_replicas() -> bool:
    application = serve.status().applications.get(APP)
    return application is not None and any(
        part.replica_states.get("RUNNING", 0) for part in application.deployments.values()
    )


def _until_running(say: Say) -> None:
    since, told = time.monotonic(), False
    while True:
        status = serve.status().applications[APP]
        if status.status == "RUNNING":
            return
        messages = [status.message, *(part.message for part in status.deployments.values())]
        causes = [cause for message in messages for cause in _CAUSE.findall(message)]
        if status.status == "DEPLOY_FAILED" or causes:
            raise ModelError(causes[-1] if causes else messages[-1].strip() or "the application could not be deployed")
        waited = time.monotonic() - since
        if waited > PATIENCE_S:
            raise ClusterError(f"No replica came up within {PATIENCE_S:g} s: {messages[-1]}")
        if waited > 10 and not told:
            told = True
            say(f"Waiting for a replica (free now: {cluster.amounts(ray.available_resources())})")
        time.sleep(0.2)


def _change(board: Board, config: ServeConfig, say: Say) -> int:
    """Have the replicas that run accept another model, and return the change's number.

    Raises:
        ModelError: they refuse it.
    """
    until = time.monotonic() + PATIENCE_S
    accepted = board.accepted()
    declared = accepted.declared if accepted else wish(config.model, config.engine)
    gate = config.gate.model_dump(mode="json")
    while (change := board.propose(config.model, config.engine, declared, gate)) is None:
        time.sleep(0.2)
        if time.monotonic() > until:
            raise ClusterError("An earlier model change has not ended: see /info")
    say(f"Loading {config.model} beside the present model")
    while (verdict := board.verdict(change.number)) is None:
        if time.monotonic() > until:
            raise ClusterError(f"{config.model}: not loaded within {PATIENCE_S:g} s: see /info")
        time.sleep(0.1)
    if "error" in verdict:
        raise ModelError(f"{verdict['error']} (the present model serves on)")
    return change.number


def _until_all_have(board: Board, number: int) -> str:
    """Return an accepted model's name@fingerprint once every living replica has it."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        verdict = board.verdict(number)
        if verdict is not None and all(peer["change"] >= number for peer in board.alive().values()):
            return str(verdict["model"])
        time.sleep(0.1)
    raise ClusterError(f"Not every replica took the model over within {PATIENCE_S:g} s: see /info")


def _until_ready(url: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            with local_http.get(f"{url}/ready", timeout_s=30):
                return
        except OSError as error:
            if time.monotonic() > until:
                raise ClusterError(f"{url}/ready: no good answer within {PATIENCE_S:g} s: {error}") from None
        time.sleep(0.1)


def _note(port: int) -> Path:
    """Where an endpoint whose Ray was started for it alone notes how to find it."""
    return private_folder() / f"serve-{port}.json"


def _join_own(port: int) -> bool:
    """Join the Ray of an endpoint that an earlier `emoray serve` started on this machine and port, if one runs.

    Ray itself finds clusters of `ray start` alone.
    """
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        return False
    try:
        note = json.loads(_note(port).read_text())
        address, auth = note["address"], note["auth"]
        cluster.knock(address)  # in a container that was killed and started again the note is still there
    except (OSError, ValueError, KeyError):
        return False
    os.environ["RAY_ADDRESS"] = address
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # how to switch it off was not asked
    if auth == "token":  # Ray asks for it by itself where it starts a cluster, but not at an address that is named
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    return True


@contextmanager
def _found_by_others(port: int, is_here: bool) -> Iterator[None]:
    note = _note(port)
    if is_here:
        address = ray.get_runtime_context().gcs_address
        auth = os.environ.get("RAY_AUTH_MODE", "disabled")  # Ray sets it where it has chosen itself
        note.write_text(json.dumps({"address": address, "auth": auth}))
    try:
        yield
    finally:
        if is_here:
            note.unlink(missing_ok=True)
