"""What answers without a key, and how the rest is refused."""

import logging
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from cortex.core.entitlements import ApiKey, Entitlements
from cortex.gateway.edge import KeyMiddleware
from cortex.gateway.request_ids import RequestIds
from tests.support.gateway import RunningGateway, run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/messages/count_tokens",
)


def routes_of(gateway: RunningGateway) -> list[tuple[str, str]]:
    """Every (method, path) of the gateway, path parameters filled in."""
    assert isinstance(gateway.apps.api, RequestIds)
    guarded = gateway.apps.api.app
    assert isinstance(guarded, KeyMiddleware)
    app = guarded.app
    assert isinstance(app, Starlette)
    found = []
    for route in app.routes:
        assert isinstance(route, Route)
        path = route.path_format
        for name in route.param_convertors:
            path = path.replace("{" + name + "}", "m")
        found += [(method, path) for method in sorted(route.methods or {"GET"})]
    return found


async def test_of_all_routes_only_health_answers_without_a_key() -> None:
    async with run_gateway({}, keys=("secret",)) as gateway:
        routes = routes_of(gateway)
        assert ("POST", "/v1/chat/completions") in routes
        answered = []
        for method, path in routes:
            async with gateway.session.request(method, gateway.url + path) as response:
                if response.status != 401:
                    answered.append((method, path, response.status))
                else:
                    assert response.headers["www-authenticate"] == "Bearer"
        assert answered == [("GET", "/health", 200), ("HEAD", "/health", 200)]


@pytest.mark.parametrize(
    "path", ["/nope", "/v1/nope", "/health/x", "/health/", "//health", "/docs"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
async def test_an_unknown_path_answers_401_before_404(method: str, path: str) -> None:
    async with run_gateway({}, keys=("secret",)) as gateway:
        async with gateway.session.request(method, gateway.url + path) as response:
            assert response.status == 401


async def test_a_websocket_is_refused_without_a_key() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    async with run_gateway({}, keys=("secret",)) as gateway:
        scope = {"type": "websocket", "path": "/health", "headers": []}
        await gateway.apps.api(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_the_refusal_speaks_the_callers_dialect() -> None:
    async with run_gateway({}, keys=("secret",)) as gateway:
        response = await gateway.chat()
        assert response.status == 401
        error = (await response.json())["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            response = await gateway.post(path, {})
            assert response.status == 401
            body = await response.json()
            assert (body["type"], body["error"]["type"]) == ("error", "authentication_error")


async def test_a_key_opens_every_route_as_bearer_and_as_x_api_key() -> None:
    async with run_gateway({}, keys=("secret",)) as gateway:
        assert (await gateway.get("/v1/models", x_api_key="secret")).status == 200
        assert (await gateway.get("/v1/models", authorization="Bearer secret")).status == 200
        assert (await gateway.get("/", x_api_key="secret")).status == 200
        assert (await gateway.get("/v1/nope", x_api_key="secret")).status == 404


async def test_what_is_not_for_callers_takes_a_key_with_admin() -> None:
    keys = [
        ApiKey(key="plain", account_id="a"),
        ApiKey(key="chief", account_id="a", key_id="chief", admin=True),
    ]
    for required in (True, False):
        entitlements = Entitlements(require_auth=required, keys=keys)
        async with run_gateway({}, entitlements=entitlements) as gateway:
            refused = await gateway.post("/drain", {}, x_api_key="plain")
            assert refused.status == 403
            error = (await refused.json())["error"]
            assert error["code"] == "permission_denied"
            assert "admin = true" in error["message"]
            assert (await gateway.get("/nodes")).status == (401 if required else 403)
            assert (await gateway.post("/nope", {}, x_api_key="chief")).status == 404
            assert (await gateway.get("/v1/models", x_api_key="plain")).status == 200
            assert (await gateway.get("/", x_api_key="plain")).status == 200
            unauthorized = (await gateway.metrics())["cortex_unauthorized_requests_total"]
            assert unauthorized == 2


async def test_a_key_with_a_list_of_models_asks_for_no_plans_but_an_admin_does() -> None:
    keys = [
        ApiKey(key="plain", account_id="a", models=["m"]),
        ApiKey(key="chief", account_id="b", models=["m"], admin=True),
    ]
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        entitlements = Entitlements(require_auth=True, keys=keys)
        async with run_gateway({"a": neuron.endpoint}, entitlements=entitlements) as gateway:
            assert (await gateway.get("/plan?model=m", x_api_key="plain")).status == 403
            assert (await gateway.get("/plan?model=m", x_api_key="chief")).status == 200
            body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
            asked = await gateway.post("/v1/chat/completions", body, x_api_key="plain")
            path = "/why/" + asked.headers["x-request-id"]
            assert (await gateway.get(path, x_api_key="plain")).status == 200
            assert (await gateway.get(path, x_api_key="chief")).status == 200


async def test_without_keys_everything_is_open() -> None:
    async with run_gateway({}) as gateway:
        assert (await gateway.get("/nope")).status == 404


async def test_a_caller_who_is_still_sending_sees_the_refusal() -> None:
    async with run_gateway({}, keys=("secret",)) as gateway:
        body = b'"' + b"x" * (24 << 20) + b'"'
        response = await gateway.post("/v1/chat/completions", body, x_api_key="wrong")
        assert response.status == 401


async def test_without_a_key_health_tells_no_names_where_keys_are_required() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"beast": neuron.endpoint}, keys=("secret",)) as gateway:
            bare = await (await gateway.get("/health")).text()
            assert '"status":"ok"' in bare
            assert "beast" not in bare
            assert "beast" in await (await gateway.get("/health", x_api_key="secret")).text()


async def test_a_key_with_a_list_of_models_hears_of_no_others_from_health() -> None:
    keys = [
        ApiKey(key="some", account_id="a", models=["m"]),
        ApiKey(key="chief", account_id="b", models=["m"], admin=True),
    ]
    async with MockNeuron(MockModel("other", "loaded")) as neuron:
        entitlements = Entitlements(require_auth=True, keys=keys)
        async with run_gateway({"a": neuron.endpoint}, entitlements=entitlements) as gateway:
            assert "other" not in await (await gateway.get("/health", x_api_key="some")).text()
            assert "other" in await (await gateway.get("/health", x_api_key="chief")).text()


async def test_the_metrics_port_asks_for_a_key_where_the_configuration_says_so() -> None:
    keys = [ApiKey(key="secret", account_id="a")]
    guarded = Entitlements(metrics_require_auth=True, keys=keys)
    async with run_gateway({}, entitlements=guarded) as gateway:
        url = gateway.metrics_url + "/metrics"
        async with gateway.session.get(url) as response:
            assert response.status == 401
        async with gateway.session.get(url, headers={"x-api-key": "secret"}) as response:
            assert response.status == 200
        assert (await gateway.get("/v1/models")).status == 200


async def test_a_key_lists_and_reaches_only_the_models_it_may_use() -> None:
    entitlements = Entitlements(
        require_auth=True, keys=[ApiKey(key="k", account_id="a", models=["m*"])]
    )
    async with MockNeuron(MockModel("m1", "loaded"), MockModel("q9", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, entitlements=entitlements) as gateway:
            listed = await (await gateway.get("/v1/models", x_api_key="k")).json()
            assert [card["id"] for card in listed["data"]] == ["m1"]
            assert (await gateway.get("/v1/models/m1", x_api_key="k")).status == 200
            unknown = []
            for name in ("q9", "m2"):
                body = {
                    "model": name,
                    "max_tokens": 5,
                    "messages": [{"role": "user", "content": "Hi"}],
                }
                response = await gateway.get(f"/v1/models/{name}", x_api_key="k")
                assert response.status == 404
                for path in PATHS:
                    response = await gateway.post(path, body, x_api_key="k")
                    assert response.status == 404
                    message = (await response.json())["error"]["message"]
                    unknown.append(message.replace(name, "NAME"))
            # Nothing tells a model that the key may not use from one that does not exist.
            assert set(unknown) == {
                "model 'NAME' does not exist; GET /v1/models lists what there is"
            }
            assert neuron.seen == []
            answer = await gateway.post(
                "/v1/chat/completions",
                {"model": "m1", "messages": [{"role": "user", "content": "Hi"}]},
                x_api_key="k",
            )
            assert answer.status == 200


async def test_a_key_reaches_neither_the_nodes_nor_the_log_nor_the_metrics(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, keys=("very-secret",)) as gateway:
            body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
            for headers in ({"x_api_key": "very-secret"}, {"authorization": "Bearer very-secret"}):
                response = await gateway.post("/v1/chat/completions", body, **headers)
                assert response.status == 200
            await gateway.post("/v1/chat/completions", body, x_api_key="very-secret-but-wrong")
            async with gateway.session.get(gateway.metrics_url + "/metrics") as response:
                metrics = await response.text()
            assert 'account="test"' in metrics
            assert "very-secret" not in metrics
            assert len(neuron.seen) == 2
            assert not any("very-secret" in str(each) for each in neuron.seen)
    assert "very-secret" not in caplog.text
