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
        logit_rows=torch.arange(total),
    )


def test_single_tokens_decode_together_and_longer_ones_prefill_alone():
    step = batch([1, 3, 1], [5, 2, 9], [0, 1, 2], [[1, 2, -1], [3, 4, -1], [5, 6, 7]])
    plan = make_plan(step, caches_of_ones())
    assert plan.decode is not None
    assert plan.decode.rows.tolist() == [0, 4]
    assert plan.decode.length == 10
    assert plan.decode.blocks.tolist() == [[1, 2, 0], [5, 6, 7]]
    assert plan.decode.mask.sum(-1).flatten().tolist() == [6, 10]
    (prefill,) = plan.prefills
    assert (prefill.start, prefill.stop, prefill.length) == (1, 4, 5)
    assert prefill.blocks == slice(3, 5)
    assert prefill.mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_rows_of_one_length_need_no_mask_and_slots_in_a_row_no_gathering():
    plan = make_plan(batch([1, 1], [3, 3], [2, 3], [[0], [1]]), caches_of_ones())
    assert plan.decode is not None
    assert plan.decode.rows is None
    assert plan.decode.mask is None
    assert plan.decode.slots == slice(2, 4)


def test_slots_out_of_order_are_listed():
    plan = make_plan(batch([1, 1], [3, 3], [3, 2], [[0], [1]]), caches_of_ones())
    assert plan.decode is not None
    assert plan.decode.slots.tolist() == [3, 2]


def test_one_sequence_with_scattered_blocks_keeps_its_table():
    plan = make_plan(batch([1], [9], [0], [[4, 2, 7]]), caches_of_ones())
    assert plan.decode is not None
    assert plan.decode.blocks.tolist() == [[4, 2, 7]]


def test_only_the_slots_of_new_sequences_are_cleared():
    caches = caches_of_ones()
    make_plan(batch([1, 2, 1], [0, 0, 4], [4, 1, 0], [[0, 1], [2, 3], [4, 5]]), caches)
    assert caches.recurrent_states[0].sum((1, 2, 3)).tolist() == [4.0, 0.0, 4.0, 4.0, 0.0, 4.0]
    assert caches.conv_states[0].sum((1, 2)).tolist() == [6.0, 0.0, 6.0, 6.0, 0.0, 6.0]


def test_a_padding_row_clears_no_slot_and_has_no_state_row():
    caches = caches_of_ones()
    plan = make_plan(batch([1, 1], [0, 3], [-1, 5], [[0], [1]]), caches)
    assert caches.recurrent_states.min().item() == 1.0
    assert plan.decode is not None
    assert plan.decode.state_rows.tolist() == [1]
    assert plan.decode.slots == slice(5, 6)
