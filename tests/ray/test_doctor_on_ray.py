"""`emoray doctor` on a real cluster: what its nodes can do, and what they can't."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from benchmarks.disturb import SmallCluster
from emoray import doctor
from emoray.doctor_findings import Finding
from emoray.on_ray import doctor as ray_doctor
from emoray.storage import Storage

pytestmark = pytest.mark.ray


def test_cluster_and_its_nodes(cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sound; then storage that the nodes don't share with the driver; too few CPUs."""
    from ray._private.authentication.authentication_utils import get_authentication_mode_name
    from ray._raylet import get_authentication_mode

    for limit in ("_CONNECT_S", "_GCS_S", "_NODE_S"):
        monkeypatch.setattr(ray_doctor, limit, 120.0)  # a busy machine is none of the faults
    # Ray read its mode when it was imported; the cluster's processes read it now.
    monkeypatch.setenv("RAY_AUTH_MODE", get_authentication_mode_name(get_authentication_mode()))
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    asked = ["workers.num_workers=3", "workers.use_gpu=false", f"run.storage_path={tmp_path / 'runs'}"]

    def examine(*checks: str) -> list[Finding]:
        return list(doctor.examine(None, asked, checks=["config", *checks]))

    with cluster.node(), cluster.node():
        cluster.settle()
        found = {finding.name: finding for finding in examine("cluster", "workers")}
        assert found["cluster"].found.endswith("3 nodes, 2 CPU, 0 GPU")
        assert found["nodes"].status == "ok" and "can be written from 3 nodes" in found["nodes"].found
        workers = found["workers"]
        assert workers.status == "problem" and "room for 2" in workers.found
        assert "lower workers.num_workers" in workers.remedy
        assert not (tmp_path / "runs").exists()
        monkeypatch.setattr(Storage, "write", lambda *_, **__: None)
        blind = [finding for finding in examine("cluster") if finding.name.startswith("node ")]
        assert len(blind) == 3 and blind[0].status == "problem"
        assert "doesn't see" in blind[0].found and "every node can write" in blind[0].remedy
        assert not ray.is_initialized()
