import pytest
import torch

from cortex.neuron.layers.context import Caches, CacheSpec, StepBatch
from cortex.neuron.layers.plan import make_plan

SPEC = CacheSpec(
    num_kv_layers=1,
    num_kv_heads=1,
    kv_head_dim=2,
    num_gdn_layers=1,
    gdn_value_heads=1,
    gdn_key_dim=2,
    gdn_value_dim=2,
    conv_dim=2,
    conv_width=4,
)


def caches_of_ones() -> Caches:
    caches = Caches.allocate(
        SPEC,
        num_blocks=8,
        block_size=4,
        num_slots=6,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    caches.conv_states.fill_(1.0)
    caches.recurrent_states.fill_(1.0)
    return caches


def batch(query_lens, context_lens, slots, tables) -> StepBatch:
    total = sum(query_lens)
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()])
    return StepBatch(
        token_ids=torch.zeros(total, dtype=torch.long),
        positions=torch.zeros(total, dtype=torch.long),
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
        query_starts=starts,
        kv_slots=torch.zeros(total, dtype=torch.long),
        block_tables=torch.tensor(tables),
        state_slots=torch.tensor(slots),
        fresh_slots=tuple(
            slot for slot, context in zip(slots, context_lens, strict=True) if context == 0 <= slot
        ),
        logit_rows=torch.arange(total),
    )


def test_single_tokens_decode_together_and_longer_ones_prefill_alone():
    step = batch([1, 1, 3], [5, 9, 2], [0, 2, 1], [[1, 2, -1], [5, 6, 7], [3, 4, -1]])
    plan = make_plan(step, caches_of_ones())
    assert plan.num_decode == 2
    assert plan.decode is not None
    assert plan.decode.length == 10
    assert plan.decode.blocks.tolist() == [[1, 2, 0], [5, 6, 7]]
    assert plan.decode.mask.sum(-1).flatten().tolist() == [6, 10]
    (prefill,) = plan.prefills
    assert (prefill.start, prefill.stop, prefill.length) == (2, 5, 5)
    assert prefill.blocks == slice(3, 5)
    assert prefill.mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_single_tokens_must_come_first():
    with pytest.raises(AssertionError, match="first"):
        make_plan(batch([2, 1], [0, 0], [0, 1], [[0], [1]]), caches_of_ones())


def test_rows_of_one_length_need_no_mask():
    plan = make_plan(batch([1, 1], [3, 3], [2, 3], [[0], [1]]), caches_of_ones())
    assert plan.decode is not None
    assert plan.decode.mask is None


def test_one_sequence_with_scattered_blocks_keeps_its_table():
    plan = make_plan(batch([1], [9], [0], [[4, 2, 7]]), caches_of_ones())
    assert plan.decode is not None
    assert plan.decode.blocks.tolist() == [[4, 2, 7]]


def test_the_prefills_of_a_step_are_cut_together():
    step = batch([1, 70, 3], [5, 0, 2], [4, 1, 3], [[1, 2] + [-1] * 17, [0] * 19, [3] * 19])
    gdn = make_plan(step, caches_of_ones()).gdn
    assert gdn is not None
    assert gdn.decode_slots.tolist() == [4]
    assert gdn.prefill_slots.tolist() == [1, 3]
    assert gdn.prefill_starts.tolist() == [0, 70, 73]
    assert gdn.tables is not None
    assert gdn.tables.chunks.tolist() == [[0, 64, 0, -1], [64, 6, 0, -1], [70, 3, 1, -1]]
    assert gdn.tables.first_chunks.tolist() == [0, 2, 3]


def test_a_decode_step_cuts_nothing():
    gdn = make_plan(batch([1, 1], [3, 3], [3, 2], [[0], [1]]), caches_of_ones()).gdn
    assert gdn is not None
    assert gdn.decode_slots.tolist() == [3, 2]
    assert gdn.tables is None


def test_only_the_slots_of_new_sequences_are_cleared():
    caches = caches_of_ones()
    make_plan(batch([1, 1, 2], [0, 4, 0], [4, 0, 1], [[0, 1], [4, 5], [2, 3]]), caches)
    assert caches.recurrent_states[0].sum((1, 2, 3)).tolist() == [4.0, 0.0, 4.0, 4.0, 0.0, 4.0]
    assert caches.conv_states[0].sum((1, 2)).tolist() == [6.0, 0.0, 6.0, 6.0, 0.0, 6.0]


def test_a_padding_row_clears_no_slot():
    caches = caches_of_ones()
    plan = make_plan(batch([1, 1], [0, 3], [-1, 5], [[0], [1]]), caches)
    assert caches.recurrent_states.min().item() == 1.0
    assert plan.gdn is not None
    assert plan.gdn.decode_slots.tolist() == [-1, 5]
