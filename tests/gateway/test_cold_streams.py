"""Cold streams through real sockets in virtual time: a load of a minute, and who waits for it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from cortex.core.anthropic import PING
from cortex.core.openai import KEEPALIVE
from tests.support import virtual_time
from tests.support.gateway import RunningGateway, run_gateway
from tests.support.mock_neuron import GIB, MockModel, MockNeuron
from tests.support.mock_neuron.engine import EngineSpec
from tests.support.mock_neuron.faults import FaultCommand, FaultKind

LOAD_S = 60
FIRST_BYTE_S = 1.0
SILENCE_S = 5.0
PATHS = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}


@asynccontextmanager
async def cold_fleet(**settings: object) -> AsyncIterator[tuple[MockNeuron, RunningGateway]]:
    """A gateway on the loop's clock over one node, whose model takes LOAD_S to load."""
    engine = EngineSpec(max_tokens=5)
    model = MockModel("m", memory_bytes=LOAD_S * GIB, load_bytes_s=float(GIB), engine=engine)
    async with MockNeuron(model) as neuron:
        nodes = {"a": neuron.endpoint}
        async with run_gateway(nodes, clock=virtual_time.now_s, **settings) as gateway:
            yield neuron, gateway


class Heard:
    """What a caller of a stream heard, and when (seconds after asking)."""

    def __init__(self) -> None:
        self.status = 0
        self.chunks: list[tuple[float, bytes]] = []

    @property
    def text(self) -> bytes:
        return b"".join(chunk for _, chunk in self.chunks)

    @property
    def times(self) -> list[float]:
        return [at for at, _ in self.chunks]

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]

    @property
    def error(self) -> dict[str, str]:
        """The error event that ended it, in either dialect."""
        last = self.text.strip().split(b"\n\n")[-1].split(b"\n")[-1]
        error: dict[str, str] = msgspec.json.decode(last.removeprefix(b"data: "))["error"]
        return error


async def listen(gateway: RunningGateway, dialect: str = "openai") -> Heard:
    """Ask for a stream and note when what came."""
    heard, begun_s = Heard(), virtual_time.now_s()
    body = {
        "model": "m",
        "stream": True,
        "max_tokens": 5,
        "messages": [{"role": "user", "content": "Hi"}],
    }
    async with gateway.session.post(gateway.url + PATHS[dialect], json=body) as reply:
        heard.status = reply.status
        while chunk := await reply.content.readany():
            heard.chunks.append((virtual_time.now_s() - begun_s, chunk))
    return heard


@pytest.mark.parametrize(
    ("dialect", "keepalive", "end"),
    [
        ("openai", KEEPALIVE, b"data: [DONE]\n\n"),
        ("anthropic", PING, b'event: message_stop\ndata: {"type":"message_stop"}\n\n'),
    ],
)
@pytest.mark.parametrize("keepalive_s", [1.0, 5.0])
def test_a_load_of_a_minute_is_never_silent_for_more_than_five_seconds(
    dialect: str, keepalive: bytes, end: bytes, keepalive_s: float
) -> None:
    async def main() -> None:
        async with cold_fleet(keepalive_s=keepalive_s) as (neuron, gateway):
            heard = await listen(gateway, dialect)
        assert heard.status == 200
        assert heard.times[0] < FIRST_BYTE_S
        assert max(heard.gaps) < SILENCE_S + 0.1
        assert heard.text.count(keepalive) >= LOAD_S // keepalive_s - 1
        assert heard.text.endswith(end)
        assert b" 005" in heard.text
        assert LOAD_S < heard.times[-1] < LOAD_S + 2
        assert neuron.starts == ["m"]

    virtual_time.run(main())


def test_fifty_requests_in_both_dialects_cause_one_load_and_all_are_answered() -> None:
    async def main() -> None:
        async with cold_fleet(cold_wait_s=90) as (neuron, gateway):
            async with asyncio.TaskGroup() as tasks:
                streams = [
                    tasks.create_task(listen(gateway, dialect))
                    for _ in range(15)
                    for dialect in PATHS
                ]
                wholes = [tasks.create_task(gateway.chat(max_tokens=5)) for _ in range(20)]
            assert neuron.starts == ["m"]
            assert len(neuron.loads) == 1
            for stream in streams:
                assert b" 005" in stream.result().text
            assert {whole.result().status for whole in wholes} == {200}

    virtual_time.run(main())


def test_callers_that_leave_do_not_stop_the_load_nor_lengthen_it() -> None:
    async def main() -> None:
        async with cold_fleet() as (neuron, gateway):
            async with asyncio.TaskGroup() as tasks:
                leaving = [tasks.create_task(listen(gateway, dialect)) for dialect in PATHS]
                await asyncio.sleep(30)
                for caller in leaving:
                    caller.cancel()
            await asyncio.sleep(1)
            heard = await listen(gateway)
            assert heard.text.endswith(b"data: [DONE]\n\n")
            assert heard.times[-1] < 30
            assert neuron.starts == ["m"]

    virtual_time.run(main())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("disk_full", "No space left on device"),
        ("corrupt_checkpoint", "model.safetensors is cut short"),
        ("hub_unreachable", "the hub cannot be reached"),
        ("out_of_memory", "out of memory"),
    ],
)
def test_a_load_that_fails_half_way_reaches_every_waiter_with_its_cause(
    kind: FaultKind, words: str
) -> None:
    async def main() -> None:
        async with cold_fleet(cold_wait_s=90) as (neuron, gateway):
            neuron.apply(FaultCommand(kind=kind))
            async with asyncio.TaskGroup() as tasks:
                streams = [
                    tasks.create_task(listen(gateway, dialect))
                    for _ in range(5)
                    for dialect in PATHS
                ]
                wholes = [tasks.create_task(gateway.chat()) for _ in range(5)]
            assert neuron.starts == ["m"]
            for stream in streams:
                heard = stream.result()
                # The streams had begun, so that the cause comes as their last event.
                assert heard.status == 200
                assert words in heard.error["message"]
                assert b"[DONE]" not in heard.text
                assert b"message_stop" not in heard.text
            for whole in wholes:
                assert whole.result().status >= 400
                assert words in (await whole.result().json())["error"]["message"]

    virtual_time.run(main())


def test_a_caller_who_does_not_stream_is_told_the_progress_after_the_wait() -> None:
    async def main() -> None:
        async with cold_fleet(cold_wait_s=20) as (neuron, gateway):
            begun_s = virtual_time.now_s()
            refused = await gateway.chat()
            assert 20 <= virtual_time.now_s() - begun_s < 21
            assert refused.status == 503
            error = (await refused.json())["error"]
            assert error["code"] == "model_loading"
            assert 17 * GIB <= error["progress"]["bytes_done"] <= 20 * GIB
            assert 39 <= int(refused.headers["retry-after"]) <= 43
            await asyncio.sleep(int(refused.headers["retry-after"]))
            assert (await gateway.chat()).status == 200
            assert neuron.starts == ["m"]

    virtual_time.run(main())


def test_two_gateways_over_one_node_cause_one_load() -> None:
    async def main() -> None:
        async with cold_fleet(cold_wait_s=90) as (neuron, first):
            nodes = {"a": neuron.endpoint}
            async with run_gateway(nodes, clock=virtual_time.now_s, cold_wait_s=90) as second:
                async with asyncio.TaskGroup() as tasks:
                    heard = [
                        tasks.create_task(listen(gateway, dialect))
                        for gateway in (first, second)
                        for dialect in PATHS
                        for _ in range(5)
                    ]
                assert neuron.starts == ["m"]
                assert all(b" 005" in each.result().text for each in heard)

    virtual_time.run(main())
