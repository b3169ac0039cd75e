"""Configuration files that change under a running gateway."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cortex.core.config import GatewayConfig, GatewayListen, NeuronAddress, ResponsesConfig
from cortex.gateway.live import Live
from cortex.gateway.reload import Reloader, needing_restart, read_files
from cortex.gateway.status import fetch_status
from tests.support.gateway import RunningGateway, run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron


def write(path: Path, text: str) -> None:
    """Write a file as a new one, so that even a quick change is seen."""
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.replace(path)


def entry(name: str, neuron: MockNeuron, more: str = "") -> str:
    return f'[[neurons]]\nname = "{name}"\nendpoint = "{neuron.endpoint}"\n{more}'


def loaded(text: str, **fields: object) -> MockModel:
    return MockModel("m", "loaded", tokens=[text], **fields)  # type: ignore[arg-type]


async def reload(gateway: RunningGateway) -> None:
    assert gateway.apps.reloader is not None
    await gateway.apps.reloader.reload()


async def health(gateway: RunningGateway) -> dict:
    return await (await gateway.get("/health")).json()


async def seen(test: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not test():
            await asyncio.sleep(0.01)


async def test_nodes_that_are_added_and_removed_take_effect_without_dropping_a_request(
    tmp_path: Path,
) -> None:
    gate = asyncio.Event()
    old_model = loaded("old", first_gate=gate)
    source = tmp_path / "cortex.toml"
    async with MockNeuron(old_model, events=True) as old, MockNeuron(loaded("new")) as new:
        async with run_gateway({"a": old.endpoint}, source=source) as gateway:
            async with asyncio.TaskGroup() as tasks:
                calls = [tasks.create_task(gateway.chat(stream=each)) for each in (False, True)]
                await old.until(lambda: old_model.in_flight == 2)
                write(source, entry("b", new))
                await reload(gateway)
                await seen(lambda: old.feed.subscribers == 0)
                await new.until(lambda: new.polls > 0)
                await seen(lambda: gateway.apps.fleet.snapshot().nodes[0].healthy)
                assert '"new"' in await (await gateway.chat()).text()
                names = [each["name"] for each in (await health(gateway))["details"]]
                assert names == ["b"]
                gate.set()
            for call in calls:
                assert call.result().status == 200
                assert '"old"' in await call.result().text()
            assert "[DONE]" in await calls[1].result().text()
            assert len(old.seen) == 2


async def test_a_catalogue_that_changes_is_in_use_for_the_next_request(tmp_path: Path) -> None:
    source = tmp_path / "cortex.toml"
    async with MockNeuron(loaded("hi")) as neuron:
        write(source, entry("a", neuron))
        async with run_gateway({"a": neuron.endpoint}, source=source) as gateway:
            assert (await gateway.chat("small")).status == 404
            write(tmp_path / "models.toml", '[aliases]\nsmall = "m"\n')
            await reload(gateway)
            assert (await gateway.chat("small")).status == 200


async def test_settings_and_keys_change_too(tmp_path: Path) -> None:
    source = tmp_path / "cortex.toml"
    async with MockNeuron(loaded("hi")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, source=source) as gateway:
            assert (await gateway.chat()).status == 200
            write(
                source,
                "[gateway]\nmax_body_mb = 1\n"
                + entry("a", neuron)
                + '[entitlements]\nrequire_auth = true\n[[entitlements.keys]]\nkey = "sk-1"\n'
                'account_id = "x"\n',
            )
            await reload(gateway)
            assert (await gateway.chat()).status == 401
            body = {"model": "m", "messages": [{"role": "user", "content": "x" * (2 << 20)}]}
            response = await gateway.post("/v1/chat/completions", body, x_api_key="sk-1")
            assert response.status == 413


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("cortex.toml", "[gateway\n", "cortex.toml: not valid TOML"),
        ("cortex.toml", "[gateway]\npoll_seconds = 1\n", "unknown field `poll_seconds`"),
        ("models.toml", "[[models]]\n", "models.toml: Object missing required field `id`"),
    ],
)
async def test_a_bad_file_leaves_the_configuration_in_use_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, text: str, words: str
) -> None:
    source = tmp_path / "cortex.toml"
    async with MockNeuron(loaded("hi")) as neuron:
        write(source, entry("a", neuron))
        async with run_gateway({"a": neuron.endpoint}, source=source) as gateway:
            write(tmp_path / name, text)
            await reload(gateway)
            assert (await gateway.chat()).status == 200
            told = (await health(gateway))["config"]["error"]
            assert words in told
            assert str(tmp_path / name) in told
            assert f"the configuration in use stays: {told}" in caplog.text
            report = await fetch_status(gateway.url)
            assert report.config_lines == [f"configuration not in use: {told}"]
            (tmp_path / name).unlink()
            write(source, entry("a", neuron))
            await reload(gateway)
            assert (await health(gateway))["config"] == {}


async def test_keys_that_need_a_restart_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "cortex.toml"
    async with MockNeuron(loaded("hi")) as neuron:
        listen = '[gateway]\nlisten = "127.0.0.1:1"\nmetrics_listen = "0.0.0.0:31314"\n'
        write(source, listen + entry("a", neuron))
        async with run_gateway({"a": neuron.endpoint}, source=source) as gateway:
            await reload(gateway)
            words = "gateway.listen: takes effect when the gateway is started again"
            assert words in caplog.text
            assert (await health(gateway))["config"] == {"restart_for": ["gateway.listen"]}
            report = await fetch_status(gateway.url)
            assert report.config_lines == ["restart the gateway for: gateway.listen"]
            assert (await gateway.chat()).status == 200


def test_only_what_is_opened_once_needs_a_restart() -> None:
    before = GatewayConfig()
    after = GatewayConfig(
        gateway=GatewayListen(metrics_listen="127.0.0.1:1", drain_s=1, poll_s=1, max_body_mb=1),
        neurons=[NeuronAddress(name="a", endpoint="http://a")],
        responses=ResponsesConfig(store_file="/kept.sqlite", max_mb=1),
    )
    assert needing_restart(before, after) == (
        "gateway.metrics_listen",
        "gateway.drain_s",
        "responses.store_file",
    )


async def test_a_node_drains_while_its_entry_says_so(tmp_path: Path) -> None:
    source = tmp_path / "cortex.toml"
    async with MockNeuron(loaded("hi")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, source=source) as gateway:
            write(source, entry("a", neuron, "drain = true\n"))
            await reload(gateway)
            assert (await gateway.chat()).status == 503
            write(source, entry("a", neuron))
            await reload(gateway)
            assert (await gateway.chat()).status == 200
            await gateway.post("/nodes/a/drain", {})
            write(source, entry("a", neuron) + "[eviction]\nmin_resident_s = 5\n")
            await reload(gateway)
            assert (await gateway.chat()).status == 503, "a reload does not end what was asked for"


async def test_files_are_read_when_they_have_changed_and_settled(tmp_path: Path) -> None:
    source = tmp_path / "cortex.toml"
    write(source, "")
    config, catalogue = read_files(source)
    live = Live(config, catalogue)
    polls: list[float] = []
    live.on_change(lambda: polls.append(live.settings.poll_s))
    async with asyncio.TaskGroup() as tasks:
        reloader = Reloader(live, source, check_s=0.01)
        running = tasks.create_task(reloader.run())
        await asyncio.sleep(0.1)
        assert polls == []
        write(source, "[gateway]\npoll_s = 3\n")
        await seen(lambda: polls == [3])
        write(tmp_path / "models.toml", '[[models]]\nid = "m"\n')
        await seen(lambda: live.catalogue.find("m") is not None)
        assert polls == [3, 3]
        running.cancel()


async def test_a_file_that_looks_the_same_is_read_when_that_is_asked_for(tmp_path: Path) -> None:
    source = tmp_path / "cortex.toml"
    write(source, "[gateway]\npoll_s = 3\n")
    told = source.stat()
    live = Live(*read_files(source))
    async with asyncio.TaskGroup() as tasks:
        reloader = Reloader(live, source, check_s=60)
        running = tasks.create_task(reloader.run())
        await asyncio.sleep(0.05)
        source.write_text("[gateway]\npoll_s = 4\n")
        os.utime(source, ns=(told.st_atime_ns, told.st_mtime_ns))
        reloader.request()
        await seen(lambda: live.settings.poll_s == 4)
        running.cancel()
