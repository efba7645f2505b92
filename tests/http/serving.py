"""A real HTTP server on a free port of 127.0.0.1, over a model of twenty lines."""

from __future__ import annotations

import asyncio
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import requests
import uvicorn

from emoray.http.app import make_app
from emoray.http.keys import Keys
from emoray.http.metrics import Silent
from emoray.metrics import Calibration, softmax
from emoray.on_ray.board import Board
from emoray.on_ray.replica import ReplicaService
from emoray.prediction import Prediction
from emoray.serve_config import ServeConfig
from emoray.tokens import Tokens

LABELS = ("joy", "anger", "fear")
MAX_LENGTH = 16


class Dummy:
    """A token a word; scores from the text's checksum. `boom` fails, `nap` takes 0.2 s."""

    labels = LABELS
    calibration = Calibration()
    max_length = MAX_LENGTH
    engine: Any = SimpleNamespace(name="torch", figures={}, padding=lambda lengths: 0)

    def __init__(self, name: str = "emotion", shift: float = 0.0, fingerprint: str = "0123456789ab") -> None:
        self.facts: dict[str, Any] = {"config": {"run": {"name": name}}, "versions": {"torch": "2"}}
        self.shift, self.fingerprint = shift, fingerprint
        self.known: list[str] = []
        self.computed: list[str] = []

    def encode(self, texts: Sequence[str]) -> Tokens:
        """The first id of a text is its place among all that were ever encoded."""
        start = len(self.known)
        self.known += texts
        words = np.array([len(text.split()) + 2 for text in texts], np.int64)
        lengths = np.minimum(words, MAX_LENGTH)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.zeros(offsets[-1], np.int32)
        ids[offsets[:-1]] = np.arange(start, start + len(texts))
        return Tokens(ids, offsets, words > MAX_LENGTH)

    def seen(self, texts: Sequence[str]) -> list[int]:
        return [len(" ".join(text.split()[: MAX_LENGTH - 2])) for text in texts]

    def forward(self, tokens: Tokens) -> Any:
        texts = [self.known[tokens[i][0]] for i in range(len(tokens))]
        if any("boom" in text.split() for text in texts):
            raise RuntimeError("boom: a secret of the model's innards")
        if any("nap" in text.split() for text in texts):
            time.sleep(0.2)
        self.computed += texts
        sums = np.array([zlib.crc32(text.encode()) for text in texts], np.int64)
        return np.stack([sums % 7 - 3, sums % 11 - 5, sums % 5 - 2], 1).astype(np.float32) / 2 + self.shift

    def decode(self, logits: Any, tokens: Tokens) -> list[Prediction]:
        found = []
        for row, cut, size in zip(softmax(logits), tokens.truncated, tokens.lengths, strict=True):
            order = np.argsort(-row, kind="stable")
            scores = {LABELS[i]: float(row[i]) for i in order}
            found.append(Prediction(LABELS[order[0]], float(row[order[0]]), scores, bool(cut), int(size)))
        return found

    def __call__(self, texts: Sequence[str]) -> list[Prediction]:
        tokens = self.encode(texts)
        return self.decode(self.forward(tokens), tokens)


def load_dummy(location: str) -> Dummy:
    return Dummy()


class Store(dict[bytes, bytes]):
    """The functions of Ray's key-value store that the board uses."""

    def _internal_kv_put(self, key: bytes, value: bytes, overwrite: bool, **_: bytes) -> bool:
        existed = key in self
        if overwrite or not existed:
            self[key] = value
        return existed

    def _internal_kv_get(self, key: bytes, **_: bytes) -> bytes | None:
        return self.get(key)

    def _internal_kv_del(self, key: bytes, del_by_prefix: bool = False, **_: bytes) -> None:
        for known in [known for known in self if known == key or (del_by_prefix and known.startswith(key))]:
            del self[known]

    def _internal_kv_list(self, prefix: bytes, **_: bytes) -> list[bytes]:
        return [key for key in self if key.startswith(prefix)]


class Server:
    """A running endpoint: `server.post("/v1/classify", {...})`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.session = requests.Session()

    def post(self, path: str, content: object = None, **options: Any) -> requests.Response:
        if content is not None:
            options["json"] = content
        return self.session.post(self.url + path, timeout=20, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.session.get(self.url + path, timeout=20, **options)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def wait_until_ready(self) -> None:
        until = time.monotonic() + 60
        while self.get("/ready").status_code != 200:
            assert time.monotonic() < until, "never ready"
            time.sleep(0.02)


@contextmanager
def serving(
    load: Any = load_dummy, keys: Keys | None = None, wait: bool = True, metrics: Any = None, **config: Any
) -> Iterator[Server]:
    settings = ServeConfig.model_validate({"model": "dummy", **config})
    service = ReplicaService(settings, "", Board("app", Store()), "1", metrics or Silent(), load)
    app = make_app(service, settings, keys=keys or Keys(), metrics=metrics)
    server = uvicorn.Server(
        uvicorn.Config(
            app, host="127.0.0.1", port=0, log_level="warning", access_log=False, timeout_graceful_shutdown=5
        )
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    until = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < until
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    running = Server(f"http://127.0.0.1:{port}")
    try:
        if wait:
            running.wait_until_ready()
        yield running
    finally:
        running.session.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not stop"
