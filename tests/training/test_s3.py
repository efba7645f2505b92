"""Runs on an object store, through pyarrow's own S3 client and a server that speaks S3: killed, they end the same."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from harness import Death, configure_from, litter, outcome, run_to_the_end, run_training

from emoray.classifier import find_model
from emoray.errors import StorageError
from emoray.storage import Storage, below

SERVER = os.environ.get("EMORAY_TEST_MOTO_SERVER", "")
pytestmark = pytest.mark.skipif(
    not SERVER,
    reason="no S3: set EMORAY_TEST_MOTO_SERVER to the moto_server of moto[s3] 5.2.5, with flask and flask-cors",
)
DEATHS = [Death("emoray.storage:Storage.growing", 12), Death("emoray.learner:Learner._update", 5)]
"""Killed while it uploads a checkpoint's files, and between two steps."""


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """`run.storage_path` of a bucket that is served here."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = f"127.0.0.1:{listener.getsockname()[1]}"
    command = [SERVER, "-H", "127.0.0.1", "-p", place.rpartition(":")[2]]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                assert requests.put(f"http://{place}/bucket", timeout=10).ok
                break
            except requests.ConnectionError:
                assert time.monotonic() < until and server.poll() is None, "no S3"
                time.sleep(0.1)
        yield f"s3://bucket/runs?region=us-east-1&endpoint_override=http://{place}"
    finally:
        server.kill()
        server.wait()


def test_killed_and_given_again(store: str, material: Path, tmp_path: Path, undisturbed: Any) -> None:
    config = configure_from(material, store, "run.name=killed")  # type: ignore[arg-type]
    assert run_to_the_end(config, 1, DEATHS) == len(DEATHS)
    Storage(below(store, "killed")).download(tmp_path)
    assert outcome(tmp_path) == undisturbed(1)
    assert litter(tmp_path) == []
    assert find_model(below(store, "killed")).exists("model.safetensors")


def test_a_bucket_that_is_not_there_is_one_message(store: str, material: Path) -> None:
    nowhere = store.replace("bucket/", "nowhere/")
    with pytest.raises(StorageError, match="nowhere/runs/x") as caught:
        run_training(configure_from(material, nowhere, "run.name=x"))  # type: ignore[arg-type]
    assert not caught.value.passing and "\n" not in str(caught.value)
