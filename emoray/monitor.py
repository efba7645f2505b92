"""`emoray monitor`: Prometheus on this machine's Ray clusters, with emoray's alerts, and where to look."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from emoray import local_http
from emoray.errors import ClusterError
from emoray.folders import cache_folder, ray_temp

_PATIENCE_S = 60.0
_RAYS = "/tmp/ray/"
"""Where Ray keeps its list of metrics addresses, unless `ray_temp` is elsewhere; as in prometheus.yml."""


@dataclass(frozen=True)
class Watch:
    """Where to look.

    Attributes:
        prometheus: its address.
        dashboard: file of the Grafana dashboard.
        targets: Ray's own list of what is watched; it appears with the first cluster.
    """

    prometheus: str
    dashboard: str
    targets: str

    def text(self) -> str:
        lines = [
            f"Prometheus: {self.prometheus}   alerts: {self.prometheus}/alerts",
            f"Grafana:    add {self.prometheus} as a data source, and import {self.dashboard}",
            f"In Ray's dashboard: RAY_PROMETHEUS_HOST={self.prometheus} where Ray is started",
        ]
        if not Path(self.targets).exists():
            lines.append(f"Nothing is watched yet: {self.targets} appears when Ray is started on this machine.")
        return "\n".join(lines)


def files() -> Path:
    """cluster/monitoring/, which the wheel carries inside the package."""
    packed = Path(str(resources.files("emoray"))) / "monitoring_data"
    return packed if packed.exists() else Path(__file__).parents[1] / "cluster" / "monitoring"


@contextmanager
def watch(port: int) -> Iterator[tuple[Watch, subprocess.Popen[bytes]]]:
    """A Prometheus that is ready; it ends with the block. What it has seen is kept in emoray's cache.

    Raises:
        ClusterError: it is not installed, or doesn't start.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise ClusterError(
            "prometheus is not installed: apt-get install prometheus, brew install prometheus, or put the program of "
            "https://prometheus.io/download into the PATH"
        )
    folder = cache_folder() / "prometheus"
    folder.mkdir(parents=True, exist_ok=True)
    rays = f"{ray_temp()}/ray/"
    config = (files() / "prometheus.yml").read_text(encoding="utf-8").replace(_RAYS, rays)
    (folder / "prometheus.yml").write_text(config, encoding="utf-8")
    shutil.copy(files() / "alerts.yaml", folder / "alerts.yaml")
    address = f"127.0.0.1:{port}"
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:  # Debian's package starts one of its own, on 9090
        raise ClusterError(
            f"{address}: can't listen there: {error.strerror}. Give another: --port {port + 1}"
        ) from None
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    log = folder / "prometheus.log"
    with log.open("wb") as stream:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=stream, stderr=stream)
    try:
        _until_ready(f"http://{address}", process, log)
        targets = f"{rays}prom_metrics_service_discovery.json"
        yield Watch(f"http://{address}", str(files() / "dashboard.json"), targets), process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            with local_http.get(f"{url}/-/ready", timeout_s=5):
                if process.poll() is None:  # else another one answers there
                    return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace").splitlines()
            lines = [line for line in said if "err=" in line] or ["it says nothing"]
            raise ClusterError(f"Prometheus doesn't start at {url}: {lines[-1]} (all of it: {log})")
        time.sleep(0.1)
