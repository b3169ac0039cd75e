import asyncio
import gc
import os
import signal
import sys
import tempfile
import time
from contextlib import asynccontextmanager

import pytest

from cortex.core.errors import (
    CheckpointError,
    EngineDiedError,
    InsufficientMemoryError,
    LoadFailedError,
    ModelRecoveringError,
    ServiceUnavailableError,
    ShuttingDownError,
)
from cortex.neuron import engine_client
from cortex.neuron.engine.protocol import LoadModel, Progress, Submit
from cortex.neuron.engine_client import EngineClient
from cortex.neuron.models.source import ModelSource
from cortex.neuron.scratch import sweep
from tests.support.fake_engine import COMMAND, write_script

SPEC = LoadModel(source=ModelSource(kind="hf", path="nowhere"))


@asynccontextmanager
async def running(directory, *, command=COMMAND):
    async with asyncio.TaskGroup() as tasks:
        source = ModelSource(kind="hf", path=str(directory))
        client = EngineClient("m", command, LoadModel(source=source), clock=time.monotonic)
        await client.start(tasks)
        try:
            yield client
        finally:
            await client.kill()


async def load(client, *, on_progress=lambda progress: None, timeout_s=30.0):
    return await client.load(on_progress=on_progress, timeout_s=timeout_s)


def ask(*prompt_ids, max_tokens=1000):
    return [Submit(request_id=0, prompt_ids=list(prompt_ids), max_tokens=max_tokens)]


async def tokens_of(generation):
    return [each async for _, event in generation for each in event.token_ids]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_loaded_engine_answers_several_requests_at_once(tmp_path):
    async with running(tmp_path) as client:
        loaded = await load(client)
        assert loaded.max_num_seqs == 4
        first, second = client.submit(ask(1, 2, 3)), client.submit(ask(4, 5))
        assert await tokens_of(second) == [4, 5]
        assert await tokens_of(first) == [1, 2, 3]
        assert client.stats.free_slots == 4
        assert client.stats.tok_s_decode == 50.0


async def test_a_load_reports_its_progress(tmp_path):
    seen = []
    async with running(tmp_path) as client:
        await load(client, on_progress=seen.append)
    assert seen == [Progress(phase="weights", bytes_done=50, bytes_total=100)]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("unreadable_checkpoint", CheckpointError),
        ("unsupported_model", CheckpointError),
        ("out_of_memory", InsufficientMemoryError),
        ("internal", LoadFailedError),
    ],
)
async def test_each_reason_of_a_failed_load_is_an_error_of_its_own(tmp_path, code, error):
    write_script(tmp_path, fail=code)
    async with running(tmp_path) as client:
        with pytest.raises(error, match="model 'm' cannot be loaded: scripted failure"):
            await load(client)


async def test_a_process_that_dies_while_loading_is_quoted(tmp_path):
    write_script(tmp_path, die_loading=3)
    async with running(tmp_path) as client:
        with pytest.raises(LoadFailedError, match="exit code 3; its last words: RuntimeError"):
            await load(client)


async def test_a_program_that_does_not_exist_is_a_failed_load(tmp_path):
    async with asyncio.TaskGroup() as tasks:
        client = EngineClient("m", [str(tmp_path / "none")], SPEC, clock=time.monotonic)
        with pytest.raises(LoadFailedError, match="no engine process could be started"):
            await client.start(tasks)


async def test_a_program_that_never_connects_fails_when_it_ends(tmp_path):
    async with running(tmp_path, command=["/bin/sh", "-c", "echo no torch; exit 7"]) as client:
        with pytest.raises(LoadFailedError, match="exit code 7; its last words: no torch"):
            await load(client)


async def test_a_load_that_takes_too_long_is_given_up(tmp_path):
    write_script(tmp_path, load_s=60)
    async with running(tmp_path) as client:
        with pytest.raises(LoadFailedError, match="was not loaded within 1 s"):
            await load(client, timeout_s=1)


async def test_closing_a_generation_cancels_it_in_the_engine(tmp_path):
    write_script(tmp_path, gap_s=0.01, repeat=100)
    async with running(tmp_path) as client:
        await load(client)
        generation = client.submit(ask(1, 2, 3))
        await anext(generation)
        assert client.stats.free_slots == 3
        generation.close()
        # The next answer comes after the cancellation was seen.
        await tokens_of(client.submit(ask(9, max_tokens=1)))
        assert client.stats.free_slots == 4
        assert client.stats.num_running == 0


async def test_the_sequences_of_one_request_come_with_their_index_and_end_one_by_one(tmp_path):
    async with running(tmp_path) as client:
        await load(client)
        answers = {0: [], 1: []}
        async for choice_idx, event in client.submit([*ask(1, 2, 3), *ask(4)]):
            answers[choice_idx] += event.token_ids
        assert answers == {0: [1, 2, 3], 1: [4]}


async def test_one_sequence_can_be_given_up_while_the_other_goes_on(tmp_path):
    write_script(tmp_path, gap_s=0.001, repeat=20)
    async with running(tmp_path) as client:
        await load(client)
        answers = {0: [], 1: []}
        generation = client.submit([*ask(1), *ask(2)])
        async for choice_idx, event in generation:
            answers[choice_idx] += event.token_ids
            generation.cancel(0)
        assert answers == {0: [1], 1: [2] * 20}


async def test_a_killed_engine_ends_its_requests_with_an_error(tmp_path):
    write_script(tmp_path, gap_s=0.01, repeat=1000)
    async with running(tmp_path) as client:
        await load(client)
        generation = client.submit(ask(1, 2, 3))
        await anext(generation)
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineDiedError):
            await tokens_of(generation)
        await client.ended.wait()
        assert "SIGKILL" in client.cause_of_death
        with pytest.raises(ModelRecoveringError, match="is being restarted") as caught:
            client.submit(ask(1))
        assert caught.value.retry_after_s == 2


async def test_an_engine_that_hangs_up_serves_no_more_and_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_client, "EXIT_S", 0.1)
    write_script(tmp_path, hang_up_on_id=66)
    async with running(tmp_path) as client:
        assert not client.can_serve
        await load(client)
        assert client.can_serve
        with pytest.raises(EngineDiedError):
            await tokens_of(client.submit(ask(66)))
        assert not client.can_serve
        with pytest.raises(ModelRecoveringError, match="is being restarted") as caught:
            client.submit(ask(1))
        assert caught.value.retry_after_s == 2
        await client.ended.wait()
        assert "SIGKILL" in client.cause_of_death


async def test_bytes_that_are_no_frame_end_the_engine_and_its_requests(tmp_path):
    write_script(tmp_path, garbage_on_id=66)
    async with running(tmp_path) as client:
        await load(client)
        with pytest.raises(EngineDiedError):
            await tokens_of(client.submit(ask(66)))
        await client.ended.wait()


async def test_a_reader_that_stops_reading_loses_only_its_own_request(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_client, "MAX_QUEUED_EVENTS", 10)
    write_script(tmp_path, repeat=100)
    async with running(tmp_path) as client:
        await load(client)
        slow = client.submit(ask(1))
        other = client.submit(ask(2))
        assert await tokens_of(other) == [2] * 100
        with pytest.raises(ServiceUnavailableError, match="was not read: 10 pieces"):
            await tokens_of(slow)


async def test_stop_ends_the_process_and_removes_its_socket(tmp_path):
    async with running(tmp_path) as client:
        await load(client)
        await client.stop(grace_s=10)
        assert client.ended.is_set()
        assert not is_alive(client.pid)


async def test_a_process_that_ignores_everything_else_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_client, "TERM_S", 0.1)
    write_script(tmp_path, stubborn=True)
    async with running(tmp_path) as client:
        await load(client)
        await client.stop(grace_s=0.1)
        assert client.ended.is_set()
        assert "SIGKILL" in client.cause_of_death


async def test_the_socket_directory_is_private_and_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with running(tmp_path) as client:
        await load(client)
        folders = list(tmp_path.glob("cortex-*"))
        assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700]
    assert not list(tmp_path.glob("cortex-*"))


async def test_what_the_engine_prints_goes_to_the_log_with_the_model_name(tmp_path, caplog):
    write_script(tmp_path, words="loading on the moon")
    caplog.set_level("INFO", logger="cortex.engine")
    async with running(tmp_path) as client:
        await load(client)
        await client.stop(grace_s=10)
    records = [each for each in caplog.records if each.getMessage() == "loading on the moon"]
    assert [each.model for each in records] == ["m"]


async def test_a_line_without_end_is_logged_in_pieces(tmp_path, caplog):
    caplog.set_level("INFO", logger="cortex.engine")
    script = "head -c 200000 /dev/zero | tr '\\0' x; echo; echo end"
    async with running(tmp_path, command=["/bin/sh", "-c", script]) as client:
        await client.ended.wait()
    said = [each.getMessage() for each in caplog.records if each.name == "cortex.engine"]
    pieces = said[:-1]
    assert said[-1] == "end"
    assert len(pieces) > 1
    assert "".join(pieces) == "x" * 200_000


async def test_another_neurons_start_leaves_an_engine_that_has_not_connected_yet_alone(tmp_path):
    async with running(tmp_path) as client:
        sweep()
        assert (await load(client)).max_num_seqs == 4


async def test_a_temporary_directory_that_cannot_take_a_socket_fails_the_load(
    tmp_path, monkeypatch
):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    async with asyncio.TaskGroup() as tasks:
        client = EngineClient("m", COMMAND, SPEC, clock=time.monotonic)
        with pytest.raises(LoadFailedError, match="set TMPDIR to a short path"):
            await client.start(tasks)
    assert not list(long.iterdir())


async def test_requests_of_a_stopped_engine_end_with_the_reason_of_the_stop(tmp_path):
    write_script(tmp_path, gap_s=0.01, repeat=1000)
    async with running(tmp_path) as client:
        await load(client)
        generation = client.submit(ask(1))
        await anext(generation)
        await client.stop(grace_s=10, error=ShuttingDownError("going home"))
        with pytest.raises(ShuttingDownError, match="going home"):
            await tokens_of(generation)
        with pytest.raises(ShuttingDownError, match="going home"):
            client.submit(ask(1))


async def test_an_engine_that_dies_before_it_connects_leaves_no_unread_outcome(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    client = EngineClient("m", command, SPEC, clock=time.monotonic)
    async with asyncio.TaskGroup() as tasks:
        await client.start(tasks)
        with pytest.raises(LoadFailedError, match="exit code 3"):
            await load(client)
    # An exception nobody asked for is reported when its future goes away.
    unread: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unread.append(context))
    del client
    gc.collect()
    assert unread == []
