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


def test_a_released_block_with_a_key_is_found_until_its_space_is_needed():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.name(block, b"a")
    pool.release([block])
    assert (pool.num_free, pool.num_idle, pool.find(b"a")) == (3, 1, block)
    evicted: list[bytes] = []
    pool.on_evict = evicted.append
    pool.allocate(2)
    assert evicted == []
    pool.allocate(1)
    assert (evicted, pool.find(b"a"), pool.num_idle) == ([b"a"], None, 0)


def test_an_idle_block_can_be_held_again_and_is_idle_again_after_that():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.name(block, b"a")
    pool.release([block])
    pool.retain([block])
    assert (pool.num_free, pool.num_holders(block)) == (1, 1)
    pool.release([block])
    assert (pool.num_free, pool.find(b"a")) == (2, block)


def test_of_idle_blocks_the_one_released_longest_ago_is_evicted_unless_it_is_touched():
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block, key in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.name(block, key)
    pool.release(blocks)
    pool.touch(blocks[2])
    # Last block first, so the third would be the first to go.
    assert pool.allocate(2) == blocks[:2]
    assert pool.find(b"c") == blocks[2]


def test_a_held_block_takes_the_key_of_an_idle_one_but_not_of_another_held_one():
    pool = BlockPool(3)
    first, second, third = pool.allocate(3)
    pool.name(first, b"a")
    pool.name(second, b"a")
    assert pool.find(b"a") == first
    pool.release([first])
    pool.name(third, b"a")
    assert (pool.find(b"a"), pool.num_idle, pool.num_free) == (third, 0, 1)


def test_a_forgotten_block_is_found_no_more():
    pool = BlockPool(2)
    held, idle = pool.allocate(2)
    pool.name(held, b"a")
    pool.name(idle, b"b")
    pool.release([idle])
    assert [pool.forget(each) for each in (held, idle, held)] == [b"a", b"b", None]
    assert (pool.find(b"a"), pool.find(b"b"), pool.num_idle) == (None, None, 0)
    pool.release([held])
    assert pool.num_free == 2


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
