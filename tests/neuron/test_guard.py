"""A neuron with a fleet secret or certificates: who gets in, and what the others hear."""

import ssl
from pathlib import Path

import aiohttp
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from cortex.core.config import Harnesses, NeuronConfig, TorchHarness
from cortex.core.trust import Trust, client_context
from cortex.gateway.status import fetch_status
from cortex.neuron.app import open_app
from cortex.neuron.guard import FleetGuard
from tests.support.certificates import Authority
from tests.support.fake_engine import COMMAND
from tests.support.gateway import run_gateway
from tests.support.neuron_fakes import FakeProbe
from tests.support.neuron_http import add_chat_model, neuron

SECRET = "correct-horse-battery"
CLOSED = Trust(fleet_secret=SECRET)


async def routes_of(tmp_path: Path) -> list[tuple[str, str]]:
    """Every (method, path) of a neuron, path parameters filled in."""
    harness = Harnesses(torch=TorchHarness(demo_models=False, hub=False))
    config = NeuronConfig(state_dir=str(tmp_path / "s"), harness=harness, fleet_secret=SECRET)
    async with open_app(config, engine_command=COMMAND, probe=FakeProbe()) as app:
        assert isinstance(app, FleetGuard)
        assert isinstance(app.app, Starlette)
        routes = [each for each in app.app.routes if isinstance(each, Route)]
        assert len(routes) == len(app.app.routes)
    return [
        (method, route.path.replace("{model_id:path}", "m"))
        for route in routes
        for method in sorted(route.methods or {"GET"})
    ]


async def test_of_all_routes_only_health_answers_without_the_secret(tmp_path: Path):
    routes = [
        *await routes_of(tmp_path),
        ("GET", "/nope"),
        ("GET", "/health/"),
        ("POST", "/health"),
    ]
    assert ("POST", "/models/load") in routes
    async with neuron(tmp_path, trust=CLOSED) as api:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": SECRET}):
            for method, path in routes:
                answer = await api.call(method, path, headers=headers)
                if path == "/health" and method != "POST":
                    assert answer.status == 200
                    assert method == "HEAD" or answer.json == {"status": "ok"}
                else:
                    assert answer.status == 401
        assert (await api.get("/models")).error["code"] == "fleet_secret_required"


async def test_with_the_secret_everything_answers(tmp_path: Path):
    async with neuron(tmp_path, trust=CLOSED) as api:
        headers = {"authorization": f"Bearer {SECRET}"}
        health = await api.call("GET", "/health", headers=headers)
        assert "uptime_secs" in health.json
        assert (await api.call("GET", "/models", headers=headers)).status == 200


async def test_a_gateway_with_the_secret_polls_loads_and_serves(tmp_path: Path):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path, trust=CLOSED) as api:
        async with run_gateway({"a": api.url}, trust=CLOSED) as gateway:
            assert (await fetch_status(gateway.url)).exit_code == 0
            response = await gateway.chat("m", max_tokens=3)
            assert response.status == 200, await response.text()
            assert SECRET not in await response.text()
            async with gateway.open_chat("m", max_tokens=3) as stream:
                assert (await stream.read()).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("trust", [Trust(), Trust(fleet_secret="another-fleet-secret")])
async def test_a_gateway_without_the_secret_shows_the_node_as_down_and_says_why(
    tmp_path: Path, trust: Trust
):
    async with neuron(tmp_path, trust=CLOSED) as api:
        async with run_gateway({"a": api.url}, trust=trust) as gateway:
            report = await fetch_status(gateway.url)
            assert report.exit_code == 1
            state = report.node_rows[0][1]
            assert state.startswith("down: node a refuses this gateway")
            assert "set fleet_secret in cortex.toml" in state
            assert (await gateway.chat("cortex-tiny")).status == 503


async def test_with_mutual_tls_a_gateway_of_the_same_ca_is_served_and_others_are_not(
    tmp_path: Path,
):
    fleet, stranger = Authority(tmp_path, "fleet"), Authority(tmp_path, "stranger")
    (cert, key), (gateway_cert, gateway_key) = fleet.issue("beast"), fleet.issue("gateway")
    other_cert, other_key = stranger.issue("gateway")
    server = Trust(tls_cert=cert, tls_key=key, tls_ca=fleet.ca)
    ours = Trust(tls_cert=gateway_cert, tls_key=gateway_key, tls_ca=fleet.ca)
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path, trust=server) as api:
        assert api.url.startswith("https://")
        async with run_gateway({"a": api.url}, trust=ours) as gateway:
            assert (await fetch_status(gateway.url)).exit_code == 0
            response = await gateway.chat("m", max_tokens=3)
            assert response.status == 200, await response.text()
        # Without a certificate, or with one of another authority, no request comes about.
        for trust in (
            Trust(tls_ca=fleet.ca),
            Trust(tls_cert=other_cert, tls_key=other_key, tls_ca=fleet.ca),
        ):
            context = client_context(trust, "test")
            assert context is not None
            with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
                async with api.session.get(api.url + "/health", ssl=context):
                    pass
        # A gateway that does not know the neuron's authority does not talk to it.
        async with run_gateway(
            {"a": api.url}, trust=msgspec.structs.replace(ours, tls_ca=stranger.ca)
        ) as gateway:
            report = await fetch_status(gateway.url)
            assert report.exit_code == 1
            assert "certificate" in report.node_rows[0][1]
