from cortex.core.neuron_api import (
    Activation,
    DeviceHealth,
    HostMemory,
    LoadProgress,
    ModelInfo,
    ModelLoad,
    NeuronHealth,
    Servable,
)
from cortex.neuron.changes import Changes

GIB = 1 << 30


def info(**changes):
    values = {"id": "m", "harness": "torch", "status": "loading"}
    return ModelInfo(**{**values, **changes})


def health(**changes):
    return NeuronHealth(**{"uptime_secs": 1, **changes})


def names(changes):
    return [each.name for each in changes]


def test_a_model_is_told_once_and_again_when_its_state_or_servability_moves():
    changes = Changes()
    assert names(changes.of_models({"m": info()}, 0.0)) == ["model"]
    assert changes.of_models({"m": info()}, 0.1) == []
    loaded = info(status="loaded", servable=Servable(ok=True))
    assert [each.data for each in changes.of_models({"m": loaded}, 0.2)] == [loaded]
    stuck = info(status="loaded", servable=Servable(ok=False, reason="stuck"))
    assert names(changes.of_models({"m": stuck}, 0.3)) == ["model"]


def test_what_moves_with_every_request_is_told_every_two_seconds():
    changes = Changes()
    changes.of_models({"m": info()}, 0.0)
    used = info(in_flight=3, last_used_s=1.5, resident_s=60.0, evictable_in_s=4.0)
    assert changes.of_models({"m": used}, 1.9) == []
    assert [each.data for each in changes.of_models({"m": used}, 2.0)] == [used]
    assert changes.of_models({"m": used}, 9.0) == []


def test_cycles_beside_an_engine_are_told_at_once():
    changes = Changes()
    changes.of_models({"m": info(engine_cycles=1)}, 0.0)
    assert names(changes.of_models({"m": info(engine_cycles=2)}, 0.1)) == ["model"]


def test_progress_is_told_twice_a_second_and_a_new_state_at_once():
    changes = Changes()
    changes.of_models({"m": info()}, 0.0)
    early = info(progress=LoadProgress(phase="weights", bytes_done=1, bytes_total=9))
    assert changes.of_models({"m": early}, 0.49) == []
    assert names(changes.of_models({"m": early}, 0.5)) == ["model"]
    assert changes.of_models({"m": early}, 1.5) == []
    assert names(changes.of_models({"m": info(status="failed", error="why")}, 1.6)) == ["model"]


def test_a_model_that_is_gone_is_told_once():
    changes = Changes()
    changes.of_models({"m": info()}, 0.0)
    [removed] = changes.of_models({"m": None, "never": None}, 0.1)
    assert (removed.name, removed.data.id) == ("model_removed", "m")
    assert changes.of_models({"m": None}, 0.2) == []


def test_only_counters_that_moved_are_told_and_at_most_twice_a_second():
    changes = Changes()
    quiet, busy = ModelLoad(id="quiet"), ModelLoad(id="busy")
    assert names(changes.of_loads([quiet, busy], 0.0)) == ["load"]
    busy = ModelLoad(id="busy", in_flight=2)
    assert changes.of_loads([quiet, busy], 0.4) == []
    [load] = changes.of_loads([quiet, busy], 0.5)
    assert load.data == [busy]


def test_time_alone_moves_no_counter():
    changes = Changes()
    changes.of_loads([ModelLoad(id="m", last_used_s=1.0)], 0.0)
    assert changes.of_loads([ModelLoad(id="m", last_used_s=2.0)], 1.0) == []


def test_a_node_is_told_when_its_status_or_its_default_models_move():
    changes = Changes()
    assert names(changes.of_node(health())) == ["node"]
    assert changes.of_node(health(uptime_secs=99)) == []
    assert names(changes.of_node(health(status="draining"))) == ["node"]
    ready = Activation(state="ready", completed=["m"])
    assert names(changes.of_node(health(status="draining", activation=ready))) == ["node"]


def test_memory_of_a_node_is_told_in_steps_of_a_quarter_gib():
    changes = Changes()

    def free(device_bytes, host_bytes):
        device = DeviceHealth(index=0, vram_used_mb=0, vram_free_mb=0, free_bytes=device_bytes)
        return health(devices=[device], host=HostMemory(free_bytes=host_bytes, total_bytes=GIB))

    changes.of_node(free(GIB, GIB))
    assert changes.of_node(free(GIB + 1000, GIB + 1000)) == []
    assert names(changes.of_node(free(GIB - (256 << 20), GIB))) == ["node"]
    assert names(changes.of_node(free(GIB - (256 << 20), 2 * GIB))) == ["node"]
