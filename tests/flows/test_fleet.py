"""`cortex serve` over two `cortex neuron`, each a process of its own with a file of its own."""

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from tests.support.processes import cortex_process, free_port, run_cortex

ASK = {
    "model": "small",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
}
KEY = {"Authorization": "Bearer sk-test"}
NOTICED_S = 30


@dataclass
class Fleet:
    url: str
    metrics_url: str
    neuron_urls: list[str]
    neuron_pids: list[int]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    tmp: Path = tmp_path_factory.mktemp("fleet")
    ports = [free_port() for _ in range(4)]
    neurons = [f"http://127.0.0.1:{port}" for port in ports[:2]]
    for at, port in enumerate(ports[:2]):
        (tmp / f"neuron{at}.toml").write_text(
            f'host = "127.0.0.1"\nport = {port}\n[harness.torch]\ndemo_models = false\n'
        )
    (tmp / "cortex.toml").write_text(
        f"""
        [gateway]
        listen = "127.0.0.1:{ports[2]}"
        metrics_listen = "127.0.0.1:{ports[3]}"
        poll_s = 0.2
        [[neurons]]
        name = "first"
        endpoint = "{neurons[0]}"
        [[neurons]]
        name = "second"
        endpoint = "{neurons[1]}"
        [entitlements]
        require_auth = true
        [[entitlements.keys]]
        key = "sk-test"
        account_id = "tester"
        """
    )
    (tmp / "models.toml").write_text(
        '[[models]]\nid = "cortex-tiny"\npinned_on = ["second"]\n'
        '[[models]]\nid = "org/not-here"\nmin_device_vram_mb = 80000\n'
        '[aliases]\nsmall = "cortex-tiny"\n'
    )
    url = f"http://127.0.0.1:{ports[2]}"
    with (
        cortex_process(tmp, neurons[0], "neuron", "-c", str(tmp / "neuron0.toml")) as first,
        cortex_process(tmp, neurons[1], "neuron", "-c", str(tmp / "neuron1.toml")) as second,
        cortex_process(tmp, url, "serve", "-c", str(tmp / "cortex.toml")),
    ):
        yield Fleet(url, f"http://127.0.0.1:{ports[3]}/metrics", neurons, [first.pid, second.pid])


async def ask(fleet: Fleet, **headers: str) -> tuple[int, dict]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{fleet.url}/v1/chat/completions", json=ASK, headers=headers) as reply,
    ):
        return reply.status, await reply.json()


async def test_a_request_without_a_key_is_refused_and_loads_nothing(fleet: Fleet):
    status, answer = await ask(fleet)
    assert status == 401
    assert answer["error"]["code"] == "invalid_api_key"
    assert await models_of(fleet.neuron_urls[1]) == {"cortex-tiny": "unloaded"}


async def test_the_first_request_loads_the_model_where_it_is_pinned(fleet: Fleet):
    status, answer = await ask(fleet, **KEY)
    assert status == 200
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert await models_of(fleet.neuron_urls[0]) == {"cortex-tiny": "unloaded"}
    assert await models_of(fleet.neuron_urls[1]) == {"cortex-tiny": "loaded"}


async def test_the_listing_has_catalogue_models_aliases_and_what_the_nodes_have(fleet: Fleet):
    async with (
        aiohttp.ClientSession(headers=KEY) as session,
        session.get(f"{fleet.url}/v1/models") as reply,
    ):
        cards = {card["id"]: card for card in (await reply.json())["data"]}
    assert set(cards) == {"cortex-tiny", "org/not-here", "small"}
    assert cards["cortex-tiny"]["loaded"] is True
    assert cards["cortex-tiny"]["feasible_on"] == ["second"]
    assert cards["org/not-here"]["feasible_on"] == []


async def test_the_metrics_count_the_request_the_load_and_the_tokens(fleet: Fleet):
    await ask(fleet, **KEY)
    async with aiohttp.ClientSession() as session, session.get(fleet.metrics_url) as reply:
        lines = (await reply.text()).splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    labels = '{model="cortex-tiny",node="second"}'
    assert float(values[f"cortex_requests_total{labels}"]) >= 2
    assert float(values[f"cortex_cold_starts_total{labels}"]) == 1
    assert float(values[f"cortex_prompt_tokens_total{labels}"]) > 0
    assert float(values[f"cortex_completion_tokens_total{labels}"]) > 0
    assert values['cortex_node_up{node="first"}'] == "1.0"


def test_status_with_the_key_shows_the_fleet(fleet: Fleet, tmp_path: Path):
    done = run_cortex(tmp_path, "status", "-e", fleet.url, "--key", "sk-test")
    assert done.returncode == 0, done.stdout
    assert "second" in done.stdout
    assert "org/not-here" in done.stdout


async def test_an_unloaded_model_is_loaded_again_by_the_next_request(fleet: Fleet):
    async with aiohttp.ClientSession() as session:
        body = {"model_id": "cortex-tiny"}
        async with session.post(f"{fleet.neuron_urls[1]}/models/unload", json=body) as reply:
            assert (await reply.json())["status"] == "unloaded"
    status, _ = await ask(fleet, **KEY)
    assert status == 200


async def test_a_killed_neuron_is_noticed_and_its_model_refused_with_a_time_to_retry(
    fleet: Fleet,
):
    os.kill(fleet.neuron_pids[1], signal.SIGKILL)
    async with aiohttp.ClientSession() as session, asyncio.timeout(NOTICED_S):
        while True:
            async with session.get(f"{fleet.url}/health") as reply:
                health = await reply.json()
            if health["nodes"]["healthy"] == 1:
                break
            await asyncio.sleep(0.1)
        async with session.post(f"{fleet.url}/v1/chat/completions", json=ASK, headers=KEY) as reply:
            assert reply.status == 503
            assert "Retry-After" in reply.headers


async def models_of(neuron_url: str) -> dict[str, str]:
    async with aiohttp.ClientSession() as session, session.get(f"{neuron_url}/models") as reply:
        return {model["id"]: model["status"] for model in await reply.json()}
