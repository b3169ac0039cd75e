"""Where a cold model would go, who would have to leave, and what the node is asked."""

from dataclasses import replace
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from cortex.core.catalogue import Catalogue, CatalogueModel
from cortex.core.config import Eviction
from cortex.core.neuron_api import DeviceHealth, HostMemory, LoadProgress, LoadRequest, NeuronHealth
from cortex.gateway.costs import Demand, Knowledge
from cortex.gateway.fleet import NodeView
from cortex.gateway.placement import Placement, load_request, plan_placement
from tests.support.fleet_views import GIB, fleet_of, model, view

NO_POLICY = Eviction()
M = CatalogueModel(id="m", vram_mb=8 * 1024)


def place(node: NodeView, *listed: CatalogueModel, policy: Eviction = NO_POLICY, **tables: object):
    return plan_placement(
        fleet_of(node),
        Catalogue(models=list(listed or (M,)), **tables),  # type: ignore[arg-type]
        node,
        "m",
        demand=Demand(),
        known=Knowledge(),
        policy=policy,
    )


def placed(*args: object, **kwargs: object) -> Placement:
    found = place(*args, **kwargs)  # type: ignore[arg-type]
    assert isinstance(found, Placement), found
    return found


def test_a_model_that_fits_displaces_nobody():
    found = placed(view("a", model("old", gib=2, last_used_s=900.0)))
    assert (found.victims, found.devices, found.doubt) == ((), (0,), None)
    assert (found.needed_bytes, found.free_bytes) == (8 * GIB, 20 * GIB)
    assert found.cost.victims_s == 0


def test_the_victims_return_is_part_of_the_cost():
    node = view("a", model("old", gib=10, last_used_s=600.0), devices={0: (24, 2)})
    found = placed(node)
    assert found.victims == ("old",)
    # 3 s and 10 GiB at 1 GB/s, half as likely after ten idle minutes.
    assert round(found.cost.victims_s, 2) == round(0.5 * (3 + 10 * GIB / 1e9), 2)


def test_each_device_is_planned_by_itself_and_the_cheapest_is_taken():
    node = view(
        "a",
        model("busy", gib=20, devices=[0], in_flight=2),
        model("idle", gib=20, devices=[1], last_used_s=50.0),
        devices={0: (24, 3), 1: (24, 3)},
    )
    found = placed(node)
    assert (found.devices, found.victims, found.doubt) == ((1,), ("idle",), None)


def test_free_memory_of_two_devices_does_not_add_up_for_a_model_of_one():
    found = placed(view("a", devices={0: (24, 5), 1: (24, 6)}))
    assert found.doubt == "needs 8.0 GiB, 6.0 free and not enough can leave"


def test_a_model_of_two_devices_needs_its_share_on_each():
    split = CatalogueModel(id="m", vram_mb=16 * 1024, harness="command", min_devices=2)
    found = placed(view("a", devices={0: (24, 9), 1: (24, 3), 2: (24, 8)}), split)
    assert (found.devices, found.needed_bytes, found.doubt) == ((0, 2), 8 * GIB, None)
    listed = Catalogue(models=[split])
    request = load_request(listed, "m", found, Eviction())
    assert (request.devices, request.tensor_parallel) == ([0, 2], 2)
    assert place(view("b", devices={0: (24, 20)}), split) == "has fewer than 2 device(s)"


def test_why_nobody_can_leave_is_told_resident_by_resident():
    node = view(
        "a",
        model("high", gib=5, priority=500),
        model("pin", gib=5, pinned=True),
        model("young", gib=5, resident_s=10.0, min_resident_s=60.0),
        devices={0: (24, 1)},
    )
    assert placed(node).doubt == (
        "needs 8.0 GiB, 1.0 free and not enough can leave; high has priority 500, above 100, "
        "pin is pinned here, young has 50 s of its minimum residency left"
    )


def test_the_fleets_minimum_residency_holds_where_the_catalogue_names_none():
    node = view("a", model("young", gib=20, resident_s=10.0), devices={0: (24, 1)})
    assert placed(node, policy=Eviction(min_resident_s=60)).doubt is not None
    own = CatalogueModel(id="young", min_resident_s=0)
    assert placed(node, M, own, policy=Eviction(min_resident_s=60)).victims == ("young",)


def test_what_a_neuron_has_measured_anywhere_beats_what_is_declared():
    small = view("a", model("m", "unloaded", gib=6))
    big = view("b", model("m", gib=12))
    found = plan_placement(
        fleet_of(small, big),
        Catalogue(models=[M]),
        small,
        "m",
        demand=Demand(),
        known=Knowledge(),
        policy=Eviction(),
    )
    assert isinstance(found, Placement)
    assert found.needed_bytes == 12 * GIB


def test_a_device_floor_names_the_devices_to_the_neuron():
    big_only = CatalogueModel(id="m", vram_mb=1024, min_device_vram_mb=20 * 1024)
    node = view("a", devices={0: (12, 12), 1: (24, 5)})
    found = placed(node, big_only)
    assert found.devices == (1,)
    assert load_request(Catalogue(models=[big_only]), "m", found, Eviction()).devices == [1]


def test_how_a_model_writes_tool_calls_goes_along_with_its_load():
    told = CatalogueModel(id="m", vram_mb=1024, tool_format="mistral", constrain_tools=False)
    found = placed(view("a"), told)
    request = load_request(Catalogue(models=[told]), "m", found, Eviction())
    assert (request.tool_format, request.constrain_tools) == ("mistral", False)


def test_a_member_of_the_same_group_has_to_leave_even_where_both_would_fit():
    found = placed(view("a", model("rival", gib=2)), groups={"g": ["m", "rival"]})
    assert (found.victims, found.doubt) == (("rival",), None)


def test_a_busy_rival_makes_the_placement_doubtful_and_a_pinned_one_rules_it_out():
    groups = {"g": ["m", "rival"]}
    found = placed(view("a", model("rival", gib=2, in_flight=1)), groups=groups)
    assert found.doubt == "rival must leave (group) but has 1 requests in hand"
    pinned = CatalogueModel(id="rival", pinned_on=["a"])
    assert place(view("a", model("rival", gib=2)), M, pinned, groups=groups) == (
        "rival, which excludes it by a group, is pinned here"
    )


def test_the_load_request_carries_ttl_residency_pin_and_priority():
    listed = CatalogueModel(
        id="m", pinned_on=["a"], ttl_s=60, min_resident_s=5, residency_priority=200
    )
    found = placed(view("a"), listed)
    request = load_request(Catalogue(models=[listed]), "m", found, Eviction(ttl_s=9))
    assert request == LoadRequest(
        model_id="m", ttl_s=60, min_resident_s=5, pinned=True, priority=200
    )


def test_a_model_outside_the_catalogue_gets_the_fleets_ttl_and_residency():
    found = placed(view("a", model("m", "unloaded", gib=1)), CatalogueModel(id="other"))
    request = load_request(Catalogue(), "m", found, Eviction(ttl_s=9, min_resident_s=3))
    assert request == LoadRequest(model_id="m", ttl_s=9, min_resident_s=3)


def test_a_host_without_devices_offers_the_memory_its_residents_leave():
    node = view("a", model("old", gib=10), devices={})
    found = placed(node)
    assert (found.devices, found.free_bytes, found.victims) == ((), 6 * GIB, ("old",))


def test_the_nodes_own_figures_of_need_and_room_are_exact():
    node = view("a", model("m", "unloaded", gib=1, need_bytes=21 * GIB))
    assert placed(node).needed_bytes == 21 * GIB
    reading = DeviceHealth(index=0, vram_used_mb=0, vram_free_mb=20480, free_bytes=3 * GIB)
    promised = replace(node, health=NeuronHealth(uptime_secs=1, devices=[reading]))
    assert placed(promised).free_bytes == 3 * GIB
    host = HostMemory(free_bytes=5 * GIB, total_bytes=16 * GIB)
    cpu = replace(view("b", devices={}), health=NeuronHealth(uptime_secs=1, host=host))
    assert placed(cpu).free_bytes == 5 * GIB


def test_a_load_under_way_needs_no_room_and_lasts_as_long_as_it_says():
    loading = model("m", "loading", gib=8)
    loading = msgspec.structs.replace(
        loading, progress=LoadProgress(phase="weights", seconds_left=7)
    )
    found = placed(view("a", loading, model("old", gib=15), devices={0: (24, 1)}))
    assert (found.status, found.victims, found.doubt) == ("loading", (), None)
    assert found.cost.load_s == 7


def test_what_other_loads_were_promised_is_not_free():
    node = replace(view("a", devices={0: (24, 20)}), claims={"other": 15 * GIB})
    assert placed(node).doubt == "needs 8.0 GiB, 5.0 free and not enough can leave"


RESIDENTS = st.lists(
    st.builds(
        dict,
        gib=st.integers(0, 12),
        in_flight=st.integers(0, 1),
        pinned=st.booleans(),
        priority=st.integers(99, 101),
        min_resident_s=st.sampled_from([0.0, 60.0]),
        devices=st.sampled_from([[0], [1]]),
    ),
    max_size=6,
)


@given(residents=RESIDENTS, free=st.tuples(st.integers(0, 12), st.integers(0, 12)))
def test_whatever_is_resident_a_plan_is_allowed_and_sufficient(
    residents: list[dict[str, Any]], free: tuple[int, int]
) -> None:
    models = [model(f"r{at}", resident_s=30.0, **fields) for at, fields in enumerate(residents)]
    node = view("a", *models, devices={0: (64, free[0]), 1: (64, free[1])})
    found = placed(node, M)
    by_id = {each.id: each for each in models}
    victims = [by_id[name] for name in found.victims]
    for each in victims:
        assert not each.in_flight
        assert not each.pinned
        assert (each.priority or 0) <= 100
        assert each.min_resident_s <= 30
        assert each.devices == list(found.devices)
    # One of unknown size is named alone, and the neuron tells whether it was enough.
    if found.doubt is None and all(each.vram_used_mb for each in victims):
        (device,) = found.devices
        freed = sum((each.vram_used_mb or 0) << 20 for each in victims)
        assert free[device] * GIB + freed >= 8 * GIB
