"""Keys: who gets in, and how the others are told."""

import pytest

from cortex.core.config import ApiKey, Entitlements
from cortex.core.errors import AuthenticationError
from cortex.gateway.auth import ANONYMOUS, Caller, Gatekeeper
from tests.support.gateway import run_gateway

REQUIRED = Entitlements(
    require_auth=True,
    keys=[ApiKey(key="one", account_id="a"), ApiKey(key="zwei-schlüssel", account_id="b")],
)


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer one"},
        {"authorization": "bearer  one "},
        {"x-api-key": "one"},
        {"x-api-key": "zwei-schlüssel"},
        {"authorization": "Bearer placeholder", "x-api-key": "one"},
    ],
)
def test_a_known_key_passes_as_bearer_or_x_api_key(headers: dict[str, str]) -> None:
    assert Gatekeeper(REQUIRED).check(headers) != ANONYMOUS


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer two"},
        {"authorization": "Basic one"},
        {"authorization": "one"},
        {"x-api-key": "on"},
        {"x-api-key": ""},
    ],
)
def test_a_missing_or_unknown_key_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(AuthenticationError):
        Gatekeeper(REQUIRED).check(headers)


def test_without_require_auth_any_key_passes_and_a_known_one_is_counted() -> None:
    optional = Entitlements(keys=[ApiKey(key="one", account_id="a", key_id="laptop")])
    gatekeeper = Gatekeeper(optional)
    assert gatekeeper.check({"authorization": "Bearer placeholder"}) == ANONYMOUS
    known = gatekeeper.check({"authorization": "Bearer one"})
    assert known == Caller(account_id="a", key_id="laptop")


def test_a_key_without_an_id_is_named_by_the_start_of_its_hash() -> None:
    caller = Gatekeeper(REQUIRED).check({"x-api-key": "one"})
    assert caller == Caller(account_id="a", key_id="7692c3ad")


async def test_everything_but_health_answers_401_in_the_callers_dialect() -> None:
    async with run_gateway({}, keys=("secret",)) as gateway:
        for path in ("/v1/models", "/v1/models/m"):
            assert (await gateway.get(path)).status == 401
        response = await gateway.chat()
        assert response.status == 401
        error = (await response.json())["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            response = await gateway.post(path, {})
            assert response.status == 401
            body = await response.json()
            assert (body["type"], body["error"]["type"]) == ("error", "authentication_error")
        for path in ("/", "/health"):
            assert (await gateway.get(path)).status == 200
        assert (await gateway.get("/v1/models", x_api_key="secret")).status == 200
        assert (await gateway.get("/v1/models", authorization="Bearer secret")).status == 200
