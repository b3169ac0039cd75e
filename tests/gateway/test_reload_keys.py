"""Keys, limits and the fleet secret of a file that changes under a running gateway."""

from pathlib import Path

import msgspec

from tests.support.budgets import COST, Wall, chat, until_used, used
from tests.support.gateway import RunningGateway, run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron

KEYS = "[entitlements]\nrequire_auth = true\n"


def entry(key: str, key_id: str, limits: str) -> str:
    named = f'account_id = "alice"\nkey_id = "{key_id}"\n'
    return f'[[entitlements.keys]]\nkey = "{key}"\n{named}{limits}\n'


def write(source: Path, neuron: MockNeuron, text: str) -> None:
    where = f'[[neurons]]\nname = "a"\nendpoint = "{neuron.endpoint}"\n'
    source.write_text(f"{text}\n{where}")


async def reload(gateway: RunningGateway, source: Path, neuron: MockNeuron, text: str) -> None:
    write(source, neuron, text)
    assert gateway.apps.reloader is not None
    await gateway.apps.reloader.reload()


async def test_keys_and_limits_follow_the_file_and_what_is_spent_stays_spent(
    tmp_path: Path,
) -> None:
    source = tmp_path / "cortex.toml"
    async with (
        MockNeuron(MockModel("m", "loaded")) as neuron,
        run_gateway({"a": neuron.endpoint}, source=source, wall_clock=Wall()) as gateway,
    ):
        first = KEYS + entry("k", "laptop", f"hard_cap = {COST}")
        await reload(gateway, source, neuron, first)
        assert (await gateway.chat()).status == 401
        assert (await chat(gateway)).status == 200
        await until_used(gateway, "hard_cap", COST)
        assert (await chat(gateway)).status == 429
        # More of the same budget, under another secret: the key is its id.
        await reload(gateway, source, neuron, KEYS + entry("k2", "laptop", "hard_cap = 1000"))
        assert (await chat(gateway)).status == 401
        await reload(gateway, source, neuron, KEYS + entry("k", "laptop", "hard_cap = 1000"))
        assert await used(gateway) == {"hard_cap": COST}
        assert (await chat(gateway)).status == 200
        await until_used(gateway, "hard_cap", 2 * COST)
        # A file that cannot be used changes nothing.
        await reload(gateway, source, neuron, KEYS + entry("k", "laptop", "hard_cap = -1"))
        assert await used(gateway) == {"hard_cap": 2 * COST}


async def test_another_fleet_secret_is_shown_from_the_next_request_on(tmp_path: Path) -> None:
    source = tmp_path / "cortex.toml"
    async with (
        MockNeuron(MockModel("m", "loaded")) as neuron,
        run_gateway({"a": neuron.endpoint}, source=source) as gateway,
    ):
        for secret in ("the-first-fleet-secret", "the-second-fleet-secret"):
            await reload(gateway, source, neuron, f'fleet_secret = "{secret}"')
            assert (await gateway.chat()).status == 200
            headers = {name.lower(): value for name, value in neuron.seen[-1].headers.items()}
            assert headers["authorization"] == f"Bearer {secret}"
        await reload(gateway, source, neuron, "")
        assert (await gateway.chat()).status == 200
        assert "authorization" not in {name.lower() for name in neuron.seen[-1].headers}
        assert msgspec.json.decode(neuron.seen[-1].body)["model"] == "m"
