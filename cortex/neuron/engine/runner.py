"""Runs a step's chunks on the device: forward pass, constraints, sampling."""

import logging

import torch
from torch import Tensor

from cortex.neuron.engine.batch import BatchBuilder
from cortex.neuron.engine.cache import blocks_for
from cortex.neuron.engine.constraint import ConstraintState, apply_masks
from cortex.neuron.engine.images import CHANNELS
from cortex.neuron.engine.sampler import Sampled, edit_logits, keep_raw, sample
from cortex.neuron.engine.scheduler import Chunk
from cortex.neuron.engine.sequence import Sequence
from cortex.neuron.layers.context import Caches, StepBatch
from cortex.neuron.models.base import CausalLM

_log = logging.getLogger(__name__)


class Runner:
    """A model with its caches.

    Args:
        max_len: tokens of the longest sequence there can be.
        num_snapshots: the last so many state slots hold what the prefix cache keeps.
    """

    def __init__(
        self, model: CausalLM, caches: Caches, *, max_len: int, num_snapshots: int = 0
    ) -> None:
        self.model = model
        self.device = model.device
        self.block_size = caches.keys.shape[2]
        self.num_blocks = caches.keys.shape[1]
        self.num_slots = caches.conv_states.shape[1] - num_snapshots
        self._caches = caches
        self._builder = BatchBuilder(
            num_slots=self.num_slots,
            # A sequence about to be sampled from holds the block of its next token already.
            max_blocks=blocks_for(max_len + 1, self.block_size),
            block_size=self.block_size,
            device=model.device,
        )

    @torch.inference_mode()
    def restore(self, chunks: list[Chunk]) -> None:
        """Copy what chunks go on from, in their order; before `step`, and before any `scrub`."""
        for chunk in chunks:
            restore = chunk.restore
            if restore is None:
                continue
            self._copy_state(self.num_slots + restore.snapshot_slot, chunk.sequence.slot)
            if restore.blocks is not None:
                source, target = restore.blocks
                self._caches.keys[:, target] = self._caches.keys[:, source]
                self._caches.values[:, target] = self._caches.values[:, source]

    @torch.inference_mode()
    def look(self, chunk: Chunk) -> None:
        """Compute what `step` needs of the images that a chunk has tokens of."""
        start = chunk.sequence.num_computed
        for image in chunk.sequence.images:
            if image.overlap(start, start + chunk.num_tokens):
                assert self.model.vision is not None
                image.look(self.model.vision)

    @torch.inference_mode()
    def step(self, chunks: list[Chunk]) -> Sampled | None:
        """Compute some chunks; return one draw per chunk that is its sequence's last, in order.

        None if no chunk is. The sequences themselves are not changed, but for their generators.
        """
        batch = self._builder.build(chunks)
        logits = self.model.forward(batch, self._caches)
        for chunk in chunks:
            for image in chunk.sequence.images:
                if image.stop <= chunk.sequence.num_computed + chunk.num_tokens:
                    image.embeddings = None
        sequences = [chunk.sequence for chunk in chunks if chunk.is_last]
        return self._sample(logits, sequences) if sequences else None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run a prefill and a decode token through block 0 and slot 0, and an image of one token.

        First use costs, and no request should pay for it.

        What they leave there does no harm: a sequence reads only positions it has written.
        """
        for context_len, num_tokens in ((0, min(4, self.block_size)), (0, 1)):
            index = torch.arange(context_len, context_len + num_tokens, device=self.device)
            zero = torch.zeros(1, dtype=torch.int64, device=self.device)
            batch = StepBatch(
                token_ids=torch.zeros_like(index),
                positions=index,
                query_lens=(num_tokens,),
                context_lens=(context_len,),
                query_starts=torch.tensor([0, num_tokens], device=self.device),
                kv_slots=index,
                block_tables=zero[None],
                state_slots=zero,
                fresh_slots=(0,),
                logit_rows=torch.tensor([num_tokens - 1], device=self.device),
            )
            self.model.forward(batch, self._caches).max(dim=-1)
        vision = self.model.vision
        if vision is not None:
            side = vision.token_side
            vision(torch.zeros(side, side, CHANNELS, dtype=torch.uint8))

    @torch.inference_mode()
    def scrub(self, sequence: Sequence, own_blocks: list[int]) -> None:
        """Zero what a sequence alone holds: a NaN left in a block would reach its next holder,

        because attention weights of zero do not cancel it. Blocks that it shares are finite.
        """
        blocks = self._index(own_blocks)
        self._caches.keys[:, blocks] = 0
        self._caches.values[:, blocks] = 0
        self._caches.conv_states[:, sequence.slot] = 0
        self._caches.recurrent_states[:, sequence.slot] = 0

    @torch.inference_mode()
    def is_finite(self, blocks: list[int], slot: int | None) -> bool:
        """Whether some blocks, and a slot's state, hold nothing but numbers."""
        parts: list[Tensor] = []
        if blocks:
            index = self._index(blocks)
            parts += [self._caches.keys[:, index], self._caches.values[:, index]]
        if slot is not None:
            parts += [self._caches.conv_states[:, slot], self._caches.recurrent_states[:, slot]]
        return all(bool(part.isfinite().all()) for part in parts)

    @torch.inference_mode()
    def keep_state(self, slot: int, snapshot_slot: int) -> None:
        """Copy a slot's state to where the prefix cache keeps it."""
        self._copy_state(slot, self.num_slots + snapshot_slot)

    def is_healthy(self) -> bool:
        """Whether the device still computes; after a device-side fault it never does again."""
        if self.device.type == "cpu":
            return True
        try:
            torch.cuda.empty_cache()
            return int(torch.ones(2, device=self.device).sum().item()) == 2
        except RuntimeError:
            _log.exception("device %s is lost", self.device)
            return False

    def _copy_state(self, source: int, target: int) -> None:
        self._caches.conv_states[:, target] = self._caches.conv_states[:, source]
        self._caches.recurrent_states[:, target] = self._caches.recurrent_states[:, source]

    def _index(self, blocks: list[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self.device)

    def _sample(self, logits: Tensor, sequences: list[Sequence]) -> Sampled:
        states = [sequence.sampling for sequence in sequences]
        constrained: list[tuple[int, ConstraintState]] = [
            (row, sequence.constraint)
            for row, sequence in enumerate(sequences)
            if sequence.constraint is not None and sequence.constraint.is_active
        ]
        if not constrained and all(state.is_simple for state in states):
            return sample(logits, states)
        raw = keep_raw(logits, states)
        edit_logits(logits, states)
        if constrained:
            rows, constraints = zip(*constrained, strict=True)
            apply_masks(logits, list(rows), list(constraints))
        return sample(logits, states, raw)
