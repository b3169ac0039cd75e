"""The Gated DeltaNet operators as layers call them: on pools of states, by slot, in place.

One function per operator. Each takes its rows' states out of the pool, runs the implementation
that serves the tensors' device and puts the new states back.
"""

import torch
from torch import Tensor

from cortex.neuron.kernels import gdn_reference

Slots = Tensor | slice


def gated_delta_rule_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, pool: Tensor, slots: Slots
) -> Tensor:
    """Apply the gated delta rule token by token; the rows' states in the pool are updated.

    Args:
        q, k, v, g, beta: float32, shapes as in `gdn_reference.gated_delta_rule_recurrence`.
        pool: (slots, v_heads, v_dim, k_dim) float32.
        slots: the slot of each batch row, (batch,) int64 or an ascending run of slots.

    Returns:
        (batch, tokens, v_heads, v_dim) float32.
    """
    state = pool[slots]
    out = gdn_reference.gated_delta_rule_recurrence_(q, k, v, g, beta, state)
    if isinstance(slots, Tensor):
        pool.index_copy_(0, slots, state)
    return out


def chunked_gated_delta_rule_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, pool: Tensor, slots: Slots
) -> Tensor:
    """Apply the gated delta rule by chunks (prefill); arguments as for the recurrence."""
    out, state = gdn_reference.chunked_gated_delta_rule_recurrence(q, k, v, g, beta, pool[slots])
    pool[slots] = state
    return out


def causal_conv1d_full(x: Tensor, weight: Tensor, *, pool: Tensor, slots: Slots) -> Tensor:
    """Convolve each channel over its own past, then SiLU; the windows in the pool are updated.

    Args:
        x: (batch, tokens, conv_dim).
        weight: (conv_dim, width), oldest tap first.
        pool: (slots, width - 1, conv_dim), the last inputs of each sequence, oldest first.
        slots: the slot of each batch row, (batch,) int64 or an ascending run of slots.

    Returns:
        (batch, tokens, conv_dim).
    """
    out, window = gdn_reference.causal_conv1d_full(x, weight, pool[slots])
    pool[slots] = window.to(pool.dtype)
    return out


def causal_conv1d_update(x: Tensor, weight: Tensor, *, pool: Tensor, slots: Slots) -> Tensor:
    """Convolve one token of each sequence, (batch, conv_dim); otherwise as the full form."""
    out, window = gdn_reference.causal_conv1d_update(x, weight, pool[slots])
    pool[slots] = window.to(pool.dtype)
    return out


def fused_gdn_gating(b: Tensor, a: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return beta and log decay g in float32; arguments as in `gdn_reference.fused_gdn_gating`."""
    return gdn_reference.fused_gdn_gating(b, a, a_log, dt_bias)


def l2_normalise(x: Tensor) -> Tensor:
    """Return x in float32 over its Euclidean norm in the last dimension."""
    return gdn_reference.l2_normalise(x.to(torch.float32))
