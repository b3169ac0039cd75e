import torch

from cortex.neuron.engine.batch import BatchBuilder
from cortex.neuron.engine.scheduler import Chunk
from tests.neuron.engine.building import make_sequence


def builder() -> BatchBuilder:
    return BatchBuilder(num_slots=4, max_blocks=5, block_size=4, device=torch.device("cpu"))


def placed(request_id: int, num_tokens: int, *, computed: int, blocks: list[int], slot: int):
    sequence = make_sequence(request_id, num_tokens)
    sequence.token_ids = [10 * request_id + i for i in range(num_tokens)]
    sequence.num_computed = computed
    sequence.blocks = blocks
    sequence.slot = slot
    return sequence


def test_a_mixed_step_lays_its_sequences_side_by_side():
    decode = placed(1, 6, computed=5, blocks=[7, 2], slot=3)
    prefill = placed(2, 9, computed=3, blocks=[4, 0, 9], slot=1)
    batch = builder().build([Chunk(decode, 1), Chunk(prefill, 4)])
    assert batch.token_ids.tolist() == [15, 23, 24, 25, 26]
    assert batch.positions.tolist() == [5, 3, 4, 5, 6]
    assert batch.query_lens == (1, 4)
    assert batch.context_lens == (5, 3)
    assert batch.query_starts.tolist() == [0, 1, 5]
    assert batch.kv_slots.tolist() == [2 * 4 + 1, 4 * 4 + 3, 0, 1, 2]
    assert batch.block_tables.tolist() == [[7, 2, -1], [4, 0, 9]]
    assert batch.state_slots.tolist() == [3, 1]
    assert batch.logit_rows.tolist() == [0]
    assert not batch.is_decode


def test_a_decode_step_has_one_token_and_one_logit_row_per_sequence():
    first = placed(1, 6, computed=5, blocks=[7, 2], slot=3)
    second = placed(2, 1, computed=0, blocks=[5], slot=0)
    batch = builder().build([Chunk(first, 1), Chunk(second, 1)])
    assert batch.is_decode
    assert batch.token_ids.tolist() == [15, 20]
    assert batch.positions.tolist() == [5, 0]
    assert batch.kv_slots.tolist() == [9, 20]
    assert batch.logit_rows.tolist() == [0, 1]


def test_the_last_chunk_of_a_prompt_wants_the_logits_of_its_last_token():
    sequence = placed(1, 9, computed=3, blocks=[4, 0, 9], slot=1)
    assert builder().build([Chunk(sequence, 6)]).logit_rows.tolist() == [5]
    sequence.num_tabled_blocks = 0
    assert builder().build([Chunk(sequence, 5)]).logit_rows.tolist() == []


def test_blocks_taken_later_are_added_to_the_table():
    building = builder()
    sequence = placed(1, 4, computed=3, blocks=[7], slot=2)
    assert building.build([Chunk(sequence, 1)]).block_tables.tolist() == [[7]]
    sequence.blocks.append(3)
    sequence.token_ids.append(1)
    sequence.num_computed = 4
    batch = building.build([Chunk(sequence, 1)])
    assert batch.block_tables.tolist() == [[7, 3]]
    assert batch.kv_slots.tolist() == [12]


def test_a_slot_forgets_the_blocks_of_its_last_holder():
    building = builder()
    building.build([Chunk(placed(1, 9, computed=8, blocks=[7, 2, 6], slot=2), 1)])
    successor = placed(2, 1, computed=0, blocks=[5], slot=2)
    other = placed(3, 12, computed=11, blocks=[1, 3, 4], slot=0)
    batch = building.build([Chunk(successor, 1), Chunk(other, 1)])
    assert batch.block_tables.tolist() == [[5, -1, -1], [1, 3, 4]]


def test_single_tokens_come_first_and_logits_keep_the_order_asked_for():
    prefill = placed(2, 9, computed=5, blocks=[4, 0, 9], slot=1)
    decode = placed(1, 6, computed=5, blocks=[7, 2], slot=3)
    fresh = placed(3, 1, computed=0, blocks=[5], slot=0)
    batch = builder().build([Chunk(prefill, 4), Chunk(decode, 1), Chunk(fresh, 1)])
    assert batch.query_lens == (1, 1, 4)
    assert batch.state_slots.tolist() == [3, 0, 1]
    assert batch.fresh_slots == (0,)
    assert batch.token_ids.tolist() == [15, 30, 25, 26, 27, 28]
    assert batch.logit_rows.tolist() == [5, 0, 1]
