"""The owner of the gateway's view: readings, misses, leases."""

import pytest

from cortex.core.neuron_api import Discovery, ModelInfo, ModelLoad, NeuronHealth, Servable
from cortex.gateway.fleet import Fleet, FleetSnapshot, NodeView


def info(model_id: str, status: str = "loaded") -> ModelInfo:
    return ModelInfo(id=model_id, harness="torch", status=status)


def health(*loads: ModelLoad) -> NeuronHealth:
    return NeuronHealth(uptime_secs=1, models=list(loads))


def node_of(fleet: Fleet, name: str = "a") -> NodeView:
    node = fleet.snapshot().node(name)
    assert node is not None
    return node


@pytest.fixture
def fleet() -> Fleet:
    return Fleet([("b", "http://b:1/"), ("a", "http://a:1")])


def test_nodes_are_sorted_by_name_and_unhealthy_until_they_have_answered(fleet: Fleet) -> None:
    nodes = fleet.snapshot().nodes
    assert [(node.name, node.endpoint, node.healthy) for node in nodes] == [
        ("a", "http://a:1", False),
        ("b", "http://b:1", False),
    ]


def test_a_reading_makes_a_node_healthy_and_replaces_its_models(fleet: Fleet) -> None:
    assert fleet.record_reading("a", [info("x"), info("y")], None, stamp=fleet.begin_reading())
    assert not fleet.record_reading("a", [info("y")], None, stamp=fleet.begin_reading())
    assert node_of(fleet).healthy
    assert set(node_of(fleet).models) == {"y"}


def test_the_third_miss_in_a_row_makes_a_node_unhealthy(fleet: Fleet) -> None:
    fleet.record_reading("a", [info("x")], None, stamp=0)
    assert [fleet.record_failure("a", "gone") for _ in range(4)] == [False, False, True, False]
    assert not node_of(fleet).healthy
    assert node_of(fleet).failure == "gone"


def test_an_answer_between_misses_starts_the_count_again(fleet: Fleet) -> None:
    fleet.record_reading("a", [], None, stamp=0)
    fleet.record_failure("a", "late")
    fleet.record_failure("a", "late")
    fleet.record_reading("a", [], None, stamp=0)
    fleet.record_failure("a", "late")
    assert node_of(fleet).healthy
    assert node_of(fleet).failures == 1


def test_an_unhealthy_node_keeps_its_models_known(fleet: Fleet) -> None:
    fleet.record_reading("a", [info("x")], None, stamp=0)
    for _ in range(3):
        fleet.record_failure("a", "gone")
    assert fleet.snapshot().lists("x")


def test_a_poll_that_began_before_a_load_ended_does_not_undo_it(fleet: Fleet) -> None:
    fleet.record_reading("a", [info("x", "unloaded")], None, stamp=fleet.begin_reading())
    stamp = fleet.begin_reading()
    fleet.record_status("a", "x", "loaded")
    fleet.record_reading("a", [info("x", "loading")], None, stamp=stamp)
    assert node_of(fleet).status("x") == "loaded"
    fleet.record_reading("a", [info("x", "recovering")], None, stamp=fleet.begin_reading())
    assert node_of(fleet).status("x") == "recovering"


def test_a_model_recorded_before_its_node_ever_listed_it_is_kept_by_an_older_poll(
    fleet: Fleet,
) -> None:
    stamp = fleet.begin_reading()
    fleet.record_status("a", "hub/model", "loading")
    fleet.record_reading("a", [info("x")], None, stamp=stamp)
    assert sorted(node_of(fleet).models) == ["hub/model", "x"]


def test_a_status_this_version_does_not_know_reads_as_unloaded(fleet: Fleet) -> None:
    fleet.record_reading("a", [info("x", "hibernating")], None, stamp=0)
    assert node_of(fleet).status("x") == "unloaded"
    assert node_of(fleet).status("never-heard-of") is None


def test_a_model_that_was_loaded_here_is_not_held_back_by_what_was_said_before(
    fleet: Fleet,
) -> None:
    unloaded = ModelInfo(
        id="x", harness="torch", status="unloaded", servable=Servable(ok=False, reason="unloaded")
    )
    fleet.record_reading("a", [unloaded], None, stamp=0)
    fleet.record_status("a", "x", "loaded")
    assert node_of(fleet).models["x"].servable is None


def test_a_lease_is_counted_until_its_first_release(fleet: Fleet) -> None:
    first, second = fleet.lease("a", "x"), fleet.lease("a", "x")
    assert fleet.snapshot().requests(node_of(fleet), "x") == 2
    first.release()
    first.release()
    assert fleet.snapshot().requests(node_of(fleet), "x") == 1
    second.release()
    assert dict(fleet.snapshot().leases) == {}


def test_requests_of_others_are_counted_beside_our_own(fleet: Fleet) -> None:
    lease = fleet.lease("a", "x")
    reported = health(ModelLoad(id="x", in_flight=3, queue_depth=2))
    fleet.record_reading("a", [info("x")], reported, stamp=0)
    assert fleet.snapshot().requests(node_of(fleet), "x") == 5
    lease.release()
    assert fleet.snapshot().requests(node_of(fleet), "x") == 4


def test_a_lease_learns_that_its_node_was_lost_once(fleet: Fleet) -> None:
    calls: list[str] = []
    fleet.record_reading("a", [], None, stamp=0)
    kept, released = fleet.lease("a", "x"), fleet.lease("a", "x")
    kept.on_node_lost(lambda: calls.append("kept"))
    released.on_node_lost(lambda: calls.append("released"))
    released.release()
    for _ in range(3):
        fleet.record_failure("a", "gone")
    fleet.record_reading("a", [], None, stamp=0)
    for _ in range(3):
        fleet.record_failure("a", "gone again")
    assert calls == ["kept"]


def test_a_draining_node_is_healthy_but_takes_nothing_new(fleet: Fleet) -> None:
    draining = NeuronHealth(uptime_secs=1, status="draining")
    fleet.record_reading("a", [], draining, stamp=0)
    assert node_of(fleet).healthy
    assert not node_of(fleet).usable


def test_a_snapshot_does_not_change_afterwards(fleet: Fleet) -> None:
    before: FleetSnapshot = fleet.snapshot()
    fleet.record_reading("a", [info("x")], None, stamp=0)
    fleet.record_discovery("a", Discovery(hostname="h"))
    fleet.lease("a", "x")
    assert not before.nodes[0].healthy
    assert dict(before.leases) == {}


def test_a_load_that_was_asked_for_is_claimed_until_the_node_tells_of_it(fleet: Fleet) -> None:
    fleet.record_reading("a", [info("x", "unloaded")], None, stamp=fleet.begin_reading())
    stamp = fleet.begin_reading()
    fleet.record_claim("a", "x", 5)
    assert (node_of(fleet).status("x"), dict(node_of(fleet).claims)) == ("loading", {"x": 5})
    fleet.record_reading("a", [info("x", "unloaded")], None, stamp=stamp)
    assert dict(node_of(fleet).claims) == {"x": 5}
    fleet.record_model("a", info("x", "loading"))
    assert dict(node_of(fleet).claims) == {}
    fleet.record_claim("a", "x", 5)
    fleet.record_reading("a", [info("x", "loading")], None, stamp=fleet.begin_reading())
    assert dict(node_of(fleet).claims) == {}


def test_events_change_parts_of_what_is_known(fleet: Fleet) -> None:
    reported = health(ModelLoad(id="x", in_flight=1), ModelLoad(id="y", in_flight=2))
    fleet.record_reading("a", [info("x"), info("y")], reported, stamp=0)
    fleet.record_loads("a", [ModelLoad(id="y", in_flight=5)])
    assert dict(node_of(fleet).foreign) == {"x": 1, "y": 5}
    fleet.record_model("a", info("y", "unloaded"))
    assert list(node_of(fleet).loads) == ["x"]
    fleet.record_model_gone("a", "x")
    assert (list(node_of(fleet).models), dict(node_of(fleet).loads)) == (["y"], {})


def test_what_is_told_of_a_node_that_was_removed_is_dropped(fleet: Fleet) -> None:
    fleet.record_reading("a", [info("x")], None, stamp=0)
    lease = fleet.lease("a", "x")
    fleet.set_nodes([("b", "http://b:1")])
    fleet.record_reading("a", [info("x")], None, stamp=0)
    fleet.record_failure("a", "gone")
    fleet.record_model("a", info("x"))
    fleet.record_status("a", "x", "loaded")
    lease.failed()
    lease.release()
    assert [node.name for node in fleet.snapshot().nodes] == ["b"]
    assert dict(fleet.snapshot().leases) == {}


def test_a_node_with_another_endpoint_is_another_node(fleet: Fleet) -> None:
    fleet.record_reading("a", [info("x")], None, stamp=0)
    fleet.record_reading("b", [info("x")], None, stamp=0)
    fleet.set_nodes([("a", "http://a:2"), ("b", "http://b:1/")])
    assert [node.healthy for node in fleet.snapshot().nodes] == [False, True]
