import asyncio
import os
import signal

import pytest

from cortex.core.config import TorchHarness
from cortex.core.errors import InsufficientMemoryError, LoadFailedError, ServiceUnavailableError
from cortex.core.neuron_api import LoadRequest
from cortex.neuron import ledger as ledger_module
from cortex.neuron.devices import HOST
from cortex.neuron.eviction import VictimBusyError, VictimProtectedError, protection
from cortex.neuron.memory import Resident
from cortex.neuron.resident import UnloadedError
from tests.support.fake_engine import starts, write_script
from tests.support.neuron_fakes import add_model, eventually
from tests.support.neuron_host import host, is_alive, tokens_of

# 40 GB in float32: one of them fits a host of 64 GiB, two do not.
LARGE = 10_000_000_000


def resident(**changes):
    values = {"id": "old", "device": 0, "bytes": 1, "in_flight": 0, "last_used_s": None}
    return Resident(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "status", "why"),
    [
        ({}, "loaded", None),
        ({"in_flight": 3}, "loaded", None),
        ({"priority": 50}, "loaded", None),
        ({"priority": 100}, "loaded", None),
        ({"priority": 101}, "loaded", "its priority 101 is above 100"),
        ({"pinned": True}, "loaded", "it is pinned"),
        ({"min_resident_left_s": 41.6}, "loaded", "its minimum residency ends in 42 s"),
        ({}, "loading", "it is loading"),
        ({}, "recovering", "it is recovering"),
        ({}, "draining", "it is draining"),
    ],
)
def test_who_may_be_evicted_for_a_newcomer_of_priority_100(changes, status, why):
    assert protection(resident(**changes), status, 100) == why


def add_large(tmp_path, *names):
    return [add_model(tmp_path / "models", name, parameters=LARGE) for name in names]


async def test_a_victim_gives_its_memory_to_the_load_it_leaves_for(tmp_path):
    old, new = add_large(tmp_path, "old", "new")
    async with host(tmp_path) as it:
        await it.load("old")
        with pytest.raises(InsufficientMemoryError):
            await it.load("new")
        job = await it.load("new", evict=["old", "never-heard-of"])
        assert (job.evicted, job.drained) == (["old"], [])
        assert (it.status("old"), it.status("new")) == ("unloaded", "loaded")
        assert not is_alive(starts(old)[0])
        assert is_alive(starts(new)[0])


async def test_nobody_else_gets_the_memory_of_a_victim_while_it_leaves(tmp_path):
    add_large(tmp_path, "old", "new", "thief")
    async with host(tmp_path) as it:
        await it.load("old")
        ticket = await it.lifecycle.serving("old").admission.acquire()
        async with asyncio.TaskGroup() as tasks:
            loading = tasks.create_task(it.load("new", evict=["old"]))
            await it.until("old", "draining")
            with pytest.raises(InsufficientMemoryError):
                await it.load("thief")
            with pytest.raises(VictimProtectedError, match="it is draining"):
                await it.load("thief", evict=["old"])
            ticket.release()
        assert loading.result().evicted == ["old"]
        with pytest.raises(InsufficientMemoryError):
            await it.load("thief")


async def test_a_busy_victim_ends_its_requests_first_and_is_named(tmp_path):
    [old, _] = add_large(tmp_path, "old", "new")
    write_script(old, gap_s=0.01, repeat=20)
    async with host(tmp_path) as it:
        await it.load("old")
        ticket = await it.lifecycle.serving("old").admission.acquire()
        stream = it.stream("old", 7)
        async with asyncio.TaskGroup() as tasks:
            loading = tasks.create_task(it.load("new", evict=["old"]))
            await it.until("old", "draining")
            with pytest.raises(UnloadedError):
                it.lifecycle.serving("old")
            assert await tokens_of(stream) == [7] * 20
            assert it.status("new") == "loading"
            ticket.release()
        assert (loading.result().evicted, loading.result().drained) == (["old"], ["old"])


async def test_a_victim_that_stays_busy_goes_on_and_the_load_names_it(tmp_path):
    paths = add_large(tmp_path, "busy", "idle", "new")
    async with host(tmp_path, config=TorchHarness(drain_s=0.2)) as it:
        it.probe.free_gib[HOST] = 100.0
        await it.load("busy")
        await it.load("idle")
        serving = it.lifecycle.serving("busy")
        await serving.admission.acquire()
        with pytest.raises(VictimBusyError, match="busy still had requests in hand") as caught:
            await it.load("new", evict=["idle", "busy"])
        assert (caught.value.status, caught.value.extras) == (409, {"busy": ["busy"]})
        # Nobody was ended, nothing is promised, and both take requests again.
        assert [it.status(name) for name in ("busy", "idle", "new")] == [
            "loaded",
            "loaded",
            "unloaded",
        ]
        assert it.lifecycle.claim("new") is None
        assert [len(starts(path)) for path in paths] == [1, 1, 0]
        for name in ("busy", "idle"):
            with await it.lifecycle.serving(name).admission.acquire():
                assert await tokens_of(it.stream(name, 5)) == [5]


async def test_who_waits_for_a_seat_of_a_victim_gets_it_if_the_victim_stays(tmp_path):
    path, _ = add_large(tmp_path, "busy", "new")
    write_script(path, max_num_seqs=1)
    async with host(tmp_path, config=TorchHarness(drain_s=0.3)) as it:
        await it.load("busy")
        admission = it.lifecycle.serving("busy").admission
        ticket = await admission.acquire()
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(admission.acquire())
            with pytest.raises(VictimBusyError):
                await it.load("new", evict=["busy"])
            assert not waiting.done()
            ticket.release()
        assert admission.in_flight == 1


async def test_who_waits_for_a_seat_of_a_victim_that_leaves_is_told_to_come_again(tmp_path):
    path, _ = add_large(tmp_path, "old", "new")
    write_script(path, max_num_seqs=1)
    async with host(tmp_path) as it:
        await it.load("old")
        admission = it.lifecycle.serving("old").admission
        ticket = await admission.acquire()
        waiting = asyncio.ensure_future(admission.acquire())
        loading = asyncio.ensure_future(it.load("new", evict=["old"]))
        await it.until("old", "draining")
        ticket.release()
        with pytest.raises(UnloadedError) as caught:
            await waiting
        assert isinstance(caught.value, ServiceUnavailableError)
        await loading


@pytest.mark.parametrize(
    ("policy", "priority", "why"),
    [
        ({"pinned": True}, 100, "it is pinned"),
        ({"priority": 200}, 199, "its priority 200 is above 199"),
        ({"min_resident_s": 60.0}, 100, "its minimum residency ends in 60 s"),
    ],
)
async def test_a_protected_victim_is_named_and_nothing_is_unloaded(tmp_path, policy, priority, why):
    add_large(tmp_path, "kept", "other", "new")
    async with host(tmp_path) as it:
        it.probe.free_gib[HOST] = 100.0
        await it.load("kept", **policy)
        await it.load("other")
        with pytest.raises(VictimProtectedError) as caught:
            await it.load("new", priority=priority, evict=["other", "kept"])
        assert caught.value.status == 409
        assert "'kept' may not be evicted" in caught.value.message
        assert why in caught.value.message
        assert caught.value.extras["victim"] == "kept"
        assert (it.status("kept"), it.status("other")) == ("loaded", "loaded")
        # An explicit unload always works.
        await it.lifecycle.unload("kept")
        assert it.status("kept") == "unloaded"


async def test_a_minimum_residency_that_is_over_protects_no_more(tmp_path):
    add_large(tmp_path, "old", "new")
    async with host(tmp_path) as it:
        await it.load("old", min_resident_s=60.0)
        with pytest.raises(VictimProtectedError) as caught:
            await it.load("new", evict=["old"])
        assert 59.0 < caught.value.extras["ends_in_s"] <= 60.0
        assert 59.0 < caught.value.retry_after_s <= 60.0
        it.clock.ahead_s = 60.0
        assert (await it.load("new", evict=["old"])).evicted == ["old"]


async def test_a_restart_of_its_engine_does_not_make_a_residency_longer(tmp_path):
    path, _ = add_large(tmp_path, "old", "new")
    async with host(tmp_path) as it:
        await it.load("old", min_resident_s=60.0)
        it.clock.ahead_s = 60.0
        os.kill(starts(path)[0], signal.SIGKILL)
        await eventually(lambda: len(starts(path)) == 2)
        await it.until("old", "loaded")
        assert (await it.load("new", evict=["old"])).evicted == ["old"]


async def test_a_load_that_does_not_fit_even_without_its_victims_unloads_none(tmp_path):
    add_large(tmp_path, "old")
    add_model(tmp_path / "models", "huge", parameters=30_000_000_000)
    async with host(tmp_path) as it:
        await it.load("old")
        with pytest.raises(InsufficientMemoryError, match="even without old"):
            await it.load("huge", evict=["old"])
        assert it.status("old") == "loaded"
        assert it.lifecycle.claim("huge") is None


async def test_a_load_that_fails_after_its_victims_left_gives_everything_back(tmp_path):
    _, new = add_large(tmp_path, "old", "new")
    write_script(new, fail="internal")
    async with host(tmp_path) as it:
        await it.load("old")
        with pytest.raises(LoadFailedError):
            await it.load("new", evict=["old"])
        assert it.lifecycle.claim("new") is None
        await it.load("old")
        assert it.status("old") == "loaded"


async def test_a_load_that_is_given_up_while_its_victim_drains_leaves_the_victim(tmp_path):
    add_large(tmp_path, "old", "new")
    async with host(tmp_path) as it:
        await it.load("old")
        ticket = await it.lifecycle.serving("old").admission.acquire()
        job = await it.lifecycle.load(LoadRequest(model_id="new", evict=["old"]))
        await it.until("old", "draining")
        await it.lifecycle.unload("new")
        assert it.status("old") == "loaded"
        ticket.release()
        assert job.is_done
        with await it.lifecycle.serving("old").admission.acquire():
            assert await tokens_of(it.stream("old", 5)) == [5]


async def test_a_load_of_a_victim_waits_and_finds_it_loaded_if_it_stayed(tmp_path):
    path, _ = add_large(tmp_path, "old", "new")
    async with host(tmp_path, config=TorchHarness(drain_s=0.3)) as it:
        await it.load("old")
        await it.lifecycle.serving("old").admission.acquire()
        async with asyncio.TaskGroup() as tasks:
            evicting = tasks.create_task(failing(it.load("new", evict=["old"])))
            await it.until("old", "draining")
            await it.load("old")
        assert isinstance(evicting.result(), VictimBusyError)
        assert len(starts(path)) == 1


async def test_a_victim_whose_engine_dies_while_it_drains_is_gone_whatever_comes_of_the_load(
    tmp_path,
):
    paths = add_large(tmp_path, "dying", "new")
    add_model(tmp_path / "models", "busy")
    async with host(tmp_path, config=TorchHarness(drain_s=0.5)) as it:
        await it.load("dying")
        await it.load("busy")
        await it.lifecycle.serving("busy").admission.acquire()
        async with asyncio.TaskGroup() as tasks:
            evicting = tasks.create_task(failing(it.load("new", evict=["dying", "busy"])))
            await it.until("dying", "draining")
            os.kill(starts(paths[0])[0], signal.SIGKILL)
            await it.until("dying", "unloaded")
        assert isinstance(evicting.result(), VictimBusyError)
        assert (it.status("dying"), it.status("busy")) == ("unloaded", "loaded")
        assert it.lifecycle.claim("dying") is None
        await it.load("dying")
        assert await tokens_of(it.stream("dying", 5)) == [5]


async def test_memory_that_does_not_come_back_fails_the_load_with_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "MEMORY_RETURN_S", 0.3)
    add_large(tmp_path, "old", "new")
    async with host(tmp_path) as it:
        await it.load("old")
        it.probe.free_gib[HOST] = 1.0
        with pytest.raises(InsufficientMemoryError) as caught:
            await it.load("new", evict=["old"])
        assert caught.value.extras["free_bytes"] == 1 << 30
        assert it.lifecycle.claim("new") is None


async def failing(work):
    try:
        await work
    except VictimBusyError as exc:
        return exc
    raise AssertionError("it did not fail")
