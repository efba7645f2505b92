"""k8s/: every overlay is what Kubernetes, KubeRay and emoray take, and what breaks one of their rules is refused."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from emoray import config, serve_config, tune_config

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
OVERLAYS = ("cpu-small", "gpu", "gpu-spot", "production")
RAY = {"RayJob", "RayService", "RayCluster"}

Object = dict[str, Any]


@cache
def rendered(overlay: str) -> tuple[Object, ...]:
    """An overlay's objects, as `kubectl kustomize` gives them."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    command = ["kubectl", "kustomize", str(ROOT / "k8s" / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.load_all(done.stdout, yaml.CSafeLoader))


@pytest.fixture(scope="module")
def problems() -> Callable[[Object], list[str]]:
    """What Kubernetes' and KubeRay's own rules have against an object."""
    tools, data = SHARED / "tools", SHARED / "data"
    if not tools.exists():
        pytest.skip(f"no schemas of Kubernetes and KubeRay at {SHARED}")
    pytest.importorskip("kubernetes_validate")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tools))
        import validate_k8s

        crds = validate_k8s.load_crds([data / "kuberay-crds", data / "k8s-extra-crds"])
        yield lambda thing: [f"{field}: {text}" for field, text in validate_k8s.problems(thing, crds, "1.33")]
        sys.modules.pop("validate_k8s")


def one(overlay: str, kind: str, name: str = "") -> Object:
    (found,) = [o for o in rendered(overlay) if o["kind"] == kind and o["metadata"]["name"].startswith(name)]
    return copy.deepcopy(found)


def cluster_of(thing: Object) -> Object:
    spec = thing["spec"]
    found: Object = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return found


def groups(thing: Object) -> Iterator[Object]:
    yield cluster_of(thing)["headGroupSpec"]
    yield from cluster_of(thing)["workerGroupSpecs"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str, problems: Callable[[Object], list[str]]) -> None:
    objects = rendered(overlay)
    assert {o["kind"] for o in objects} >= {*RAY, "NetworkPolicy", "PodDisruptionBudget", "PersistentVolumeClaim"}
    assert {f"{o['kind']}/{o['metadata']['name']}": problems(o) for o in objects if problems(o)} == {}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_keep_the_house_rules(overlay: str) -> None:
    for thing in rendered(overlay):
        assert thing["metadata"]["labels"]["app.kubernetes.io/component"], thing["metadata"]["name"]
        if thing["kind"] not in RAY:
            continue
        cluster = cluster_of(thing)
        assert cluster["authOptions"] == {"mode": "token"}
        assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in groups(thing):
            spec = group["template"]["spec"]
            (container,) = spec["containers"]
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert re.fullmatch(r"registry.example.com/emoray:\d+\.\d+\.\d+-[cg]pu", container["image"])
            assert spec["securityContext"]["runAsNonRoot"] is True and spec["restartPolicy"] == "Never"
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounted.keys() == {volume["name"] for volume in spec["volumes"]}
            assert mounted["shm"] == "/dev/shm" and mounted["emoray"] == "/mnt/emoray"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_the_pods_run_is_what_emoray_takes(overlay: str, tmp_path: Path) -> None:
    """The configs that the jobs are given, and the endpoint's arguments."""
    for name, content in one(overlay, "ConfigMap")["data"].items():
        (tmp_path / name).write_text(content)
    training = config.load(tmp_path / "train.yaml")
    sweep = tune_config.load(tmp_path / "tune.yaml")
    assert training.run.storage_path == sweep.config.run.storage_path == "/mnt/emoray/runs"
    for job, name in (("emoray-train", "train"), ("emoray-sweep", "tune")):
        thing = one(overlay, "RayJob", job)
        assert thing["spec"]["entrypoint"] == f"emoray {name} /etc/emoray/{name}.yaml"
        (worker,) = cluster_of(thing)["workerGroupSpecs"]
        limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits["cpu"]) == training.workers.cpus_per_worker
        assert bool(limits.get("nvidia.com/gpu")) is training.workers.use_gpu
        assert worker["maxReplicas"] >= training.workers.max_workers
        assert worker["maxReplicas"] >= sweep.config.tune.max_concurrent  # type: ignore[operator]
    service = one(overlay, "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    serving = serve_config.ServeConfig.model_validate(application["args"])
    assert application["import_path"] == "emoray.on_ray.serve:build" and serving.auth.keys_file
    (endpoint,) = application["deployments"]
    assert endpoint["user_config"].keys() == {"model"} and endpoint["max_replicas_per_node"] == 1
    (worker,) = cluster_of(service)["workerGroupSpecs"]
    assert serving.replicas.min >= 2 <= worker["minReplicas"]
    assert serving.replicas.max <= worker["maxReplicas"]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert serving.replicas.num_cpus == int(limits["cpu"])
    assert serving.replicas.num_gpus == int(limits.get("nvidia.com/gpu", 0))


def _typo(job: Object) -> None:
    job["spec"]["backofLimit"] = job["spec"].pop("backoffLimit")


def _no_entry_mode(job: Object) -> None:
    job["spec"]["submissionMode"] = "SidecarMode"
    job["spec"]["submitterConfig"] = {"backoffLimit": 1}


def _both_deletions(job: Object) -> None:
    job["spec"]["shutdownAfterJobFinishes"] = True


def _workers_deleted_beside_the_autoscaler(job: Object) -> None:
    job["spec"]["deletionStrategy"]["deletionRules"][0]["policy"] = "DeleteWorkers"


def _two_conditions_in_one(job: Object) -> None:
    job["spec"]["deletionStrategy"]["deletionRules"][0]["condition"]["jobDeploymentStatus"] = "Failed"


def _other_ray(job: Object) -> None:
    cluster_of(job)["rayVersion"] = "2.51.0"


def _restarted_pods(job: Object) -> None:
    cluster_of(job)["workerGroupSpecs"][0]["template"]["spec"]["restartPolicy"] = "Always"


def _more_than_the_most(job: Object) -> None:
    cluster_of(job)["workerGroupSpecs"][0]["replicas"] = 99


def _number_for_text(job: Object) -> None:
    cluster_of(job)["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def _variable_twice(job: Object) -> None:
    environment = cluster_of(job)["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    environment.append(environment[0])


def _long_name(job: Object) -> None:
    job["metadata"]["name"] = "e" * 48


def _auth_mode_of_no_kind(job: Object) -> None:
    cluster_of(job)["authOptions"]["mode"] = "password"


@pytest.mark.parametrize(
    "breaking",
    [
        _typo,
        _no_entry_mode,
        _both_deletions,
        _workers_deleted_beside_the_autoscaler,
        _two_conditions_in_one,
        _other_ray,
        _restarted_pods,
        _more_than_the_most,
        _number_for_text,
        _variable_twice,
        _long_name,
        _auth_mode_of_no_kind,
    ],
)
def test_broken_jobs_are_refused(breaking: Callable[[Object], None], problems: Callable[[Object], list[str]]) -> None:
    job = one("gpu", "RayJob", "emoray-train")
    assert problems(job) == []
    breaking(job)
    assert problems(job) != []


def test_other_broken_objects_are_refused(problems: Callable[[Object], list[str]]) -> None:
    service = one("production", "RayService")
    service["spec"]["upgradeStrategy"]["clusterUpgradeOptions"]["stepSizePercent"] = 80  # more than may be added
    policy = one("gpu", "NetworkPolicy", "redis")
    policy["spec"]["ingress"][0]["fron"] = policy["spec"]["ingress"][0].pop("from")  # would let everyone in
    budget = one("gpu", "PodDisruptionBudget")
    budget["spec"]["minAvailable"] = True
    for thing in (service, policy, budget):
        assert problems(thing) != [], thing["kind"]


def test_only_newest_fields_stay_in_overlays() -> None:
    """The base is for KubeRay 1.6; Kueue, the Prometheus operator and the Gateway API are for who has them."""
    for overlay in ("cpu-small", "gpu", "gpu-spot"):
        assert not any(re.match(r"(kueue|monitoring)\.", o["apiVersion"]) for o in rendered(overlay))
        assert "upgradeStrategy" not in one(overlay, "RayService")["spec"]
    for job in (one("production", "RayJob", "emoray-train"), one("production", "RayJob", "emoray-sweep")):
        # what Kueue's webhook refuses otherwise
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "emoray"
        assert job["spec"]["shutdownAfterJobFinishes"] is True and not cluster_of(job)["enableInTreeAutoscaling"]
    service = one("production", "RayService")
    assert service["spec"]["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"


def test_the_image_has_what_pods_need() -> None:
    recipe = (ROOT / "k8s" / "Dockerfile").read_text()
    assert "==2.60.0" in recipe and " wget " in recipe
    assert " rsync openssh-client" in recipe, "Ray's launcher needs them in the container"
    for target in ("cpu", "gpu"):
        stage = recipe.split(f"AS {target}\n")[1].split("\nFROM ")[0]
        assert "USER 1000" in stage and "HOME=/home/ray" in stage and "[onnx,optuna]" in stage


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_gpu_pods_get_the_image_with_cuda_whatever_its_name(overlay: str, tmp_path: Path) -> None:
    """As docs/cluster.md says to name one's own image."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    for path in (tmp_path / "k8s").rglob("*.yaml"):
        path.write_text(path.read_text().replace("registry.example.com/emoray", "ghcr.io/we/ours"))
    command = ["kubectl", "kustomize", str(tmp_path / "k8s" / "overlays" / overlay)]
    images = set(re.findall(r"image: (ghcr\S+)", subprocess.run(command, capture_output=True, text=True).stdout))
    assert images == {f"ghcr.io/we/ours:0.1.0-{'cpu' if overlay == 'cpu-small' else 'gpu'}"}


def test_alerts_are_the_same_for_both_kinds_of_prometheus() -> None:
    read = lambda path: yaml.safe_load((ROOT / path).read_text())  # noqa: E731
    rule = read("k8s/components/monitoring/alerts.yaml")
    assert rule["spec"]["groups"] == read("cluster/monitoring/alerts.yaml")["groups"]
