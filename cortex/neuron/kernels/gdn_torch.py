"""The operators on pools of states in plain torch, for where the extension is not built.

Same names, arguments and results as the native operators (`torch.ops.cortex`, see
`csrc/bindings.cpp`): they change the pools in place, compute in float32 and return the dtype of
their inputs. They wait for the device to read slots and tables.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from cortex.neuron.kernels import gdn_reference as reference


class _Rule(Protocol):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]: ...


def gated_delta_rule_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    states: Tensor,
    slots: Tensor,
    starts: Tensor | None = None,
) -> Tensor:
    """Apply the rule token by token; see `gdn.gated_delta_rule_recurrence`."""
    return _apply(
        reference.gated_delta_rule_recurrence, (q, k, v, g, beta), states, slots, starts
    ).to(v.dtype)


def chunked_gated_delta_rule_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    states: Tensor,
    slots: Tensor,
    starts: Tensor | None = None,
) -> Tensor:
    """Apply the rule by chunks; see `gdn.chunked_gated_delta_rule_recurrence`."""
    return _apply(
        reference.chunked_gated_delta_rule_recurrence, (q, k, v, g, beta), states, slots, starts
    ).to(v.dtype)


def causal_conv1d_update(x: Tensor, weight: Tensor, windows: Tensor, slots: Tensor) -> Tensor:
    """Convolve one token of each sequence; see `gdn.causal_conv1d_update`."""
    return causal_conv1d_full(x, weight, windows, slots, None)


def causal_conv1d_full(
    x: Tensor, weight: Tensor, windows: Tensor, slots: Tensor, starts: Tensor | None = None
) -> Tensor:
    """Convolve each sequence; see `gdn.causal_conv1d_full`."""
    out = torch.zeros(x.shape, device=x.device)
    taps = weight.float()
    for rows, count, own in _batches(x.shape[0], slots, starts, windows.shape[0]):
        part = torch.unflatten(x[rows].float(), 0, (count, -1))
        convolved, last = reference.causal_conv1d_full(part, taps, windows[own].float())
        out[rows] = convolved.flatten(0, 1)
        windows[own] = last.to(windows.dtype)
    return out.to(x.dtype)


def fused_gdn_gating(b: Tensor, a: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return beta and g, float32; see `gdn.fused_gdn_gating`."""
    return reference.fused_gdn_gating(b, a, a_log, dt_bias)


def gdn_gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the gated norm of each value head; see `gdn.gdn_gated_norm`."""
    normed = functional.rms_norm(x.float(), x.shape[-1:], None, eps) * weight
    return (normed * functional.silu(gate.float())).to(x.dtype)


def gdn_decode_step(
    mixed: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    windows: Tensor,
    states: Tensor,
    slots: Tensor,
    arrivals: Tensor,
) -> Tensor:
    """Run the mixer between its projections on one token each; see `gdn.gdn_decode_step`."""
    del arrivals
    convolved = causal_conv1d_update(mixed.float(), conv_weight, windows, slots)
    q, k, v = _heads(convolved, states)
    beta, g = reference.fused_gdn_gating(b, a, a_log, dt_bias)
    core = gated_delta_rule_recurrence(q, k, v, g, beta, states, slots)
    gate = torch.unflatten(z, -1, v.shape[1:])
    out = gdn_gated_norm(core, gate, norm_weight, norm_eps)
    return out.flatten(1).to(mixed.dtype)


def gdn_prefill(
    qkv: Tensor,
    g: Tensor,
    beta: Tensor,
    states: Tensor,
    slots: Tensor,
    chunks: Tensor,
    first_chunks: Tensor,
    segments: Tensor,
    snapshots: Tensor | None = None,
) -> Tensor:
    """Apply the rule to whole prompts; see `gdn.gdn_prefill`."""
    del segments
    q, k, v = _heads(qkv.float(), states)
    out = torch.zeros_like(v)
    table, bounds = chunks.tolist(), first_chunks.tolist()
    for sequence, slot in enumerate(slots.tolist()):
        if not 0 <= slot < states.shape[0]:
            continue
        own = slots[sequence : sequence + 1]
        for start, stop, snapshot in _between_snapshots(
            table[bounds[sequence] : bounds[sequence + 1]]
        ):
            part = slice(start, stop)
            out[part] = chunked_gated_delta_rule_recurrence(
                q[part], k[part], v[part], g[part], beta[part], states, own
            )
            if snapshot >= 0:
                assert snapshots is not None, "a chunk names a snapshot and there is no room"
                snapshots[snapshot] = states[slot]
    return out.to(qkv.dtype)


def gdn_verify(
    mixed: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    windows: Tensor,
    states: Tensor,
    slots: Tensor,
    pending: Tensor,
    ring_inputs: Tensor,
    ring_keys: Tensor,
    ring_deltas: Tensor,
    ring_decays: Tensor,
    arrivals: Tensor,
) -> Tensor:
    """Fold accepted drafts in and compute new ones; see `gdn.gdn_verify`."""
    del arrivals
    out = torch.zeros_like(z)
    num_draft = mixed.shape[1]
    taps = conv_weight.float()
    group = states.shape[1] // _num_k_heads(mixed.shape[-1], states)
    beta, g = reference.fused_gdn_gating(b, a, a_log, dt_bias)
    for row, slot in enumerate(slots.tolist()):
        if not 0 <= slot < states.shape[0]:
            continue
        taken = min(max(int(pending[row]), 0), ring_decays.shape[1])
        state = states[slot].float()
        for i in range(taken):
            state = ring_decays[slot, i].exp()[:, None, None] * state
            state = state + ring_deltas[slot, i][..., None] * ring_keys[slot, i][:, None]
        window = torch.cat((windows[slot], ring_inputs[slot, :taken]))[taken:]
        if taken:
            states[slot], windows[slot] = state, window
        convolved, _ = reference.causal_conv1d_full(
            mixed[row : row + 1].float(), taps, window[None].float()
        )
        q, k, v = _heads(convolved[0], states)
        core = torch.empty_like(v)
        for t in range(num_draft):
            key = k[t].repeat_interleave(group, dim=0)
            query = q[t].repeat_interleave(group, dim=0)
            state = g[row, t].exp()[:, None, None] * state
            delta = beta[row, t][:, None] * (v[t] - (state @ key[..., None])[..., 0])
            state = state + delta[..., None] * key[:, None]
            core[t] = (state @ query[..., None])[..., 0]
            ring_keys[slot, t], ring_deltas[slot, t], ring_decays[slot, t] = key, delta, g[row, t]
        ring_inputs[slot, :num_draft] = mixed[row]
        gate = torch.unflatten(z[row], -1, core.shape[1:])
        out[row] = gdn_gated_norm(core, gate, norm_weight, norm_eps).flatten(1).to(z.dtype)
    return out


def _apply(
    rule: _Rule,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    states: Tensor,
    slots: Tensor,
    starts: Tensor | None,
) -> Tensor:
    out = torch.zeros(inputs[2].shape, device=states.device)
    for rows, count, own in _batches(out.shape[0], slots, starts, states.shape[0]):
        q, k, v, g, beta = (torch.unflatten(x[rows].float(), 0, (count, -1)) for x in inputs)
        part, state = rule(q, k, v, g, beta, states[own].float())
        out[rows] = part.flatten(0, 1)
        states[own] = state.to(states.dtype)
    return out


def _batches(
    num_tokens: int, slots: Tensor, starts: Tensor | None, num_slots: int
) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield (rows, sequences, slots) of runs of equally long sequences that hold a slot."""
    each = slots.tolist()
    if not each or not num_tokens:
        return
    held = [0 <= slot < num_slots for slot in each]
    if starts is None and all(held):
        yield slice(0, num_tokens), len(each), slots
        return
    size = num_tokens // len(each)
    bounds = starts.tolist() if starts is not None else list(range(0, num_tokens + 1, size))
    for s in range(len(each)):
        if held[s] and bounds[s] < bounds[s + 1]:
            yield slice(bounds[s], bounds[s + 1]), 1, slots[s : s + 1]


def _between_snapshots(chunks: list[list[int]]) -> Iterator[tuple[int, int, int]]:
    """Yield (first token, end token, snapshot or -1), joining chunks that no snapshot parts."""
    start: int | None = None
    for i, (first, count, _, snapshot) in enumerate(chunks):
        start = first if start is None else start
        if snapshot >= 0 or i == len(chunks) - 1:
            yield start, first + count, snapshot
            start = None


def _num_k_heads(conv_dim: int, states: Tensor) -> int:
    _, v_heads, v_dim, k_dim = states.shape
    return (conv_dim - v_heads * v_dim) // (2 * k_dim)


def _heads(convolved: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split (tokens, conv_dim) float32 into q and k heads, normalised, q scaled, and v heads."""
    _, v_heads, v_dim, k_dim = states.shape
    width = _num_k_heads(convolved.shape[-1], states) * k_dim
    q, k, v = torch.split(convolved, [width, width, v_heads * v_dim], dim=-1)
    q, k = (reference.l2_normalise(torch.unflatten(x, -1, (-1, k_dim))) for x in (q, k))
    return q * k_dim**-0.5, k, torch.unflatten(v, -1, (v_heads, v_dim))
