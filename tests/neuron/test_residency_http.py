import asyncio

import pytest

from cortex.core.config import DefaultModel
from cortex.neuron import ledger, reaper
from cortex.neuron.devices import HOST
from tests.support.fake_engine import starts, write_script
from tests.support.neuron_fakes import FakeProbe
from tests.support.neuron_http import add_chat_model, chat, neuron, until


async def test_a_protected_victim_is_named_in_a_409(tmp_path):
    for name in ("kept", "m"):
        add_chat_model(tmp_path / "models", name)
    async with neuron(tmp_path) as api:
        await api.load("kept", min_resident_s=60.0)
        answer = await api.load("m", evict=["kept"])
        assert (answer.status, answer.error["code"]) == (409, "victim_protected")
        assert (answer.error["victim"], answer.error["param"]) == ("kept", "evict")
        assert 59 < answer.error["ends_in_s"] <= 60
        assert answer.headers["retry-after"] == "60"
        assert await api.status_of("kept") == "loaded"


async def test_a_victim_at_work_is_waited_for_and_named(tmp_path):
    path = add_chat_model(tmp_path / "models", "busy")
    add_chat_model(tmp_path / "models", "m")
    write_script(path, gap_s=0.05, repeat=10)
    async with neuron(tmp_path) as api:
        await api.load("busy")
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(
                api.post("/v1/chat/completions", chat("busy", max_tokens=20))
            )

            async def at_work():
                return (await api.health_of("busy"))["in_flight"] == 1

            await until(at_work)
            answer = await api.load("m", evict=["busy"])
        assert (answer.json["evicted"], answer.json["drained"]) == (["busy"], ["busy"])
        assert asking.result().json["usage"]["completion_tokens"] == 20


async def test_a_shortage_tells_the_figures_of_every_device_and_of_the_residents(tmp_path):
    for name in ("old", "m"):
        add_chat_model(tmp_path / "models", name)
    probe = FakeProbe()
    probe.free_gib.update({0: 8.0, 1: 8.0})
    async with neuron(tmp_path, probe=probe) as api:
        await api.load("old", pinned=True, priority=7, devices=[1])
        probe.free_gib.update({0: 0.5, 1: 0.25})
        answer = await api.load("m")
        assert (answer.status, answer.error["code"]) == (409, "insufficient_memory")
        devices = {each["device"]: each for each in answer.error["devices"]}
        assert devices[0]["free_bytes"] == 1 << 29
        assert devices[1]["free_bytes"] == 1 << 28
        assert devices[0]["needed_bytes"] > 900 << 20
        [resident] = answer.error["residents"]
        assert resident["bytes"] > 900 << 20
        del resident["bytes"]
        assert resident == {
            "id": "old",
            "device": 1,
            "in_flight": 0,
            "last_used_s": None,
            "priority": 7,
            "pinned": True,
            "min_resident_left_s": 0.0,
        }


async def test_a_models_policy_is_listed_and_a_later_load_changes_it(tmp_path):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path, idle_ttl_s=500.0) as api:
        await api.load("m", min_resident_s=60, priority=3)
        info = (await api.get("/models/m")).json
        assert (info["ttl_s"], info["min_resident_s"], info["priority"]) == (500.0, 60.0, 3)
        assert (info["pinned"], info["resident_s"] < 60) == (False, True)
        assert 490 < info["idle_unload_in_s"] <= 500
        assert 50 < info["evictable_in_s"] <= 60
        await api.load("m", pinned=True, ttl_s=7)
        info = (await api.get("/models/m")).json
        assert (info["ttl_s"], info["pinned"], info["priority"]) == (7.0, True, 3)
        assert info["idle_unload_in_s"] is None


async def test_an_idle_model_leaves_after_its_ttl(tmp_path, monkeypatch):
    monkeypatch.setattr(reaper, "CHECK_S", 0.05)
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        await api.load("m", ttl_s=0.2)

        async def gone():
            return await api.status_of("m") == "unloaded"

        await until(gone)
        assert (await api.get("/health")).json["cycles"] == 2
        metrics = (await api.get("/metrics")).body.decode()
        assert 'cortex_neuron_idle_unloads_total{model="m"} 1.0' in metrics


async def test_requests_wait_while_a_model_is_recycled(tmp_path):
    path = add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        await api.load("m")
        write_script(path, load_s=0.5)
        async with asyncio.TaskGroup() as tasks:
            recycling = tasks.create_task(api.post("/models/recycle", {"model_id": "m"}))

            async def seen():
                info = (await api.get("/models/m")).json
                return info["servable"] == {
                    "ok": True,
                    "reason": "recycling",
                    "detail": "the engine is started again; requests wait for it",
                }

            await until(seen)
            answer = await api.post("/v1/chat/completions", chat("m", max_tokens=3))
        assert answer.status == 200
        assert recycling.result().json["status"] == "recycled"
        assert recycling.result().json["load_s"] > 0
        assert len(starts(path)) == 2
        metrics = (await api.get("/metrics")).body.decode()
        assert 'cortex_neuron_recycles_total{model="m"} 1.0' in metrics
        info = (await api.get("/models/m")).json
        assert (info["servable"], info["engine_cycles"]) == (
            {"ok": True, "reason": None, "detail": None},
            0,
        )


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model_id": "m"}, 404, "model_not_found"),
        ({}, 400, "invalid_request"),
    ],
)
async def test_a_recycling_that_cannot_be_is_refused(tmp_path, body, status, code):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        answer = await api.post("/models/recycle", body)
        assert (answer.status, answer.error["code"]) == (status, code)


@pytest.mark.parametrize("field", ["ttl_s", "min_resident_s"])
async def test_a_negative_time_is_refused(tmp_path, field):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        answer = await api.load("m", **{field: -1})
        assert (answer.status, answer.error["code"]) == (400, "invalid_request")


async def test_what_a_model_took_is_reckoned_with_also_after_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "MEASURE_S", 0.02)
    for name in ("m", "other"):
        add_chat_model(tmp_path / "models", name)
    probe = FakeProbe()
    probe.process_bytes[HOST] = 3 << 30
    peaks = tmp_path / "state" / "memory_peaks.json"
    async with neuron(tmp_path, probe=probe) as api:
        await api.load("m")
        # The devices are read every few seconds, and for every load.
        await api.load("other")

        async def learned():
            return peaks.exists() and b'"m"' in peaks.read_bytes()

        await until(learned)
        assert (await api.get("/models/m")).json["need_bytes"] == 3 << 30
    async with neuron(tmp_path, probe=probe) as api:

        async def described():
            return (await api.get("/models/m")).json["need_bytes"] is not None

        await until(described)
        # Without the 2000 bytes of cache that the fake made, with the one that is wanted.
        assert 3 << 30 <= (await api.get("/models/m")).json["need_bytes"] < (3 << 30) + (64 << 20)


async def test_memory_that_no_model_holds_is_a_metric(tmp_path):
    probe = FakeProbe()
    probe.free_gib[0] = 61.0
    async with neuron(tmp_path, probe=probe) as api:
        text = (await api.get("/metrics")).body.decode()
        assert 'cortex_neuron_device_unaccounted_bytes{device="0"} 3.221225472e+09' in text


async def test_default_models_come_with_their_policy_once_the_neuron_answers(tmp_path):
    path = add_chat_model(tmp_path / "models", "m")
    write_script(path, load_s=0.5)
    default = DefaultModel(model_id="m", pinned=True, priority=5, ttl_s=60.0)
    async with neuron(tmp_path, default_models=[default]) as api:
        health = (await api.get("/health")).json
        assert (health["activation"]["state"], health["activation"]["in_progress"]) == (
            "pre_warming",
            "m",
        )

        async def ready():
            return (await api.get("/health")).json["activation"]["completed"] == ["m"]

        await until(ready)
        info = (await api.get("/models/m")).json
        assert (info["pinned"], info["priority"], info["ttl_s"]) == (True, 5, 60.0)
