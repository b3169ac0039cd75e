"""What the gateway's API takes and answers, as an OpenAPI document made from the wire structs."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cortex.core import anthropic, completions, embeddings, openai, response_items, responses
from cortex.core.build import version
from cortex.gateway.decisions import WhyReport
from cortex.gateway.plans import PlanReport
from cortex.gateway.usage import UsageReport
from cortex.gateway.views import HealthReport, NodeReport

DOCUMENT_PATH = "/openapi.json"

_SCHEMAS = "#/components/schemas/"
# Names that two modules share come out as the whole path of the class.
_LONG_NAME = re.compile(r"(?:cortex\.)(?:\w+\.)*(\w+\.\w+)")
_PARAMETER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path.

    Attributes:
        answers: the structs that an answer may be.
        query: a struct of the parameters that it reads of the query.
        streams: whether the answer may be an event stream.
        error: the envelope of its errors.
    """

    method: str
    path: str
    summary: str
    body: type[msgspec.Struct] | None = None
    answers: tuple[type[msgspec.Struct], ...] = ()
    query: type[msgspec.Struct] | None = None
    streams: bool = False
    error: type[msgspec.Struct] = openai.ErrorBody


class PlanQuery(msgspec.Struct, kw_only=True, frozen=True):
    """The query of `GET /plan`."""

    model: str


OPERATIONS = (
    Operation(method="GET", path="/", summary="State of the fleet", answers=(HealthReport,)),
    Operation(method="GET", path="/health", summary="State of the fleet", answers=(HealthReport,)),
    Operation(
        method="POST",
        path="/v1/chat/completions",
        summary="Answer a conversation",
        body=openai.ChatRequest,
        answers=(openai.ChatCompletion,),
        streams=True,
    ),
    Operation(
        method="POST",
        path="/v1/completions",
        summary="Go on from a text",
        body=completions.CompletionRequest,
        answers=(completions.TextCompletion,),
        streams=True,
    ),
    Operation(
        method="POST",
        path="/v1/embeddings",
        summary="Make vectors of texts",
        body=embeddings.EmbeddingRequest,
        answers=(embeddings.EmbeddingList,),
    ),
    Operation(
        method="POST",
        path="/v1/responses",
        summary="Answer a conversation, and keep the answer",
        body=responses.ResponsesRequest,
        answers=(responses.Response,),
        streams=True,
    ),
    Operation(
        method="POST",
        path="/v1/responses/input_tokens",
        summary="Count the tokens of a request for a response",
        body=responses.ResponsesRequest,
        answers=(responses.InputTokens,),
    ),
    Operation(
        method="GET",
        path="/v1/responses/{response_id}",
        summary="A response that is kept or being made",
        answers=(responses.Response,),
    ),
    Operation(
        method="DELETE",
        path="/v1/responses/{response_id}",
        summary="Forget a response",
        answers=(responses.Deleted,),
    ),
    Operation(
        method="POST",
        path="/v1/responses/{response_id}/cancel",
        summary="End a response that is being streamed",
        answers=(responses.Response,),
    ),
    Operation(
        method="GET",
        path="/v1/responses/{response_id}/input_items",
        summary="The input of a response that is kept",
        query=response_items.ItemsQuery,
        answers=(response_items.ItemPage,),
    ),
    Operation(
        method="POST",
        path="/v1/messages",
        summary="Answer a conversation in Anthropic's dialect",
        body=anthropic.MessagesRequest,
        answers=(anthropic.MessageResponse,),
        streams=True,
        error=anthropic.ErrorResponse,
    ),
    Operation(
        method="POST",
        path="/v1/messages/count_tokens",
        summary="Count the tokens of a conversation",
        body=anthropic.CountTokensRequest,
        answers=(anthropic.CountTokensResponse,),
        error=anthropic.ErrorResponse,
    ),
    Operation(
        method="GET",
        path="/v1/models",
        summary="List the models; in Anthropic's shape with an anthropic-version header",
        query=anthropic.ModelsQuery,
        answers=(openai.ModelList, anthropic.ModelPage),
    ),
    Operation(
        method="GET",
        path="/v1/models/{name}",
        summary="Describe a model; in Anthropic's shape with an anthropic-version header",
        answers=(openai.ModelCard, anthropic.ModelInfo),
    ),
    Operation(
        method="GET",
        path="/v1/usage",
        summary="Limits and spending of the caller's key",
        answers=(UsageReport,),
    ),
    Operation(
        method="GET",
        path="/plan",
        summary="Where a request would go, without doing it",
        query=PlanQuery,
        answers=(PlanReport,),
    ),
    Operation(
        method="GET",
        path="/why/{request_id}",
        summary="The decision about a recent request",
        answers=(WhyReport,),
    ),
    Operation(
        method="POST",
        path="/nodes/{name}/drain",
        summary="Send nothing new to a node",
        answers=(NodeReport,),
    ),
    Operation(
        method="POST",
        path="/nodes/{name}/undrain",
        summary="Use a node again",
        answers=(NodeReport,),
    ),
)


def document_route(routes: Iterable[Route]) -> Route:
    """Return the route that serves the document of all the others, and of itself."""
    own = Operation(method="GET", path=DOCUMENT_PATH, summary="This document")
    body = document([*described(routes), own])

    async def serve(_: Request) -> Response:
        return Response(body, media_type="application/json")

    return Route(DOCUMENT_PATH, serve, methods=["GET"])


def described(routes: Iterable[Route]) -> list[Operation]:
    """Return an operation for every route; one that is not listed above has but a name."""
    known = {(each.method, each.path): each for each in OPERATIONS}
    found = []
    for route in routes:
        for method in sorted((route.methods or {"GET"}) - {"HEAD"}):
            key = method, route.path_format
            found.append(
                known.get(key) or Operation(method=method, path=key[1], summary=route.name)
            )
    return found


def document(operations: Iterable[Operation]) -> bytes:
    """Return the OpenAPI document of some operations, as JSON."""
    operations = list(operations)
    types = {kind for each in operations for kind in _types(each)}
    # In an order of their own, so that the same code always serves the same bytes.
    ordered = sorted(types, key=lambda kind: (kind.__module__, kind.__name__))
    schemas, components = msgspec.json.schema_components(ordered, ref_template=_SCHEMAS + "{name}")
    schema_of = dict(zip(ordered, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for each in operations:
        paths.setdefault(each.path, {})[each.method.lower()] = _operation(each, schema_of)
    whole = {
        "openapi": "3.1.0",
        "info": {"title": "Cortex", "version": version().package_version},
        "security": [{"bearer": []}, {"key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }
    text = msgspec.json.encode(whole).decode()
    return _LONG_NAME.sub(r"\1", text).encode()


def _types(operation: Operation) -> list[type[msgspec.Struct]]:
    body = [] if operation.body is None else [operation.body]
    return [*operation.answers, *body, operation.error]


def _operation(operation: Operation, schema_of: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    error = {"application/json": {"schema": schema_of[operation.error]}}
    answers = [schema_of[each] for each in operation.answers]
    answer = answers[0] if len(answers) == 1 else {"anyOf": answers} if answers else {}
    content: dict[str, Any] = {"application/json": {"schema": answer}}
    if operation.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": _identifier(operation),
        "parameters": _parameters(operation),
        "responses": {
            "200": {"description": "The answer", "content": content},
            "4XX": {"description": "The request cannot be honoured", "content": error},
            "5XX": {"description": "It could not be answered now", "content": error},
        },
    }
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema_of[operation.body]}},
        }
    return described


def _identifier(operation: Operation) -> str:
    words = re.findall(r"\w+", operation.path)
    return "_".join([operation.method.lower(), *words])


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(operation.path)
    ]
    if operation.query is None:
        return found
    (reference,), components = msgspec.json.schema_components(
        [operation.query], ref_template="{name}"
    )
    schema = components[reference["$ref"]]
    required = schema.get("required", [])
    found += [
        {"name": name, "in": "query", "required": name in required, "schema": each}
        for name, each in schema["properties"].items()
    ]
    return found
