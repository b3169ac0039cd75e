"""What the engine knows of a model, and what a model's builder knows of a checkpoint's weights."""

from typing import Protocol

import torch
from torch import Tensor

from cortex.neuron.layers.context import Caches, CacheSpec, StepBatch


class Vision(Protocol):
    """What turns images into tokens.

    Attributes:
        token_side: pixels that one token covers each way.
        image_token_id: stands in a prompt for each of an image's tokens.
    """

    token_side: int
    image_token_id: int

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map (height, width, 3) uint8 to (tokens, hidden), row by row.

        Both sides are multiples of `token_side`. The caller sets inference mode.
        """


class CausalLM(Protocol):
    """A loaded model.

    Attributes:
        cache_spec: shapes of the caches that `forward` needs.
        dtype, device: of weights and activations; of the KV cache too.
        weight_bytes: device memory held by weights.
        vision: None for a model that reads text only.
    """

    cache_spec: CacheSpec
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    max_position_embeddings: int
    weight_bytes: int
    vision: Vision | None

    def forward(self, batch: StepBatch, caches: Caches) -> Tensor:
        """Run one step and return the logits of `batch.logit_rows`, (L, vocab_size) float32.

        The caches are updated in place. The caller sets inference mode.
        """

    def encode(self, batch: StepBatch, caches: Caches) -> Tensor:
        """Do the same and return the last hidden states of those rows, normed, (L, hidden)."""


class WeightSource(Protocol):
    """A checkpoint's tensors under Hugging Face's names, without their `model.` prefix."""

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has this tensor."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read one tensor into host memory, in the checkpoint's floating-point type.

        Raises:
            CheckpointError: it is missing, of another shape or unreadable.
        """

    @property
    def dtype(self) -> torch.dtype:
        """The type most of the checkpoint's weights are best computed in."""
