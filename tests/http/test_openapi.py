"""The description is true: schemathesis sends what it allows and what it forbids, and compares the answers."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server, serving

from emoray.http.keys import Key, Keys
from emoray.http.routes import ROUTES

KEY = "the-key-of-schemathesis"


@pytest.fixture(scope="module")
def keyed() -> Iterator[Server]:
    if elsewhere := os.environ.get("EMORAY_ENDPOINT"):
        yield Server(elsewhere)
        return
    keys = Keys((Key("fuzzer", hashlib.sha256(KEY.encode()).digest(), admin=True),))
    with serving(keys=keys, limits={"max_texts": 20}) as server:
        server.session.headers["Authorization"] = f"Bearer {KEY}"
        yield server


def test_every_route_is_described_and_every_reference_leads_somewhere(keyed: Server) -> None:
    document = keyed.get("/openapi.json").json()
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert described == {(route.method, route.path) for route in ROUTES}
    ids = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(ids) == len(set(ids))

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "$ref":
                    yield value
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    for reference in set(references(document)):
        node = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]
    for path, item in document["paths"].items():
        for operation in item.values():
            for status, answer in operation["responses"].items():
                if status >= "400":
                    schema = answer["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorBody"}, path
    assert document["components"]["schemas"]["ClassifyRequest"]["properties"]["texts"]["maxItems"] == 20


# Too many texts are a 413, which schemathesis does not expect by itself; nor can a schema say how many words there are
# to explain. A random name of a model only ever meets a
# 404. And that a tensor's shape must fit its data is more than a JSON schema can say.
CONFIGURATION = """
checks.enabled = true
checks.negative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 409, 413, 415, 422, 429]

[[operations]]
include-path-regex = "^/v1/classify$"
checks.positive_data_acceptance.expected-statuses = ["2xx", 401, 403, 404, 409, 413, "5xx"]

[[operations]]
include-path-regex = "/infer$"
parameters = { name = "emotion", version = "0123456789ab" }
checks.positive_data_acceptance.enabled = false

[[operations]]
include-path-regex = "^/v2/models/"
parameters = { name = "emotion", version = "0123456789ab" }
"""


@pytest.mark.parametrize(
    ("phases", "examples", "at_least"),
    [("fuzzing", 8, 60), pytest.param("examples,coverage,fuzzing,stateful", 100, 2000, marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_schemathesis(keyed: Server, tmp_path: Path, phases: str, examples: int, at_least: int) -> None:
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    command = [sys.executable, "-m", "schemathesis.cli", "run", keyed.url + "/openapi.json"]
    options = ["--mode=all", f"--phases={phases}", f"-n{examples}", "--seed=1", "--no-color"]
    header = ["-H", f"Authorization: Bearer {KEY}"]
    ran = subprocess.run([*command, *options, *header], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    found = re.search(r"(\d+) generated", ran.stdout)
    assert found is not None and int(found[1]) >= at_least
