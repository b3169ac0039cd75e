"""Random lives of a scheduler: nothing leaks, nothing starves, nobody overtakes."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cortex.neuron.engine.cache import NO_SLOT, blocks_for
from cortex.neuron.engine.sequence import Sequence
from tests.neuron.engine.building import make_scheduler, make_sequence

NUM_BLOCKS = 12
BLOCK_SIZE = 4
NUM_SLOTS = 3
MAX_BATCHED_TOKENS = 10
MAX_LEN = NUM_BLOCKS * BLOCK_SIZE


class SchedulerLife(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            num_slots=NUM_SLOTS,
            max_batched_tokens=MAX_BATCHED_TOKENS,
            max_waiting=50,
        )
        self.alive: dict[int, Sequence] = {}
        self.first_admitted: list[int] = []
        self.ended: list[int] = []
        self.next_id = 0

    @rule(num_prompt=st.integers(1, MAX_LEN - 1), max_tokens=st.integers(1, 20))
    def submit(self, num_prompt: int, max_tokens: int) -> None:
        if len(self.alive) >= 50:
            return
        sequence = make_sequence(self.next_id, num_prompt, max_tokens=max_tokens)
        sequence.max_len = min(sequence.max_len, MAX_LEN)
        self.scheduler.add(sequence)
        self.alive[self.next_id] = sequence
        self.next_id += 1

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.alive:
            self._end(data.draw(st.sampled_from(sorted(self.alive))))

    @rule(max_tokens=st.none() | st.integers(1, MAX_BATCHED_TOKENS))
    def step(self, max_tokens: int | None = None) -> None:
        chunks = self.scheduler.schedule(max_tokens)
        assert bool(chunks) == bool(self.alive)
        assert sum(chunk.num_tokens for chunk in chunks) <= MAX_BATCHED_TOKENS
        assert len({chunk.sequence.request_id for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            sequence = chunk.sequence
            assert 1 <= chunk.num_tokens <= sequence.num_pending
            reach = sequence.num_computed + chunk.num_tokens
            assert len(sequence.blocks) >= blocks_for(reach, BLOCK_SIZE)
            if sequence.request_id not in self.first_admitted:
                self.first_admitted.append(sequence.request_id)
        ready = [chunk.sequence for chunk in chunks if chunk.is_last]
        self.scheduler.commit(chunks)
        for sequence in ready:
            if sequence.append(2) is not None:
                self._end(sequence.request_id)

    def _end(self, request_id: int) -> None:
        self.scheduler.remove(self.alive.pop(request_id))
        self.ended.append(request_id)

    @invariant()
    def every_block_and_slot_has_one_place(self) -> None:
        held = [block for s in self.alive.values() for block in s.blocks]
        assert len(held) == len(set(held)) == NUM_BLOCKS - self.scheduler.blocks.num_free
        slots = [s.slot for s in self.alive.values() if s.slot != NO_SLOT]
        assert len(slots) == len(set(slots)) == NUM_SLOTS - self.scheduler.slots.num_free
        assert len(slots) == self.scheduler.num_running
        assert len(self.alive) - len(slots) == self.scheduler.num_waiting

    @invariant()
    def nobody_is_admitted_before_an_earlier_one(self) -> None:
        assert self.first_admitted == sorted(self.first_admitted)

    def teardown(self) -> None:
        for _ in range(20_000):
            if not self.alive:
                break
            self.step()
        assert not self.alive
        assert sorted(self.ended) == list(range(self.next_id))
        assert self.scheduler.blocks.num_free == NUM_BLOCKS
        assert self.scheduler.slots.num_free == NUM_SLOTS


TestSchedulerLife = SchedulerLife.TestCase
TestSchedulerLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
