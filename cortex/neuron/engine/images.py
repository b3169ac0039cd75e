"""Images in a sequence: where their tokens stand, and what positions tokens have because of them.

A text token's position is one number. The tokens of an image share a time and differ by row and
column, so the text after an image goes on from its longer side and not from its token count.
"""

from collections.abc import Sequence as Many

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortex.neuron.engine.protocol import ImageSpan, Submit
from cortex.neuron.models.base import Vision

CHANNELS = 3


class SequenceImage:
    """One image of a sequence.

    Attributes:
        start, stop: its tokens' indices.
        rows, columns: of its tokens.
        digest: the same for the same image, and for no other one.
        embeddings: (tokens, hidden) while its tokens are computed, else None.
    """

    __slots__ = ("columns", "digest", "embeddings", "pixels", "rows", "size", "start", "stop")

    def __init__(self, span: ImageSpan, pixels: bytes, token_side: int) -> None:
        self.start = span.start
        self.rows, self.columns = span.height // token_side, span.width // token_side
        self.stop = span.start + self.rows * self.columns
        self.digest = span.digest
        self.size = (span.height, span.width)
        self.pixels = pixels
        self.embeddings: Tensor | None = None

    @property
    def position_span(self) -> int:
        """How far the positions of the text after it have gone on."""
        return max(self.rows, self.columns)

    def look(self, vision: Vision) -> None:
        """Compute the embeddings, unless they are there."""
        if self.embeddings is None:
            # A copy, since torch wants memory that it may write to.
            flat = torch.frombuffer(bytearray(self.pixels), dtype=torch.uint8)
            self.embeddings = vision(flat.view(*self.size, CHANNELS))

    def overlap(self, start: int, stop: int) -> tuple[int, int] | None:
        """Return which of its tokens are among the sequence's tokens start to stop, if any."""
        first, last = max(start, self.start), min(stop, self.stop)
        return (first, last) if first < last else None


def image_problem(submit: Submit, pixels: Many[bytes], vision: Vision | None) -> str | None:
    """Say why a request's images can never be served, if so."""
    if len(pixels) != len(submit.images):
        return f"the prompt has {len(submit.images)} images, the pixels of {len(pixels)} came"
    if not submit.images:
        return None
    if vision is None:
        return "the model reads text only"
    side, end = vision.token_side, 0
    for at, (span, data) in enumerate(zip(submit.images, pixels, strict=True)):
        if min(span.height, span.width) < side or span.height % side or span.width % side:
            return f"image {at}: {span.width} x {span.height} pixels are no multiples of {side}"
        if len(data) != span.height * span.width * CHANNELS:
            return f"image {at}: {len(data)} bytes are not its pixels"
        stop = span.start + (span.height // side) * (span.width // side)
        tokens = submit.prompt_ids[span.start : stop]
        if span.start < end or set(tokens) != {vision.image_token_id}:
            return f"image {at}: the prompt has no place for it"
        if len(tokens) < stop - span.start:
            return f"image {at}: the prompt ends within it"
        end = stop
    return None


def place_tokens(num_tokens: int, images: Many[SequenceImage]) -> NDArray[np.int64]:
    """Return (3, num_tokens): each token's time, row and column.

    `num_tokens` are those of the prompt; later ones have index + `position_shift` three times.
    """
    places = np.empty((3, num_tokens), dtype=np.int64)
    at = position = 0
    for image in images:
        length = image.start - at
        places[:, at : image.start] = position + np.arange(length)
        position += length
        tokens = places[:, image.start : image.stop]
        tokens[0] = position
        tokens[1] = position + np.repeat(np.arange(image.rows), image.columns)
        tokens[2] = position + np.tile(np.arange(image.columns), image.rows)
        position += image.position_span
        at = image.stop
    places[:, at:] = position + np.arange(num_tokens - at)
    return places


def position_shift(images: Many[SequenceImage]) -> int:
    """Return what the position of a token after all images differs by from its index."""
    return sum(image.position_span - (image.stop - image.start) for image in images)
