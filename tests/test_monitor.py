"""Alerts, dashboard and Prometheus' config, by Prometheus' own checks; `emoray monitor` where it isn't installed."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import Emoray

from emoray import monitor

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


@needs_promtool
def test_alerts_fire_where_they_should() -> None:
    for check in (["test", "rules", "alerts_test.yaml"], ["check", "config", "prometheus.yml"]):
        done = subprocess.run(["promtool", *check], cwd=monitor.files(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_that_fires_and_one_that_does_not() -> None:
    groups = yaml.safe_load((monitor.files() / "alerts.yaml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"]}
    tests = yaml.safe_load((monitor.files() / "alerts_test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if "exp_alerts" in case} == alerts
    assert {case["alertname"] for case in cases if "exp_alerts" not in case} == alerts


@needs_promtool
def test_every_query_of_the_dashboard_is_one() -> None:
    check = SHARED / "tools" / "check_dashboard.py"
    if not check.exists():
        pytest.skip(f"no {check}")
    command = [sys.executable, str(check), str(monitor.files() / "dashboard.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_queries_name_metrics_that_emoray_and_ray_have() -> None:
    """Those of emoray's are declared in the modules that count; each query is filtered by cluster."""
    declared = "".join((ROOT / f"emoray/on_ray/{name}.py").read_text() for name in ("train_metrics", "serve_metrics"))
    known = set(re.findall(r'"(emoray_[a-z_]+)"', declared))
    known |= {f"emoray_train_{name}" for name in re.findall(r'\("([a-z_]+)", "[A-Z]', declared)}
    dashboard = json.loads((monitor.files() / "dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    alerts = (monitor.files() / "alerts.yaml").read_text()
    for name in re.findall(r"ray_(emoray_[a-z_]+)", " ".join([*queries, alerts])):
        assert re.sub(r"_bucket$", "", name) in known, name
    for query in queries:
        assert query.count('ray_io_cluster=~"$cluster"') == len(re.findall(r"ray_[a-z_]+\{", query)), query


def test_where_prometheus_is_missing_it_is_said(emoray: Emoray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    answer = emoray("monitor")
    assert answer.status == 1 and "apt-get install prometheus" in answer.err


def test_a_port_that_is_taken_is_said(emoray: Emoray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By another Prometheus, say, which would answer in the place of ours."""
    program = tmp_path / "prometheus"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        answer = emoray("monitor", "--port", str(port))
    assert answer.status == 1 and f"--port {port + 1}" in answer.err
