import os

import pytest
import torch

from cortex.neuron.engine.free_memory import free_memory_bytes
from cortex.neuron.engine.sizing import CachePlan, OutOfDeviceMemoryError, plan_caches
from cortex.neuron.layers.context import CacheSpec

MIB = 1 << 20

# 4 KiB of K and V per token and 1 MiB of state per sequence, in float32.
SPEC = CacheSpec(
    num_kv_layers=1,
    num_kv_heads=1,
    kv_head_dim=512,
    num_gdn_layers=1,
    gdn_value_heads=1,
    gdn_key_dim=512,
    gdn_value_dim=512,
)
ATTENTION_ONLY = CacheSpec(num_kv_layers=1, num_kv_heads=1, kv_head_dim=512)


def plan(spec: CacheSpec = SPEC, **changes) -> CachePlan:
    settings = {
        "dtype": torch.float32,
        "block_size": 32,
        "max_num_seqs": 8,
        "max_len": 1024,
        "free_bytes": 10_000 * MIB,
        "kv_limit_bytes": None,
        "asked_bytes": None,
    }
    return plan_caches(spec, **{**settings, **changes})


def test_with_memory_to_spare_every_sequence_can_be_as_long_as_allowed():
    assert plan() == CachePlan(
        num_blocks=8 * 32, num_slots=8, max_model_len=1024, cache_bytes=8 * MIB + 32 * MIB
    )


def test_the_default_bound_of_the_kv_cache_holds():
    assert plan(kv_limit_bytes=16 * MIB).num_blocks == 128


def test_the_longest_sequence_is_what_the_cache_can_hold():
    assert plan(kv_limit_bytes=2 * MIB).max_model_len == 512


def test_what_is_asked_for_replaces_the_default_bound():
    assert plan(asked_bytes=24 * MIB, kv_limit_bytes=16 * MIB).num_blocks == 192


def test_a_fifth_of_the_free_memory_is_left_alone():
    # 40 MiB usable, 8 of them for states.
    assert plan(free_bytes=50 * MIB, max_len=4096).num_blocks == 256


def test_fewer_slots_are_made_where_states_would_take_over_half():
    sizes = plan(free_bytes=10 * MIB, max_len=4096)
    assert (sizes.num_slots, sizes.num_blocks) == (4, 32)


def test_a_model_without_state_keeps_all_its_slots():
    assert plan(ATTENTION_ONLY, free_bytes=MIB, max_num_seqs=64).num_slots == 64


def test_a_model_without_kv_has_the_blocks_its_sequences_can_fill():
    spec = CacheSpec(num_kv_layers=0, num_kv_heads=0, kv_head_dim=0)
    assert plan(spec).num_blocks == 256


def test_states_are_kept_within_their_own_bounds():
    many = {"snapshot_bytes": 6 * MIB, "max_snapshots": 100}
    assert plan(**many).num_snapshots == 6
    assert plan(**{**many, "max_snapshots": 2}).num_snapshots == 2
    assert plan(**many).cache_bytes == 8 * MIB + 6 * MIB + 32 * MIB
    assert plan(ATTENTION_ONLY, **many).num_snapshots == 0


def test_kept_states_take_at_most_an_eighth_of_what_is_usable():
    # 40 MiB are usable.
    assert plan(free_bytes=50 * MIB, snapshot_bytes=100 * MIB, max_snapshots=99).num_snapshots == 5


def test_kept_states_give_way_to_a_cache_that_is_asked_for():
    sizes = plan(
        free_bytes=50 * MIB, asked_bytes=40 * MIB, snapshot_bytes=100 * MIB, max_snapshots=99
    )
    assert (sizes.num_snapshots, sizes.num_blocks) == (2, 8 * 32)
    full = plan(free_bytes=48 * MIB, asked_bytes=40 * MIB, snapshot_bytes=9 * MIB, max_snapshots=99)
    assert full.num_snapshots == 0


def test_an_asked_cache_larger_than_the_free_memory_is_refused():
    with pytest.raises(OutOfDeviceMemoryError) as caught:
        plan(free_bytes=20 * MIB, asked_bytes=100 * MIB)
    assert caught.value.message == (
        "the caches need 0.04 GiB (41943040 bytes), 0.02 GiB (20971520 bytes) are free; "
        "unload another model, lower max_num_seqs, or raise cache_bytes if it is set"
    )


def test_memory_for_less_than_one_block_is_refused():
    with pytest.raises(OutOfDeviceMemoryError):
        plan(asked_bytes=1000)
    with pytest.raises(OutOfDeviceMemoryError):
        plan(free_bytes=MIB)


def test_free_ram_is_some_but_not_more_than_the_machine_has():
    free_bytes = free_memory_bytes(torch.device("cpu"))
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_bytes < total_bytes
