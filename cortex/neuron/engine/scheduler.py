"""Which sequences run in the next step, and with how many tokens: decisions, no tensors, no time.

Admission is first come, first served. A sequence is admitted when a state slot and the blocks
of all its known tokens and the next one are free; from then on it takes blocks as it grows. When
none is left the youngest running sequence gives everything back and waits, ahead of all that
were never admitted, to be computed again from its prompt and what it has generated.

With a prefix cache a sequence begins after the tokens that are in the caches already. The blocks
of them that it shares it only reads: it writes where its own tokens begin, in blocks of its own.
"""

from collections import deque
from dataclasses import dataclass

from cortex.core.errors import QueueFullError
from cortex.neuron.engine.cache import NO_SLOT, BlockPool, SlotPool, blocks_for
from cortex.neuron.engine.prefix import NO_MATCH, Match, PrefixCache
from cortex.neuron.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """What is copied before a sequence goes on from a snapshot.

    Attributes:
        snapshot_slot: whose state becomes the sequence's own.
        blocks: the block that holds the last few tokens, and the sequence's own in its place;
            None where the snapshot is at the end of a block.
    """

    snapshot_slot: int
    blocks: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence's part of a step: its next `num_tokens` pending tokens.

    Attributes:
        restore: what is to be copied first. Copies are made in the order of the chunks: a later
            one may be made to where an earlier one comes from.
    """

    sequence: Sequence
    num_tokens: int
    restore: Restore | None = None

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
        num_snapshots: states that the prefix cache may keep; None for a model without a state.
        prefix_cache: whether there is one.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        max_batched_tokens: int,
        max_waiting: int,
        prefix_cache: bool = False,
        num_snapshots: int | None = None,
    ) -> None:
        if max_batched_tokens < num_slots:
            raise ValueError(f"{max_batched_tokens} tokens cannot carry {num_slots} sequences")
        self.blocks = BlockPool(num_blocks)
        self.slots = SlotPool(num_slots)
        self.prefix: PrefixCache | None = None
        if prefix_cache:
            snapshots = None if num_snapshots is None else SlotPool(num_snapshots)
            self.prefix = PrefixCache(self.blocks, block_size, snapshots)
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
        if self.prefix is not None and self._waiting:
            self.prefix.mark_partings(self._waiting[0], self._running)
        # Decodes come first: they are one token each and someone reads along.
        in_order = [s for s in self._running if s.num_pending == 1]
        in_order += [s for s in self._running if s.num_pending > 1]
        planned: dict[Sequence, int] = {}
        num_waiting = len(self._waiting)
        for sequence in in_order:
            if sequence.slot == NO_SLOT:
                continue  # preempted for one before it
            num_tokens = _next_tokens(sequence, budget)
            if num_tokens == 0:
                break
            if self._make_room(sequence, sequence.num_computed + num_tokens):
                planned[sequence] = num_tokens
                budget -= num_tokens
        preempted = len(self._waiting) > num_waiting
        chunks = [Chunk(sequence, num_tokens) for sequence, num_tokens in planned.items()]
        # What a preemption frees is for those that run: nobody is admitted on it.
        while budget > 0 and not preempted and self._waiting:
            match = self._admit(self._waiting[0])
            if match is None:
                break
            sequence = self._running[-1]
            chunks.append(
                Chunk(sequence, _next_tokens(sequence, budget), _restore(sequence, match))
            )
            budget -= chunks[-1].num_tokens
        return chunks

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

    def _admit(self, sequence: Sequence) -> Match | None:
        """Move the head of the queue among the running if what it needs is free.

        It also waits for a prompt in progress that begins like it: that one is older and takes
        the budget of the steps first, so nothing is lost by it.

        Returns what it goes on from; None if it has to wait.
        """
        if self.slots.num_free == 0:
            return None
        match = NO_MATCH if self.prefix is None else self.prefix.match(sequence)
        if self.prefix is not None and self.prefix.is_coming(sequence, match, self._running):
            return None
        num_new = blocks_for(len(sequence.token_ids) + 1, self.block_size) - len(match.blocks)
        num_idle = sum(self.blocks.num_holders(block) == 0 for block in match.blocks)
        if self.blocks.num_free - num_idle < num_new:
            return None
        self._waiting.popleft()
        if self.prefix is not None:
            self.prefix.use(sequence, match)
        sequence.slot = self.slots.allocate()
        self.blocks.retain(match.blocks)
        sequence.blocks = match.blocks + self.blocks.allocate(num_new)
        sequence.num_computed = match.num_tokens
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(match.num_tokens, sequence.num_prompt_tokens)
        self._running.append(sequence)
        return match

    def _take_back(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        self.slots.release(sequence.slot)
        sequence.blocks = []
        sequence.slot = NO_SLOT
        sequence.num_computed = 0
        sequence.num_tabled_blocks = 0
        sequence.num_kept_blocks = 0
        sequence.cuts = []


def _next_tokens(sequence: Sequence, budget: int) -> int:
    """Return how many tokens a sequence computes next: it stops where its state is to be kept."""
    num_tokens = min(sequence.num_pending, budget)
    for cut in sequence.cuts:
        if cut > sequence.num_computed:
            return min(num_tokens, cut - sequence.num_computed)
    return num_tokens


def _restore(sequence: Sequence, match: Match) -> Restore | None:
    if match.snapshot is None:
        return None
    tail_block = match.tail_block
    return Restore(
        snapshot_slot=match.snapshot.slot,
        blocks=None if tail_block is None else (tail_block, sequence.blocks[len(match.blocks)]),
    )
