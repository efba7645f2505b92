from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from serving import Server, serving

from emoray.on_ray import replica


@pytest.fixture(scope="session", autouse=True)
def _eager_replicas() -> Iterator[None]:
    """A change of the model needn't wait for a second here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica, "_LOOK_S", 0.04)
        yield


@pytest.fixture(scope="session")
def endpoint(_eager_replicas: None) -> Iterator[Server]:
    """An open endpoint over the dummy, with small limits and no keys; or one that runs elsewhere, with the same."""
    if elsewhere := os.environ.get("EMORAY_ENDPOINT"):
        yield Server(elsewhere)
        return
    with serving(limits={"max_texts": 50, "max_body_bytes": 20_000, "timeout_s": 3}) as server:
        yield server
        assert server.post("/v1/classify", {"texts": ["still there?"]}).status_code == 200
