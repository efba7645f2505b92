"""KubeRay's pods as namespaces of this machine: the manifests' commands, ports, environment and files, no Kubernetes.

Each pod has a network, a process tree, a /tmp and mounts of its own, as in a cluster; killing it is the power cut of a
pod. What the KubeRay operator adds to a pod (ray-operator/controllers/ray/common/pod.go of v1.7.0) is added here. There
is no autoscaler, and processes run as root. For root on Linux with iproute2, in tests.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmarks.disturb import PATIENCE_S
from benchmarks.serving import wait_until

Object = dict[str, Any]

TOKEN = "the-token-that-the-operator-makes-for-a-cluster"
ROOT = Path(__file__).parents[1]
_networks = itertools.count()  # of this process: links of one that has ended may live on for a moment


def why_not() -> str | None:
    """Why pods can't be made here; None where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return None if tried.returncode == 0 else "this container may not make namespaces"


class Pod:
    """A pod that runs.

    Args:
        net: where it is.
        name: of the pod.
        command: of its one container.
        environment: all of it.
        mounts: path in the pod -> folder here.
        shm: size of /dev/shm, as mount takes it.
    """

    def __init__(
        self,
        net: Network,
        name: str,
        command: str,
        environment: dict[str, str],
        mounts: dict[str, Path],
        shm: str = "64m",
    ) -> None:
        self.net, self.name = net, name
        self.space, self.ip = net.plug()
        self.environment, self.log = environment, net.folder / f"{name}-{self.space}.log"
        script = net.folder / f"{self.space}.sh"
        script.write_text("\n".join([*self._files(mounts, shm), f"cd /tmp; {command}\n"]))
        self.process = self._run(["bash", str(script)], self.log)

    def _files(self, mounts: dict[str, Path], shm: str) -> list[str]:
        scratch = self.net.folder / f"{self.space}-files"
        (scratch / "tmp").mkdir(parents=True)
        lines = ["set -e", f"mount -t tmpfs tmpfs {scratch}/tmp", f"mkdir -p {scratch}/tmp/{{etc,work,tmp}}"]
        lines += [
            f"mount -t overlay overlay -o lowerdir=/etc,upperdir={scratch}/tmp/etc,workdir={scratch}/tmp/work /etc",
            f"mount --bind {self.net.hosts} /etc/hosts",
            "echo nameserver 127.0.0.1 > /etc/resolv.conf",  # no answer is one too, and comes at once
            "mount -t tmpfs tmpfs /mnt",
            f"mount -t tmpfs -o size={shm} tmpfs /dev/shm",
        ]
        for path, folder in mounts.items():
            lines += [f"mkdir -p {path}", f"mount --bind {folder} {path}"]
        return [*lines, f"mkdir {scratch}/tmp/tmp/ray; mount --bind {scratch}/tmp/tmp /tmp", "set +e"]

    def _run(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        spaces = ["ip", "netns", "exec", self.space, "unshare", "--mount", "--pid", "--fork", "--kill-child=KILL"]
        with log.open("wb") as stream:
            return subprocess.Popen(
                [*spaces, "--mount-proc", *command], stdout=stream, stderr=subprocess.STDOUT, env=self.environment
            )

    def exec(self, command: str, timeout: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        """Run a command in the pod, as `kubectl exec` does."""
        init = int(subprocess.check_output(["pgrep", "-P", str(self.process.pid)], text=True).split()[0])
        enter = ["nsenter", "--target", str(init), "--net", "--mount", "--pid", "bash", "-c", command]
        return subprocess.run(enter, capture_output=True, text=True, env=self.environment, timeout=timeout)

    def processes(self, of: str) -> list[psutil.Process]:
        """Those of its processes whose command line begins with such a program and argument, e.g. `emoray train`."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if of in " ".join(word.rpartition("/")[2] for word in process.cmdline()[:3]):
                    found.append(process)
        return found

    def kill(self) -> None:
        """All of its processes at once."""
        self.process.kill()
        self.process.wait()
        self.net.unplug(self.space)


class Network:
    """A bridge on this machine, and a name service: all of it is gone when the block ends.

    Args:
        folder: for scripts, logs and what pods share.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        number = next(_networks)
        self._bridge = f"em{os.getpid()}{chr(ord('a') + number)}"
        self._subnet = f"10.{213 + number}.{os.getpid() % 250 + 1}"
        self._count = 1
        self._spaces: list[str] = []
        self.pods: list[Pod] = []
        self.hosts = folder / "hosts"

    def __enter__(self) -> Network:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hosts.write_text("127.0.0.1 localhost\n")
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self._subnet}.1/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for pod in self.pods:
            if pod.process.poll() is None:
                pod.process.kill()
                pod.process.wait()
        for space in self._spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)
        subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True)

    def plug(self) -> tuple[str, str]:
        """A namespace's name, and its address."""
        self._count += 1
        space, address = f"{self._bridge}-{self._count}", f"{self._subnet}.{self._count}"
        link = f"v{self._count}{self._bridge}"
        _ip("netns", "add", space)
        self._spaces.append(space)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", link, "master", self._bridge, "up")
        _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        _ip("-n", space, "link", "set", "lo", "up")
        # By the way out Ray finds out which address is its own; there is none.
        _ip("-n", space, "route", "add", "default", "via", f"{self._subnet}.1")
        return space, address

    def unplug(self, space: str) -> None:
        _ip("netns", "delete", space)
        self._spaces.remove(space)

    def call(self, name: str, address: str) -> None:
        """Let pods reach an address by a service's name. The file is the same, for pods have it mounted."""
        lines = [line for line in self.hosts.read_text().splitlines() if not line.endswith(f" {name}")]
        with self.hosts.open("r+") as stream:
            stream.write("\n".join([*lines, f"{address} {name}"]) + "\n")
            stream.truncate()

    def redis(self, stateful_set: Object, password: str, data: Path) -> Pod:
        """The StatefulSet's one pod, with this machine's redis-server."""
        (container,) = stateful_set["spec"]["template"]["spec"]["containers"]
        arguments = [word.replace("$(REDIS_PASSWORD)", password) for word in container["args"]]
        data.mkdir(exist_ok=True)
        command = shlex.join(["redis-server", *arguments, "--dir", "/mnt/data"])
        pod = Pod(self, "redis", command, {"PATH": os.environ["PATH"]}, {"/mnt/data": data})
        self.pods.append(pod)
        self.call(stateful_set["metadata"]["name"], pod.ip)
        return pod


class RayPods:
    """A RayCluster's pods.

    Args:
        thing: a RayJob, RayService or RayCluster, rendered.
        volumes: name of a volume -> folder here.
        password: of Redis, where the cluster keeps its state there.
    """

    def __init__(self, net: Network, thing: Object, volumes: dict[str, Path], password: str = "") -> None:
        spec = thing["spec"]
        self.net, self.kind, self.volumes, self._password = net, thing["kind"], volumes, password
        self.name = thing["metadata"]["name"]
        self.spec = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
        self._service = f"{self.name}-head-svc.emoray.svc.cluster.local"
        self.head: Pod | None = None
        self.workers: list[Pod] = []

    def start(self, workers: int) -> None:
        """The head, then workers; returns when all are ready by KubeRay's probes."""
        self.start_head()
        (group,) = self.spec["workerGroupSpecs"]
        address = {"address": f"{self._service}:6379"}
        self.workers = [self._pod(f"worker-{n}", group, address) for n in range(workers)]
        for pod in self.workers:
            self._until_ready(pod)

    def start_head(self) -> None:
        """A first head, or another one in the place of one that is gone."""
        params = {"dashboard-host": "0.0.0.0", "no-monitor": "true"}
        if self._password:
            params["redis-password"] = "$REDIS_PASSWORD"
        self.head = self._pod("head", self.spec["headGroupSpec"], params)
        self.net.call(self._service, self.head.ip)
        self._until_ready(self.head)
        wait_until(self._dashboard_answers, "the dashboard")  # the operator asks again until it does

    def _dashboard_answers(self) -> bool:
        with suppress(requests.ConnectionError):
            return self.request("GET", "/api/version").status_code == 200
        return False

    @property
    def dashboard(self) -> str:
        assert self.head is not None
        return f"http://{self.head.ip}:8265"

    def request(self, method: str, path: str, content: Any = None, token: str | None = TOKEN) -> requests.Response:
        """As the operator asks the dashboard."""
        headers = {} if token is None else {"x-ray-authorization": f"Bearer {token}"}
        return requests.request(method, self.dashboard + path, json=content, headers=headers, timeout=60)

    def _pod(self, name: str, group: Object, params: dict[str, str]) -> Pod:
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        (shm,) = [volume["emptyDir"]["sizeLimit"] for volume in spec["volumes"] if volume["name"] == "shm"]
        pod = Pod(
            self.net,
            f"{self.name}-{name}",
            f"ulimit -n 65536; {self._command(name == 'head', group, params, container['resources']['limits'])}",
            self._environment(name, container),
            {path: self.volumes[volume] for volume, path in mounts.items() if volume in self.volumes},
            shm.removesuffix("i").lower(),
        )
        self.net.pods.append(pod)
        return pod

    def _command(self, head: bool, group: Object, params: dict[str, str], limits: Object) -> str:
        """As `generateRayStartCommand` of the operator puts it together."""
        memory = _bytes(limits["memory"])
        defaults = {"num-cpus": str(_whole(limits["cpu"])), "memory": str(memory), "metrics-export-port": "8080"}
        defaults |= {"dashboard-agent-listen-port": "52365", **params, **group["rayStartParams"]}
        flags = " ".join(f"--{name}={value}" if value != "true" else f"--{name}" for name, value in defaults.items())
        return f"ray start {'--head ' if head else ''}{flags} --block"

    def _environment(self, name: str, container: Object) -> dict[str, str]:
        head = name == "head"
        address = "127.0.0.1" if head else self._service
        given = {variable["name"]: variable["value"] for variable in container.get("env", [])}
        theirs = {
            "RAY_CLUSTER_NAME": self.name,
            "RAY_CLOUD_INSTANCE_ID": f"{self.name}-{name}",
            "RAY_NODE_TYPE_NAME": "headgroup" if head else "workers",
            "RAY_PORT": "6379",
            "RAY_ADDRESS": f"{address}:6379",
            "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
            **({"RAY_enable_autoscaler_v2": "true"} if head else {"FQ_RAY_IP": address}),
        }
        if self.kind == "RayService":
            theirs |= {"RAY_timeout_ms_task_wait_for_death_info": "0", "RAY_gcs_server_request_timeout_seconds": "5"}
            theirs |= {"RAY_SERVE_KV_TIMEOUT_S": "5"}
        if self.spec["authOptions"]["mode"] == "token":
            theirs |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        if "gcsFaultToleranceOptions" in self.spec and head:
            redis = self.spec["gcsFaultToleranceOptions"]["redisAddress"]
            theirs |= {"RAY_external_storage_namespace": self.name, "RAY_REDIS_ADDRESS": redis}
            theirs |= {"REDIS_PASSWORD": self._password}
        elif "gcsFaultToleranceOptions" in self.spec:
            theirs |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        image = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),  # what the image has installed
            "HOME": "/tmp",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "300",
        }
        return {**image, **given, **theirs}

    def _until_ready(self, pod: Pod) -> None:
        """Wait as KubeRay's readiness probe does."""

        def ready() -> bool:
            assert pod.process.poll() is None, pod.log.read_text()
            try:
                return requests.get(f"http://{pod.ip}:52365/api/healthz", timeout=5).status_code == 200
            except requests.ConnectionError:
                return False

        wait_until(ready, f"{pod.name} to be ready")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _bytes(quantity: str) -> int:
    return int(quantity.removesuffix("Gi")) << 30


def _whole(cpus: str | int) -> int:
    """KubeRay rounds up."""
    return -(-int(cpus.removesuffix("m")) // 1000) if isinstance(cpus, str) and cpus.endswith("m") else int(cpus)
