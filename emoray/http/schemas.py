"""The bodies of all dialects, as strict models: what comes in is checked by them, what goes out is described by them.

Our own requests refuse fields they don't know. Those of other servers ignore them, as those servers do: their clients
send fields that mean nothing here (`options`, `user`, `encoding_format`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema

from emoray.http.ranking import Function
from emoray.http.service import State

Text = Annotated[str, Field(pattern=r"\S", description="Not empty, nor blank.", examples=["i feel wonderful today"])]


_INK = re.compile(r"[^\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
"""What is not Unicode White_Space: the `\\S` of pydantic's patterns. Python's own differs by four characters."""


def is_blank(text: str) -> bool:
    """Whether `Text` refuses it, for texts that come another way."""
    return _INK.search(text) is None


def _whole(value: object) -> object:
    """3.0 is a whole number to JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


TopK = Annotated[
    int,
    Field(ge=1, le=10_000, description="So many of the likeliest labels; all where it is null."),
    BeforeValidator(_whole),
]
Score = Annotated[float, Field(description="A probability; or what another function was asked for.")]

_TEXT_SCHEMA: dict[str, Any] = {"type": "string", "pattern": r"\S", "description": "Not empty, nor blank."}
_LIST_SCHEMA: dict[str, Any] = {"type": "array", "minItems": 1, "items": _TEXT_SCHEMA}


def _listed(value: object) -> object:
    """One text as a list of one."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("must be a text or a list of texts")
    return value


OneOrMore = Annotated[
    list[Text],
    Field(min_length=1, fail_fast=True),  # of a million wrong items the first will do
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [_TEXT_SCHEMA, _LIST_SCHEMA], "examples": ["i feel wonderful today"]}),
]


class Strict(BaseModel):
    """No coercion: the number 1 is neither a string nor a boolean."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class Own(Strict):
    model_config = ConfigDict(extra="forbid")


# Our own


class ClassifyRequest(Own):
    texts: Annotated[list[Text], Field(min_length=1, fail_fast=True)]
    top_k: TopK | None = None
    truncate: Annotated[bool, Field(description="Cut texts that are too long; else they are refused.")] = True
    explain: Annotated[
        bool,
        Field(
            description="Say which words pulled each prediction; each word counts as one more text against the limit."
        ),
    ] = False


class WordBody(Strict):
    word: Annotated[str, Field(description="As it stands in the text.")]
    start: Annotated[int, Field(ge=0, description="Index of its first character, in code points.")]
    end: Annotated[int, Field(ge=0, description="Index after its last character.")]
    effect: Annotated[
        float, Field(description="By how much it raises the log-odds of the label; below 0 where it speaks against it.")
    ]


class PredictionBody(Strict):
    label: str
    score: Annotated[float, Field(ge=0, le=1)]
    scores: Annotated[dict[str, float], Field(description="Label to probability, the likeliest first.")]
    truncated: Annotated[bool, Field(description="The text was cut to the model's length.")]
    tokens: Annotated[int, Field(ge=0, description="Tokens that the model saw.")]
    words: Annotated[list[WordBody] | None, Field(description="Only where `explain` was asked for.")] = None


class ClassifyResponse(Strict):
    model: Annotated[str, Field(description="name@fingerprint of the model that answered.")]
    predictions: list[PredictionBody]


class ModelRequest(Own):
    model: Annotated[str, Field(min_length=1, max_length=4096, description="Folder, URI or run of the new model.")]


class SwapResponse(Strict):
    swap: dict[str, Any]


# Hugging Face's inference API


class HuggingFaceParameters(Strict):
    top_k: TopK | None = None
    function_to_apply: Function | None = None


class HuggingFaceRequest(Strict):
    inputs: OneOrMore
    parameters: HuggingFaceParameters | None = None


class LabelScore(Strict):
    label: str
    score: Score


# text-embeddings-inference


class TeiInputs(BaseModel):
    """Texts of a request, and whether it was a single one, whose answer is flat."""

    texts: list[str]
    single: bool


def _tei_inputs(value: object) -> TeiInputs:
    """`"a"`, `["a"]`, or the batch `[["a"], ["b"]]`; two strings side by side are a pair there."""
    if isinstance(value, str):
        return TeiInputs(texts=[_filled(value, "")], single=True)
    if not isinstance(value, list) or not value:
        raise ValueError('must be a text, or a batch of texts: [["first"], ["second"]]')
    if all(isinstance(item, str) for item in value):
        if len(value) > 1:
            raise ValueError('a list of strings is a pair of texts here; send a batch as [["first"], ["second"]]')
        return TeiInputs(texts=[_filled(value[0], "[0]")], single=True)
    for place, item in enumerate(value):
        if not isinstance(item, list) or len(item) != 1 or not isinstance(item[0], str):
            raise ValueError(f'item {place} of a batch must be a list with one text: [["first"], ["second"]]')
    return TeiInputs(texts=[_filled(item[0], f"[{place}]") for place, item in enumerate(value)], single=False)


def _filled(text: str, place: str) -> str:
    if is_blank(text):
        raise ValueError(f"{'item ' + place + ' ' if place else ''}must not be empty or blank")
    return text


class TeiRequest(Strict):
    inputs: Annotated[
        TeiInputs,
        PlainValidator(_tei_inputs),
        WithJsonSchema(
            {
                "anyOf": [
                    _TEXT_SCHEMA,
                    {**_LIST_SCHEMA, "maxItems": 1},
                    {"type": "array", "minItems": 1, "items": {**_LIST_SCHEMA, "maxItems": 1}},
                ],
                "examples": ["i feel wonderful today", [["i feel wonderful today"], ["leave me alone"]]],
            }
        ),
    ]
    truncate: bool | None = None
    truncation_direction: Annotated[
        Literal["right", "Right"] | None, Field(description="Long texts lose their end, never their beginning.")
    ] = None
    raw_scores: Annotated[bool, Field(description="Logits instead of probabilities.")] = False


# infinity, vLLM


class InfinityRequest(Strict):
    input: OneOrMore
    model: Annotated[str | None, Field(description="The served model's name; may be left out.")] = None
    raw_scores: Annotated[bool, Field(description="Logits instead of probabilities.")] = False


class Usage(Strict):
    prompt_tokens: int
    total_tokens: int


class InfinityResponse(Strict):
    object: Literal["classify"]
    id: str
    created: Annotated[int, Field(description="Seconds since 1970.")]
    model: str
    data: Annotated[list[list[LabelScore]], Field(description="A list for each text, the likeliest label first.")]
    usage: Usage


# KServe V2


class V2Input(Strict):
    name: Annotated[Literal["text"], Field(description="The model has this input only.")]
    shape: Annotated[
        list[Annotated[int, Field(ge=1, le=2**31), BeforeValidator(_whole)]],
        Field(min_length=1, max_length=2, description="[texts] or [texts, 1]"),
    ]
    datatype: Literal["BYTES"]
    parameters: Annotated[dict[str, Any] | None, Field(description="`binary_data_size` in the binary form.")] = None
    data: Annotated[
        Annotated[list[Text | Annotated[list[Text], Field(fail_fast=True)]], Field(fail_fast=True)] | None,
        Field(description="The texts; left out in the binary form."),
    ] = None


class V2RequestedOutput(Strict):
    name: Literal["label", "scores"]
    parameters: Annotated[dict[str, Any] | None, Field(description="`binary_data`: answer in the binary form.")] = None


class V2Request(Strict):
    id: str | None = None
    inputs: Annotated[list[V2Input], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[V2RequestedOutput] | None, Field(description="Both where it is left out.")] = None
    parameters: Annotated[dict[str, Any] | None, Field(description="`binary_data_output`: as `binary_data`.")] = None


class V2Output(Strict):
    name: str
    shape: list[int]
    datatype: Literal["BYTES", "FP32"]
    data: list[str] | list[float] | None = None
    parameters: dict[str, Any] | None = None


class V2Response(Strict):
    id: str | None = None
    model_name: str
    model_version: str
    parameters: Annotated[dict[str, Any], Field(description="`labels`: the columns of `scores`.")]
    outputs: list[V2Output]


class V2TensorMetadata(Strict):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = None


class V2ModelMetadata(Strict):
    name: str
    versions: list[str]
    platform: str
    inputs: list[V2TensorMetadata]
    outputs: list[V2TensorMetadata]


class V2ServerMetadata(Strict):
    name: str
    version: str
    extensions: list[str]


class V2Live(Strict):
    live: bool


class V2Ready(Strict):
    ready: bool


class V2ModelReady(Strict):
    name: str
    ready: bool


# About the endpoint


class Health(Strict):
    status: Literal["ok", "ready"]


class Limits(Strict):
    max_texts: int
    max_body_bytes: int
    max_length: Annotated[int | None, Field(description="Tokens; longer texts are cut.")]
    timeout_s: float


class Info(BaseModel):
    """`swap` is the state of a model change; further fields depend on what serves."""

    model: Annotated[str | None, Field(description="name@fingerprint; null until there is one.")]
    model_id: str | None
    fingerprint: str | None
    labels: list[str]
    state: State
    engine: Annotated[str | None, Field(description="torch, onnx or onnx-int8.")]
    engines: Annotated[dict[str, Any], Field(description="What `auto` measured at warm-up, in milliseconds.")]
    limits: Limits
    versions: dict[str, str]
    swap: dict[str, Any]


class ErrorBody(Strict):
    error: Annotated[str, Field(description="A sentence a person can act on.")]
    error_type: str
