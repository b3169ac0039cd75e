"""Learned rates: where they start, how they change, and that there are not too many."""

import pytest

from cortex.core.neuron_api import ModelLoad
from cortex.gateway.rates import RateBook
from tests.support.fleet_views import GIB, model, view


@pytest.mark.parametrize(
    ("device", "tok_s"),
    [
        ("NVIDIA H100 80GB HBM3", 60 * 3350e9),
        ("NVIDIA GeForce RTX 3060", 60 * 360e9),
        ("Something Else", 60 * 400e9),
    ],
)
def test_a_prefill_rate_starts_from_the_devices_bandwidth(device: str, tok_s: float):
    node = view("a", model("m", gib=1), device_name=device)
    assert RateBook().prefill_tok_s(node, "m") == pytest.approx(tok_s / GIB)


def test_a_host_without_devices_is_slow():
    node = view("a", model("m", gib=1), devices={})
    assert RateBook().prefill_tok_s(node, "m") == pytest.approx(15 * 20e9 / GIB)


def test_what_the_neuron_measures_wins_over_what_was_learned():
    rates = RateBook()
    rates.learn_prefill("a", "m", 1000, 0.5)
    assert rates.prefill_tok_s(view("a", model("m")), "m") == 2000
    told = view("a", model("m"), loads={"m": ModelLoad(id="m", tok_s_prefill=700.0)})
    assert rates.prefill_tok_s(told, "m") == 700


def test_a_slow_prefill_counts_little_since_it_may_have_waited():
    rates, node = RateBook(), view("a", model("m"))
    rates.learn_prefill("a", "m", 1000, 1.0)
    rates.learn_prefill("a", "m", 1000, 10.0)
    assert rates.prefill_tok_s(node, "m") == 1000 - 0.05 * 900
    rates.learn_prefill("a", "m", 10, 10.0)  # too short to tell
    assert rates.prefill_tok_s(node, "m") == 955


def test_a_model_whose_files_are_elsewhere_is_fetched_first():
    rates = RateBook()
    here, elsewhere = view("a", model("m", "unloaded", gib=1)), view("b")
    assert rates.load_s(here, "m", GIB) == pytest.approx(3 + GIB / 1e9)
    assert rates.load_s(elsewhere, "m", GIB) == pytest.approx(3 + GIB / 1e9 + GIB / 1e8)


def test_a_load_teaches_the_models_time_and_the_nodes_rate():
    rates, node = RateBook(), view("a", model("m", "unloaded"), model("n", "unloaded"))
    rates.learn_load("a", "m", 2 * GIB, 7.0)
    assert rates.load_s(node, "m", 2 * GIB) == 7.0
    assert rates.load_s(node, "n", GIB) == pytest.approx(5.0)
    rates.learn_load("a", "m", 2 * GIB, 17.0)
    assert rates.load_s(node, "m", 2 * GIB) == pytest.approx(10.0)


def test_the_pair_unused_for_longest_is_forgotten_first():
    rates = RateBook(max_learned=2)
    for name in ("m", "n", "m", "o"):
        rates.learn_service("a", name, 9.0)
    assert len(rates) == 2
    assert [rates.service_s("a", name) for name in ("m", "n", "o")] == [9.0, 2.0, 9.0]
