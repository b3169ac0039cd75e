"""`kill -9` of one of three neurons under 100 requests a second, on loopback."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest

from tests.support.gateway import RunningGateway, run_gateway
from tests.support.mock_neuron.__main__ import ModelSpec, NodeSpec
from tests.support.mock_neuron.engine import EngineSpec

pytestmark = pytest.mark.slow

RATE = 100
NUM_REQUESTS = 400
KILLED_AFTER = 150


@contextlib.contextmanager
def neuron(*, events: bool) -> Iterator[tuple[str, int]]:
    """A mock neuron as a process: its endpoint and process id."""
    model = ModelSpec(id="m", status="loaded", engine=EngineSpec(max_tokens=20))
    spec = msgspec.json.encode(NodeSpec(models=[model], events=events)).decode()
    command = [sys.executable, "-m", "tests.support.mock_neuron", "--spec", spec]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process.pid
        finally:
            process.kill()


async def outcome(gateway: RunningGateway, *, stream: bool) -> str:
    """How one request ended; a stream that broke off before its first token counts as failed."""
    response = await gateway.chat(stream=stream)
    text = await response.text()
    if response.status != 200:
        return f"{response.status}: {text}"
    if not stream or "[DONE]" in text:
        return "ok"
    has_begun = '"content":"' in text.replace('"content":""', "")
    return "broke off after its first token" if has_begun else f"failed: {text}"


@pytest.mark.parametrize("events", [True, False], ids=["events", "polled"])
async def test_a_killed_neuron_fails_no_request_that_had_not_started(events: bool) -> None:
    clock = asyncio.get_running_loop().time
    outcomes: Counter[str] = Counter()
    waits: list[float] = []

    async def ask(gateway: RunningGateway, number: int) -> None:
        begun_s = clock()
        outcomes[await outcome(gateway, stream=number % 2 == 0)] += 1
        waits.append(clock() - begun_s)

    with contextlib.ExitStack() as stack:
        neurons = [stack.enter_context(neuron(events=events)) for _ in range(3)]
        nodes = {name: endpoint for name, (endpoint, _) in zip("abc", neurons, strict=True)}
        async with run_gateway(nodes) as gateway:
            begun_s = clock()
            async with asyncio.TaskGroup() as tasks:
                for number in range(NUM_REQUESTS):
                    if number == KILLED_AFTER:
                        os.kill(neurons[1][1], signal.SIGKILL)
                    tasks.create_task(ask(gateway, number))
                    await asyncio.sleep(max(0.0, begun_s + number / RATE - clock()))
            assert outcomes.keys() <= {"ok", "broke off after its first token"}, outcomes
            # Only what was at work on the killed one can have been cut: a share of a moment.
            assert outcomes["ok"] >= NUM_REQUESTS * 0.9, outcomes
            healthy = [node.healthy for node in gateway.apps.fleet.snapshot().nodes]
            assert healthy == [True, False, True]
            assert sorted(waits)[int(NUM_REQUESTS * 0.99)] < 5
