"""Which sequences run in the next step, and with how many tokens: decisions, no tensors, no time.

Admission is first come, first served. A sequence is admitted when a state slot and the blocks
of all its known tokens and the next one are free; from then on it takes blocks as it grows. When
none is left the youngest running sequence gives everything back and waits, ahead of all that
were never admitted, to be computed again from its prompt and what it has generated.
"""

from collections import deque
from dataclasses import dataclass

from cortex.core.errors import QueueFullError
from cortex.neuron.engine.cache import NO_SLOT, BlockPool, SlotPool, blocks_for
from cortex.neuron.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence's part of a step: its next `num_tokens` pending tokens."""

    sequence: Sequence
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """Whether every known token is computed after this step, so that one is sampled."""
        return self.num_tokens == self.sequence.num_pending


class Scheduler:
    """The waiting and the running sequences of one engine, and the pools they draw on.

    Args:
        max_batched_tokens: tokens in one step; at least `num_slots`, so that every running
            sequence can decode in every step.
        max_waiting: bound of the waiting queue; preempted sequences may exceed it.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        max_batched_tokens: int,
        max_waiting: int,
    ) -> None:
        if max_batched_tokens < num_slots:
            raise ValueError(f"{max_batched_tokens} tokens cannot carry {num_slots} sequences")
        self.blocks = BlockPool(num_blocks)
        self.slots = SlotPool(num_slots)
        self.block_size = block_size
        self.max_batched_tokens = max_batched_tokens
        self._max_waiting = max_waiting
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # oldest first

    @property
    def num_waiting(self) -> int:
        """Sequences that hold nothing yet, or again."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue.

        Raises:
            QueueFullError: the queue is at its bound.
        """
        if len(self._waiting) >= self._max_waiting:
            raise QueueFullError(f"{self._max_waiting} requests wait already; retry later")
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it stands, and take back what it holds."""
        if sequence.slot == NO_SLOT:
            self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        self._take_back(sequence)

    def schedule(self, max_tokens: int | None = None) -> list[Chunk]:
        """Decide the next step, taking blocks and slots and preempting as needed.

        Args:
            max_tokens: a smaller token budget for this step; decodes go ahead regardless.
        """
        budget = self.max_batched_tokens
        if max_tokens is not None:
            budget = min(budget, max(max_tokens, len(self._running)))
        # Decodes come first: they are one token each and someone reads along.
        in_order = [s for s in self._running if s.num_pending == 1]
        in_order += [s for s in self._running if s.num_pending > 1]
        planned: dict[Sequence, int] = {}
        num_waiting = len(self._waiting)
        for sequence in in_order:
            if sequence.slot == NO_SLOT:
                continue  # preempted for one before it
            num_tokens = min(sequence.num_pending, budget)
            if num_tokens == 0:
                break
            if self._make_room(sequence, sequence.num_computed + num_tokens):
                planned[sequence] = num_tokens
                budget -= num_tokens
        preempted = len(self._waiting) > num_waiting
        # What a preemption frees is for those that run: nobody is admitted on it.
        while budget > 0 and not preempted and self._waiting and self._admit(self._waiting[0]):
            sequence = self._running[-1]
            planned[sequence] = min(sequence.num_pending, budget)
            budget -= planned[sequence]
        return [Chunk(sequence, num_tokens) for sequence, num_tokens in planned.items()]

    def commit(self, chunks: list[Chunk]) -> None:
        """Record that a step's tokens are in the caches."""
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence the blocks for `num_tokens`, preempting the youngest for it.

        False if it was the youngest itself. Whoever is preempted is not planned yet: prompts
        have their blocks, so only decodes get here short of one, and these are planned oldest
        first.
        """
        missing = blocks_for(num_tokens, self.block_size) - len(sequence.blocks)
        while missing > self.blocks.num_free:
            victim = self._running.pop()
            self._take_back(victim)
            self._waiting.appendleft(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.blocks += self.blocks.allocate(missing)
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Move the head of the queue among the running if what it needs is free."""
        num_blocks = blocks_for(len(sequence.token_ids) + 1, self.block_size)
        if self.slots.num_free == 0 or self.blocks.num_free < num_blocks:
            return False
        self._waiting.popleft()
        sequence.slot = self.slots.allocate()
        sequence.blocks = self.blocks.allocate(num_blocks)
        self._running.append(sequence)
        return True

    def _take_back(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        self.slots.release(sequence.slot)
        sequence.blocks = []
        sequence.slot = NO_SLOT
        sequence.num_computed = 0
        sequence.num_tabled_blocks = 0
