"""A model of an engine: what a batch costs, what fits in its cache, what is found there again.

Prompts are bytes; a token is TOKEN_BYTES of them. Steps take the time that the spec says, all
sequences of a batch advance together, and prefill is cut into chunks that share the steps.
"""

import asyncio
import hashlib
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import msgspec

TOKEN_BYTES = 4


class EngineSpec(msgspec.Struct, kw_only=True, frozen=True):
    """What an engine can do.

    Attributes:
        step_s: what a step costs before its first sequence, `step_per_seq_s` for each of them.
        snapshot_tokens: how far a hybrid's state snapshots lie apart; None: any block can be
            continued from.
    """

    prefill_tok_s: float = 8000.0
    step_s: float = 0.006
    step_per_seq_s: float = 0.00035
    max_batched_tokens: int = 2048
    max_num_seqs: int = 32
    max_queue_depth: int = 64
    num_blocks: int = 4096
    block_tokens: int = 32
    snapshot_tokens: int | None = None
    max_snapshots: int = 256
    max_tokens: int = 64


class Timebase:
    """Seconds of the model, each of which takes `scale` real ones."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def now_s(self) -> float:
        """Return the model's monotonic time."""
        return asyncio.get_running_loop().time() / self.scale

    async def sleep_until(self, when_s: float) -> None:
        """Sleep until a time of the model."""
        await asyncio.sleep(max(0.0, when_s - self.now_s()) * self.scale)

    async def sleep(self, seconds: float) -> None:
        """Sleep for a time of the model."""
        await asyncio.sleep(seconds * self.scale)


def block_chain(text: bytes, block_tokens: int) -> list[bytes]:
    """Return the hashes of a text's full blocks, each over everything before it."""
    size = block_tokens * TOKEN_BYTES
    chain: list[bytes] = []
    parent = b""
    for start in range(0, len(text) - size + 1, size):
        parent = hashlib.blake2b(parent + text[start : start + size], digest_size=8).digest()
        chain.append(parent)
    return chain


def num_tokens(text: bytes) -> int:
    """Return how many tokens a text has."""
    return -(-len(text) // TOKEN_BYTES)


class EngineDied(Exception):  # noqa: N818  an event of the model, not an error of the mock
    """The engine ended with requests in hand."""


class QueueFull(Exception):  # noqa: N818  a refusal
    """Too many wait already."""


@dataclass(eq=False)
class _Sequence:
    """A request in the engine; `reserved` and `shared` blocks are what it holds."""

    text: bytes
    prompt: int
    chain: list[bytes]
    max_tokens: int
    blocks: int
    reserved: int = 0
    cached: int = 0
    prefilled: int = 0
    generated: int = 0
    shared: list[bytes] = field(default_factory=list)
    out: "asyncio.Queue[str | tuple[int, int] | EngineDied | None]" = field(
        default_factory=asyncio.Queue
    )


class PrefixCache:
    """Blocks of past prompts by hash, the longest unused given up first; bounded by `capacity`.

    A hybrid continues only where it has a snapshot of its state.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.capacity = spec.num_blocks
        self.reserved = 0
        self._spec = spec
        self._blocks: OrderedDict[bytes, int] = OrderedDict()
        self._snapshots: OrderedDict[bytes, None] = OrderedDict()
        self._pinned = 0

    @property
    def free_blocks(self) -> int:
        """Blocks that a new sequence could have, idle cached ones among them."""
        return self.capacity - self.reserved - self._pinned

    @property
    def hashes(self) -> list[bytes]:
        """What is cached and can be continued from, the longest unused first."""
        if self._spec.snapshot_tokens is None:
            return list(self._blocks)
        return [each for each in self._snapshots if each in self._blocks]

    def match(self, chain: Sequence[bytes]) -> list[bytes]:
        """Return the longest cached start of a chain that can be continued from."""
        found = 0
        for each in chain:
            if each not in self._blocks:
                break
            found += 1
        if self._spec.snapshot_tokens is not None:
            while found and chain[found - 1] not in self._snapshots:
                found -= 1
        return list(chain[:found])

    def hold(self, hashes: Sequence[bytes]) -> None:
        """Keep cached blocks while a sequence uses them."""
        for each in hashes:
            if self._blocks[each] == 0:
                self._pinned += 1
            self._blocks[each] += 1
            self._blocks.move_to_end(each)
            if each in self._snapshots:
                self._snapshots.move_to_end(each)

    def drop(self, hashes: Sequence[bytes]) -> None:
        """Let them go; they stay until room is needed."""
        for each in hashes:
            self._blocks[each] -= 1
            if self._blocks[each] == 0:
                self._pinned -= 1

    def reserve(self, blocks: int) -> bool:
        """Take room for a sequence, giving up idle blocks; False if there is none."""
        if blocks > self.free_blocks:
            return False
        self.reserved += blocks
        self._shrink()
        return True

    def store(self, chain: Sequence[bytes], prompt_blocks: int) -> None:
        """Remember computed blocks, and snapshots where a hybrid takes them."""
        every = self._spec.snapshot_tokens
        for at, each in enumerate(chain, 1):
            self._blocks.setdefault(each, 0)
            self._blocks.move_to_end(each)
            if every is not None and (
                at in (prompt_blocks, len(chain)) or at * self._spec.block_tokens % every == 0
            ):
                self._snapshots[each] = None
                self._snapshots.move_to_end(each)
        while len(self._snapshots) > self._spec.max_snapshots:
            self._snapshots.popitem(last=False)

    def release(self, blocks: int) -> None:
        """Give reserved room back."""
        self.reserved -= blocks
        self._shrink()

    def _shrink(self) -> None:
        excess = len(self._blocks) + self.reserved - self.capacity
        if excess <= 0:
            return
        idle = [each for each, refs in self._blocks.items() if refs == 0]
        for each in idle[:excess]:
            del self._blocks[each]
            self._snapshots.pop(each, None)


class Engine:
    """One loaded model at work. `run` is its step loop; `generate` asks it for an answer.

    Attributes:
        slow: what every step is multiplied with.
        hung: set, it stops before its next step.
        cached_tokens: prompt tokens that were found in the cache, of `prompt_tokens`.
    """

    def __init__(self, spec: EngineSpec, time: Timebase) -> None:
        self.spec = spec
        self.cache = PrefixCache(spec)
        self.slow = 1.0
        self.hung = asyncio.Event()
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.rejected = 0
        self.steps = 0
        self._time = time
        self._queue: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._work = asyncio.Event()
        self._dead = False

    @property
    def in_flight(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def queue_depth(self) -> int:
        """Sequences that wait for a place in it."""
        return len(self._queue)

    async def generate(
        self, text: bytes, max_tokens: int
    ) -> AsyncGenerator[str | tuple[int, int], None]:
        """Yield (prompt tokens, cached ones) once a place is found, then token by token.

        Raises:
            QueueFull: at once.
            EngineDied: at any time.
        """
        if self._dead:
            raise EngineDied
        size = self.spec.block_tokens
        prompt = num_tokens(text)
        total = prompt + max_tokens
        sequence = _Sequence(
            text=text,
            prompt=prompt,
            chain=block_chain(text, size),
            max_tokens=max_tokens,
            blocks=-(-total // size),
        )
        if len(self._queue) >= self.spec.max_queue_depth or (sequence.blocks > self.cache.capacity):
            self.rejected += 1
            raise QueueFull
        self._queue.append(sequence)
        self._work.set()
        try:
            while (token := await sequence.out.get()) is not None:
                if isinstance(token, EngineDied):
                    raise token
                yield token
        finally:
            self._remove(sequence)

    def die(self) -> None:
        """End with everything that is in hand."""
        self._dead = True
        for each in [*self._queue, *self._running]:
            each.out.put_nowait(EngineDied())

    async def run(self) -> None:
        """Step while there is work, until cancelled."""
        ready_s = 0.0
        while True:
            self._admit()
            if not self._running:
                self._work.clear()
                await self._work.wait()
                ready_s = self._time.now_s()
                continue
            decoding = [each for each in self._running if each.prefilled >= each.prompt]
            prefilled = self._prefill(self.spec.max_batched_tokens - len(decoding))
            step_s = self.spec.step_s + self.spec.step_per_seq_s * len(decoding)
            ready_s = max(ready_s, self._time.now_s() - step_s)
            ready_s += (step_s + prefilled / self.spec.prefill_tok_s) * self.slow
            await self._time.sleep_until(ready_s)
            if self.hung.is_set():
                await asyncio.Event().wait()
            self.steps += 1
            for each in list(self._running):
                if each.prefilled >= each.prompt:
                    self._advance(each)

    def _admit(self) -> None:
        while self._queue and len(self._running) < self.spec.max_num_seqs:
            sequence = self._queue[0]
            found = self.cache.match(sequence.chain)
            # The last token of a prompt is always computed: it makes the first of the answer.
            size = self.spec.block_tokens
            if len(found) * size >= sequence.prompt:
                found = self.cache.match(sequence.chain[:-1])
            self.cache.hold(found)
            if not self.cache.reserve(sequence.blocks - len(found)):
                self.cache.drop(found)
                return
            self._queue.popleft()
            sequence.reserved = sequence.blocks - len(found)
            sequence.shared = found
            sequence.cached = sequence.prefilled = len(found) * size
            self.prompt_tokens += sequence.prompt
            self.cached_tokens += sequence.cached
            self._running.append(sequence)
            sequence.out.put_nowait((sequence.prompt, sequence.cached))

    def _prefill(self, budget: int) -> int:
        done = 0
        for each in self._running:
            part = min(each.prompt - each.prefilled, budget - done)
            if part > 0:
                each.prefilled += part
                done += part
        return done

    def _advance(self, sequence: _Sequence) -> None:
        if not sequence.generated:
            self._share(sequence)
        sequence.generated += 1
        token = f" {sequence.generated % 1000:03d}"
        sequence.text += token.encode()
        sequence.out.put_nowait(token)
        if sequence.generated >= sequence.max_tokens:
            sequence.out.put_nowait(None)
            self._remove(sequence)

    def _share(self, sequence: _Sequence) -> None:
        """Let others use a prompt's blocks as soon as they are computed."""
        cache, mine = self.cache, sequence.chain
        cache.store(mine, len(mine))
        cache.hold(mine)
        cache.drop(sequence.shared)
        cache.release(len(mine) - len(sequence.shared))
        sequence.reserved -= len(mine) - len(sequence.shared)
        sequence.shared = mine

    def _remove(self, sequence: _Sequence) -> None:
        if sequence in self._queue:
            self._queue.remove(sequence)
        elif sequence in self._running:
            self._running.remove(sequence)
            if sequence.generated:
                chain = block_chain(sequence.text, self.spec.block_tokens)
                self.cache.store(chain, len(sequence.chain))
            self.cache.drop(sequence.shared)
            self.cache.release(sequence.reserved)
        else:
            return
        self._work.set()
