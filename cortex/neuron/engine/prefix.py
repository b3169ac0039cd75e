"""What of a new prompt is computed already: KV blocks by content, and snapshots of the state.

Full blocks go by a key that hashes their tokens (and the images among these) and the key of the
block before, so that equal keys mean equal prefixes. Attention can go on from the end of any
block. A recurrent state knows only where it stands, so a model that has one goes on from
snapshots alone: copies of the state (and of the convolution's window) at one length of one
sequence, good for as long as the blocks of the same tokens are there. Decisions and counters, no
tensors.
"""

import hashlib
from array import array
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from cortex.neuron.engine.cache import BlockPool, SlotPool, Snapshot, blocks_for
from cortex.neuron.engine.sequence import Sequence

# The end of a prompt that the next turn of a chat may not repeat: the header of the answer.
VOLATILE_TAIL_TOKENS = 16
# Snapshots closer than this to one that exists are not worth their copy.
MIN_SNAPSHOT_GAIN_TOKENS = 64
# Snapshots inside a long prompt, for prompts that part from it early and for a second try.
MIN_INTERVAL_TOKENS = 2048
MAX_INTERVAL_SNAPSHOTS = 4

_KEY_BYTES = 16
_ROOT = b""  # comes before the first block


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What a sequence can go on from.

    Attributes:
        blocks: full blocks to share.
        num_tokens: tokens that need no computing.
        snapshot: whose state to copy; None for a model without one, or without a match.
        tail_block: the block to copy for the tokens after `blocks`.
        num_known_tokens: tokens whose K and V are there, with a usable state or not.
    """

    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0
    snapshot: Snapshot | None = None
    tail_block: int | None = None
    num_known_tokens: int = 0


NO_MATCH = Match()


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """What of a sequence is to be kept after a step.

    Attributes:
        blocks: those whose numbers nobody has checked yet.
        snapshot: whether its state is wanted, too.
    """

    blocks: list[int]
    snapshot: bool


class PrefixCache:
    """Finds the prefixes that the blocks and the snapshot slots of one engine hold.

    Args:
        blocks: the engine's pool; its keys are this cache's.
        snapshots: slots for states; None for a model without a state.
    """

    def __init__(self, blocks: BlockPool, block_size: int, snapshots: SlotPool | None) -> None:
        self._blocks = blocks
        self._block_size = block_size
        self._slots = snapshots
        self._snapshots: OrderedDict[Snapshot, None] = OrderedDict()  # used longest ago first
        self._at: dict[bytes, list[Snapshot]] = {}  # by `key`, and by `tail_key`
        blocks.on_evict = self._drop_at

    @property
    def num_snapshots(self) -> int:
        """States that are kept."""
        return len(self._snapshots)

    def match(self, sequence: Sequence) -> Match:
        """Return the longest prefix to go on from; at least one token is left to compute."""
        if not sequence.is_cacheable:
            return NO_MATCH
        size = self._block_size
        blocks: list[int] = []
        # A last token is always computed: its logits are what the sequence is for.
        for key in self._keys_of(sequence, (len(sequence.token_ids) - 1) // size):
            block = self._blocks.find(key)
            if block is None:
                break
            blocks.append(block)
        num_known = len(blocks) * size
        if self._slots is None:
            return Match(blocks=blocks, num_tokens=num_known, num_known_tokens=num_known)
        for count in range(len(blocks), -1, -1):
            snapshot = self._longest_at(sequence, count)
            if snapshot is not None:
                tail_key = snapshot.tail_key
                return Match(
                    blocks=blocks[:count],
                    num_tokens=count * size + snapshot.num_tail_tokens,
                    snapshot=snapshot,
                    tail_block=None if tail_key is None else self._blocks.find(tail_key),
                    num_known_tokens=num_known,
                )
        return Match(num_known_tokens=num_known)

    def use(self, sequence: Sequence, match: Match) -> None:
        """Note that a sequence goes on from a match, and choose where its states are kept."""
        num_tokens = match.num_tokens
        sequence.num_kept_blocks = len(match.blocks)
        sequence.kept_at = num_tokens
        sequence.restored = match.snapshot
        if match.snapshot is not None:
            match.snapshot.num_hits += 1
            self._snapshots.move_to_end(match.snapshot)
        if match.tail_block is not None:
            self._blocks.touch(match.tail_block)
        if self._slots is not None and sequence.is_cacheable:
            sequence.cuts = cuts(
                num_tokens, match.num_known_tokens, len(sequence.token_ids), self._block_size
            )

    def is_coming(self, sequence: Sequence, match: Match, running: Iterable[Sequence]) -> bool:
        """Whether to wait with a prompt, since a running one is about to compute much of it."""
        useful = match.num_tokens + MIN_SNAPSHOT_GAIN_TOKENS
        for other, common in self._computing(sequence, running):
            ends = [common] if self._slots is None else other.cuts
            if any(max(useful, other.num_computed + 1) <= end <= common for end in ends):
                return True
        return False

    def mark_partings(self, sequence: Sequence, running: Iterable[Sequence]) -> None:
        """Have running prompts' states kept where a prompt that waits parts from them."""
        if self._slots is None:
            return
        num_tokens = self.match(sequence).num_tokens
        for other, common in self._computing(sequence, running):
            before = max((cut for cut in other.cuts if cut <= common), default=0)
            gain = common - max(num_tokens, before)
            if common > other.num_computed and gain >= MIN_SNAPSHOT_GAIN_TOKENS:
                insort(other.cuts, common)

    def due(self, sequence: Sequence, *, is_leaving: bool = False) -> Due | None:
        """Return what is to be kept of a sequence that has just been computed some way.

        Args:
            is_leaving: it ends here, and its state is wanted wherever it stands.
        """
        if not sequence.is_cacheable:
            return None
        num_full = sequence.num_computed // self._block_size
        snapshot = self._slots is not None and self._slots.num_slots > 0
        if is_leaving:
            snapshot &= sequence.num_computed - sequence.kept_at >= MIN_SNAPSHOT_GAIN_TOKENS
        else:
            snapshot &= sequence.num_computed in sequence.cuts
        if num_full <= sequence.num_kept_blocks and not snapshot:
            return None
        stop = num_full
        if snapshot and sequence.num_computed % self._block_size:
            stop += 1
        return Due(blocks=sequence.blocks[sequence.num_kept_blocks : stop], snapshot=snapshot)

    def keep(self, sequence: Sequence, due: Due) -> int | None:
        """Make what is due findable; return the slot to copy the sequence's state to, if any."""
        num_full = sequence.num_computed // self._block_size
        # Others' blocks that it began from may be gone: then its own take their place.
        first = 0 if due.snapshot else sequence.num_kept_blocks
        keys = self._keys_of(sequence, num_full)
        for idx in range(first, num_full):
            self._blocks.name(sequence.blocks[idx], keys[idx])
        sequence.num_kept_blocks = num_full
        if not due.snapshot:
            return None
        sequence.kept_at = sequence.num_computed
        return self._keep_state(sequence, keys[-1] if keys else _ROOT, num_full)

    def forget(self, sequence: Sequence) -> None:
        """Drop all that a sequence holds: nothing of it is to be found again."""
        for block in sequence.blocks:
            key = self._blocks.forget(block)
            if key is not None:
                self._drop_at(key)
        sequence.is_cacheable = False

    def _keep_state(self, sequence: Sequence, key: bytes, num_full: int) -> int | None:
        assert self._slots is not None
        start, stop = num_full * self._block_size, sequence.num_computed
        tail_key = _key(sequence, key, start, stop) if start < stop else None
        for each in self._at.get(key, ()):
            if each.key == key and each.tail_key == tail_key:
                self._snapshots.move_to_end(each)
                return None
        self._retire(sequence)
        if self._slots.num_free == 0:
            self._drop(next(iter(self._snapshots)))
        if tail_key is not None:
            self._blocks.name(sequence.blocks[num_full], tail_key)
            assert self._blocks.find(tail_key) == sequence.blocks[num_full]
        snapshot = Snapshot(
            key=key, num_tail_tokens=stop - start, tail_key=tail_key, slot=self._slots.allocate()
        )
        self._snapshots[snapshot] = None
        self._at.setdefault(key, []).append(snapshot)
        if tail_key is not None:
            self._at.setdefault(tail_key, []).append(snapshot)
        return snapshot.slot

    def _computing(
        self, sequence: Sequence, running: Iterable[Sequence]
    ) -> Iterator[tuple[Sequence, int]]:
        """Yield the prompts in progress that begin like a sequence, each with how far it does."""
        if not sequence.is_cacheable:
            return
        size = self._block_size
        keys = self._keys_of(sequence, (len(sequence.token_ids) - 1) // size)
        for other in running:
            if other.num_pending > 1 and other.is_cacheable:
                pairs = zip(keys, other.keys, strict=False)
                same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                yield other, same * size

    def _retire(self, sequence: Sequence) -> None:
        """Let the state that a sequence came from go first if one chat alone has used it.

        That chat has moved on from it.
        """
        before, sequence.restored = sequence.restored, None
        if before is not None and before in self._snapshots and before.num_hits == 1:
            self._snapshots.move_to_end(before, last=False)

    def _longest_at(self, sequence: Sequence, count: int) -> Snapshot | None:
        """Return the snapshot after `count` full blocks that reaches furthest."""
        key = sequence.keys[count - 1] if count else _ROOT
        start = count * self._block_size
        here = [each for each in self._at.get(key, ()) if each.key == key]
        for each in sorted(here, key=lambda each: each.num_tail_tokens, reverse=True):
            stop = start + each.num_tail_tokens
            if stop >= len(sequence.token_ids):
                continue
            if each.tail_key is None or each.tail_key == _key(sequence, key, start, stop):
                return each
        return None

    def _keys_of(self, sequence: Sequence, count: int) -> list[bytes]:
        """Return the keys of the first `count` blocks; the sequence remembers them."""
        keys, size = sequence.keys, self._block_size
        for idx in range(len(keys), count):
            before = keys[-1] if keys else _ROOT
            keys.append(_key(sequence, before, idx * size, (idx + 1) * size))
        return keys[:count]

    def _drop_at(self, key: bytes) -> None:
        for each in list(self._at.get(key, ())):
            self._drop(each)

    def _drop(self, snapshot: Snapshot) -> None:
        assert self._slots is not None
        del self._snapshots[snapshot]
        self._slots.release(snapshot.slot)
        for key in (snapshot.key, snapshot.tail_key):
            if key is not None:
                self._at[key].remove(snapshot)
                if not self._at[key]:
                    del self._at[key]
        if snapshot.tail_key is not None:
            block = self._blocks.find(snapshot.tail_key)
            if block is not None:
                self._blocks.forget(block)


def cuts(start: int, known: int, stop: int, block_size: int) -> list[int]:
    """Return the lengths at which the state of a sequence is kept while its prompt is computed.

    These are where it parts from a prompt that came before (others will part from it there,
    too), a few on the way through a long one, and the last end of a block that the next turn
    surely shares.

    Args:
        start: tokens that are computed already.
        known: leading tokens whose K and V another sequence has left.
        stop: tokens of the sequence.
    """
    last = (stop - VOLATILE_TAIL_TOKENS) // block_size * block_size
    ends = {each for each in (known, last) if start + MIN_SNAPSHOT_GAIN_TOKENS <= each <= last}
    interval = max(MIN_INTERVAL_TOKENS, (last - start) // (MAX_INTERVAL_SNAPSHOTS + 1))
    interval = blocks_for(interval, block_size) * block_size
    first = start // block_size * block_size + interval
    on_the_way = {
        each
        for each in range(first, last, interval)
        if all(abs(each - end) >= MIN_SNAPSHOT_GAIN_TOKENS for end in ends)
    }
    return sorted(ends | on_the_way)


def _key(sequence: Sequence, before: bytes, start: int, stop: int) -> bytes:
    """Return the key of a sequence's tokens start to stop, after those that `before` stands for."""
    digest = hashlib.blake2b(before, digest_size=_KEY_BYTES)
    digest.update(array("q", sequence.token_ids[start:stop]).tobytes())
    for image in sequence.images:
        # All tokens of images are the same: what they look like is in the digest alone.
        if image.overlap(start, stop):
            digest.update(array("q", [image.start]).tobytes() + image.digest)
    return digest.digest()
