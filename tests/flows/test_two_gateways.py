"""Two `cortex serve` over two real `cortex neuron`: agreement, reload, drain, and a kill."""

import asyncio
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.processes import cortex_process, free_port, run_cortex

pytestmark = pytest.mark.slow

NOTICED_S = 30
SAY = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
}


@dataclass
class Fleet:
    tmp: Path
    urls: list[str]
    neuron_urls: list[str]
    neuron_pids: list[int]
    gateway_pids: list[int]


def gateway_file(port: int, metrics_port: int, neurons: list[str], more: str = "") -> str:
    nodes = "".join(
        f'[[neurons]]\nname = "{name}"\nendpoint = "{url}"\n'
        for name, url in zip(("first", "second"), neurons, strict=False)
    )
    return (
        f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:{metrics_port}"\n'
        f"{more}{nodes}"
    )


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    tmp: Path = tmp_path_factory.mktemp("two")
    ports = [free_port() for _ in range(6)]
    neurons = [f"http://127.0.0.1:{port}" for port in ports[:2]]
    for at, port in enumerate(ports[:2]):
        (tmp / f"neuron{at}.toml").write_text(
            f'host = "127.0.0.1"\nport = {port}\n[harness.torch]\ndemo_models = false\n'
        )
    urls = []
    for at, (port, metrics_port) in enumerate([(ports[2], ports[3]), (ports[4], ports[5])]):
        home = tmp / f"gateway{at}"
        home.mkdir()
        (home / "cortex.toml").write_text(gateway_file(port, metrics_port, neurons))
        urls.append(f"http://127.0.0.1:{port}")
    with (
        cortex_process(tmp, neurons[0], "neuron", "-c", str(tmp / "neuron0.toml")) as first,
        cortex_process(tmp, neurons[1], "neuron", "-c", str(tmp / "neuron1.toml")) as second,
        cortex_process(tmp, urls[0], "serve", "-c", str(tmp / "gateway0/cortex.toml")) as one,
        cortex_process(tmp, urls[1], "serve", "-c", str(tmp / "gateway1/cortex.toml")) as two,
    ):
        yield Fleet(tmp, urls, neurons, [first.pid, second.pid], [one.pid, two.pid])


async def get(url: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(url) as reply:
        return await reply.json()


async def chat(url: str, model: str = "cortex-tiny") -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json={"model": model, **SAY}) as reply,
    ):
        return reply.status, await reply.json()


async def until(url: str, test: Callable[[Any], object]) -> Any:
    """Ask for the health of a gateway until it is as it should be."""
    async with asyncio.timeout(NOTICED_S):
        while True:
            health = await get(f"{url}/health")
            if test(health):
                return health
            await asyncio.sleep(0.05)


def node(health: Any, name: str) -> Any:
    return next(each for each in health["details"] if each["name"] == name)


async def holders(fleet: Fleet) -> list[str]:
    """The status of the bundled model on each neuron."""
    listed = [await get(f"{url}/models") for url in fleet.neuron_urls]
    return [models[0]["status"] for models in listed]


async def test_both_gateways_hold_the_events_of_both_neurons(fleet: Fleet):
    for url in fleet.urls:
        await until(url, lambda health: all(each["subscribed"] for each in health["details"]))


async def test_requests_at_both_for_a_cold_model_load_it_once(fleet: Fleet):
    answers = await asyncio.gather(*(chat(url) for url in fleet.urls for _ in range(10)))
    assert {status for status, _ in answers} == {200}
    assert len({answer["choices"][0]["message"]["content"] for _, answer in answers}) == 1
    assert sorted(await holders(fleet)) == ["loaded", "unloaded"]
    for url in fleet.urls:
        await until(url, lambda health: "loaded" in str(health["details"]))


async def test_a_model_that_was_unloaded_is_known_to_both_without_a_poll(fleet: Fleet):
    at = (await holders(fleet)).index("loaded")
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{fleet.neuron_urls[at]}/models/unload", json={"model_id": "cortex-tiny"}
        ) as reply,
    ):
        assert reply.status == 200
    for url in fleet.urls:
        await until(
            url,
            lambda health: (
                not any(
                    model["state"] == "loaded"
                    for each in health["details"]
                    for model in each["models"]
                )
            ),
        )


async def test_a_drained_node_loads_nothing_until_it_is_undrained(fleet: Fleet):
    arguments = [argument for url in fleet.urls for argument in ("-e", url)]
    done = run_cortex(fleet.tmp, "drain", "first", *arguments, "--wait", "20")
    assert done.returncode == 0, done.stderr
    assert re.findall("node first (drains|is idle)", done.stdout) == ["drains", "drains", "is idle"]
    status, _ = await chat(fleet.urls[0])
    assert status == 200
    assert await holders(fleet) == ["unloaded", "loaded"]
    shown = run_cortex(fleet.tmp, "status", "-e", fleet.urls[1])
    assert re.search(r"first +draining", shown.stdout), shown.stdout
    done = run_cortex(fleet.tmp, "undrain", "first", *arguments)
    assert done.returncode == 0, done.stderr
    assert not node(await get(f"{fleet.urls[1]}/health"), "first")["draining"]


async def test_a_changed_file_is_used_on_sighup_and_a_bad_one_is_told(fleet: Fleet):
    url, home = fleet.urls[0], fleet.tmp / "gateway0"
    (home / "models.toml").write_text('[aliases]\nsmall = "cortex-tiny"\n')
    os.kill(fleet.gateway_pids[0], signal.SIGHUP)
    async with asyncio.timeout(NOTICED_S):
        while (await chat(url, "small"))[0] != 200:
            await asyncio.sleep(0.1)
    good = (home / "cortex.toml").read_text()
    (home / "cortex.toml").write_text(good.replace("[gateway]", "[gateways]"))
    os.kill(fleet.gateway_pids[0], signal.SIGHUP)
    health = await until(url, lambda health: health["config"])
    assert "unknown field `gateways`" in health["config"]["error"]
    shown = run_cortex(fleet.tmp, "status", "-e", url)
    assert f"configuration not in use: {home / 'cortex.toml'}: " in shown.stdout
    assert (await chat(url, "small"))[0] == 200
    (home / "cortex.toml").write_text(good)
    await until(url, lambda health: not health["config"])


async def test_a_killed_neuron_fails_no_request_that_had_not_started(fleet: Fleet):
    async with aiohttp.ClientSession() as session:
        # Both hold the model, so that there is somewhere to go.
        for url in fleet.neuron_urls:
            body = {"model_id": "cortex-tiny"}
            async with session.post(f"{url}/models/load", json=body) as reply:
                assert reply.status == 200
    for url in fleet.urls:
        await until(url, lambda health: str(health["details"]).count("'loaded'") == 2)
    answers: list[int] = []

    async def ask(url: str) -> None:
        for _ in range(15):
            status, _answer = await chat(url)
            answers.append(status)

    async with asyncio.TaskGroup() as tasks:
        for url in fleet.urls * 2:
            tasks.create_task(ask(url))
        async with asyncio.timeout(NOTICED_S):
            while len(answers) < 10:
                await asyncio.sleep(0.01)
        os.kill(fleet.neuron_pids[0], signal.SIGKILL)
    assert answers == [200] * 60
    for url in fleet.urls:
        health = await until(url, lambda health: health["nodes"]["healthy"] == 1)
        assert not node(health, "first")["healthy"]
