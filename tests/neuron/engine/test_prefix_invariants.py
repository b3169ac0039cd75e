"""Random lives of a scheduler with a prefix cache, over caches that remember what was written.

Each place of a block holds a hash of all tokens up to it, and each state of all its sequence's:
whatever a sequence goes on from has to be what it would have computed itself.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cortex.neuron.engine.cache import NO_SLOT
from cortex.neuron.engine.scheduler import Chunk
from cortex.neuron.engine.sequence import Sequence
from tests.neuron.engine.building import make_scheduler, make_sequence

NUM_BLOCKS = 60
BLOCK_SIZE = 4
NUM_SLOTS = 3
NUM_SNAPSHOTS = 3
MAX_LEN = NUM_BLOCKS * BLOCK_SIZE

# Beginnings that prompts share, and ends that tell them apart.
beginnings = st.sampled_from([(1, 90), (1, 150), (2, 110)])
ends = st.lists(st.integers(1, 3), max_size=40)


def hashes(token_ids: list[int]) -> list[int]:
    found = []
    last = 0
    for token in token_ids:
        last = hash((last, token))
        found.append(last)
    return found


class CachingLife(RuleBasedStateMachine):
    num_snapshots: int | None = NUM_SNAPSHOTS

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            num_slots=NUM_SLOTS,
            max_batched_tokens=70,
            prefix_cache=True,
            num_snapshots=self.num_snapshots,
        )
        assert self.scheduler.prefix is not None
        self.prefix = self.scheduler.prefix
        self.alive: dict[int, Sequence] = {}
        self.places = [0] * MAX_LEN
        self.states = [0] * NUM_SLOTS
        self.kept = [0] * NUM_SNAPSHOTS
        self.next_id = 0

    @rule(beginning=beginnings, end=ends, max_tokens=st.integers(1, 80))
    def submit(self, beginning: tuple[int, int], end: list[int], max_tokens: int) -> None:
        if len(self.alive) >= 20:
            return
        token, count = beginning
        sequence = make_sequence(
            self.next_id, 0, prompt_ids=[token] * count + end, max_tokens=max_tokens
        )
        sequence.max_len = min(sequence.max_len, MAX_LEN)
        self.scheduler.add(sequence)
        self.alive[self.next_id] = sequence
        self.next_id += 1

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.alive:
            self._end(data.draw(st.sampled_from(sorted(self.alive))))

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """End a sequence whose numbers are in doubt, as an engine does after a NaN."""
        running = sorted(i for i, s in self.alive.items() if s.slot != NO_SLOT)
        if not running:
            return
        sequence = self.alive.pop(data.draw(st.sampled_from(running)))
        self.prefix.forget(sequence)
        for block in sequence.blocks:
            assert not self.scheduler.blocks.forget(block)
            if self.scheduler.blocks.num_holders(block) == 1:
                self._write(block, [0] * BLOCK_SIZE)
        self.scheduler.remove(sequence)

    @rule(max_tokens=st.none() | st.integers(1, 70), num_steps=st.integers(1, 8))
    def steps(self, max_tokens: int | None, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step(max_tokens)

    def step(self, max_tokens: int | None = None) -> None:
        chunks = self.scheduler.schedule(max_tokens)
        assert bool(chunks) == bool(self.alive)
        for chunk in chunks:
            self._restore(chunk)
        for chunk in chunks:
            self._compute(chunk)
        ready = [chunk.sequence for chunk in chunks if chunk.is_last]
        self.scheduler.commit(chunks)
        for chunk in chunks:
            self._keep(chunk.sequence)
        for sequence in ready:
            if sequence.append(1 + len(sequence.token_ids) % 3) is not None:
                self._end(sequence.request_id)

    def _restore(self, chunk: Chunk) -> None:
        restore = chunk.restore
        if restore is not None:
            self.states[chunk.sequence.slot] = self.kept[restore.snapshot_slot]
            if restore.blocks is not None:
                source, target = (block * BLOCK_SIZE for block in restore.blocks)
                self.places[target : target + BLOCK_SIZE] = self.places[source:][:BLOCK_SIZE]
        elif chunk.sequence.num_computed == 0:
            self.states[chunk.sequence.slot] = 0

    def _compute(self, chunk: Chunk) -> None:
        """Check what the sequence goes on from, then write what its chunk computes."""
        sequence = chunk.sequence
        expected = hashes(sequence.token_ids)
        start, stop = sequence.num_computed, sequence.num_computed + chunk.num_tokens
        places = [
            sequence.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(stop)
        ]
        assert [self.places[place] for place in places[:start]] == expected[:start]
        if self.num_snapshots is not None:
            assert self.states[sequence.slot] == (expected[start - 1] if start else 0)
        for at in range(start, stop):
            assert self.scheduler.blocks.num_holders(places[at] // BLOCK_SIZE) == 1
            self.places[places[at]] = expected[at]
        self.states[sequence.slot] = expected[stop - 1]

    def _keep(self, sequence: Sequence, *, is_leaving: bool = False) -> None:
        due = self.prefix.due(sequence, is_leaving=is_leaving)
        if due is not None:
            slot = self.prefix.keep(sequence, due)
            if slot is not None:
                self.kept[slot] = self.states[sequence.slot]

    def _write(self, block: int, values: list[int]) -> None:
        self.places[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = values

    def _end(self, request_id: int) -> None:
        sequence = self.alive.pop(request_id)
        self._keep(sequence, is_leaving=True)
        self.scheduler.remove(sequence)

    @invariant()
    def a_block_is_held_as_often_as_sequences_list_it_and_is_else_free_or_idle(self) -> None:
        pool = self.scheduler.blocks
        held = [block for s in self.alive.values() for block in s.blocks]
        assert [pool.num_holders(b) for b in range(NUM_BLOCKS)] == [
            held.count(b) for b in range(NUM_BLOCKS)
        ]
        assert len(set(held)) + pool.num_free == NUM_BLOCKS
        assert sorted([*pool._free, *pool._idle, *set(held)]) == list(range(NUM_BLOCKS))
        assert set(pool._idle) <= set(pool._keys)
        assert not set(pool._free) & set(pool._keys)
        assert {key: block for block, key in pool._keys.items()} == pool._blocks

    @invariant()
    def every_kept_state_has_a_slot_of_its_own_and_the_blocks_at_its_end(self) -> None:
        slots = self.prefix._slots
        if slots is None:
            assert self.prefix.num_snapshots == 0
            return
        kept = list(self.prefix._snapshots)
        assert len({each.slot for each in kept}) == len(kept) == NUM_SNAPSHOTS - slots.num_free
        for each in kept:
            assert self.scheduler.blocks.find(each.key) is not None
            assert bool(each.num_tail_tokens) == (each.tail_key is not None)
            assert each.tail_key is None or self.scheduler.blocks.find(each.tail_key) is not None
        listed = {id(each) for snapshots in self.prefix._at.values() for each in snapshots}
        assert listed == {id(each) for each in kept}

    def teardown(self) -> None:
        for _ in range(5000):
            if not self.alive:
                break
            self.step()
        assert not self.alive
        assert self.scheduler.blocks.num_free == NUM_BLOCKS
        assert self.scheduler.slots.num_free == NUM_SLOTS


class BlockCachingLife(CachingLife):
    num_snapshots = None


TestCachingLife = CachingLife.TestCase
TestCachingLife.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestBlockCachingLife = BlockCachingLife.TestCase
TestBlockCachingLife.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
