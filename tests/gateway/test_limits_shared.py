"""Budgets over a server that several gateways share, and over one that is away."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cortex.core.entitlements import ApiKey, Entitlements, LimitsConfig
from tests.support.budgets import COST, Wall, chat, one_key, until_used
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron
from tests.support.redis import RedisServer, redis_server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as running:
        yield running


async def test_two_gateways_spend_from_one_budget(server: RedisServer) -> None:
    limits = LimitsConfig(storage=server.url)
    shared: dict[str, Any] = {
        "entitlements": one_key(tokens_per_day=500, requests_per_minute=3),
        "limits": limits,
        "wall_clock": Wall(),
    }
    async with (
        MockNeuron(MockModel("m", "loaded")) as neuron,
        run_gateway({"a": neuron.endpoint}, **shared) as one,
        run_gateway({"a": neuron.endpoint}, **shared) as other,
    ):
        assert (await chat(one)).status == 200
        assert (await chat(other)).status == 200
        assert (await chat(one)).status == 200
        assert (await chat(other)).status == 429
        await until_used(one, "tokens_per_day", 3 * COST)
        await until_used(other, "tokens_per_day", 3 * COST)


async def test_a_budget_outlives_its_gateway(server: RedisServer) -> None:
    options: dict[str, Any] = {
        "entitlements": one_key(hard_cap=COST),
        "limits": LimitsConfig(storage=server.url),
    }
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, **options) as gateway:
            assert (await chat(gateway)).status == 200
        # What was in hand when it ended is settled before it goes.
        async with run_gateway({"a": neuron.endpoint}, **options) as gateway:
            await until_used(gateway, "hard_cap", COST)
            assert (await chat(gateway)).status == 429


async def test_while_the_server_is_away_requests_pass_uncounted_and_are_counted_again_after(
    server: RedisServer,
) -> None:
    async with (
        MockNeuron(MockModel("m", "loaded")) as neuron,
        run_gateway(
            {"a": neuron.endpoint},
            entitlements=one_key(requests_per_minute=1),
            limits=LimitsConfig(storage=server.url),
            wall_clock=Wall(),
        ) as gateway,
    ):
        server.stop()
        for _ in range(3):
            assert (await chat(gateway)).status == 200
        assert (await gateway.metrics())["cortex_limits_storage_errors_total"] == 3


async def test_without_the_server_nobody_is_served_where_the_configuration_says_so(
    server: RedisServer,
) -> None:
    server.stop()
    limits = LimitsConfig(storage=server.url, on_storage_error="refuse")
    keys = [
        ApiKey(key="k", account_id="a", requests_per_minute=9, max_concurrent=1),
        ApiKey(key="free", account_id="b"),
    ]
    async with (
        MockNeuron(MockModel("m", "loaded")) as neuron,
        run_gateway(
            {"a": neuron.endpoint}, entitlements=Entitlements(keys=keys), limits=limits
        ) as gateway,
    ):
        for _ in range(2):
            refused = await chat(gateway)
            assert refused.status == 503
            assert refused.headers["retry-after"] == "2"
            assert (await refused.json())["error"]["code"] == "limits_unavailable"
        assert neuron.seen == []
        assert (await gateway.get("/v1/usage", x_api_key="k")).status == 503
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
        response = await gateway.post("/v1/chat/completions", body, x_api_key="free")
        assert response.status == 200
