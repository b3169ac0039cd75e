"""The one cost in seconds that candidates are ranked by."""

import pytest

from cortex.core.neuron_api import LoadProgress, ModelLoad
from cortex.gateway.costs import Cost, Demand, Knowledge, load_s, return_s, warm_cost
from cortex.gateway.rates import RateBook
from tests.support.fleet_views import GIB, fleet_of, model, view

FAST = {"m": ModelLoad(id="m", tok_s_prefill=1000.0, max_in_flight=4)}


def test_the_cost_is_the_sum_of_its_parts():
    assert Cost(queue_s=1, prefill_s=2, load_s=4, victims_s=8, others_s=16).total_s == 31


def test_only_what_no_cache_holds_is_prefilled():
    node = view("a", model("m"), loads=FAST)
    demand = Demand(prompt_tokens=3000, cached={("a", "m"): 2000})
    cost = warm_cost(fleet_of(node), node, "m", demand, Knowledge())
    assert (cost.queue_s, cost.prefill_s) == (0.0, 1.0)


def test_a_prompt_that_is_cached_whole_still_costs_its_last_token():
    node = view("a", model("m"), loads=FAST)
    demand = Demand(prompt_tokens=100, cached={("a", "m"): 100})
    assert warm_cost(fleet_of(node), node, "m", demand, Knowledge()).prefill_s == 0.001


def test_prefill_that_was_sent_before_is_waited_for():
    node = view("a", model("m"), loads=FAST)
    known = Knowledge(queued_s={("a", "m"): 2.5})
    assert warm_cost(fleet_of(node), node, "m", Demand(), known).queue_s == 2.5


@pytest.mark.parametrize(("requests", "turns"), [(3, 0.0), (4, 0.25), (8, 1.25)])
def test_a_full_replica_is_waited_for_turn_by_turn(requests: int, turns: float):
    node = view("a", model("m"), loads=FAST)
    rates = RateBook()
    rates.learn_service("a", "m", 8.0)
    snapshot = fleet_of(node, leases={("a", "m"): requests})
    cost = warm_cost(snapshot, node, "m", Demand(), Knowledge(rates=rates))
    shared = 0.25 * requests / 4
    assert cost.queue_s == 8.0 * (turns + shared)


def test_a_load_under_way_costs_what_is_left_of_it():
    half = LoadProgress(bytes_done=1, bytes_total=2)
    node = view("a", model("m", "loading", gib=1, progress=half))
    assert load_s(node, "m", GIB, Knowledge()) == (3 + GIB / 1e9) / 2
    told = view("a", model("m", "loading", gib=1, progress=LoadProgress(seconds_left=1.5)))
    assert load_s(told, "m", GIB, Knowledge()) == 1.5


def test_a_victim_that_was_never_used_costs_a_tenth_of_its_load():
    node = view("a", model("used", gib=1, last_used_s=0.0), model("never", gib=1))
    whole_s = 3 + GIB / 1e9
    assert return_s(node, "used", Knowledge()) == whole_s
    assert return_s(node, "never", Knowledge()) == pytest.approx(whole_s / 10)


def test_a_prefill_holds_up_those_in_hand():
    node = view("a", model("m"), loads=FAST)
    snapshot = fleet_of(node, leases={("a", "m"): 2})
    cost = warm_cost(snapshot, node, "m", Demand(prompt_tokens=4000), Knowledge())
    assert (cost.prefill_s, cost.others_s) == (4.0, 2.0)


def test_a_replica_that_is_being_recycled_costs_the_rest_of_its_start():
    starting = LoadProgress(seconds_left=7.0)
    node = view("a", model("m", progress=starting), loads=FAST)
    assert warm_cost(fleet_of(node), node, "m", Demand(), Knowledge()).load_s == 7.0
