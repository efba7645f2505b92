"""The example for Python users runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.disturb import Bench

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.slow
def test_from_python(bench: Bench, tmp_path: Path) -> None:
    environment = {**bench.environment, "RAY_ADDRESS": "local"}
    command = [sys.executable, str(ROOT / "examples" / "from_python.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^test accuracy 0\.\d{4}$", done.stdout, re.MULTILINE)
    assert "'i feel wonderful today': " in done.stdout and "95% interval" in done.stdout
