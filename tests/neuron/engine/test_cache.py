import pytest

from cortex.neuron.engine.cache import BlockPool, SlotPool, blocks_for


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (32, 1), (33, 2), (64, 2)])
def test_a_started_block_counts_as_a_whole_one(num_tokens, blocks):
    assert blocks_for(num_tokens, 32) == blocks


def test_released_blocks_are_handed_out_again():
    pool = BlockPool(3)
    first = pool.allocate(3)
    assert sorted(first) == [0, 1, 2]
    assert pool.num_free == 0
    pool.release(first[1:])
    assert pool.num_free == 2
    assert sorted(pool.allocate(2)) == sorted(first[1:])


def test_a_retained_block_is_free_only_after_its_last_release():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.retain(blocks)
    pool.release(blocks)
    assert pool.num_free == 1
    pool.release(blocks)
    assert pool.num_free == 2


def test_a_block_cannot_be_released_twice():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="block 0 is free already"):
        pool.release(blocks)


def test_a_free_block_cannot_be_retained():
    with pytest.raises(AssertionError, match="block 1 is free"):
        BlockPool(2).retain([1])


def test_more_blocks_than_there_are_cannot_be_taken():
    with pytest.raises(AssertionError, match="3 blocks asked, 2 free"):
        BlockPool(2).allocate(3)


def test_slots_are_distinct_and_come_back():
    pool = SlotPool(2)
    slots = {pool.allocate(), pool.allocate()}
    assert slots == {0, 1}
    assert pool.num_free == 0
    pool.release(1)
    assert pool.allocate() == 1


def test_a_slot_cannot_be_released_twice():
    pool = SlotPool(2)
    slot = pool.allocate()
    pool.release(slot)
    with pytest.raises(AssertionError, match="slot 0 is free already"):
        pool.release(slot)
