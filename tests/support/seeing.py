"""Runs sequences with images through a model as the engine does, and keeps all logits."""

import hashlib
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cortex.neuron.engine.batch import BatchBuilder
from cortex.neuron.engine.images import SequenceImage, image_problem
from cortex.neuron.engine.protocol import ImageSpan, Sampling, Submit
from cortex.neuron.engine.sampler import SamplingState
from cortex.neuron.engine.scheduler import Chunk
from cortex.neuron.engine.sequence import Sequence
from cortex.neuron.layers.context import Caches
from tests.support.checkpoints import IMAGE_TOKEN_ID

BLOCK_SIZE = 16
TOKEN_SIDE = 8

Piece = int | Tensor


def picture(height: int, width: int, seed: int = 3) -> Tensor:
    """Return noise, (height, width, 3) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)


def words(count: int, seed: int = 1) -> list[int]:
    """Return random tokens, none of which stands for an image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, IMAGE_TOKEN_ID, (count,), generator=generator).tolist()


def submit_of(
    pieces: Many[Piece], request_id: int = 1, **fields: Any
) -> tuple[Submit, list[bytes]]:
    """Return a prompt of tokens and images as the neuron would send it."""
    ids: list[int] = []
    spans: list[ImageSpan] = []
    pixels: list[bytes] = []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
            continue
        height, width = piece.shape[:2]
        data = piece.numpy().tobytes()
        digest = hashlib.sha256(data + bytes([height, width])).digest()
        spans.append(ImageSpan(start=len(ids), width=width, height=height, digest=digest))
        pixels.append(data)
        ids += [IMAGE_TOKEN_ID] * (height // TOKEN_SIDE * (width // TOKEN_SIDE))
    options = {"max_tokens": 100, **fields}
    return Submit(request_id=request_id, prompt_ids=ids, images=spans, **options), pixels


class Seeing:
    """A model with caches and sequences that are stepped by hand."""

    def __init__(self, model: Any, *, num_blocks: int = 64, num_slots: int = 4) -> None:
        self.model = model
        scattered = [*range(1, num_blocks, 2), *range(0, num_blocks, 2)]
        self._free_blocks = scattered
        self._free_slots = list(range(num_slots))
        self._builder = BatchBuilder(
            num_slots=num_slots, max_blocks=num_blocks, block_size=BLOCK_SIZE, device=model.device
        )
        self._caches = Caches.allocate(
            model.cache_spec,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            num_slots=num_slots,
            dtype=model.dtype,
            device=model.device,
        )

    def sequence(self, pieces: Many[Piece]) -> Sequence:
        """Return a sequence that holds a slot and all the blocks it will need."""
        submit, pixels = submit_of(pieces)
        assert image_problem(submit, pixels, self.model.vision) is None
        sampling = SamplingState(
            Sampling(), prompt_ids=[], vocab_size=self.model.vocab_size, device=self.model.device
        )
        sequence = Sequence(
            submit,
            max_model_len=10_000,
            sampling=sampling,
            images=[
                SequenceImage(span, data, TOKEN_SIDE)
                for span, data in zip(submit.images, pixels, strict=True)
            ],
        )
        sequence.slot = self._free_slots.pop()
        needed = -(-(len(submit.prompt_ids) + 80) // BLOCK_SIZE)
        sequence.blocks = [self._free_blocks.pop() for _ in range(needed)]
        return sequence

    @torch.inference_mode()
    def step(self, *work: tuple[Sequence, int]) -> list[Tensor]:
        """Compute the next tokens of some sequences; return the logits of each token of each."""
        chunks = [Chunk(sequence, count) for sequence, count in work]
        for chunk in chunks:
            start = chunk.sequence.num_computed
            for image in chunk.sequence.images:
                if image.overlap(start, start + chunk.num_tokens):
                    image.look(self.model.vision)
        batch = self._builder.build(chunks)
        rows = torch.arange(len(batch.token_ids), device=self.model.device)
        logits = self.model.forward(replace(batch, logit_rows=rows), self._caches)
        layout = sorted(chunks, key=lambda chunk: chunk.num_tokens > 1)
        parts = dict(zip(layout, logits.split([c.num_tokens for c in layout]), strict=True))
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
        return [parts[chunk] for chunk in chunks]
