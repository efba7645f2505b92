"""A Ray cluster of one node, started as `ray start` does, that takes jobs from whoever has the token"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import requests
from ray.job_submission import JobSubmissionClient

from benchmarks.serving import wait_until

TOKEN = "a-token-that-only-the-tests-have"
ROOT = Path(__file__).parents[1]


class JobServer:
    """Use it as a context manager: at its end nothing that it started runs.

    Args:
        environment: of Ray's processes, and so of jobs.
        cpus: that the node says it has.

    Attributes:
        address: for drivers.
        dashboard: for everything else.
        environment: of whoever comes with the token.
    """

    def __init__(self, environment: dict[str, str], cpus: int = 2) -> None:
        self._cpus = cpus
        self._folder = tempfile.TemporaryDirectory(prefix="ej-", ignore_cleanup_errors=True)
        self.environment = {
            **environment,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_TMPDIR": self._folder.name,
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # at the end nothing that runs is waited for
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        self.environment.pop("RAY_ADDRESS", None)

    def __enter__(self) -> JobServer:
        port, dashboard, agent, metrics = free_ports(4)
        self.address, self.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            f"--num-cpus={self._cpus}",
        ]
        command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        command += [f"--metrics-export-port={metrics}", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        with (Path(self._folder.name) / "ray.log").open("w") as stream:
            self.process = subprocess.Popen(command, env=self.environment, stdout=stream, stderr=subprocess.STDOUT)
        wait_until(self._answers, "the dashboard")
        return self

    def __exit__(self, *_: object) -> None:
        below = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        for process in [*below, self.process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._folder.cleanup()

    def _answers(self) -> bool:
        assert self.process.poll() is None, (Path(self._folder.name) / "ray.log").read_text()
        with suppress(requests.ConnectionError):
            return requests.get(f"{self.dashboard}/api/version", timeout=5).status_code in (200, 401)
        return False

    def client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.dashboard, headers={"Authorization": f"Bearer {TOKEN}"})

    def drivers(self) -> list[psutil.Process]:
        """Drivers of jobs that train."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "emoray train" in " ".join(word.rpartition("/")[2] for word in process.cmdline()[:3]):
                    found.append(process)
        return found


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    with ExitStack() as stack:
        listening = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listening]
