"""Who holds which piece of the caches: KV blocks and GDN state slots. Counters only, no tensors."""

NO_SLOT = -1


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Return how many KV blocks `num_tokens` tokens fill, the last one perhaps in part."""
    return -(-num_tokens // block_size)


class BlockPool:
    """The KV blocks of one engine, each with a count of its holders.

    A block goes back to the free list when its last holder releases it, so several sequences
    can hold the blocks of a common prefix.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # Popped from the end, so that low numbers, warm in the processor's cache, go first.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one holder; the caller has checked `num_free`."""
        assert count <= len(self._free), f"{count} blocks asked, {len(self._free)} free"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def retain(self, blocks: list[int]) -> None:
        """Add a holder to each of some held blocks."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is free"
            self._holders[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Take one holder from each block; those without any become free, last block first."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} is free already"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free.append(block)


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
