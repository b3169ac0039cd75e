import asyncio
import os
import signal

import pytest

from cortex.core.config import Admission, TorchHarness
from cortex.core.errors import (
    ConflictError,
    ModelNotFoundError,
    ModelRecoveringError,
    QueueFullError,
)
from cortex.core.neuron_api import LoadRequest
from cortex.neuron.resident import UnloadedError
from cortex.neuron.supervisor import ModelBusyError
from tests.support.fake_engine import starts, write_script
from tests.support.neuron_fakes import add_model, eventually
from tests.support.neuron_host import host, is_alive, tokens_of


async def test_a_recycled_model_has_a_new_engine_and_serves(tmp_path):
    path = add_model(tmp_path / "models", "m")
    async with host(tmp_path) as it:
        await it.load("m")
        job = await it.lifecycle.recycle("m")
        await job.wait()
        first, second = starts(path)
        assert (is_alive(first), is_alive(second)) == (False, True)
        assert it.status("m") == "loaded"
        assert await tokens_of(it.stream("m", 5)) == [5]


async def test_callers_of_one_recycling_share_it(tmp_path):
    path = add_model(tmp_path / "models", "m")
    async with host(tmp_path) as it:
        await it.load("m")
        async with asyncio.TaskGroup() as tasks:
            for _ in range(5):
                job = await it.lifecycle.recycle("m")
                tasks.create_task(job.wait())
        assert len(starts(path)) == 2


async def test_requests_in_hand_end_first_and_new_ones_wait_for_the_new_engine(tmp_path):
    path = add_model(tmp_path / "models", "m")
    write_script(path, gap_s=0.01, repeat=20)
    async with host(tmp_path) as it:
        await it.load("m")
        ticket = await it.lifecycle.serving("m").admission.acquire()
        stream = it.stream("m", 7)
        job = await it.lifecycle.recycle("m")
        # To a caller it is loaded as before, and whoever comes waits in its queue.
        serving = it.lifecycle.serving("m")
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(serving.admission.acquire())
            assert await tokens_of(stream) == [7] * 20
            assert (serving.admission.queue_depth, waiting.done()) == (1, False)
            ticket.release()
            await job.wait()
        assert len(starts(path)) == 2
        assert waiting.result().seats == 1
        assert serving.engine.pid == starts(path)[1]


async def test_the_queue_of_a_model_that_is_recycled_is_bounded(tmp_path):
    path = add_model(tmp_path / "models", "m")
    config = TorchHarness(drain_s=30, admission=Admission(max_queue_depth=1))
    async with host(tmp_path, config=config) as it:
        await it.load("m")
        write_script(path, load_s=60)
        await it.lifecycle.recycle("m")
        await it.until("m", "recovering")
        admission = it.lifecycle.serving("m").admission
        waiting = asyncio.ensure_future(admission.acquire())
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await admission.acquire()
        # An unload ends it, and tells who waits.
        await it.lifecycle.unload("m")
        with pytest.raises(UnloadedError):
            await waiting


async def test_a_model_that_stays_busy_is_not_recycled_and_goes_on(tmp_path):
    path = add_model(tmp_path / "models", "m")
    async with host(tmp_path, config=TorchHarness(drain_s=0.2)) as it:
        await it.load("m")
        ticket = await it.lifecycle.serving("m").admission.acquire()
        job = await it.lifecycle.recycle("m")
        with pytest.raises(ModelBusyError, match="still had 1 requests in hand") as caught:
            await job.wait()
        assert caught.value.status == 409
        assert it.status("m") == "loaded"
        assert await tokens_of(it.stream("m", 5)) == [5]
        ticket.release()
        await (await it.lifecycle.recycle("m")).wait()
        assert len(starts(path)) == 2


async def test_an_engine_that_dies_while_it_is_recycled_fails_who_waits_and_comes_back(tmp_path):
    path = add_model(tmp_path / "models", "m")
    async with host(tmp_path) as it:
        await it.load("m")
        serving = it.lifecycle.serving("m")
        await serving.admission.acquire()
        job = await it.lifecycle.recycle("m")
        waiting = asyncio.ensure_future(serving.admission.acquire())
        await asyncio.sleep(0)
        os.kill(starts(path)[0], signal.SIGKILL)
        with pytest.raises(ModelRecoveringError):
            await waiting
        await job.wait()
        assert it.status("m") == "loaded"
    assert len(starts(path)) == 2


async def test_what_is_not_loaded_cannot_be_recycled(tmp_path):
    path = add_model(tmp_path / "models", "m")
    async with host(tmp_path) as it:
        with pytest.raises(ModelNotFoundError, match="'m' is not loaded here"):
            await it.lifecycle.recycle("m")
        write_script(path, load_s=60)
        await it.lifecycle.load(LoadRequest(model_id="m"))
        await eventually(lambda: starts(path))
        with pytest.raises(ConflictError, match="'m' is loading; only a loaded one"):
            await it.lifecycle.recycle("m")


async def test_loads_and_unloads_are_counted_and_restarts_are_not(tmp_path):
    path = add_model(tmp_path / "models", "m")
    add_model(tmp_path / "models", "other")
    async with host(tmp_path) as it:
        await it.load("m")
        await it.load("other")
        await it.lifecycle.unload("other")
        assert it.lifecycle.cycles == 3
        os.kill(starts(path)[0], signal.SIGKILL)
        await eventually(lambda: len(starts(path)) == 2)
        await it.until("m", "loaded")
        await (await it.lifecycle.recycle("m")).wait()
        assert it.lifecycle.cycles == 3
        assert it.lifecycle.model("m").cycles_at_start == 3
