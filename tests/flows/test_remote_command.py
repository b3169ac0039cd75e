"""A command that stands in models.toml, through a gateway, at a neuron that allows it."""

import os
from pathlib import Path

import msgspec

from cortex.core.catalogue import load_catalogue
from cortex.core.command import CommandModel
from cortex.core.config import CommandHarness
from tests.support.command_engine import spec
from tests.support.fake_server import COMMAND, requests, starts
from tests.support.gateway import run_gateway
from tests.support.neuron_fakes import FakeProbe
from tests.support.neuron_http import neuron

ENVIRONMENT = {"PYTHONPATH": os.environ.get("PYTHONPATH", ".")}


def catalogue(tmp_path: Path, **fields: object):
    (tmp_path / "fake").mkdir()
    command = [*COMMAND, f"{tmp_path}/fake", "--port", "{port}", "--len", "{max_model_len}"]
    entry = {"command": command, "vram_mb": 100, "context": 2048, **fields}
    lines = [f"{key} = {msgspec.json.encode(value).decode()}" for key, value in entry.items()]
    environment = f'env = {{ PYTHONPATH = "{ENVIRONMENT["PYTHONPATH"]}" }}'
    path = tmp_path / "models.toml"
    path.write_text("\n".join(['[[models]]\nid = "org/m"\n[models.command]', *lines, environment]))
    return load_catalogue(path)


async def test_a_neuron_that_allows_it_runs_the_command_of_the_catalogue(tmp_path):
    models = catalogue(tmp_path)
    async with (
        neuron(tmp_path, command=CommandHarness(allow_remote_commands=True)) as api,
        run_gateway({"host": api.url}, catalogue=models, poll_s=0.1) as gateway,
    ):
        answer = await (await gateway.chat("org/m")).json()
        assert answer["model"] == "org/m"
        assert answer["choices"][0]["message"]["content"] == "Hi"
        assert len(starts(tmp_path / "fake")) == 1
        info = (await api.get("/models/org/m")).json
        assert (info["harness"], info["limit"]) == ("command", {"context": 2048})


async def test_a_neuron_that_does_not_allow_it_refuses_with_the_way_out(tmp_path):
    models = catalogue(tmp_path)
    other = CommandModel(command="serve {port}", vram_mb=1)
    async with (
        neuron(tmp_path, command=CommandHarness(models={"other": other})) as api,
        run_gateway({"host": api.url}, catalogue=models, poll_s=0.1) as gateway,
    ):
        reply = await gateway.chat("org/m")
        error = (await reply.json())["error"]
        assert reply.status == 400
        assert "allow_remote_commands" in error["message"]
        assert starts(tmp_path / "fake") == []


async def test_a_model_over_two_gpus_is_placed_by_the_gateway_as_its_command_says(tmp_path):
    models = catalogue(tmp_path, num_devices=2)
    assert (models.models[0].min_devices, models.models[0].vram_mb) == (2, 200)
    probe = FakeProbe()
    probe.free_gib |= {0: 8.0, 1: 8.0, 2: 0.01}
    async with (
        neuron(tmp_path, command=CommandHarness(allow_remote_commands=True), probe=probe) as api,
        run_gateway({"host": api.url}, catalogue=models, poll_s=0.1) as gateway,
    ):
        assert (await gateway.chat("org/m")).status == 200
        assert (await api.get("/models/org/m")).json["devices"] == [0, 1]
        assert len(requests(tmp_path / "fake")) == 1


async def test_a_model_over_two_gpus_that_only_its_neuron_knows_is_placed_on_both(tmp_path):
    fake = spec(tmp_path / "fake", num_devices=2, vram_mb=5000, env=ENVIRONMENT)
    probe = FakeProbe()
    probe.free_gib |= {0: 8.0, 1: 8.0}
    async with (
        neuron(tmp_path, command=CommandHarness(models={"m": fake}), probe=probe) as api,
        run_gateway({"host": api.url}, poll_s=0.1) as gateway,
    ):
        info = (await api.get("/models/m")).json
        assert (info["num_devices"], info["need_bytes"]) == (2, 10_000 << 20)
        assert (await gateway.chat("m")).status == 200
        info = (await api.get("/models/m")).json
        assert (info["devices"], info["need_bytes"]) == ([0, 1], 10_000 << 20)
