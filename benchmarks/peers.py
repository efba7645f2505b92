"""Servers that `make bench-serve` compares: how each is installed, started and asked."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

CACHE = Path(os.environ.get("EMORAY_CACHE") or Path.home() / ".cache" / "emoray") / "bench"
"""Environments and copies of the model for peers."""
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """One server.

    Attributes:
        name: in the table.
        packages: what its environment holds beside torch; empty: this project's own environment.
        command: from (its Python, model folder, port) to what is run.
        path: of the route that is asked.
        body: from texts to what is posted there.
    """

    name: str
    packages: tuple[str, ...]
    command: Callable[[Path, Path, int], list[str]]
    path: str
    body: Callable[[list[str]], dict[str, object]]

    @property
    def is_ours(self) -> bool:
        return not self.packages

    def python(self) -> Path:
        """Its interpreter; the environment is made where it is missing.

        torch is the release that runs here, so that all compute with the same kernels.
        """
        if self.is_ours:
            return Path(sys.executable)
        folder = CACHE / self.name.replace(" ", "-").lower()
        python = folder / "bin" / "python"
        if not (folder / ".done").exists():
            print(f"Installing {self.name} into {folder}", file=sys.stderr)
            venv.create(folder, with_pip=True)
            install = [str(python), "-m", "pip", "install", "--quiet", f"torch=={version('torch')}", *self.packages]
            subprocess.run(install, check=True)
            (folder / ".done").touch()
        return python


def _ours(*overrides: str) -> Callable[[Path, Path, int], list[str]]:
    def command(python: Path, model: Path, port: int) -> list[str]:
        # None of the peers refuses anything: the queue is as long as theirs.
        given = [f"http.port={port}", "limits.max_queue_s=60", "limits.timeout_s=60", *overrides]
        return [str(python), "-m", "emoray.cli", "serve", str(model), "--json", *given]

    return command


def _infinity(python: Path, model: Path, port: int) -> list[str]:
    options = ["--model-id", str(model), "--served-model-name", "m", "--engine", "torch", "--device", "cpu"]
    options += ["--no-bettertransformer", "--no-compile", "--host", "127.0.0.1", "--port", str(port)]
    return [str(python.parent / "infinity_emb"), "v2", *options]


def _script(name: str) -> Callable[[Path, Path, int], list[str]]:
    return lambda python, model, port: [str(python), str(_HERE / name), str(model), str(port)]


def _texts(texts: list[str]) -> dict[str, object]:
    return {"texts": texts}


def _input(texts: list[str]) -> dict[str, object]:
    return {"input": texts}


_TWO = ("replicas.min=2", "replicas.max=2", "replicas.num_cpus=1")
_ONE = ("replicas.max=1", f"replicas.num_cpus={os.cpu_count()}")
_TRANSFORMERS = f"transformers=={version('transformers')}"

PEERS = {
    peer.name: peer
    for peer in (
        Peer("emoray", (), _ours(*_TWO), "/v1/classify", _texts),
        Peer("emoray, 1 replica", (), _ours(*_ONE), "/v1/classify", _texts),
        Peer("emoray, fp32", (), _ours(*_TWO, "engine=onnx"), "/v1/classify", _texts),
        Peer("emoray, torch", (), _ours(*_TWO, "engine=torch"), "/v1/classify", _texts),
        Peer("emoray, Ray's proxy", (), _ours(*_TWO, "http.proxy=ray"), "/v1/classify", _texts),
        Peer(
            "infinity",
            ("infinity-emb[server,torch]==0.0.78", "transformers==4.48.3"),
            _infinity,
            "/classify",
            lambda texts: {"model": "m", "input": texts},
        ),
        Peer("LitServe", ("litserve", _TRANSFORMERS), _script("peer_litserve.py"), "/predict", _input),
        Peer("Ray Serve", (f"ray[serve]=={version('ray')}", _TRANSFORMERS), _script("peer_ray_serve.py"), "/", _input),
    )
}
"""By name, in the table's order. `emoray` chooses engine and proxy by itself; a replica a core."""


def plain_copy(model: Path) -> Path:
    """The model as an older transformers reads it: its tokenizer's class had another name."""
    folder = CACHE / "models" / model.resolve().as_posix().strip("/").replace("/", "-")
    if not folder.exists():
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("onnx", "training", "manifest.json"))
        file = folder / "tokenizer_config.json"
        content = json.loads(file.read_text())
        content["tokenizer_class"] = str(content.get("tokenizer_class", "BertTokenizer")).removesuffix("Fast") + "Fast"
        file.write_text(json.dumps({key: value for key, value in content.items() if key != "backend"}))
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
