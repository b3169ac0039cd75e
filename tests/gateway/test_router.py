"""The choice of a node: who serves, who loads, and what a caller is told."""

from dataclasses import replace
from types import MappingProxyType

import msgspec
import pytest

from cortex.core.catalogue import Catalogue, CatalogueModel
from cortex.core.errors import (
    CortexError,
    ModelNotFoundError,
    ModelRecoveringError,
    ServiceUnavailableError,
)
from cortex.core.neuron_api import (
    Device,
    DeviceHealth,
    Discovery,
    LoadRequest,
    ModelInfo,
    NeuronHealth,
    Servable,
)
from cortex.gateway.costs import Demand, Knowledge
from cortex.gateway.fleet import FleetSnapshot, NodeView
from cortex.gateway.roster import available, nodes_listing, primary
from cortex.gateway.router import (
    ColdLoad,
    LoadPlan,
    Refuse,
    Rejection,
    Serve,
    choose_route,
)

GIB = 1 << 30
EMPTY = Catalogue()


def node(
    name: str,
    *,
    healthy: bool = True,
    draining: bool = False,
    device_mb: int | None = 24000,
    free_mb: int = 20000,
    foreign: int = 0,
    weight_bytes: int | None = None,
    servable: Servable | None = None,
    **models: str,
) -> NodeView:
    """A node whose models are given as name=status."""
    devices = [] if device_mb is None else [Device(index=0, name="d", vram_total_mb=device_mb)]
    readings = [DeviceHealth(index=0, vram_used_mb=0, vram_free_mb=free_mb)] if devices else []
    return NodeView(
        name=name,
        endpoint=f"http://{name}",
        healthy=healthy,
        seen=True,
        discovery=Discovery(hostname=name, devices=devices, memory_total_mb=16000),
        health=NeuronHealth(
            uptime_secs=1, status="draining" if draining else "ok", devices=readings
        ),
        models={
            each: ModelInfo(
                id=each,
                harness="torch",
                status=status,
                weight_bytes=weight_bytes,
                servable=servable,
            )
            for each, status in models.items()
        },
        foreign=dict.fromkeys(models, foreign),
    )


def fleet(*nodes: NodeView, **leases: int) -> FleetSnapshot:
    """A snapshot; `leases` are this gateway's requests for model `m` by node."""
    counted = {(name, "m"): count for name, count in leases.items()}
    return FleetSnapshot(
        nodes=tuple(sorted(nodes, key=lambda each: each.name)), leases=MappingProxyType(counted)
    )


def catalogue(**fields: object) -> Catalogue:
    return Catalogue(models=[CatalogueModel(id="m", **fields)])  # type: ignore[arg-type]


def order(route: object) -> list[str]:
    assert isinstance(route, ColdLoad)
    return [plan.node for plan in route.plans]


def refusal(route: object) -> CortexError:
    assert isinstance(route, Refuse)
    return route.error


def test_a_loaded_replica_serves() -> None:
    route = choose_route(fleet(node("a", m="loaded")), EMPTY, "m")
    assert route == Serve(node="a", endpoint="http://a", model_id="m")


def test_the_replica_with_the_fewest_requests_serves() -> None:
    snapshot = fleet(node("a", m="loaded"), node("b", m="loaded", foreign=1), a=3, b=1)
    route = choose_route(snapshot, EMPTY, "m")
    assert isinstance(route, Serve)
    assert route.node == "b"


def test_ties_go_to_the_first_name() -> None:
    route = choose_route(fleet(node("b", m="loaded"), node("a", m="loaded")), EMPTY, "m")
    assert isinstance(route, Serve)
    assert route.node == "a"


def test_of_equal_replicas_the_one_unused_for_longest_serves() -> None:
    snapshot = fleet(node("a", m="loaded"), node("b", m="loaded"), node("c", m="loaded"))
    demand = Demand(last_used={("a", "m"): 3, ("b", "m"): 1, ("c", "m"): 2})
    route = choose_route(snapshot, EMPTY, "m", demand=demand)
    assert [each.node for each in route.considered.options] == ["b", "c", "a"]


def test_an_alias_is_resolved() -> None:
    aliases = Catalogue(aliases={"fast": "m"})
    route = choose_route(fleet(node("a", m="loaded")), aliases, "fast")
    assert isinstance(route, Serve)
    assert route.model_id == "m"


@pytest.mark.parametrize(
    "away", [node("a", m="loaded", healthy=False), node("a", m="loaded", draining=True)]
)
def test_a_node_that_is_down_or_draining_does_not_serve(away: NodeView) -> None:
    route = choose_route(fleet(away, node("b", m="loaded")), EMPTY, "m")
    assert isinstance(route, Serve)
    assert route.node == "b"


def test_a_node_that_failed_this_request_is_avoided() -> None:
    snapshot = fleet(node("a", m="loaded"), node("b", m="unloaded"))
    assert order(choose_route(snapshot, EMPTY, "m", avoid={"a"})) == ["b"]


def test_a_replica_that_cannot_serve_is_passed_over() -> None:
    sick = node("a", m="loaded", servable=Servable(ok=False, reason="poisoned"))
    route = choose_route(fleet(sick, node("b", m="loaded")), EMPTY, "m")
    assert isinstance(route, Serve)
    assert route.node == "b"
    error = refusal(choose_route(fleet(sick), EMPTY, "m"))
    assert isinstance(error, ServiceUnavailableError)
    assert error.retry_after_s == 3


def test_a_recovering_model_is_503_with_retry_after_even_if_it_could_be_loaded_elsewhere() -> None:
    snapshot = fleet(node("a", m="recovering"), node("b", m="unloaded"))
    error = refusal(choose_route(snapshot, EMPTY, "m"))
    assert isinstance(error, ModelRecoveringError)
    assert (error.status, error.retry_after_s) == (503, 2)


def test_a_load_in_progress_is_joined_before_another_is_begun() -> None:
    snapshot = fleet(node("a", m="unloaded"), node("b", m="loading"))
    assert order(choose_route(snapshot, EMPTY, "m")) == ["b", "a"]


def test_a_node_where_the_model_failed_comes_last() -> None:
    snapshot = fleet(node("a", m="failed"), node("b", m="draining"), node("c", m="unloaded"))
    assert order(choose_route(snapshot, EMPTY, "m")) == ["c", "b", "a"]


def test_a_catalogue_model_that_no_node_lists_is_cold_loaded_with_its_source() -> None:
    route = choose_route(fleet(node("a")), catalogue(source="hf:org/m"), "m")
    assert route == ColdLoad(
        model_id="m",
        plans=(
            LoadPlan(
                node="a",
                endpoint="http://a",
                request=LoadRequest(model_id="m", source="hf:org/m"),
            ),
        ),
    )


def test_a_node_that_has_the_files_goes_before_one_that_would_fetch_them() -> None:
    snapshot = fleet(node("a", free_mb=24000), node("b", free_mb=2000, m="unloaded"))
    assert order(choose_route(snapshot, catalogue(vram_mb=1000), "m")) == ["b", "a"]


def test_a_free_fit_goes_before_a_fit_after_evictions_and_that_before_none() -> None:
    snapshot = fleet(
        node("a", free_mb=1000),
        node("b", free_mb=500, weight_bytes=12 * GIB, other="loaded"),
        node("c", free_mb=9000),
    )
    assert order(choose_route(snapshot, catalogue(vram_mb=8000), "m")) == ["c", "b", "a"]


def test_models_of_higher_priority_do_not_count_as_room() -> None:
    listed = Catalogue(
        models=[
            CatalogueModel(id="m", vram_mb=8000),
            CatalogueModel(id="high", residency_priority=500),
            CatalogueModel(id="low", residency_priority=1),
        ]
    )
    snapshot = fleet(
        node("a", free_mb=600, weight_bytes=12 * GIB, high="loaded"),
        node("b", free_mb=500, weight_bytes=12 * GIB, low="loaded"),
    )
    assert order(choose_route(snapshot, listed, "m")) == ["b", "a"]


def test_the_node_with_most_memory_beside_its_residents_wins_among_fits() -> None:
    snapshot = fleet(node("a", weight_bytes=9 * GIB, x="loaded"), node("b"))
    assert order(choose_route(snapshot, catalogue(vram_mb=8000), "m")) == ["b", "a"]
    snapshot = fleet(node("a", device_mb=12000), node("b", device_mb=12288))
    assert order(choose_route(snapshot, catalogue(vram_mb=8000), "m")) == ["b", "a"]


def test_what_a_node_reads_as_free_does_not_choose_among_fits() -> None:
    """Two gateways read at different moments, and shall send one model to one node."""
    for free_a, free_b in ((9000, 24000), (20100, 20300), (24000, 9000)):
        snapshot = fleet(node("a", free_mb=free_a), node("b", free_mb=free_b))
        assert order(choose_route(snapshot, catalogue(vram_mb=8000), "m")) == ["a", "b"]


def test_pinned_on_is_where_a_model_loads_and_nowhere_else() -> None:
    snapshot = fleet(node("a"), node("b"))
    assert order(choose_route(snapshot, catalogue(pinned_on=["b"]), "m")) == ["b"]


def test_a_device_floor_excludes_smaller_devices_and_hosts_without_one() -> None:
    snapshot = fleet(
        node("a", device_mb=12000), node("b", device_mb=24000), node("c", device_mb=None)
    )
    assert order(choose_route(snapshot, catalogue(min_device_vram_mb=20000), "m")) == ["b"]


def test_an_unknown_model_is_404_and_names_what_there_is() -> None:
    listed = Catalogue(models=[CatalogueModel(id="z")], aliases={"quick": "x", "dead": "gone"})
    error = refusal(choose_route(fleet(node("a", x="loaded")), listed, "nope"))
    assert isinstance(error, ModelNotFoundError)
    assert error.message == "model 'nope' does not exist; available: quick, x, z"
    assert error.param == "model"


def test_an_error_names_at_most_twenty_models() -> None:
    many = {f"m{number:02}": "unloaded" for number in range(30)}
    error = refusal(choose_route(fleet(node("a", **many)), EMPTY, "nope"))
    assert error.message.endswith("m18, m19 and 10 more")


@pytest.mark.parametrize("name", ["m", "nope"])
def test_without_a_healthy_node_everything_is_503(name: str) -> None:
    error = refusal(choose_route(fleet(node("a", healthy=False, m="loaded")), EMPTY, name))
    assert isinstance(error, ServiceUnavailableError)
    assert error.retry_after_s == 5


def test_without_any_node_configured_the_error_says_so() -> None:
    error = refusal(choose_route(fleet(), EMPTY, "m"))
    assert error.message == "no healthy node for model 'm': no neuron is configured"


def test_a_model_whose_only_node_is_down_is_503_not_404() -> None:
    snapshot = fleet(node("a", healthy=False, m="loaded"), node("b", x="loaded"))
    error = refusal(choose_route(snapshot, EMPTY, "m"))
    assert isinstance(error, ServiceUnavailableError)
    assert error.message == "model 'm' cannot be served just now: a not ready"
    assert error.retry_after_s == 3


def test_a_catalogue_model_that_fits_nowhere_says_why_and_promises_nothing() -> None:
    error = refusal(choose_route(fleet(node("a")), catalogue(min_device_vram_mb=80000), "m"))
    assert isinstance(error, ServiceUnavailableError)
    assert error.retry_after_s is None
    assert "min_device_vram_mb" in error.message


def test_nodes_that_hold_a_model_come_first_among_those_that_list_it() -> None:
    snapshot = fleet(node("a", m="unloaded"), node("b", m="loaded"), node("c", x="loaded"))
    assert [each.name for each in nodes_listing(snapshot, "m")] == ["b", "a"]


def test_available_holds_listed_models_catalogue_models_and_aliases_that_lead_somewhere() -> None:
    listed = Catalogue(models=[CatalogueModel(id="z")], aliases={"quick": "x", "dead": "gone"})
    assert available(fleet(node("a", x="loaded")), listed) == ["quick", "x", "z"]


def test_the_replica_that_holds_the_prefix_serves() -> None:
    snapshot = fleet(node("a", m="loaded"), node("b", m="loaded"), b=1)
    demand = Demand(prompt_tokens=20000, cached={("b", "m"): 19000})
    route = choose_route(snapshot, EMPTY, "m", demand=demand)
    assert isinstance(route, Serve)
    assert route.node == "b"
    assert [each.cached_tokens for each in route.considered.options] == [19000, 0]


def test_a_prefix_does_not_attract_requests_to_a_replica_that_is_busy_for_longer() -> None:
    snapshot = fleet(node("a", m="loaded"), node("b", m="loaded"))
    demand = Demand(prompt_tokens=2000, cached={("b", "m"): 1900})
    known = Knowledge(queued_s={("b", "m"): 30.0})
    route = choose_route(snapshot, EMPTY, "m", demand=demand, known=known)
    assert isinstance(route, Serve)
    assert route.node == "a"


def test_a_choice_tells_who_was_turned_down_and_why() -> None:
    snapshot = fleet(
        node("a", m="loaded"),
        node("b", m="loaded", healthy=False),
        node("c", m="loading"),
        node("d", m="loaded", draining=True),
        node("e", m="loaded", servable=Servable(ok=False, reason="poisoned")),
        node("f", m="loaded"),
    )
    route = choose_route(snapshot, EMPTY, "m", avoid={"f"})
    assert [each.node for each in route.considered.options] == ["a"]
    assert route.considered.rejected == tuple(
        Rejection(node=name, model_id="m", reason=reason)
        for name, reason in {
            "b": "does not answer (not heard of yet)",
            "c": "loading",
            "d": "is draining",
            "e": "loaded but cannot serve (poisoned)",
            "f": "failed this request already",
        }.items()
    )


VIRTUAL = Catalogue(virtual={"v": ["first", "second"]})


def test_a_virtual_models_first_loaded_member_serves() -> None:
    snapshot = fleet(node("a", first="unloaded", second="loaded"))
    route = choose_route(snapshot, VIRTUAL, "v")
    assert isinstance(route, Serve)
    assert route.model_id == "second"
    both = fleet(node("a", second="loaded"), node("b", first="loaded"))
    route = choose_route(both, VIRTUAL, "v")
    assert isinstance(route, Serve)
    assert (route.node, route.model_id) == ("b", "first")


def test_of_a_cold_virtual_model_the_first_member_that_fits_is_loaded() -> None:
    listed = Catalogue(
        models=[CatalogueModel(id="first", vram_mb=90000), CatalogueModel(id="second")],
        virtual={"v": ["first", "second"]},
    )
    route = choose_route(fleet(node("a")), listed, "v")
    assert isinstance(route, ColdLoad)
    assert route.model_id == "second"
    roomy = fleet(node("a", free_mb=95000))
    route = choose_route(roomy, listed, "v")
    assert isinstance(route, ColdLoad)
    assert route.model_id == "first"


def test_a_virtual_model_passes_over_a_member_that_is_recovering() -> None:
    route = choose_route(fleet(node("a", first="recovering", second="unloaded")), VIRTUAL, "v")
    assert isinstance(route, ColdLoad)
    assert route.model_id == "second"


def test_a_virtual_model_of_unknown_members_is_404() -> None:
    error = refusal(choose_route(fleet(node("a", x="loaded")), VIRTUAL, "v"))
    assert isinstance(error, ModelNotFoundError)


def test_a_long_queue_has_a_further_replica_loaded_where_there_is_room() -> None:
    known = Knowledge(queued_s={("a", "m"): 60.0})
    roomy = fleet(node("a", m="loaded"), node("b", weight_bytes=4 * GIB, m="unloaded"))
    route = choose_route(roomy, EMPTY, "m", known=known)
    assert isinstance(route, Serve)
    assert route.node == "a"
    assert route.spread is not None
    assert order(route.spread) == ["b"]


@pytest.mark.parametrize(
    ("queued_s", "other"),
    [
        (4.0, node("b", weight_bytes=4 * GIB, m="unloaded")),  # it is not worth it
        (60.0, node("b", weight_bytes=4 * GIB, m="loading")),  # one is on its way
        (60.0, node("b", free_mb=1, weight_bytes=4 * GIB, m="unloaded", n="loaded")),  # no room
        (60.0, node("b", weight_bytes=4 * GIB, m="failed")),
    ],
)
def test_no_further_replica_is_loaded_without_need_or_room(
    queued_s: float, other: NodeView
) -> None:
    known = Knowledge(queued_s={("a", "m"): queued_s})
    route = choose_route(fleet(node("a", m="loaded"), other), EMPTY, "m", known=known)
    assert isinstance(route, Serve)
    assert route.spread is None


def seeing(view: NodeView, **capabilities: list[str]) -> NodeView:
    """Return a node with what its models can do."""
    models = {
        name: msgspec.structs.replace(info, capabilities=capabilities.get(name, []))
        for name, info in view.models.items()
    }
    return replace(view, models=models)


IMAGES = Demand(has_images=True)


def test_a_request_with_images_is_refused_where_the_model_reads_text_only() -> None:
    snapshot = fleet(seeing(node("a", m="unloaded"), m=["text"]))
    error = refusal(choose_route(snapshot, EMPTY, "m", demand=IMAGES))
    assert (error.status, error.code) == (400, "unsupported_field")
    assert "model 'm' cannot take images" in error.message
    assert isinstance(choose_route(snapshot, EMPTY, "m"), ColdLoad)


@pytest.mark.parametrize("capabilities", [["text", "vision"], []])
def test_a_request_with_images_goes_where_the_model_sees_or_nobody_knows(
    capabilities: list[str],
) -> None:
    snapshot = fleet(seeing(node("a", m="loaded"), m=capabilities))
    assert isinstance(choose_route(snapshot, EMPTY, "m", demand=IMAGES), Serve)


def test_an_external_engine_is_the_judge_of_images() -> None:
    view = seeing(node("a", m="loaded"), m=["text"])
    models = {"m": msgspec.structs.replace(view.models["m"], harness="command")}
    snapshot = fleet(replace(view, models=models))
    assert isinstance(choose_route(snapshot, EMPTY, "m", demand=IMAGES), Serve)


def test_of_a_virtual_model_the_first_member_that_sees_takes_images() -> None:
    view = seeing(
        node("a", first="loaded", second="loaded"), first=["text"], second=["text", "vision"]
    )
    route = choose_route(fleet(view), VIRTUAL, "v", demand=IMAGES)
    assert isinstance(route, Serve)
    assert route.model_id == "second"
    assert primary(fleet(view), VIRTUAL, "v", has_images=True) == "second"
    assert primary(fleet(view), VIRTUAL, "v") == "first"
