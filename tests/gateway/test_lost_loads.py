"""Loads on nodes that are lost meanwhile: whoever waits goes elsewhere, and soon."""

import asyncio

from tests.support import virtual_time
from tests.support.memory_fleet import Call, MemoryHost, memory_gateway
from tests.support.mock_neuron import GIB, MockModel
from tests.support.mock_neuron.node import Node

NOTICED_S = 5


def node() -> Node:
    """A node on which the model loads in thirty seconds."""
    return Node(MockModel("m", memory_bytes=30 * GIB, load_bytes_s=float(GIB)))


async def ask_and_lose(hosts: dict[str, MemoryHost], lose: object) -> tuple[Call, float]:
    """Ask for the model, lose `a` while it loads it, and return the answer and when it came."""
    async with memory_gateway(hosts) as apps:
        body = {
            "model": "m",
            "stream": True,
            "max_tokens": 1,
            "messages": [{"role": "user", "content": "Hi"}],
        }
        call = Call(apps.api, "/v1/chat/completions", body)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(call.run())
            await asyncio.sleep(10)
            assert hosts["a"].node.models["m"].status == "loading"
            await lose()  # type: ignore[operator]
        done_s = virtual_time.now_s()
    for host in hosts.values():
        await host.close()
    return call, done_s


def test_a_node_that_is_cut_off_during_a_load_is_given_up_for_another() -> None:
    async def main() -> None:
        hosts = {name: MemoryHost(name, node) for name in "ab"}

        async def cut() -> None:
            hosts["a"].gate.clear()

        call, done_s = await ask_and_lose(hosts, cut)
        assert call.body.endswith(b"data: [DONE]\n\n")
        assert hosts["b"].node.starts == ["m"]
        assert done_s < 10 + NOTICED_S + 30 + 1

    virtual_time.run(main())


def test_a_node_that_dies_during_a_load_is_given_up_for_another_at_once() -> None:
    async def main() -> None:
        hosts = {name: MemoryHost(name, node) for name in "ab"}
        call, done_s = await ask_and_lose(hosts, hosts["a"].kill)
        assert call.body.endswith(b"data: [DONE]\n\n")
        assert hosts["b"].node.starts == ["m"]
        assert done_s < 10 + 30 + 1

    virtual_time.run(main())


def test_without_another_node_the_caller_learns_that_the_node_is_lost() -> None:
    async def main() -> None:
        hosts = {"a": MemoryHost("a", node)}

        async def cut() -> None:
            hosts["a"].gate.clear()

        call, done_s = await ask_and_lose(hosts, cut)
        assert b"node a became unreachable while it loaded model 'm'" in call.body
        assert b"[DONE]" not in call.body
        assert done_s < 10 + NOTICED_S + 1

    virtual_time.run(main())
