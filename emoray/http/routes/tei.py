"""The dialect of text-embeddings-inference."""

from __future__ import annotations

from emoray.http.exchange import Exchange, Reply, reply
from emoray.http.ranking import ranked
from emoray.http.route import Endpoint, Route
from emoray.http.schemas import LabelScore, TeiRequest


async def predict(exchange: Exchange, endpoint: Endpoint) -> Reply:
    request = await exchange.json(TeiRequest)
    answer = await endpoint.classify(exchange, request.inputs.texts, truncate=request.truncate is not False)
    lists = ranked(answer, "none" if request.raw_scores else "softmax")
    return reply(lists[0] if request.inputs.single else lists)


ROUTES = (
    Route(
        "POST",
        "/predict",
        predict,
        "Classify, as text-embeddings-inference does",
        "text-embeddings-inference",
        list[LabelScore] | list[list[LabelScore]],
        TeiRequest,
        {"inputs": [["i feel wonderful today"], ["leave me alone"]]},
        about='One text gives a flat list, a batch `[["a"], ["b"]]` a list of lists. Two strings side by side would be '
        "a pair, which this model does not take.",
    ),
)
