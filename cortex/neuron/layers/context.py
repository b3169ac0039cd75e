"""What one forward pass is given besides weights: the step's flat tokens and the caches.

All sequences of a step lie side by side in one token dimension; a sequence's tokens are a
prefill chunk or, in decode, a single token. Those that bring a single token come first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """One step's input; N tokens of S sequences.

    Attributes:
        token_ids: (N,) int64.
        positions: (N,) int64, each token's place in its sequence for the rotation; (3, N), its
            time, row and column, where a sequence of the step has images.
        query_lens: tokens of each sequence in this step, at least 1 each; sums to N. The ones
            come first.
        context_lens: tokens of each sequence already in the caches before this step.
        query_starts: (S + 1,) int64, offsets of the sequences in the token dimension.
        kv_slots: (N,) int64, where each token's K and V go: block * block_size + offset.
        block_tables: (S, max_blocks) int64, KV blocks of each sequence in order, -1 padded.
        state_slots: (S,) int64, GDN state slot of each sequence; -1 is padding.
        fresh_slots: the slots among them whose sequence begins in this step, and so from a zero
            state whatever they hold.
        logit_rows: (L,) int64, rows of the token dimension whose logits are wanted.
        image_rows: (M,) int64, rows that are tokens of images; None without any.
        image_embeddings: (M, hidden), what stands in those rows for a token's embedding.
    """

    token_ids: Tensor
    positions: Tensor
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    query_starts: Tensor
    kv_slots: Tensor
    block_tables: Tensor
    state_slots: Tensor
    fresh_slots: tuple[int, ...]
    logit_rows: Tensor
    image_rows: Tensor | None = None
    image_embeddings: Tensor | None = None

    @property
    def is_decode(self) -> bool:
        """Whether every sequence contributes exactly one token."""
        return len(self.query_lens) == self.token_ids.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """Shapes of what a model keeps per token (KV) and per sequence (GDN state)."""

    num_kv_layers: int
    num_kv_heads: int
    kv_head_dim: int
    num_gdn_layers: int = 0
    gdn_value_heads: int = 0
    gdn_key_dim: int = 0
    gdn_value_dim: int = 0
    conv_dim: int = 0
    conv_width: int = 0

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of K and V that one token adds over all layers."""
        return 2 * self.num_kv_layers * self.num_kv_heads * self.kv_head_dim * dtype.itemsize

    def state_bytes_per_slot(self, dtype: torch.dtype) -> int:
        """Bytes of conv window (in `dtype`) and recurrent state (float32) of one sequence."""
        recurrent = self.gdn_value_heads * self.gdn_value_dim * self.gdn_key_dim * 4
        window = max(self.conv_width - 1, 0) * self.conv_dim * dtype.itemsize
        return self.num_gdn_layers * (recurrent + window)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caches:
    """Device memory that outlives a step; layers update it in place.

    Attributes:
        keys, values: (kv_layers, blocks, block_size, kv_heads, head_dim) in the model's dtype.
        conv_states: (gdn_layers, slots, conv_width - 1, conv_dim), the last inputs, oldest first.
        recurrent_states: (gdn_layers, slots, value_heads, value_dim, key_dim) float32.
    """

    keys: Tensor
    values: Tensor
    conv_states: Tensor
    recurrent_states: Tensor

    @classmethod
    def allocate(
        cls,
        spec: CacheSpec,
        *,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Caches":
        """Return zeroed caches of the given size."""
        kv_shape = (spec.num_kv_layers, num_blocks, block_size, spec.num_kv_heads, spec.kv_head_dim)
        conv_shape = (spec.num_gdn_layers, num_slots, max(spec.conv_width - 1, 0), spec.conv_dim)
        state_shape = (
            spec.num_gdn_layers,
            num_slots,
            spec.gdn_value_heads,
            spec.gdn_value_dim,
            spec.gdn_key_dim,
        )
        return cls(
            keys=torch.zeros(kv_shape, dtype=dtype, device=device),
            values=torch.zeros(kv_shape, dtype=dtype, device=device),
            conv_states=torch.zeros(conv_shape, dtype=dtype, device=device),
            recurrent_states=torch.zeros(state_shape, dtype=torch.float32, device=device),
        )
