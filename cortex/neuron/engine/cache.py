"""Who holds which piece of the caches: KV blocks, GDN state slots. Counters only, no tensors."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

NO_SLOT = -1


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Return how many KV blocks `num_tokens` tokens fill, the last one perhaps in part."""
    return -(-num_tokens // block_size)


class BlockPool:
    """The KV blocks of one engine, each with a count of its holders.

    A block may be given a key that says what it holds. With a key it stays findable after its
    last holder released it, until its space is needed: the one released longest ago goes first.
    So a block is free, idle (nobody holds it, but it has a key) or held, perhaps by several
    sequences.

    Attributes:
        on_evict: called with the key of an idle block that makes room.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.on_evict: Callable[[bytes], None] | None = None
        # Popped from the end, so that low numbers, warm in the processor's cache, go first.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # released longest ago first
        self._holders = [0] * num_blocks
        self._keys: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, idle ones among them: all of them can be allocated."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Blocks nobody holds whose content can still be found."""
        return len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks that nobody holds; the caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks asked, {self.num_free} free"
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        # Runs of neighbours are read faster than scattered blocks.
        return sorted(blocks)

    def retain(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of some held or idle blocks."""
        for block in blocks:
            if self._holders[block] == 0:
                assert block in self._idle, f"block {block} is free"
                del self._idle[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Take one holder from each block, last block first.

        Those without any become idle or free. The last of a sequence is so the first to be
        evicted, and what it builds upon stays longer.
        """
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} is free already"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._keys:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def num_holders(self, block: int) -> int:
        """Return how many hold a block."""
        return self._holders[block]

    def name(self, block: int, key: bytes) -> None:
        """Give a held block a key, unless it has one or another held block goes by that one.

        An idle block that does becomes free: what is held stays longer than what builds upon it.
        """
        assert self._holders[block] > 0, f"block {block} is free"
        other = self._blocks.get(key)
        if block in self._keys or (other is not None and self._holders[other] > 0):
            return
        if other is not None:
            self.forget(other)
        self._keys[block] = key
        self._blocks[key] = block

    def find(self, key: bytes) -> int | None:
        """Return the block of a key."""
        return self._blocks.get(key)

    def touch(self, block: int) -> None:
        """Make an idle block the last to be evicted."""
        if block in self._idle:
            self._idle.move_to_end(block)

    def forget(self, block: int) -> bytes | None:
        """Take a block's key from it and return it; an idle block becomes free."""
        key = self._keys.pop(block, None)
        if key is not None:
            del self._blocks[key]
            if block in self._idle:
                del self._idle[block]
                self._free.append(block)
        return key

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        key = self._keys.pop(block)
        del self._blocks[key]
        if self.on_evict is not None:
            self.on_evict(key)
        return block


class SlotPool:
    """The state slots of one engine; a running sequence holds exactly one."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._held = [False] * num_slots

    @property
    def num_free(self) -> int:
        """Slots nobody holds."""
        return len(self._free)

    def allocate(self) -> int:
        """Take a free slot; the caller has checked `num_free`."""
        slot = self._free.pop()
        self._held[slot] = True
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back."""
        assert self._held[slot], f"slot {slot} is free already"
        self._held[slot] = False
        self._free.append(slot)


@dataclass(slots=True, eq=False, kw_only=True)
class Snapshot:
    """A state that was kept, so that others can go on from it.

    Attributes:
        key: of the last full block before it.
        num_tail_tokens: those after that block.
        tail_key: of that block with these tokens; None without any.
        slot: where in the snapshot slots it is.
        num_hits: sequences that went on from it.
    """

    key: bytes
    num_tail_tokens: int
    tail_key: bytes | None
    slot: int
    num_hits: int = 0
