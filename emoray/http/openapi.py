"""OpenAPI 3.1 of the routes, from what answers them: the same models, limits and error table."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from emoray import __version__
from emoray.http.errors import KINDS
from emoray.http.route import Route
from emoray.http.schemas import ErrorBody
from emoray.serve_config import ServeConfig

_REF = "#/components/schemas/{model}"
_EVERY_BODY = ("malformed", "slow_body", "too_large", "unsupported_media_type", "validation")
_EVERY_CLASSIFICATION = ("overloaded", "model", "unavailable", "timeout")
_RETRY = ("overloaded", "unavailable")


def describe(routes: tuple[Route, ...], config: ServeConfig, has_keys: bool) -> dict[str, Any]:
    """The description, JSON-able."""
    models: list[Any] = [(route.request, "validation") for route in routes if route.request is not None]
    _, definitions = models_json_schema([*models, (ErrorBody, "serialization")], ref_template=_REF)
    schemas: dict[str, Any] = dict(definitions.get("$defs", {}))
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas, has_keys)
    _limit(schemas, config.limits.max_texts)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "emoray", "version": __version__, "summary": "Emotions of texts", "description": _ABOUT},
        "tags": [{"name": tag} for tag in dict.fromkeys(route.tag for route in routes)],
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if has_keys:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "basic": {"type": "http", "scheme": "basic", "description": "The key is the password; any user name."},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
    return document


_ABOUT = (
    "One model, several dialects. Texts that are too long are cut, and `/v1/classify` says so. "
    'Every error is `{"error": "a sentence", "error_type": "its kind"}`; every answer has an `X-Request-Id`.'
)


def _operation(route: Route, schemas: dict[str, Any], has_keys: bool) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(route),
        "summary": route.summary,
        "tags": [route.tag],
        "responses": {str(route.status): _good(route, schemas), **_bad(route, has_keys)},
    }
    if route.about:
        operation["description"] = route.about
    names = [segment[1:-1] for segment in route.path.split("/") if segment.startswith("{")]
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in names
        ]
    if route.request is not None:
        content: dict[str, Any] = {"application/json": {"schema": {"$ref": _REF.format(model=route.request.__name__)}}}
        if route.example is not None:
            content["application/json"]["example"] = route.example
        operation["requestBody"] = {"required": True, "content": content}
    if has_keys:
        operation["security"] = [] if route.is_open else [{"bearer": []}, {"basic": []}, {"header": []}]
    return operation


def _operation_id(route: Route) -> str:
    words = [part.strip("{}").replace(".", "_") for part in route.path.split("/") if part]
    return "_".join([route.method.lower(), *words])


def _good(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    if route.response == "text/html":
        return {"description": "A page.", "content": {"text/html": {"schema": {"type": "string"}}}}
    schema = TypeAdapter(route.response).json_schema(ref_template=_REF, mode="serialization")
    schemas.update(schema.pop("$defs", {}))
    name = getattr(route.response, "__name__", "")
    if "title" in schema and schema.get("type") == "object":
        schemas[name] = schema
        schema = {"$ref": _REF.format(model=name)}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    answer: dict[str, Any] = {"description": "The answer.", "content": content}
    if route.binary:
        content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
        answer["headers"] = {
            "Inference-Header-Content-Length": {
                "description": "Bytes of JSON before the tensors, in the binary form.",
                "schema": {"type": "integer", "minimum": 0},
            }
        }
    return answer


def _bad(route: Route, has_keys: bool) -> dict[str, Any]:
    """Status -> answer, for every error that the route can give."""
    kinds = [*route.errors]
    if route.request is not None:
        kinds += _EVERY_BODY
        kinds += () if route.is_admin else _EVERY_CLASSIFICATION
    if not route.is_open and has_keys:
        kinds.append("unauthorized")
    if route.is_admin:
        kinds.append("forbidden")
    if not route.is_open:
        kinds.append("internal")
    answers: dict[str, Any] = {}
    for kind in sorted(set(kinds), key=lambda kind: (KINDS[kind].status, kind)):
        answer = answers.setdefault(
            str(KINDS[kind].status),
            {
                "description": "",
                "content": {"application/json": {"schema": {"$ref": _REF.format(model=ErrorBody.__name__)}}},
            },
        )
        answer["description"] = f"{answer['description']} `{kind}`: {KINDS[kind].meaning}".strip()
        if kind in _RETRY:
            answer["headers"] = {
                "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
            }
    return answers


def _limit(schemas: dict[str, Any], max_texts: int) -> None:
    """The configured number of texts, where the models only know that there must be one."""
    for model, field in (
        ("ClassifyRequest", "texts"),
        ("HuggingFaceRequest", "inputs"),
        ("TeiRequest", "inputs"),
        ("InfinityRequest", "input"),
    ):
        schema = schemas[model]["properties"][field]
        for part in schema.get("anyOf", [schema]):
            if part.get("type") == "array" and "maxItems" not in part:
                part["maxItems"] = max_texts
