import pytest

from cortex.core.errors import InsufficientMemoryError
from cortex.core.neuron_api import Device
from cortex.neuron.devices import HOST, DeviceMemory, Hardware, Reading
from cortex.neuron.ledger import Ledger
from cortex.neuron.memory import Claim, Wish
from cortex.neuron.peaks import PeakKey, Peaks

GIB = 1 << 30


class FakeMonitor:
    """A host with two GPUs of 24 GiB."""

    def __init__(self):
        names = enumerate("AB")
        self.hardware = Hardware(
            devices=[Device(index=index, name=name, vram_total_mb=24576) for index, name in names]
        )
        self.pids = frozenset()
        self.reading = Reading()
        self.show(0, 0)

    def show(self, used_0, used_1, **processes):
        memory = [
            DeviceMemory(index=HOST, total_bytes=64 * GIB, free_bytes=60 * GIB),
            DeviceMemory(index=0, total_bytes=24 * GIB, free_bytes=(24 - used_0) * GIB),
            DeviceMemory(index=1, total_bytes=24 * GIB, free_bytes=(24 - used_1) * GIB),
        ]
        found = {
            (int(name[-1]), 7 if name.startswith("m") else 8): value * GIB
            for name, value in processes.items()
        }
        self.reading = Reading(memory=memory, processes=found)
        return self.reading


@pytest.fixture
def monitor():
    return FakeMonitor()


@pytest.fixture
def ledger(monitor, tmp_path):
    ledger = Ledger(monitor, Peaks(tmp_path / "peaks.json"), clock=lambda: 0.0)
    yield ledger
    ledger.close()


def wish(model_id="m", gib=6, **changes):
    values = {
        "gpu_bytes": gib * GIB,
        "host_bytes": gib * GIB,
        "gpu_cache_bytes": GIB,
        "devices": [0],
    }
    return Wish(model_id=model_id, **{**values, **changes})


def load(ledger, monitor, wished, *, cache_gib=10, pid=7):
    ledger.hold(wished, monitor.reading, ())
    ledger.take(wished.model_id, weight_bytes=4 * GIB, cache_bytes=cache_gib * GIB, pid=pid)


def test_a_taken_claim_is_the_estimate_with_the_cache_that_was_made(ledger, monitor):
    # 6 GiB wanted, 1 of them cache; the engine made 10 of it.
    load(ledger, monitor, wish())
    assert ledger.claim("m") == Claim(model_id="m", device=0, num_bytes=15 * GIB, is_taken=True)


def test_an_engine_that_takes_more_than_its_claim_raises_it(ledger, monitor):
    load(ledger, monitor, wish())
    ledger.measure(monitor.show(17, 0, m0=17))
    assert ledger.claim("m").num_bytes == 17 * GIB
    ledger.measure(monitor.show(9, 0, m0=9))
    assert ledger.claim("m").num_bytes == 17 * GIB


def test_a_load_for_which_a_victim_would_return_too_little_is_refused_before_it_leaves(
    ledger, monitor
):
    # Claimed are 15 GiB, of which the engine touched 9; others hold 6.
    load(ledger, monitor, wish())
    ledger.measure(monitor.show(15, 0, m0=9))
    with pytest.raises(InsufficientMemoryError) as caught:
        ledger.hold(wish("n", 19), monitor.reading, (), {"m"})
    assert caught.value.extras["free_bytes"] == 18 * GIB
    ledger.hold(wish("n", 18), monitor.reading, (), {"m"})


def test_the_next_placement_reckons_with_what_was_seen_beside_the_cache(ledger, monitor):
    load(ledger, monitor, wish())
    assert ledger.measure(monitor.show(18, 0, m0=18))
    ledger.release("m")
    monitor.show(0, 0)
    # 18 seen, 10 of them cache: 8, and the 1 that is wanted.
    assert ledger.hold(wish(), monitor.reading, ()).num_bytes == 9 * GIB
    assert ledger.need_bytes(wish()) == 6 * GIB  # on device 1, of another kind
    monitor.hardware = Hardware(
        devices=[Device(index=index, name="A", vram_total_mb=1) for index in (0, 1)]
    )
    assert ledger.need_bytes(wish()) == 9 * GIB


def test_less_than_the_estimate_was_seen_and_the_estimate_stands(ledger, monitor):
    load(ledger, monitor, wish())
    ledger.measure(monitor.show(12, 0, m0=12))
    ledger.release("m")
    assert ledger.hold(wish(), monitor.reading, ()).num_bytes == 6 * GIB


def test_what_was_learned_can_refuse_a_load(ledger, monitor):
    ledger._peaks.note(
        PeakKey(model_id="m", dtype="auto", max_model_len=None, device="A"), 24 * GIB
    )
    with pytest.raises(InsufficientMemoryError) as caught:
        ledger.hold(wish(), monitor.reading, ())
    assert caught.value.extras["needed_bytes"] == 25 * GIB
    assert ledger.claim("m") is None
    assert ledger.hold(wish(devices=[1]), monitor.reading, ()).num_bytes == 6 * GIB


def test_only_processes_that_hold_a_model_are_asked_for(ledger, monitor):
    load(ledger, monitor, wish("m"), pid=7)
    load(ledger, monitor, wish("n", devices=[1]), pid=8)
    load(ledger, monitor, wish("o", devices=[]), pid=None)
    assert monitor.pids == {7, 8}
    ledger.give_back("m")
    assert monitor.pids == {8}
    ledger.release("n")
    assert monitor.pids == frozenset()
    # A process that is gone is measured no more, although a reading still shows it.
    assert not ledger.measure(monitor.show(20, 0, m0=20))


def test_a_difference_between_devices_and_claims_is_told_once(ledger, monitor, caplog):
    load(ledger, monitor, wish())
    assert ledger.drift(monitor.show(15, 1)) == {0: 0, 1: GIB}
    with caplog.at_level("WARNING"):
        ledger.measure(monitor.show(17, 1))
        assert caplog.text == ""
        ledger.measure(monitor.show(18, 1))
        ledger.measure(monitor.show(18, 1))
        assert caplog.text.count("what models hold there differ") == 1
        ledger.measure(monitor.show(15, 1))
        ledger.measure(monitor.show(12, 1))
    assert caplog.text.count("what models hold there differ") == 2
    assert ledger.drift(monitor.reading) == {0: -3 * GIB, 1: GIB}


def test_a_load_in_progress_is_no_difference(ledger, monitor):
    ledger.hold(wish(), monitor.reading, ())
    assert ledger.drift(monitor.show(3, 0)) == {1: 0}


def test_a_load_gets_the_smaller_of_what_devices_and_claims_leave(ledger, monitor):
    load(ledger, monitor, wish())
    # The claims leave 9 GiB; somebody else holds 4 of them.
    monitor.show(19, 0)
    with pytest.raises(InsufficientMemoryError) as caught:
        ledger.hold(wish("n"), monitor.reading, ())
    assert caught.value.extras["free_bytes"] == 5 * GIB
    # The device says that 20 are free, since the cache was not touched yet.
    monitor.show(4, 0)
    with pytest.raises(InsufficientMemoryError) as caught:
        ledger.hold(wish("n", 10), monitor.reading, ())
    assert caught.value.extras["free_bytes"] == 9 * GIB


def test_a_second_placement_of_a_model_takes_the_place_of_its_first(ledger, monitor):
    ledger.hold(wish(gib=20), monitor.reading, ())
    assert ledger.hold(wish(gib=20), monitor.reading, ()).num_bytes == 20 * GIB
    assert len(ledger.claims()) == 1


def test_what_an_engine_takes_on_the_fullest_of_its_devices_counts_for_each(ledger, monitor):
    load(ledger, monitor, wish(devices=[0, 1], num_devices=2))
    ledger.measure(monitor.show(16, 18, m0=16, m1=18))
    assert ledger.claim("m").num_bytes == 18 * GIB
    assert ledger.claim("m").devices == (0, 1)
