"""KServe's V2 protocol (Open Inference Protocol), which Triton's HTTP client speaks, with the binary extension.

https://github.com/kserve/open-inference-protocol, and Triton's extension_binary_data.md for the binary form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic_core import to_json

from emoray import __version__
from emoray.http import v2_binary
from emoray.http.errors import RequestError, invalid, no_such, unavailable
from emoray.http.exchange import JSON, Exchange, Reply, parse, reply
from emoray.http.route import Endpoint, Route
from emoray.http.schemas import (
    V2Live,
    V2ModelMetadata,
    V2ModelReady,
    V2Ready,
    V2Request,
    V2RequestedOutput,
    V2Response,
    V2ServerMetadata,
)
from emoray.http.service import Answer, Identity

_OUTPUTS = ("label", "scores")


async def infer(exchange: Exchange, endpoint: Endpoint) -> Reply:
    exchange.need_type(JSON, v2_binary.OCTETS)
    header, binary = v2_binary.split(await exchange.body(), exchange.headers.get(v2_binary.LENGTH))
    request = parse(header, V2Request)
    wanted = _wanted(request)
    _need_model(exchange, endpoint)
    texts = _texts(request, binary)
    answer = await endpoint.classify(exchange, texts)
    return _answer(request, answer, wanted)


def _wanted(request: V2Request) -> list[tuple[str, bool]]:
    """The outputs that were asked for, and whether each comes in the binary form."""
    everywhere = (request.parameters or {}).get("binary_data_output", False)
    if not isinstance(everywhere, bool):
        raise invalid("parameters.binary_data_output: must be true or false")
    outputs = request.outputs or [V2RequestedOutput(name=name) for name in _OUTPUTS]  # type: ignore[arg-type]
    wanted: dict[str, bool] = {}
    for place, output in enumerate(outputs):
        parameters = output.parameters or {}
        refused = [name for name in ("classification", "shared_memory_region") if name in parameters]
        if refused:
            raise invalid(f"outputs[{place}].parameters.{refused[0]}: not supported; `label` has the likeliest label")
        binary = parameters.get("binary_data", everywhere)
        if not isinstance(binary, bool):
            raise invalid(f"outputs[{place}].parameters.binary_data: must be true or false")
        wanted[output.name] = binary
    return list(wanted.items())


def _need_model(exchange: Exchange, endpoint: Endpoint) -> Identity:
    identity = endpoint.service.identity
    if identity is None:
        raise unavailable("there is no model yet: try again soon", 2)
    name, version = exchange.parts["name"], exchange.parts.get("version")
    if name not in (identity.name, str(identity)):
        raise no_such("model", identity.name)
    if version not in (None, identity.fingerprint):
        raise no_such("version", identity.fingerprint)
    return identity


def _texts(request: V2Request, binary: bytes) -> list[str]:
    tensor = request.inputs[0]
    rows = tensor.shape[0]
    if tensor.shape[1:] not in ([], [1]):
        raise invalid("inputs[0].shape: must be [texts] or [texts, 1]")
    size = (tensor.parameters or {}).get("binary_data_size")
    if (size is None) == (tensor.data is None):
        raise invalid("inputs[0]: must have either `data` or `parameters.binary_data_size`")
    if size is not None:
        return v2_binary.strings(binary, size, rows)
    if binary:
        raise RequestError("malformed", f"{len(binary)} bytes follow the JSON, and no input has a binary_data_size")
    texts = [text for item in tensor.data or [] for text in ([item] if isinstance(item, str) else item)]
    if len(texts) != rows:
        raise invalid(f"inputs[0]: the shape says {rows} texts, but data holds {len(texts)}")
    return texts


def _answer(request: V2Request, answer: Answer, wanted: list[tuple[str, bool]]) -> Reply:
    name, _, version = answer.model.rpartition("@")
    content: dict[str, Any] = {
        "model_name": name,
        "model_version": version,
        "parameters": {"labels": answer.labels},
        "outputs": [],
    }
    if request.id is not None:
        content["id"] = request.id
    tail = b""
    for output, binary in wanted:
        tensor, data = _tensor(output, answer, binary)
        content["outputs"].append(tensor)
        tail += data
    if not any(binary for _, binary in wanted):
        return reply(content)
    header = to_json(content)
    length = (v2_binary.LENGTH, str(len(header)).encode())
    return Reply(header + tail, content_type=v2_binary.OCTETS, headers=(length,))


def _tensor(output: str, answer: Answer, binary: bool) -> tuple[dict[str, Any], bytes]:
    """One output: its JSON, and its bytes in the binary form."""
    rows = len(answer.predictions)
    if output == "label":
        labels = [prediction.label for prediction in answer.predictions]
        tensor = {"name": output, "datatype": "BYTES", "shape": [rows]}
        data = v2_binary.pack(labels) if binary else b""
        values: list[Any] = labels
    else:
        scores = np.array([[p.scores[label] for label in answer.labels] for p in answer.predictions], "<f4")
        tensor = {"name": output, "datatype": "FP32", "shape": [rows, len(answer.labels)]}
        data = scores.tobytes() if binary else b""
        values = scores.ravel().tolist() if not binary else []
    if binary:
        return {**tensor, "parameters": {"binary_data_size": len(data)}}, data
    return {**tensor, "data": values}, b""


async def live(exchange: Exchange, endpoint: Endpoint) -> Reply:
    return reply({"live": True})


async def ready(exchange: Exchange, endpoint: Endpoint) -> Reply:
    endpoint.must_be_ready()
    return reply({"ready": True})


async def server(exchange: Exchange, endpoint: Endpoint) -> Reply:
    return reply({"name": "emoray", "version": __version__, "extensions": ["binary_tensor_data"]})


async def model_ready(exchange: Exchange, endpoint: Endpoint) -> Reply:
    identity = _need_model(exchange, endpoint)
    await ready(exchange, endpoint)
    return reply({"name": identity.name, "ready": True})


async def model(exchange: Exchange, endpoint: Endpoint) -> Reply:
    identity = _need_model(exchange, endpoint)
    labels = len(identity.labels)
    return reply(
        {
            "name": identity.name,
            "versions": [identity.fingerprint],
            "platform": "emoray",
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
            "outputs": [
                {"name": "label", "datatype": "BYTES", "shape": [-1]},
                {
                    "name": "scores",
                    "datatype": "FP32",
                    "shape": [-1, labels],
                    "parameters": {"labels": identity.labels},
                },
            ],
        }
    )


_TAG = "KServe V2"
_MODEL = "/v2/models/{name}"
_VERSION = _MODEL + "/versions/{version}"
_INFER = (
    "The whole body is JSON, or JSON with binary tensors behind it and its length in Inference-Header-Content-Length."
)
_EXAMPLE = {
    "inputs": [
        {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["i feel wonderful today", "leave me alone"]}
    ]
}

ROUTES = (
    Route("GET", "/v2", server, "About the server", _TAG, V2ServerMetadata),
    Route("GET", "/v2/health/live", live, "Is the server up?", _TAG, V2Live, is_open=True),
    Route("GET", "/v2/health/ready", ready, "Will it answer?", _TAG, V2Ready, is_open=True, errors=("unavailable",)),
    *(
        route
        for path in (_MODEL, _VERSION)
        for route in (
            Route("GET", path, model, "About the model", _TAG, V2ModelMetadata, errors=("not_found", "unavailable")),
            Route(
                "GET",
                f"{path}/ready",
                model_ready,
                "Will the model answer?",
                _TAG,
                V2ModelReady,
                errors=("not_found", "unavailable"),
            ),
            Route(
                "POST",
                f"{path}/infer",
                infer,
                "Classify, as KServe V2 and Triton do",
                _TAG,
                V2Response,
                V2Request,
                _EXAMPLE,
                about=_INFER,
                binary=True,
                errors=("not_found",),
            ),
        )
    ),
)
