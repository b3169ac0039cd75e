"""Real neurons with the bundled model, each on a host of its own."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from tests.support.hosts import Host, Network
from tests.support.load import ask, run_load
from tests.support.processes import READY_S, STOP_S, answers, environment

MODEL = "cortex-tiny"
# Beside the mock neurons' ports on the same hosts.
GATEWAY_PORT, METRICS_PORT, NEURON_PORT = 31323, 31324, 13132
GONE_S = 10
STALL_S = 2


def body(number: int) -> dict[str, object]:
    """A short question; every other one streams."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "stream": number % 2 == 0}


@dataclass
class RealFleet:
    url: str
    neurons: list[subprocess.Popen[str]]


@pytest.fixture(scope="module")
def real(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealFleet]:
    tmp_path = tmp_path_factory.mktemp("real")
    _, gateway, _, first, second, _ = network.hosts
    processes: list[subprocess.Popen[str]] = []

    def start(host: Host, name: str, text: str, *command: str) -> None:
        config = tmp_path / f"{name}.toml"
        config.write_text(text)
        cortex = [sys.executable, "-m", "cortex", *command, "-c", str(config)]
        with (tmp_path / f"{name}.log").open("w") as log:
            processes.append(host.popen(cortex, env=environment(tmp_path), stdout=log, stderr=log))

    nodes = ""
    try:
        for host in (first, second):
            state = tmp_path / host.space
            text = (
                f'host = "{host.address}"\nport = {NEURON_PORT}\nstate_dir = "{state}"\n'
                f"[harness.torch]\ndemo_models = false\nhub = false\nstall_s = {STALL_S}\n"
                f'[[default_models]]\nmodel_id = "{MODEL}"\n'
            )
            start(host, host.space, text, "neuron")
            nodes += f'[[neurons]]\nname = "{host.space}"\n'
            nodes += f'endpoint = "http://{host.address}:{NEURON_PORT}"\n'
        text = f'[gateway]\nlisten = "{gateway.address}:{GATEWAY_PORT}"\n'
        text += f'metrics_listen = "{gateway.address}:{METRICS_PORT}"\n{nodes}'
        start(gateway, "gateway", text, "serve")
        yield RealFleet(f"http://{gateway.address}:{GATEWAY_PORT}", processes[:2])
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def children(process: subprocess.Popen[str]) -> list[int]:
    """The engine processes of a neuron."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(each) for each in found.split()]


async def loaded_on(session: aiohttp.ClientSession, real: RealFleet) -> int:
    """On how many nodes the gateway has the model."""
    async with session.get(f"{real.url}/v1/models/{MODEL}") as reply:
        if reply.status != 200:
            return 0
        locations = (await reply.json())["locations"]
        return sum(each["status"] == "loaded" for each in locations)


def alive(processes: list[int]) -> list[int]:
    """Those that have not ended."""
    return [each for each in processes if Path(f"/proc/{each}").exists()]


async def both_loaded(session: aiohttp.ClientSession, real: RealFleet) -> None:
    """Wait until the gateway has the model on both nodes."""
    async with asyncio.timeout(READY_S):
        while not answers(real.url) or await loaded_on(session, real) < 2:
            await asyncio.sleep(0.1)


async def test_a_hung_engine_is_ended_and_another_one_started(
    network: Network, real: RealFleet
) -> None:
    with network.hosts[0].inside():
        async with aiohttp.ClientSession() as session:
            await both_loaded(session, real)
            (hung,) = children(real.neurons[1])
            os.kill(hung, signal.SIGSTOP)
            # Whole answers: their callers have seen nothing when the engine is given up.
            done = await run_load([real.url], lambda _: body(1), rate=8, seconds=1)
            assert done.failed == []
            async with asyncio.timeout(READY_S):
                while alive([hung]):
                    await asyncio.sleep(0.1)
            await both_loaded(session, real)
            (other,) = children(real.neurons[1])
            assert other != hung


async def test_a_killed_neuron_takes_its_engine_along_and_the_other_one_answers(
    network: Network, real: RealFleet
) -> None:
    with network.hosts[0].inside():
        async with aiohttp.ClientSession() as session:
            await both_loaded(session, real)
            engines = children(real.neurons[0])
            assert engines

            async def kill() -> None:
                os.kill(real.neurons[0].pid, signal.SIGKILL)
                real.neurons[0].wait()

            done = await run_load([real.url], body, rate=8, seconds=2, meanwhile=kill)
            assert done.failed_before_the_start == []
            assert len(done.failed) <= 4
            assert (await ask(session, real.url, body(0))).error is None
            async with asyncio.timeout(GONE_S):
                while alive(engines):
                    await asyncio.sleep(0.1)
