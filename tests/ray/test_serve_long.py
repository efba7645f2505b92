"""The endpoint on Ray Serve, at length: hostile input through the proxy, and replicas that sleep."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from tiny import train_here

from benchmarks.serving import Serving, environment, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TESTS = Path(__file__).parents[1] / "http"


@contextmanager
def served(tiny_overrides: list[str], folder: Path, *overrides: str) -> Iterator[tuple[Serving, Path]]:
    """A running endpoint, and the folder of its Ray."""
    model = train_here([*tiny_overrides, "run.name=emotion", f"run.storage_path={folder}"])
    with tempfile.TemporaryDirectory(prefix="et-", ignore_cleanup_errors=True) as ray_folder:
        settings = environment(folder, ray_folder)
        with Serving(model, folder / "serve.log", settings, "http.port=0", "replicas.max=1", *overrides) as serving:
            yield serving, Path(ray_folder)


def test_hostile_input_and_2000_fuzzed_requests(tiny_overrides: list[str], tmp_path: Path) -> None:
    """The tests of tests/http, but for those that ask for their dummy model's own ways to fail."""
    limits = ["limits.max_texts=50", "limits.max_body_bytes=20000", "limits.timeout_s=3"]
    with served(tiny_overrides, tmp_path, *limits) as (serving, _):
        chosen = "(test_hostile or test_schemathesis) and not failing_text and not overload"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
        ran = subprocess.run(
            [*command, str(TESTS / "test_hostile.py"), str(TESTS / "test_openapi.py")],
            env={**os.environ, "EMORAY_ENDPOINT": serving.url},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]


def test_an_endpoint_sleeps_and_wakes_up(tiny_overrides: list[str], tmp_path: Path) -> None:
    """Without requests no replica runs; the next request waits for one, and is answered. Texts are logged if wanted."""
    with served(tiny_overrides, tmp_path, "replicas.min=0", "replicas.downscale_delay_s=2", "logging.texts=true") as (
        serving,
        ray_folder,
    ):
        for _ in range(2):
            wait_until(lambda: not serving.replicas, "no replica")
            answer = requests.post(f"{serving.url}/v1/classify", json={"texts": ["good morning"]}, timeout=120)
            assert answer.status_code == 200, answer.text
            assert len(serving.replicas) == 1
        logs = [path.read_text() for path in ray_folder.rglob("emoray_access_*.log")]
        assert any('"inputs": ["good morning"]' in log for log in logs)
