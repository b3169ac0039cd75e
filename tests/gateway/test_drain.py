"""Draining a node: nothing new goes there, what it has in hand ends in peace."""

import asyncio

import pytest

from cortex.core.entitlements import ApiKey, Entitlements
from cortex.core.errors import CortexError
from cortex.gateway.drain import set_drained
from cortex.gateway.status import fetch_status
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron


def loaded(text: str, **fields: object) -> MockModel:
    return MockModel("m", "loaded", tokens=[text], **fields)  # type: ignore[arg-type]


async def test_a_drained_node_ends_what_it_has_and_gets_nothing_new_until_it_is_undrained() -> None:
    gate = asyncio.Event()
    first_model = loaded("a", first_gate=gate)
    async with MockNeuron(first_model) as first, MockNeuron(loaded("b")) as second:
        async with run_gateway({"a": first.endpoint, "b": second.endpoint}) as gateway:
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(gateway.chat(stream=True))
                await first.until(lambda: first_model.in_flight == 1)
                response = await gateway.post("/nodes/a/drain", {})
                assert response.status == 200
                report = await response.json()
                assert (report["name"], report["draining"], report["relayed"]) == ("a", True, 1)
                for _ in range(3):
                    assert '"b"' in await (await gateway.chat()).text()
                gate.set()
            assert "[DONE]" in await running.result().text()
            assert len(first.seen) == 1
            assert (await gateway.metrics())['cortex_node_draining{node="a"}'] == 1
            status = await fetch_status(gateway.url)
            assert [row[:2] for row in status.node_rows] == [("a", "draining"), ("b", "healthy")]
            assert (await gateway.post("/nodes/a/undrain", {})).status == 200
            assert '"a"' in await (await gateway.chat()).text()


async def test_no_model_is_loaded_on_a_drained_node() -> None:
    async with MockNeuron(MockModel("m")) as first, MockNeuron(MockModel("m")) as second:
        async with run_gateway({"a": first.endpoint, "b": second.endpoint}) as gateway:
            await gateway.post("/nodes/a/drain", {})
            assert (await gateway.chat()).status == 200
            assert (len(first.loads), len(second.loads)) == (0, 1)
            await gateway.post("/nodes/b/drain", {})
            response = await gateway.chat()
            assert (response.status, response.headers["retry-after"]) == (503, "5")


async def test_a_load_that_failed_does_not_go_on_to_a_node_drained_meanwhile() -> None:
    gate = asyncio.Event()
    broken = MockModel("m", load_gate=gate)
    async with MockNeuron(broken) as first, MockNeuron(MockModel("m")) as second:
        async with run_gateway({"a": first.endpoint, "b": second.endpoint}) as gateway:
            async with asyncio.TaskGroup() as tasks:
                call = tasks.create_task(gateway.chat())
                await first.until(lambda: len(first.loads) == 1)
                await gateway.post("/nodes/b/drain", {})
                await first.stop()
            assert call.result().status in (502, 503)
            assert second.loads == []


async def test_a_node_that_does_not_exist_is_404_and_says_which_there_are() -> None:
    async with MockNeuron() as neuron, run_gateway({"a": neuron.endpoint}) as gateway:
        response = await gateway.post("/nodes/x/drain", {})
        assert response.status == 404
        error = (await response.json())["error"]
        assert (error["code"], error["message"]) == (
            "node_not_found",
            "there is no node 'x'; there are: a",
        )


async def test_where_keys_are_required_only_one_with_admin_may_drain() -> None:
    named = [
        ApiKey(key="sk-tenant", account_id="tenant", models=["m"]),
        ApiKey(key="sk-metered", account_id="metered", requests_per_minute=100),
        ApiKey(key="sk-operator", account_id="operator", admin=True),
    ]
    entitlements = Entitlements(require_auth=True, keys=named)
    async with MockNeuron(loaded("a")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, entitlements=entitlements) as gateway:
            statuses = {}
            for key in ("", "sk-tenant", "sk-metered", "sk-operator"):
                response = await gateway.post("/nodes/a/drain", {}, x_api_key=key)
                statuses[key] = response.status
            assert statuses == {"": 401, "sk-tenant": 403, "sk-metered": 403, "sk-operator": 200}


async def test_the_command_waits_until_the_node_is_idle() -> None:
    gate = asyncio.Event()
    model = loaded("a", first_gate=gate)
    said: list[str] = []
    async with MockNeuron(model) as neuron, run_gateway({"a": neuron.endpoint}) as gateway:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(gateway.chat())
            await neuron.until(lambda: model.in_flight == 1)
            with pytest.raises(CortexError, match=r"still has requests in hand after 0\.05 s"):
                await set_drained(
                    [gateway.url], None, "a", drained=True, wait_s=0.05, say=said.append
                )
            gate.set()
        await set_drained([gateway.url], None, "a", drained=True, wait_s=10, say=said.append)
        assert said == [
            f"{gateway.url}: node a drains, 1 requests in hand",
            f"{gateway.url}: node a drains, 0 requests in hand",
            "node a is idle",
        ]
        await set_drained([gateway.url], None, "a", drained=False, say=said.append)
        assert said[-1] == f"{gateway.url}: node a takes work, 0 requests in hand"


async def test_a_node_may_have_any_name() -> None:
    said: list[str] = []
    async with MockNeuron() as neuron, run_gateway({"rack 1/ä": neuron.endpoint}) as gateway:
        await set_drained([gateway.url], None, "rack 1/ä", drained=True, say=said.append)
        assert said == [f"{gateway.url}: node rack 1/ä drains, 0 requests in hand"]


async def test_the_command_says_what_is_wrong_with_the_gateway() -> None:
    with pytest.raises(CortexError, match=r"http://127\.0\.0\.1:9/nodes/a/drain: "):
        await set_drained(["http://127.0.0.1:9"], None, "a", drained=True, say=print)
