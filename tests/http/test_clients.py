"""Clients that nobody here wrote, unchanged, over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from serving import LABELS, Dummy, Server, serving

from emoray.http.keys import Key, Keys

KEY = "a-long-enough-key-for-clients"
TEXTS = ["i feel wonderful", "déjà vu 🙂", "what was that noise"]
EXPECTED = Dummy()(TEXTS)


@pytest.fixture(scope="module")
def keyed() -> Iterator[Server]:
    import hashlib

    with serving(keys=Keys((Key("tests", hashlib.sha256(KEY.encode()).digest()),))) as server:
        yield server


def test_huggingface_hub(keyed: Server) -> None:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError

    client = InferenceClient(keyed.url, token=KEY)
    for text, want in zip(TEXTS, EXPECTED, strict=True):
        assert {item.label: item.score for item in client.text_classification(text)} == want.scores
    top = client.text_classification(TEXTS[0], top_k=2, function_to_apply="softmax")
    assert [item.label for item in top] == list(EXPECTED[0].scores)[:2]
    old = InferenceClient(keyed.url, token=KEY, provider="hf-inference")
    assert old.text_classification(TEXTS[1])[0].label == EXPECTED[1].label
    assert old.get_endpoint_info()["labels"] == list(LABELS)
    assert old.health_check() is True
    with pytest.raises(HfHubHTTPError, match="422"):
        client.text_classification("")
    with pytest.raises(HfHubHTTPError, match="401"):
        InferenceClient(keyed.url, token="hf_wrong").text_classification("a")


@pytest.fixture(scope="module")
def triton(keyed: Server) -> Iterator[Any]:
    http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    from tritonclient.http.auth import BasicAuth

    client = http.InferenceServerClient(keyed.url.removeprefix("http://"))
    client.register_plugin(BasicAuth("anyone", KEY))
    yield client
    client.close()


def test_triton_health_and_metadata(triton: Any) -> None:
    assert triton.is_server_live() and triton.is_server_ready() and triton.is_model_ready("emotion")
    assert not triton.is_model_ready("bert")
    assert triton.get_server_metadata()["name"] == "emoray"
    metadata = triton.get_model_metadata("emotion", model_version="0123456789ab")
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["text"]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
@pytest.mark.parametrize("shape", [[3], [3, 1]])
def test_triton_infers(triton: Any, binary_in: bool, binary_out: bool | None, shape: list[int]) -> None:
    import tritonclient.http as http

    tensor = http.InferInput("text", shape, "BYTES")
    tensor.set_data_from_numpy(np.array(TEXTS, object).reshape(shape), binary_data=binary_in)
    outputs = None
    if binary_out is not None:
        outputs = [http.InferRequestedOutput(name, binary_data=binary_out) for name in ("scores", "label")]
    result = triton.infer("emotion", [tensor], outputs=outputs, request_id="7")
    assert result.get_response()["id"] == "7"
    labels = [label.decode() if isinstance(label, bytes) else label for label in result.as_numpy("label")]
    assert labels == [prediction.label for prediction in EXPECTED]
    scores = result.as_numpy("scores")
    assert scores.dtype == np.float32
    assert scores == pytest.approx(np.array([[p.scores[name] for name in LABELS] for p in EXPECTED]))


def test_triton_shows_our_errors(triton: Any) -> None:
    import tritonclient.http as http
    from tritonclient.utils import InferenceServerException

    tensor = http.InferInput("text", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([""], object))
    with pytest.raises(InferenceServerException, match="text 0 of the binary tensor is empty"):
        triton.infer("emotion", [tensor])
    with pytest.raises(InferenceServerException, match="no such model"):
        triton.infer("bert", [tensor])
