from cortex.core.config import TorchHarness
from cortex.core.neuron_api import LoadRequest
from cortex.neuron import reaper
from cortex.neuron.reaper import expired
from cortex.neuron.residency import Residency
from cortex.neuron.resident import Model, Policy
from tests.support.fake_engine import starts, write_script
from tests.support.neuron_fakes import add_model
from tests.support.neuron_host import host, is_alive, tokens_of


def model(**changes):
    values = {
        "id": "m",
        "harness": None,
        "state": Residency(status="loaded", since_s=100.0),
        "policy": Policy(ttl_s=60.0),
        "loaded_s": 100.0,
    }
    return Model(**{**values, **changes})


def test_a_model_expires_when_its_ttl_is_over_since_its_last_use():
    assert model().unload_in_s(130.0) == 30.0
    assert expired([model()], 159.9) == []
    assert expired([model()], 160.0) == ["m"]
    assert expired([model(last_used_s=110.0)], 169.9) == []
    assert expired([model(last_used_s=110.0)], 170.0) == ["m"]


def test_what_is_pinned_at_work_without_a_ttl_or_not_loaded_never_expires():
    kept = [
        model(policy=Policy(ttl_s=60.0, pinned=True)),
        model(policy=Policy()),
        model(num_open=1),
        model(state=Residency(status="draining", since_s=100.0)),
        model(state=Residency(status="loading", since_s=100.0)),
        model(state=Residency(status="loaded", since_s=100.0, is_recycling=True)),
    ]
    assert expired(kept, 100_000.0) == []
    assert [each.unload_in_s(100_000.0) for each in kept] == [None] * 6


def test_a_request_overrides_the_default_and_zero_keeps_the_model():
    default = Policy(ttl_s=600.0)
    assert default.asked(LoadRequest(model_id="m")).ttl_s == 600.0
    assert default.asked(LoadRequest(model_id="m", ttl_s=5.0)).ttl_s == 5.0
    assert default.asked(LoadRequest(model_id="m", ttl_s=0.0)).ttl_s is None


def test_what_a_later_request_leaves_out_of_a_policy_stays():
    policy = Policy().asked(
        LoadRequest(model_id="m", ttl_s=5.0, min_resident_s=9.0, pinned=True, priority=7)
    )
    assert policy == Policy(ttl_s=5.0, min_resident_s=9.0, pinned=True, priority=7)
    assert policy.asked(LoadRequest(model_id="m")) == policy
    assert policy.asked(LoadRequest(model_id="m", priority=8)).priority == 8


async def test_an_idle_model_is_unloaded_and_one_at_work_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(reaper, "CHECK_S", 0.01)
    paths = [add_model(tmp_path / "models", name) for name in ("idle", "busy", "kept")]
    write_script(paths[1], gap_s=0.01, repeat=100_000)
    async with host(tmp_path, config=TorchHarness(idle_ttl_s=600.0)) as it:
        await it.load("idle")
        await it.load("busy", ttl_s=1.0)
        await it.load("kept", ttl_s=0.0)
        ticket = await it.lifecycle.serving("busy").admission.acquire()
        with it.lifecycle.using("busy"):
            it.clock.ahead_s = 700.0
            await it.until("idle", "unloaded")
            assert not is_alive(starts(paths[0])[0])
            assert it.status("busy") == "loaded"
        ticket.release()
        it.clock.ahead_s = 702.0
        await it.until("busy", "unloaded")
        assert it.status("kept") == "loaded"


async def test_a_load_of_an_idle_model_comes_after_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(reaper, "CHECK_S", 0.01)
    path = add_model(tmp_path / "models", "m")
    async with host(tmp_path) as it:
        await it.load("m", ttl_s=60.0)
        it.clock.ahead_s = 60.0
        await it.until("m", "draining")
        await it.load("m")
        assert await tokens_of(it.stream("m", 5)) == [5]
    assert len(starts(path)) == 2
