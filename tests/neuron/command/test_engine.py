import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec
import pytest

from cortex.core.errors import (
    EngineDiedError,
    LoadFailedError,
    ServiceUnavailableError,
    ShuttingDownError,
)
from cortex.neuron.command import engine as engine_module
from cortex.neuron.devices import HOST
from cortex.neuron.discovery import NvmlProbe
from cortex.neuron.families import process_families
from tests.support.command_engine import engine, load
from tests.support.fake_server import child_pid, requests, starts, write_script
from tests.support.neuron_fakes import eventually


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def body(text, **fields):
    message = {"role": "user", "content": text}
    return msgspec.json.encode({"model": "fake", "messages": [message], **fields})


async def ask(it, text):
    reply = await it.post("/v1/chat/completions", body(text))
    try:
        return reply.status, msgspec.json.decode(await reply.read_all())
    finally:
        reply.close()


async def test_an_engine_that_is_up_answers(tmp_path):
    async with engine(tmp_path) as it:
        loaded = await load(it)
        assert it.can_serve
        assert loaded.max_num_seqs == 32
        assert loaded.device == "cpu"
        status, answer = await ask(it, "one two")
        assert status == 200
        assert answer["choices"][0]["message"]["content"] == "one two"


async def test_it_can_serve_only_once_its_health_says_so(tmp_path):
    write_script(tmp_path, start_s=0.4)
    async with engine(tmp_path) as it:
        async with asyncio.TaskGroup() as tasks:
            loading = tasks.create_task(load(it))
            await eventually(lambda: starts(tmp_path))
            assert not it.can_serve
        assert loading.result().max_num_seqs == 32
        assert it.can_serve


async def test_a_server_without_health_is_known_by_its_list_of_models(tmp_path):
    write_script(tmp_path, health=404)
    async with engine(tmp_path) as it:
        await load(it)
        assert it.can_serve


async def test_a_health_check_of_ones_own_is_the_only_one_asked(tmp_path):
    write_script(tmp_path, health=500)
    async with engine(tmp_path, health_path="/v1/models") as it:
        await load(it)
        assert it.can_serve


async def test_the_name_and_the_context_are_asked_of_a_server_with_one_model(tmp_path):
    write_script(tmp_path, name="its/own-name")
    async with engine(tmp_path) as it:
        assert (await load(it)).max_model_len == 4096
        assert it.upstream_model == "its/own-name"


async def test_a_name_and_a_context_that_are_configured_are_not_asked_for(tmp_path):
    write_script(tmp_path, name="its/own-name")
    async with engine(tmp_path, upstream_model="given", context=512) as it:
        assert (await load(it)).max_model_len == 512
        assert it.upstream_model == "given"


async def test_the_command_gets_its_values_and_only_the_placed_devices(tmp_path):
    command = [sys.executable, "-m", "tests.support.fake_server", str(tmp_path)]
    command += ["--port", "{port}", "--len", "{max_model_len}", "--tp", "{num_devices}", "{model}"]
    async with engine(
        tmp_path,
        devices=(1, 3),
        command=command,
        env={"WHERE": "{host}:{port}", "CUDA": "{devices}"},
        source="/models/m",
        context=1000,
        max_model_len=700,
    ) as it:
        assert (await load(it)).device == "cuda:1,cuda:3"
    arguments = json.loads((tmp_path / "arguments").read_text())
    assert arguments[3:] == ["--len", "700", "--tp", "2", "/models/m"]
    environment = json.loads((tmp_path / "environment").read_text())
    assert environment["CUDA_VISIBLE_DEVICES"] == environment["CUDA"] == "1,3"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert environment["WHERE"] == f"127.0.0.1:{arguments[2]}"


async def test_an_engine_on_the_cpu_sees_no_gpu(tmp_path):
    async with engine(tmp_path) as it:
        await load(it)
    environment = json.loads((tmp_path / "environment").read_text())
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


async def test_a_start_that_fails_says_what_the_engine_printed_and_where_all_of_it_is(tmp_path):
    write_script(tmp_path, die_starts=1)
    async with engine(tmp_path) as it:
        with pytest.raises(LoadFailedError) as caught:
            await load(it)
        assert "ended with exit code 3" in caught.value.message
        assert "out of luck: no such weights" in caught.value.message
        log = tmp_path / "logs" / "m.log"
        assert str(log) in caught.value.message
        await eventually(lambda: "out of luck" in log.read_text())
        assert log.read_text().startswith(f"--- {sys.executable} -m tests.support.fake_server")


async def test_an_engine_that_is_never_well_fails_in_time_and_leaves_nothing(tmp_path):
    write_script(tmp_path, health=500)
    async with engine(tmp_path) as it:
        with pytest.raises(LoadFailedError, match=r"/health.* with 200 within 1 s") as caught:
            await load(it, timeout_s=1.0)
        assert "fake server on" in caught.value.message
    assert not is_alive(starts(tmp_path)[0])


async def test_an_engine_that_never_answers_its_health_check_fails_in_time(tmp_path):
    write_script(tmp_path, health=0)
    async with engine(tmp_path) as it:
        with pytest.raises(LoadFailedError, match="within 1 s"):
            await load(it, timeout_s=1.0)


async def test_a_program_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LoadFailedError, match="the program 'no-such-server' of its command"):
        async with engine(tmp_path, command="no-such-server --port {port}"):
            pass


async def test_a_death_is_noticed_with_its_cause(tmp_path):
    write_script(tmp_path, die_on="poison")
    async with engine(tmp_path) as it:
        await load(it)
        with pytest.raises(EngineDiedError):
            await ask(it, "poison")
        await it.ended.wait()
        assert not it.can_serve
        assert "was ended by SIGKILL" in it.cause_of_death
        assert "cannot bear poison" in it.cause_of_death


async def test_an_engine_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "HEALTH_LIMIT_S", 0.1)
    async with engine(tmp_path, hang_s=0.4) as it:
        await load(it)
        os.kill(starts(tmp_path)[0], signal.SIGSTOP)
        async with asyncio.timeout(20):
            await it.ended.wait()
        assert "gave no sign of life for 0.4 s" in it.cause_of_death
    assert not is_alive(starts(tmp_path)[0])


async def test_an_engine_that_says_it_is_unwell_is_ended_too(tmp_path):
    async with engine(tmp_path, hang_s=0.4) as it:
        await load(it)
        write_script(tmp_path, health=503)
        async with asyncio.timeout(20):
            await it.ended.wait()
        assert "gave no sign of life" in it.cause_of_death


async def test_stopping_is_orderly_and_what_comes_then_is_told_why(tmp_path):
    async with engine(tmp_path) as it:
        await load(it)
        await it.stop(grace_s=1.0, error=ShuttingDownError("bye"))
        assert not is_alive(starts(tmp_path)[0])
        assert "SIGTERM" in it.cause_of_death
        with pytest.raises(ShuttingDownError):
            await ask(it, "hello")


async def test_an_engine_that_ignores_sigterm_is_killed(tmp_path):
    write_script(tmp_path, stubborn=True)
    async with engine(tmp_path, stop_timeout_s=0.2) as it:
        await load(it)
        await it.stop(grace_s=1.0)
        assert "SIGKILL" in it.cause_of_death
        with pytest.raises(ServiceUnavailableError):
            await ask(it, "hello")


async def test_what_an_engine_has_started_ends_with_it(tmp_path):
    write_script(tmp_path, child=True)
    async with engine(tmp_path) as it:
        await load(it)
        child = child_pid(tmp_path)
        assert is_alive(child)
        await it.stop(grace_s=1.0)
        assert not is_alive(child)


async def test_each_start_has_a_port_of_its_own_on_the_loopback_address(tmp_path):
    ports = []
    for name in ("a", "b"):
        async with engine(tmp_path / name) as it:
            await load(it)
            ports.append(json.loads((tmp_path / name / "arguments").read_text())[2])
    assert ports[0] != ports[1]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(ports[0]))) != 0


async def test_its_memory_is_that_of_all_its_processes(tmp_path):
    write_script(tmp_path, child=True)
    async with engine(tmp_path) as it:
        await load(it)
        family = process_families(Path("/proc"), {it.pid})
        assert {it.pid, starts(tmp_path)[0], child_pid(tmp_path)} <= set(family)
        assert set(family.values()) == {it.pid}
        held = NvmlProbe().read({it.pid}).processes[HOST, it.pid]
        assert held > 10 << 20


async def test_rates_and_seats_are_reported(tmp_path):
    async with engine(tmp_path, max_in_flight=3) as it:
        await load(it)
        it.note_open(1)
        it.note_rates(1000.0, 50.0)
        it.note_rates(0.0, 100.0)
        assert it.stats.free_slots == 2
        assert it.stats.num_running == 1
        assert it.stats.tok_s_prefill == 1000.0
        assert it.stats.tok_s_decode == 60.0


async def test_the_body_arrives_as_it_was_sent(tmp_path):
    async with engine(tmp_path) as it:
        await load(it)
        reply = await it.post("/v1/chat/completions", body("hi", odd={"nested": [1.5, None]}))
        await reply.read_all()
        reply.close()
    assert requests(tmp_path)[0]["odd"] == {"nested": [1.5, None]}
