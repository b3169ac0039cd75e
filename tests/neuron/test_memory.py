import pytest

from cortex.core.errors import BadRequestError, InsufficientMemoryError, UnsupportedFieldError
from cortex.neuron.devices import HOST, DeviceMemory
from cortex.neuron.memory import (
    Claim,
    Placement,
    Resident,
    Size,
    Wish,
    free_bytes,
    need_bytes,
    place,
)
from cortex.neuron.models.facts import ModelFacts

GIB = 1 << 30


def facts(*, parameters=1_000_000_000, kv=1000, state=1_000_000, positions=32768):
    return ModelFacts(
        family="llama",
        max_position_embeddings=positions,
        vocab_size=1000,
        weight_bytes=2 * parameters,
        num_parameters=parameters,
        kv_elements_per_token=kv,
        state_bytes_per_slot_f32=state,
    )


def size(**changes):
    values = {
        "facts": facts(),
        "dtype": "auto",
        "max_model_len": None,
        "max_num_seqs": 4,
        "cache_bytes": None,
    }
    return Size(**{**values, **changes})


def wish(**changes):
    values = {"model_id": "m", "gpu_bytes": 2_955_910_400, "host_bytes": 4_439_814_400}
    return Wish(**{**values, **changes})


def gpu(index, free_gib, total_gib=24):
    return DeviceMemory(index=index, total_bytes=total_gib * GIB, free_bytes=int(free_gib * GIB))


HOST_32 = DeviceMemory(index=HOST, total_bytes=32 * GIB, free_bytes=32 * GIB)


def test_need_counts_weights_cache_states_and_the_process():
    # 2 bytes each: 1e9 weights, 4096 tokens of 1000 elements; 4 slots of 1e6; 900 MiB.
    assert need_bytes(size(), on_gpu=True) == 2_000_000_000 + 8_192_000 + 4_000_000 + (900 << 20)


def test_need_on_a_cpu_is_in_float32():
    assert need_bytes(size(), on_gpu=False) == (
        4_000_000_000 + 16_384_000 + 4_000_000 + (400 << 20)
    )


def test_a_short_context_and_a_fixed_cache_change_the_need():
    short = need_bytes(size(max_model_len=100), on_gpu=True)
    assert short == 2_000_000_000 + 200_000 + 4_000_000 + (900 << 20)
    fixed = need_bytes(size(cache_bytes=GIB), on_gpu=True)
    assert fixed == 2_000_000_000 + GIB + 4_000_000 + (900 << 20)


def test_the_gpu_with_the_most_free_memory_is_chosen():
    placement = place(wish(), [HOST_32, gpu(0, 5), gpu(1, 9)], [])
    assert placement == Placement(device=1, num_bytes=2_955_910_400)
    assert placement.engine_device == "cuda:1"


def test_the_host_is_used_only_where_no_gpu_is():
    assert place(wish(), [HOST_32], []).engine_device == "cpu"
    with pytest.raises(InsufficientMemoryError):
        place(wish(), [HOST_32, gpu(0, 1)], [])


def test_the_host_is_used_beside_a_gpu_when_asked_for():
    assert place(wish(devices=[]), [HOST_32, gpu(0, 20)], []).device == HOST


def test_a_named_gpu_is_used_even_if_another_is_emptier():
    assert place(wish(devices=[0]), [HOST_32, gpu(0, 5), gpu(1, 9)], []).device == 0


def test_memory_promised_to_a_load_in_progress_is_not_free():
    claim = Claim(model_id="other", device=0, num_bytes=7 * GIB)
    assert place(wish(), [gpu(0, 9), gpu(1, 5)], [claim]).device == 1


def test_a_claim_that_the_reading_shows_is_not_subtracted_again():
    claim = Claim(model_id="other", device=0, num_bytes=7 * GIB, is_taken=True)
    assert place(wish(), [gpu(0, 9), gpu(1, 5)], [claim]).device == 0


def test_a_refusal_tells_needed_and_free_bytes_and_who_is_resident():
    resident = Resident(
        id="old", device=0, bytes=20 * GIB, in_flight=2, last_used_s=4.5, pinned=True
    )
    with pytest.raises(InsufficientMemoryError) as caught:
        place(wish(), [gpu(0, 1), gpu(1, 0.5)], [], [resident])
    error = caught.value
    assert error.status == 409
    assert error.message == (
        "model 'm' needs 2.8 GiB on GPU 0, 1.0 GiB are free; "
        "unload a model, or lower max_model_len or cache_mb"
    )
    assert error.extras == {
        "device": 0,
        "needed_bytes": 2_955_910_400,
        "free_bytes": GIB,
        "devices": [
            {"device": 0, "needed_bytes": 2_955_910_400, "free_bytes": GIB},
            {"device": 1, "needed_bytes": 2_955_910_400, "free_bytes": GIB // 2},
        ],
        "residents": [
            {
                "id": "old",
                "device": 0,
                "bytes": 20 * GIB,
                "in_flight": 2,
                "last_used_s": 4.5,
                "priority": 100,
                "pinned": True,
                "min_resident_left_s": 0.0,
            }
        ],
    }


def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(BadRequestError, match=r"no GPU 3 on this host \(there are: 0, 1\)"):
        place(wish(devices=[3]), [gpu(0, 9), gpu(1, 9)], [])


def test_two_devices_for_one_model_are_refused():
    with pytest.raises(UnsupportedFieldError, match="one device"):
        place(wish(devices=[0, 1]), [gpu(0, 9), gpu(1, 9)], [])


def test_claims_bound_what_is_free_where_the_reading_shows_more():
    # A cache that nobody has touched yet is not in the reading.
    claim = Claim(model_id="other", device=0, num_bytes=20 * GIB, is_taken=True)
    assert free_bytes(gpu(0, 23), [claim]) == 4 * GIB


def test_the_reading_bounds_what_is_free_where_the_claims_leave_more():
    # Somebody else is on the device.
    assert free_bytes(gpu(0, 3), []) == 3 * GIB


def test_claims_over_the_device_leave_nothing_and_never_less():
    claims = [Claim(model_id=name, device=0, num_bytes=20 * GIB) for name in ("a", "b")]
    assert free_bytes(gpu(0, 5), claims) == 0


def test_memory_of_those_that_leave_is_free_for_the_one_they_leave_for():
    claims = [
        Claim(model_id="old", device=0, num_bytes=20 * GIB, is_taken=True),
        Claim(model_id="kept", device=0, num_bytes=1 * GIB, is_taken=True),
    ]
    device = gpu(0, 2)
    assert free_bytes(device, claims) == 2 * GIB
    assert free_bytes(device, claims, {"old"}) == 22 * GIB
    big = wish(gpu_bytes=21 * GIB)
    assert place(big, [device], claims, (), {"old"}).device == 0
    with pytest.raises(InsufficientMemoryError, match=r"22\.0 GiB are free even without old"):
        place(wish(gpu_bytes=23 * GIB), [device], claims, (), {"old"})


def test_a_victim_returns_no_more_than_it_was_seen_to_hold():
    seen = Claim(model_id="old", device=0, num_bytes=20 * GIB, is_taken=True, seen_bytes=8 * GIB)
    assert free_bytes(gpu(0, 14), [seen], {"old"}) == 22 * GIB
    assert free_bytes(gpu(0, 14), [seen]) == 4 * GIB
    more = Claim(model_id="old", device=0, num_bytes=20 * GIB, is_taken=True, seen_bytes=21 * GIB)
    assert free_bytes(gpu(0, 1), [more], {"old"}) == 21 * GIB


def test_what_was_promised_to_another_is_not_free_although_a_victim_leaves():
    claims = [
        Claim(model_id="old", device=0, num_bytes=20 * GIB, is_taken=True),
        Claim(model_id="rival", device=0, num_bytes=18 * GIB),
    ]
    assert free_bytes(gpu(0, 2), claims, {"old"}) == 4 * GIB


def test_a_model_that_spans_devices_goes_to_the_emptiest_in_their_order():
    memory = [HOST_32, gpu(0, 5), gpu(1, 4), gpu(2, 9), gpu(3, 1)]
    placement = place(wish(num_devices=2), memory, [])
    assert placement.gpus == (0, 2)
    assert placement.engine_device == "cuda:0"


def test_each_of_the_devices_that_a_model_spans_needs_room():
    with pytest.raises(InsufficientMemoryError, match=r"on GPU 1, 1\.0 GiB"):
        place(wish(num_devices=2), [gpu(0, 9), gpu(1, 1)], [])


def test_a_model_that_spans_devices_is_claimed_on_each():
    claim = Claim(model_id="other", device=0, more_devices=(1,), num_bytes=7 * GIB)
    assert place(wish(), [gpu(0, 9), gpu(1, 9), gpu(2, 5)], [claim]).device == 2


def test_more_devices_than_there_are_cannot_be_had():
    with pytest.raises(BadRequestError, match="needs 2 GPUs, there are 1"):
        place(wish(num_devices=2), [gpu(0, 9)], [])


def test_named_devices_are_all_used():
    memory = [gpu(0, 9), gpu(1, 8), gpu(2, 7)]
    assert place(wish(num_devices=2, devices=[1, 2]), memory, []).gpus == (1, 2)
