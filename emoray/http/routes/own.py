"""Our own dialect: everything that is known of a text, and the model's change."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from emoray.http.exchange import Exchange, Reply, reply
from emoray.http.route import Endpoint, Route
from emoray.http.schemas import ClassifyRequest, ClassifyResponse, ModelRequest, SwapResponse


async def classify(exchange: Exchange, endpoint: Endpoint) -> Reply:
    request = await exchange.json(ClassifyRequest)
    answer = await endpoint.classify(exchange, request.texts, request.truncate, request.explain)
    predictions: list[dict[str, Any]] = [
        {
            "label": prediction.label,
            "score": prediction.score,
            "scores": dict(list(prediction.scores.items())[: request.top_k]),
            "truncated": prediction.truncated,
            "tokens": prediction.tokens,
        }
        for prediction in answer.predictions
    ]
    if request.explain:
        for body, explanation in zip(predictions, answer.explanations, strict=True):
            body["words"] = [asdict(word) for word in explanation.words]
    return reply({"model": answer.model, "predictions": predictions})


async def change_model(exchange: Exchange, endpoint: Endpoint) -> Reply:
    request = await exchange.json(ModelRequest)
    await endpoint.service.change_model(request.model)
    return reply({"swap": endpoint.service.info()["swap"]}, status=202)


ROUTES = (
    Route(
        "POST",
        "/v1/classify",
        classify,
        "Classify texts",
        "emoray",
        ClassifyResponse,
        ClassifyRequest,
        {"texts": ["i feel wonderful today", "leave me alone"], "top_k": 2},
        about="Each label's probability, whether a text was cut, and which model answered; with `explain`, which words "
        "pulled each prediction.",
    ),
    Route(
        "PUT",
        "/v1/model",
        change_model,
        "Change the model",
        "emoray",
        SwapResponse,
        ModelRequest,
        {"model": "runs/emotion/best"},
        about="Loads and checks the new model beside the present one, which answers until then and stays if the new "
        "one can't be loaded. `/info` tells how far it is.",
        is_admin=True,
        status=202,
        errors=("conflict",),
    ),
)
