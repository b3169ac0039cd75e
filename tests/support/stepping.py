"""Runs sequences through a model the way the engine does, with blocks scattered on purpose."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cortex.neuron.layers.context import Caches, StepBatch
from cortex.neuron.models.base import CausalLM


@dataclass
class Sequence:
    """One sequence's place in the caches."""

    slot: int
    length: int = 0
    blocks: list[int] = field(default_factory=list)


class Stepper:
    """A model with caches; blocks are scattered, or one after the other when `in_a_row`."""

    def __init__(
        self,
        model: CausalLM,
        *,
        num_blocks: int = 64,
        block_size: int = 16,
        num_slots: int = 8,
        in_a_row: bool = False,
    ) -> None:
        self.model = model
        self.block_size = block_size
        scattered = [*range(1, num_blocks, 2), *range(0, num_blocks, 2)]
        self.free = list(reversed(range(num_blocks))) if in_a_row else scattered
        self.caches = Caches.allocate(
            model.cache_spec,
            num_blocks=num_blocks,
            block_size=block_size,
            num_slots=num_slots,
            dtype=model.dtype,
            device=model.device,
        )

    def step(self, *work: tuple[Sequence, list[int]], last_only: bool = False) -> list[Tensor]:
        """Run one step and return each sequence's logits, (tokens or 1, vocab_size)."""
        for sequence, tokens in work:
            needed = -(-(sequence.length + len(tokens)) // self.block_size)
            while len(sequence.blocks) < needed:
                sequence.blocks.append(self.free.pop())
        # Single tokens come first in a batch.
        order = sorted(range(len(work)), key=lambda i: len(work[i][1]) > 1)
        batched = tuple(work[i] for i in order)
        with torch.inference_mode():
            batch = self._batch(batched, last_only=last_only)
            logits = self.model.forward(batch, self.caches).cpu()
        for sequence, tokens in work:
            sequence.length += len(tokens)
        parts = logits.split([1 if last_only else len(tokens) for _, tokens in batched])
        return [parts[order.index(i)] for i in range(len(work))]

    def release(self, sequence: Sequence) -> None:
        """Give a sequence's blocks back; what they hold stays as it is."""
        self.free.extend(sequence.blocks)

    def _batch(self, work: tuple[tuple[Sequence, list[int]], ...], *, last_only: bool) -> StepBatch:
        positions, kv_slots, ends = [], [], []
        widest = max(len(sequence.blocks) for sequence, _ in work) + 1
        for sequence, tokens in work:
            own = range(sequence.length, sequence.length + len(tokens))
            positions += own
            kv_slots += [
                sequence.blocks[i // self.block_size] * self.block_size + i % self.block_size
                for i in own
            ]
            ends.append(len(positions))
        tables = [s.blocks + [-1] * (widest - len(s.blocks)) for s, _ in work]
        rows = [end - 1 for end in ends] if last_only else list(range(len(positions)))

        def on_device(values: list[Any]) -> Tensor:
            return torch.tensor(values, device=self.model.device)

        return StepBatch(
            token_ids=on_device([token for _, tokens in work for token in tokens]),
            positions=on_device(positions),
            query_lens=tuple(len(tokens) for _, tokens in work),
            context_lens=tuple(sequence.length for sequence, _ in work),
            query_starts=on_device([0, *ends]),
            kv_slots=on_device(kv_slots),
            block_tables=on_device(tables),
            state_slots=on_device([sequence.slot for sequence, _ in work]),
            fresh_slots=tuple(s.slot for s, _ in work if s.length == 0 and s.slot >= 0),
            logit_rows=on_device(rows),
        )
