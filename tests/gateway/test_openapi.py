"""The OpenAPI document that the gateway serves: complete, well-formed, and closed like the rest."""

import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import msgspec
from starlette.routing import Route

from cortex.gateway.openapi import OPERATIONS, described
from tests.gateway.test_edge import routes_of
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for each in value.values():
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


async def test_every_route_is_in_the_document_and_every_reference_leads_somewhere() -> None:
    async with run_gateway({}) as gateway:
        response = await gateway.get("/openapi.json")
        assert (response.status, response.content_type) == (200, "application/json")
        whole = await response.json()
        routes = {(method.lower(), path) for method, path in routes_of(gateway) if method != "HEAD"}
    assert whole["openapi"] == "3.1.0"
    told = {
        (method, re.sub(r"\{\w+\}", "m", path))
        for path, methods in whole["paths"].items()
        for method in methods
    }
    assert routes <= told
    assert ("get", "/openapi.json") in told
    schemas = whole["components"]["schemas"]
    assert "cortex." not in msgspec.json.encode(whole).decode()
    for reference in references(whole):
        assert reference.removeprefix("#/components/schemas/") in schemas


def test_what_is_described_is_a_route_and_what_is_not_has_its_name() -> None:
    async def later() -> None: ...

    routes = [Route("/v1/models/{name:path}", later), Route("/later", later, methods=["POST"])]
    model, unknown = described(routes)
    assert model in OPERATIONS
    assert (unknown.method, unknown.path, unknown.summary) == ("POST", "/later", "later")


async def test_all_that_is_described_is_served() -> None:
    async with run_gateway({}) as gateway:
        routes = set(routes_of(gateway))
    for each in OPERATIONS:
        path = re.sub(r"\{\w+\}", "m", each.path)
        assert (each.method, path) in routes


async def test_the_document_takes_a_key_where_keys_are_required() -> None:
    async with run_gateway({}, keys=("secret",)) as gateway:
        assert (await gateway.get("/openapi.json")).status == 401
        assert (await gateway.get("/openapi.json", x_api_key="secret")).status == 200


async def test_answers_and_errors_are_as_the_document_says() -> None:
    user = [{"role": "user", "content": "Hi"}]
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            whole = await (await gateway.get("/openapi.json")).json()
            calls = [
                ("get", "/health", None),
                ("get", "/v1/models", None),
                ("get", "/v1/models/m", None),
                ("get", "/plan?model=m", None),
                ("get", "/why/nothing", None),
                ("post", "/v1/chat/completions", {"model": "m", "messages": user}),
                ("post", "/v1/chat/completions", {"model": "m"}),
                ("post", "/v1/completions", {"model": "m", "prompt": "x"}),
                ("post", "/v1/responses", {"model": "m", "input": "x"}),
                ("post", "/v1/responses", {"model": "m"}),
                ("post", "/v1/messages", {"model": "m", "max_tokens": 4, "messages": user}),
                ("post", "/v1/messages", {"model": "m", "messages": user}),
                ("post", "/v1/messages/count_tokens", {"model": "m", "messages": user}),
                ("post", "/nodes/a/undrain", {}),
            ]
            for method, path, body in calls:
                call = gateway.get(path) if body is None else gateway.post(path, body)
                response = await call
                name = path.partition("?")[0].replace("/a/", "/{name}/")
                name = name.replace("models/m", "models/{name}").replace("nothing", "{request_id}")
                status = "200" if response.status == 200 else f"{response.status // 100}XX"
                answers = whole["paths"][name][method]["responses"]
                schema = answers[status]["content"]["application/json"]["schema"]
                valid = jsonschema_rs.Draft202012Validator(
                    {**schema, "components": whole["components"]}
                )
                valid.validate(await response.json())
