"""Turns the chunks of a step into the tensors of a `StepBatch`."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortex.neuron.engine.scheduler import Chunk
from cortex.neuron.layers.context import StepBatch


class BatchBuilder:
    """Builds step batches; keeps one block-table row per state slot between the steps.

    Args:
        max_blocks: blocks of the longest sequence there can be.
    """

    def __init__(
        self, *, num_slots: int, max_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self._block_size = block_size
        self._device = device
        self._table = np.full((num_slots, max_blocks), -1, dtype=np.int64)

    def build(self, chunks: list[Chunk]) -> StepBatch:
        """Return the batch of some chunks, at least one.

        The chunks of a single token come first in it; the rows of logits are in the order of
        `chunks`.
        """
        layout = sorted(chunks, key=lambda chunk: chunk.num_tokens > 1)
        sequences = [chunk.sequence for chunk in layout]
        for sequence in sequences:
            if sequence.num_tabled_blocks != len(sequence.blocks):
                row = self._table[sequence.slot]
                start = sequence.num_tabled_blocks
                row[start:] = -1
                row[start : len(sequence.blocks)] = sequence.blocks[start:]
                sequence.num_tabled_blocks = len(sequence.blocks)
        num_blocks = max(len(sequence.blocks) for sequence in sequences)
        query_lens = [chunk.num_tokens for chunk in layout]
        context_lens = [sequence.num_computed for sequence in sequences]
        slots = np.array([sequence.slot for sequence in sequences], dtype=np.int64)
        starts = np.zeros(len(chunks) + 1, dtype=np.int64)
        np.cumsum(query_lens, out=starts[1:])
        num_tokens = int(starts[-1])
        if num_tokens == len(chunks):  # every chunk is one token
            token_ids = [s.token_ids[s.num_computed] for s in sequences]
            positions = np.array(context_lens, dtype=np.int64)
            token_slots = slots
        else:
            token_ids = []
            for chunk in layout:
                start = chunk.sequence.num_computed
                token_ids += chunk.sequence.token_ids[start : start + chunk.num_tokens]
            shift = np.array(context_lens, dtype=np.int64) - starts[:-1]
            positions = np.arange(num_tokens, dtype=np.int64) + np.repeat(shift, query_lens)
            token_slots = np.repeat(slots, query_lens)
        blocks = self._table[token_slots, positions // self._block_size]
        ends = {chunk.sequence: end for chunk, end in zip(layout, starts[1:].tolist(), strict=True)}
        logit_rows = [ends[chunk.sequence] - 1 for chunk in chunks if chunk.is_last]
        image_rows, image_embeddings = self._images(layout)
        return StepBatch(
            token_ids=self._tensor(np.array(token_ids, dtype=np.int64)),
            positions=self._tensor(_places(layout, positions)),
            query_lens=tuple(query_lens),
            context_lens=tuple(context_lens),
            query_starts=self._tensor(starts),
            kv_slots=self._tensor(blocks * self._block_size + positions % self._block_size),
            block_tables=self._tensor(self._table[slots, :num_blocks]),
            state_slots=self._tensor(slots),
            fresh_slots=tuple(s.slot for s in sequences if s.num_computed == 0),
            logit_rows=self._tensor(np.array(logit_rows, dtype=np.int64)),
            image_rows=image_rows,
            image_embeddings=image_embeddings,
        )

    def _images(self, layout: list[Chunk]) -> tuple[Tensor | None, Tensor | None]:
        """Return which rows are tokens of images, and those images' embeddings of them."""
        rows: list[NDArray[np.int64]] = []
        embeddings: list[Tensor] = []
        row = 0
        for chunk in layout:
            start = chunk.sequence.num_computed
            for image in chunk.sequence.images:
                part = image.overlap(start, start + chunk.num_tokens)
                if part is not None:
                    assert image.embeddings is not None, "nobody has looked at the image"
                    rows.append(row + np.arange(part[0] - start, part[1] - start))
                    embeddings.append(
                        image.embeddings[part[0] - image.start : part[1] - image.start]
                    )
            row += chunk.num_tokens
        if not rows:
            return None, None
        return self._tensor(np.concatenate(rows)), torch.cat(embeddings)

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device)


def _places(layout: list[Chunk], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what tokens turn by: their indices, or three rows where a sequence has images."""
    if not any(chunk.sequence.images for chunk in layout):
        return positions
    places = np.tile(positions, (3, 1))
    row = 0
    for chunk in layout:
        if chunk.sequence.images:
            places[:, row : row + chunk.num_tokens] = chunk.sequence.places(chunk.num_tokens)
        row += chunk.num_tokens
    return places
