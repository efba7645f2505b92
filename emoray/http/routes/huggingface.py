"""The inference API of Hugging Face: what `huggingface_hub.InferenceClient(url).text_classification(text)` speaks."""

from __future__ import annotations

from emoray.http.exchange import Exchange, Reply, reply
from emoray.http.ranking import ranked
from emoray.http.route import Endpoint, Route
from emoray.http.schemas import HuggingFaceParameters, HuggingFaceRequest, LabelScore


async def infer(exchange: Exchange, endpoint: Endpoint) -> Reply:
    request = await exchange.json(HuggingFaceRequest)
    answer = await endpoint.classify(exchange, request.inputs)
    parameters = request.parameters or HuggingFaceParameters()
    return reply(ranked(answer, parameters.function_to_apply or "softmax", parameters.top_k))


ROUTES = (
    Route(
        "POST",
        "/",
        infer,
        "Classify, as the Hugging Face inference API does",
        "Hugging Face",
        list[list[LabelScore]],
        HuggingFaceRequest,
        {"inputs": "i feel wonderful today", "parameters": {"top_k": 2}},
        about="One inner list a text, even for a single text.",
    ),
)
