import asyncio
import os
import signal
import threading
from dataclasses import replace

import pytest

from cortex.core.config import TorchHarness
from cortex.core.errors import (
    BadRequestError,
    CheckpointError,
    ConflictError,
    EngineDiedError,
    InsufficientMemoryError,
    LoadFailedError,
    ModelLoadingError,
    ModelNotFoundError,
    ModelRecoveringError,
    ServiceUnavailableError,
    ShuttingDownError,
    UnsupportedFieldError,
)
from cortex.core.neuron_api import LoadRequest
from cortex.core.openai import ChatRequest, Message
from cortex.neuron import engine_client, residency, supervisor
from cortex.neuron.accounts import Accounts
from cortex.neuron.chat.model import load_chat_model
from cortex.neuron.fetch import ImageFetcher
from cortex.neuron.harness import ModelNotLoadedError
from cortex.neuron.hub import HubUnreachableError
from cortex.neuron.inference import Inference
from cortex.neuron.library import BUNDLED_DIR
from cortex.neuron.metrics import Metrics
from cortex.neuron.models.source import ModelSource
from cortex.neuron.resident import UnloadedError
from tests.support.fake_engine import starts, write_script
from tests.support.neuron_fakes import HOST, add_model, chat_model, eventually
from tests.support.neuron_host import host, is_alive, tokens_of


async def test_ten_callers_at_once_start_one_engine(tmp_path):
    path = add_model(tmp_path / "models", "m")
    write_script(path, load_s=0.1)
    async with host(tmp_path) as it:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(10):
                tasks.create_task(it.load("m"))
        assert it.status("m") == "loaded"
        await it.load("m")
    assert len(starts(path)) == 1


async def test_a_loader_that_leaves_does_not_stop_the_load(tmp_path):
    path = add_model(tmp_path / "models", "m")
    write_script(path, load_s=0.2)
    async with host(tmp_path) as it:
        async with asyncio.TaskGroup() as tasks:
            leaver = tasks.create_task(it.load("m"))
            await it.until("m", "loading")
            leaver.cancel()
        await it.load("m")
        assert it.status("m") == "loaded"
    assert len(starts(path)) == 1


async def test_a_loading_model_tells_its_phase_and_bytes(tmp_path):
    path = add_model(tmp_path / "models", "m")
    write_script(path, load_s=1.0)
    async with host(tmp_path) as it:
        job = await it.lifecycle.load(LoadRequest(model_id="m"))
        await eventually(lambda: job.progress.phase == "weights")
        assert (job.progress.bytes_done, job.progress.bytes_total) == (50, 100)
        assert job.progress.seconds_left is not None
        with pytest.raises(ModelLoadingError) as caught:
            it.lifecycle.serving("m")
        assert caught.value.extras["progress"]["phase"] == "weights"


async def test_a_failed_load_is_not_repeated_until_the_cool_down_is_over(tmp_path):
    path = add_model(tmp_path / "models", "m")
    write_script(path, fail="internal")
    async with host(tmp_path) as it:
        with pytest.raises(LoadFailedError, match="scripted failure"):
            await it.load("m")
        with pytest.raises(LoadFailedError, match="scripted failure"):
            await it.load("m")
        assert it.status("m") == "failed"
        assert len(starts(path)) == 1
        write_script(path)
        it.clock.ahead_s = residency.COOL_DOWN_S
        await it.load("m")
        assert it.status("m") == "loaded"


async def test_an_unreadable_checkpoint_keeps_its_own_status(tmp_path):
    path = add_model(tmp_path / "models", "m")
    write_script(path, fail="unreadable_checkpoint")
    async with host(tmp_path) as it:
        with pytest.raises(CheckpointError):
            await it.load("m")
        with pytest.raises(CheckpointError):
            await it.load("m")


async def test_a_killed_engine_fails_its_streams_and_comes_back(tmp_path):
    path = add_model(tmp_path / "models", "m")
    write_script(path, gap_s=0.01, repeat=1000)
    async with host(tmp_path) as it:
        await it.load("m")
        stream = it.stream("m", 1)
        await anext(stream)
        write_script(path, load_s=0.3)
        os.kill(starts(path)[0], signal.SIGKILL)
        with pytest.raises(EngineDiedError):
            await tokens_of(stream)
        await it.until("m", "recovering")
        with pytest.raises(ModelRecoveringError) as caught:
            it.lifecycle.serving("m")
        assert caught.value.retry_after_s == 2
        await it.until("m", "loaded")
        assert await tokens_of(it.stream("m", 7)) == [7]
    assert len(starts(path)) == 2


async def test_a_loaded_model_whose_engine_has_hung_up_is_recovering_to_requests(tmp_path):
    path = add_model(tmp_path / "models", "m")
    write_script(path, hang_up_on_id=66)
    async with host(tmp_path) as it:
        await it.load("m")
        with pytest.raises(EngineDiedError):
            await tokens_of(it.stream("m", 66))
        # The process is still there, so nothing has changed the state yet.
        assert it.status("m") == "loaded"
        with pytest.raises(ModelRecoveringError) as caught:
            it.lifecycle.serving("m")
        assert caught.value.retry_after_s == 2


async def test_a_stream_whose_engine_goes_before_its_first_byte_is_refused_and_not_begun(tmp_path):
    path = add_model(tmp_path / "models", "m")
    write_script(path, hang_up_on_id=66)
    async with host(tmp_path) as it:
        await it.load("m")
        source = ModelSource(kind="hf", path=str(BUNDLED_DIR))
        chat = load_chat_model(source, model_id="m", cache_dir=tmp_path)
        serving = replace(it.lifecycle.serving("m"), chat=chat)
        with pytest.raises(EngineDiedError):
            await tokens_of(it.stream("m", 66))
        inference = Inference(
            it.lifecycle,
            Accounts(it.lifecycle, Metrics(), clock=it.clock),
            open_chat=chat_model,
            fetcher=ImageFetcher([], max_bytes=1, limit_s=1),
            wall_clock=it.clock,
        )
        request = ChatRequest(
            model="m", stream=True, messages=[Message(role="user", content="hello")]
        )
        with pytest.raises(ModelRecoveringError):
            await anext(inference.stream(request, serving))
        with pytest.raises(ModelRecoveringError):
            await inference.complete(request, serving)
        assert serving.admission.in_flight == 0
        inference.close()


async def test_a_load_request_during_a_recovery_waits_for_its_end(tmp_path):
    path = add_model(tmp_path / "models", "m")
    async with host(tmp_path) as it:
        await it.load("m")
        write_script(path, load_s=0.3)
        os.kill(starts(path)[0], signal.SIGKILL)
        await it.until("m", "recovering")
        await it.load("m")
        assert it.status("m") == "loaded"
    assert len(starts(path)) == 2


async def test_memory_of_a_recovering_model_is_not_given_away(tmp_path):
    path = add_model(tmp_path / "models", "m", parameters=10_000_000_000)
    add_model(tmp_path / "models", "other", parameters=10_000_000_000)
    async with host(tmp_path) as it:
        await it.load("m")
        write_script(path, load_s=60)
        os.kill(starts(path)[0], signal.SIGKILL)
        await it.until("m", "recovering")
        with pytest.raises(InsufficientMemoryError):
            await it.load("other")
        await it.lifecycle.unload("m")
        assert it.status("m") == "unloaded"
        await it.load("other")


async def test_an_engine_that_is_stuck_is_ended_and_started_anew(tmp_path):
    path = add_model(tmp_path / "models", "m")
    write_script(path, gap_s=60, repeat=10)
    async with host(tmp_path, config=TorchHarness(stall_s=0.2)) as it:
        await it.load("m")
        stream = it.stream("m", 1)
        write_script(path)
        with pytest.raises(EngineDiedError):
            await tokens_of(stream)
        await eventually(lambda: len(starts(path)) == 2)
        await it.until("m", "loaded")
        assert await tokens_of(it.stream("m", 7)) == [7]


async def test_an_engine_that_keeps_dying_is_given_up_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(residency, "RESTART_PAUSES_S", (0.0, 0.0, 0.0))
    path = add_model(tmp_path / "models", "m")
    async with host(tmp_path) as it:
        await it.load("m")
        write_script(path, die_loading=9)
        os.kill(starts(path)[0], signal.SIGKILL)
        await it.until("m", "failed")
        assert len(starts(path)) == 4
        with pytest.raises(LoadFailedError, match="exit code 9; its last words: RuntimeError"):
            it.lifecycle.serving("m")
        write_script(path)
        it.clock.ahead_s = residency.COOL_DOWN_S
        await it.load("m")
        assert it.status("m") == "loaded"


async def test_unload_lets_requests_end_and_refuses_new_ones(tmp_path):
    path = add_model(tmp_path / "models", "m")
    async with host(tmp_path) as it:
        await it.load("m")
        ticket = await it.lifecycle.serving("m").admission.acquire()
        async with asyncio.TaskGroup() as tasks:
            unloading = tasks.create_task(it.lifecycle.unload("m"))
            await it.until("m", "draining")
            with pytest.raises(UnloadedError):
                it.lifecycle.serving("m")
            assert is_alive(starts(path)[0])
            ticket.release()
            await unloading
        assert it.status("m") == "unloaded"
        assert not is_alive(starts(path)[0])


async def test_a_drain_that_takes_too_long_ends_the_engine_and_its_streams(tmp_path):
    path = add_model(tmp_path / "models", "m")
    write_script(path, gap_s=0.01, repeat=100_000)
    async with host(tmp_path, config=TorchHarness(drain_s=0.2)) as it:
        await it.load("m")
        await it.lifecycle.serving("m").admission.acquire()
        stream = it.stream("m", 1)
        await it.lifecycle.unload("m")
        with pytest.raises(ServiceUnavailableError, match="is being unloaded"):
            await tokens_of(stream)


async def test_unload_during_a_load_ends_it_and_tells_who_waits(tmp_path):
    path = add_model(tmp_path / "models", "m")
    write_script(path, load_s=60)
    async with host(tmp_path) as it:
        job = await it.lifecycle.load(LoadRequest(model_id="m"))
        await eventually(lambda: starts(path))
        await it.lifecycle.unload("m")
        with pytest.raises(ConflictError, match="was unloaded while it loaded"):
            await job.wait()
        assert it.status("m") == "unloaded"
        assert not is_alive(starts(path)[0])
        write_script(path)
        await it.load("m")


async def test_a_load_that_meets_a_drain_waits_for_its_end_and_loads_anew(tmp_path):
    path = add_model(tmp_path / "models", "m")
    async with host(tmp_path) as it:
        await it.load("m")
        ticket = await it.lifecycle.serving("m").admission.acquire()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(it.lifecycle.unload("m"))
            await it.until("m", "draining")
            tasks.create_task(it.load("m"))
            await asyncio.sleep(0)
            ticket.release()
        assert it.status("m") == "loaded"
    assert len(starts(path)) == 2


async def test_what_is_not_loaded_cannot_be_unloaded(tmp_path):
    async with host(tmp_path) as it:
        with pytest.raises(ModelNotFoundError, match="'m' is not loaded here"):
            await it.lifecycle.unload("m")


async def test_a_load_ends_its_victims_first(tmp_path):
    for name in ("old", "new"):
        add_model(tmp_path / "models", name)
    async with host(tmp_path) as it:
        await it.load("old")
        job = await it.load("new", evict=["old", "never-heard-of"])
        assert job.evicted == ["old"]
        assert (it.status("old"), it.status("new")) == ("unloaded", "loaded")


async def test_a_model_that_does_not_fit_is_refused_with_who_could_make_room(tmp_path):
    add_model(tmp_path / "models", "small")
    add_model(tmp_path / "models", "big", parameters=30_000_000_000)
    async with host(tmp_path) as it:
        await it.load("small")
        with pytest.raises(InsufficientMemoryError) as caught:
            await it.load("big")
        extras = caught.value.extras
        assert extras["needed_bytes"] > 120_000_000_000
        # 4 kB of weights, 1 MiB of cache and 400 MiB of process are promised to the other.
        assert extras["free_bytes"] == (64 << 30) - (400 << 20) - (1 << 20) - 4000
        assert [(each["id"], each["in_flight"]) for each in extras["residents"]] == [("small", 0)]
        # Nothing is held against the model: room may be made at once.
        it.probe.free_gib[HOST] = 200.0
        await it.load("big")


async def test_memory_of_a_load_in_progress_is_spoken_for(tmp_path):
    path = add_model(tmp_path / "models", "first", parameters=10_000_000_000)
    write_script(path, load_s=60)
    add_model(tmp_path / "models", "second", parameters=10_000_000_000)
    async with host(tmp_path) as it:
        await it.lifecycle.load(LoadRequest(model_id="first"))
        await eventually(lambda: starts(path))
        with pytest.raises(InsufficientMemoryError):
            await it.load("second")
        await it.lifecycle.unload("first")
        await it.load("second")


async def test_a_model_goes_to_the_emptiest_gpu(tmp_path):
    add_model(tmp_path / "models", "m")
    async with host(tmp_path) as it:
        it.probe.free_gib = {HOST: 64.0, 0: 10.0, 1: 20.0}
        await it.load("m")
        assert it.lifecycle.model("m").loaded.device == "cuda:1"


async def test_an_unknown_model_is_not_found(tmp_path):
    async with host(tmp_path) as it:
        with pytest.raises(ModelNotFoundError, match="no model 'nothing'"):
            await it.load("nothing")
        with pytest.raises(ModelNotFoundError):
            it.lifecycle.serving("nothing")


async def test_a_known_model_that_is_not_loaded_says_so(tmp_path):
    add_model(tmp_path / "models", "m")
    async with host(tmp_path) as it:
        it.library.scan()
        with pytest.raises(ModelNotLoadedError) as caught:
            it.lifecycle.serving("m")
        assert (caught.value.status, caught.value.code) == (503, "model_not_loaded")


@pytest.mark.parametrize(
    ("options", "error", "param"),
    [
        ({"harness": "vllm"}, UnsupportedFieldError, "harness"),
        ({"tensor_parallel": 2}, UnsupportedFieldError, "tensor_parallel"),
        ({"max_model_len": 0}, BadRequestError, "max_model_len"),
        ({"source": "ollama:org/name"}, BadRequestError, "source"),
        ({"source": "hf:../../etc"}, BadRequestError, "source"),
        ({"devices": [7]}, BadRequestError, "devices"),
        ({"quant": "q4_0"}, UnsupportedFieldError, "quant"),
    ],
)
async def test_options_that_cannot_be_met_are_named(tmp_path, options, error, param):
    add_model(tmp_path / "models", "m")
    async with host(tmp_path) as it:
        with pytest.raises(error) as caught:
            await it.load("m", **options)
        assert caught.value.param == param


async def test_a_repository_is_fetched_and_loaded_under_its_id(tmp_path):
    repo = add_model(tmp_path / "cache", "snapshot")
    (repo / "model.safetensors").touch()
    asked = []

    def snapshot(repo_id, **options):
        asked.append(repo_id)
        return str(repo)

    async with host(tmp_path, snapshot=snapshot) as it:
        await it.load("org/name")
        assert it.status("org/name") == "loaded"
        await it.load("nick", source="hf:org/other")
        assert it.status("nick") == "loaded"
    assert asked == ["org/name", "org/other"]


async def test_a_hub_that_cannot_be_reached_holds_nothing_against_the_model(tmp_path):
    async with host(tmp_path) as it:
        with pytest.raises(HubUnreachableError, match="no route to the hub"):
            await it.load("org/name")
        assert it.status("org/name") == "unloaded"


async def test_with_the_hub_switched_off_a_repository_id_is_unknown(tmp_path):
    async with host(tmp_path, config=TorchHarness(hub=False)) as it:
        with pytest.raises(ModelNotFoundError, match="the hub is off"):
            await it.load("org/name")


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/etc", "..", "link", ".hidden"])
async def test_no_name_reaches_outside_the_model_directories(tmp_path, name):
    outside = add_model(tmp_path, "outside")
    add_model(tmp_path / "models", ".hidden")
    (tmp_path / "models" / "link").symlink_to(outside)
    async with host(tmp_path) as it:
        with pytest.raises(ModelNotFoundError):
            await it.load(name)
    assert starts(outside) == []


async def test_the_end_of_the_process_unloads_everything(tmp_path):
    paths = [add_model(tmp_path / "models", name) for name in ("a", "b", "c")]
    write_script(paths[2], load_s=60)
    async with host(tmp_path) as it:
        await it.load("a")
        await it.load("b")
        await it.lifecycle.load(LoadRequest(model_id="c"))
        await eventually(lambda: starts(paths[2]))
    assert [is_alive(starts(path)[0]) for path in paths] == [False, False, False]
    with pytest.raises(ShuttingDownError):
        await it.load("a")


async def test_a_library_that_cannot_start_the_engine_reports_a_failed_load(tmp_path):
    add_model(tmp_path / "models", "m")
    async with host(tmp_path, command=[str(tmp_path / "no-such-program")]) as it:
        with pytest.raises(LoadFailedError, match="no engine process could be started"):
            await it.load("m")
        assert it.status("m") == "failed"


async def test_a_directory_that_hangs_delays_no_listing_and_no_load_of_what_is_known(tmp_path):
    add_model(tmp_path / "models", "m")
    released = threading.Event()
    async with host(tmp_path) as it:
        it.library.scan()
        it.clock.ahead_s = 60.0
        scans = []

        def hang():
            scans.append(1)
            released.wait(30)

        it.library.scan = hang
        for _ in range(5):
            await it.lifecycle.refresh(0.01)
        assert scans == [1]
        await it.load("m")
        assert it.status("m") == "loaded"
        released.set()


async def test_the_end_of_the_process_waits_for_no_engine_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "ENGINE_STOP_S", 0.1)
    monkeypatch.setattr(engine_client, "TERM_S", 0.1)
    path = add_model(tmp_path / "models", "m")
    write_script(path, gap_s=600, repeat=10, stubborn=True)
    async with host(tmp_path, config=TorchHarness(drain_s=0.1)) as it:
        await it.load("m")
        await it.lifecycle.serving("m").admission.acquire()
        stream = it.stream("m", 1)
    with pytest.raises(ShuttingDownError):
        await tokens_of(stream)
    assert not is_alive(starts(path)[0])
