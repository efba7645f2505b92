"""The dialect of infinity, which vLLM's clients speak too."""

from __future__ import annotations

import time

from emoray.http.errors import no_such
from emoray.http.exchange import Exchange, Reply, reply
from emoray.http.ranking import ranked
from emoray.http.route import Endpoint, Route
from emoray.http.schemas import InfinityRequest, InfinityResponse
from emoray.http.service import Service

_ANY = (None, "", "default/not-specified")
"""What stands for the served model; the last is what infinity's own clients send by default."""


async def classify(exchange: Exchange, endpoint: Endpoint) -> Reply:
    request = await exchange.json(InfinityRequest)
    _need_model(request.model, endpoint.service)
    answer = await endpoint.classify(exchange, request.input)
    tokens = sum(prediction.tokens for prediction in answer.predictions)
    return reply(
        {
            "object": "classify",
            "id": exchange.request_id,
            "created": int(time.time()),
            "model": answer.model,
            "data": ranked(answer, "none" if request.raw_scores else "softmax"),
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


def _need_model(name: str | None, service: Service) -> None:
    identity = service.identity
    if identity is not None and name not in (*_ANY, identity.name, str(identity)):
        raise no_such("model", identity.name)


ROUTES = (
    Route(
        "POST",
        "/classify",
        classify,
        "Classify, as infinity and vLLM do",
        "infinity, vLLM",
        InfinityResponse,
        InfinityRequest,
        {"input": ["i feel wonderful today", "leave me alone"]},
        errors=("not_found",),
    ),
)
