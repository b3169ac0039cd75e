"""The Gated DeltaNet operators as layers call them: on pools of states, by slot, in place.

One function per operator, served by the native one where it is built for the tensors' device and
by plain torch elsewhere. Shapes of all of them:

N tokens of S sequences lie side by side in one dimension; `starts`, (S + 1,) int64, says where
each sequence begins, None that all are equally long. Inputs may be float32, float16 or bfloat16,
one dtype for all of a call, with their tokens any distance apart; results have that dtype. States
are a pool (slots, v_heads, v_dim, k_dim) in float32 or bfloat16, convolution windows a pool
(slots, width - 1, channels) in the inputs' dtype, oldest input first. `slots`, (S,) int64, names
each sequence's slot; -1 is padding, whose results are zeros and which touches no pool. Value heads
come in groups of `v_heads / k_heads` consecutive ones that share a key head.

Source of the maths: Gated Delta Networks, arXiv 2412.06464.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cortex.neuron.kernels import extension, gdn_torch
from cortex.neuron.kernels.chunks import PrefillTables


def gated_delta_rule_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    states: Tensor,
    slots: Tensor,
    starts: Tensor | None = None,
) -> Tensor:
    """Apply the gated delta rule token by token; the sequences' states are updated.

    Args:
        q: (N, k_heads, k_dim), L2-normalised and scaled by k_dim ** -0.5.
        k: (N, k_heads, k_dim), L2-normalised.
        v: (N, v_heads, v_dim).
        g: (N, v_heads) float32, log decay, at most 0.
        beta: (N, v_heads) float32, in (0, 1).

    Returns:
        (N, v_heads, v_dim).

    Raises:
        RuntimeError: a shape, dtype, device or, on a CPU, a slot or start is not as above.
    """
    native = _operators(v.device).gated_delta_rule_recurrence
    return _tensor(native(q, k, v, g, beta, states, slots, starts))


def chunked_gated_delta_rule_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    states: Tensor,
    slots: Tensor,
    starts: Tensor | None = None,
) -> Tensor:
    """Apply the gated delta rule by chunks of tokens; arguments as for the recurrence."""
    native = _operators(v.device).chunked_gated_delta_rule_recurrence
    return _tensor(native(q, k, v, g, beta, states, slots, starts))


def causal_conv1d_update(x: Tensor, weight: Tensor, *, windows: Tensor, slots: Tensor) -> Tensor:
    """Convolve one token of each sequence, x (S, channels); otherwise as the full form."""
    return _tensor(_operators(x.device).causal_conv1d_update(x, weight, windows, slots))


def causal_conv1d_full(
    x: Tensor, weight: Tensor, *, windows: Tensor, slots: Tensor, starts: Tensor | None = None
) -> Tensor:
    """Convolve each channel over its own past, then SiLU; the sequences' windows are updated.

    Args:
        x: (N, channels).
        weight: (channels, width), oldest tap first, 2 to 8 taps.

    Returns:
        (N, channels).
    """
    return _tensor(_operators(x.device).causal_conv1d_full(x, weight, windows, slots, starts))


def fused_gdn_gating(b: Tensor, a: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return beta = sigmoid(b) and log decay g = -exp(a_log) softplus(a + dt_bias).

    Args:
        b, a: (N, v_heads).
        a_log, dt_bias: (v_heads,) float32.

    Returns:
        (N, v_heads) float32 each.
    """
    beta, g = _operators(b.device).fused_gdn_gating(b, a, a_log, dt_bias)
    return _tensor(beta), _tensor(g)


def gdn_gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight * silu(gate) over the value dimension.

    Args:
        x: (N, v_heads, v_dim), dense.
        gate: shaped like x.
        weight: (v_dim,) float32.
        eps: added to the mean square.
    """
    return _tensor(_operators(x.device).gdn_gated_norm(x, gate, weight, eps))


def gdn_decode_step(
    mixed: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    *,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    windows: Tensor,
    states: Tensor,
    slots: Tensor,
) -> Tensor:
    """Run the whole mixer between its projections on one token of each sequence.

    Convolution, SiLU, normalised q and k, gates, recurrence and gated norm in one launch; windows
    and states are updated.

    Args:
        mixed: (S, conv_dim), the channels [q heads | k heads | v heads].
        z: (S, v_heads * v_dim), the norm's gate.
        b, a: (S, v_heads).
        conv_weight: (conv_dim, width).
        a_log, dt_bias: (v_heads,) float32.
        norm_weight: (v_dim,) float32.

    Returns:
        (S, v_heads * v_dim).
    """
    return _tensor(
        _operators(mixed.device).gdn_decode_step(
            mixed,
            z,
            b,
            a,
            conv_weight,
            a_log,
            dt_bias,
            norm_weight,
            norm_eps,
            windows,
            states,
            slots,
            _arrivals(mixed.shape[0] * states.shape[1], mixed.device),
        )
    )


def gdn_prefill(
    qkv: Tensor,
    g: Tensor,
    beta: Tensor,
    tables: PrefillTables,
    *,
    states: Tensor,
    slots: Tensor,
    snapshots: Tensor | None = None,
) -> Tensor:
    """Apply the gated delta rule to whole prompts or parts of them; states are updated.

    Args:
        qkv: (N, conv_dim), convolved channels [q heads | k heads | v heads]; q and k are
            normalised, and q scaled, in here.
        g, beta: (N, v_heads) float32.
        tables: how the sequences are cut, from `chunks.plan_prefill`.
        snapshots: (tables.num_snapshots, v_heads, v_dim, k_dim) in the states' dtype, filled with
            the states after the tokens that the tables name.

    Returns:
        (N, v_heads, v_dim).
    """
    return _tensor(
        _operators(qkv.device).gdn_prefill(
            qkv,
            g,
            beta,
            states,
            slots,
            tables.chunks,
            tables.first_chunks,
            tables.segments,
            snapshots,
        )
    )


def gdn_verify(
    mixed: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    *,
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
) -> Tensor:
    """Compute draft tokens from a state without changing it, so that rejecting them costs nothing.

    First the oldest `pending` entries of a slot's ring, which the call before left there, are
    folded into its state and window: the drafts that were accepted. Then the new drafts are
    computed and left in the ring. Without drafts, T = 0, it only folds.

    Args:
        mixed: (S, T, conv_dim); z, b, a have the same T. T is at most D, the ring's length, which
            is at most 16.
        pending: (S,) int64, 0 to D.
        ring_inputs: (slots, D, conv_dim) in the inputs' dtype.
        ring_keys: (slots, D, v_heads, k_dim) float32.
        ring_deltas: (slots, D, v_heads, v_dim) float32.
        ring_decays: (slots, D, v_heads) float32.

    Returns:
        (S, T, v_heads * v_dim).
    """
    return _tensor(
        _operators(mixed.device).gdn_verify(
            mixed,
            z,
            b,
            a,
            conv_weight,
            a_log,
            dt_bias,
            norm_weight,
            norm_eps,
            windows,
            states,
            slots,
            pending,
            ring_inputs,
            ring_keys,
            ring_deltas,
            ring_decays,
            _arrivals(mixed.shape[0] * states.shape[1], mixed.device),
        )
    )


def _operators(device: torch.device) -> ModuleType | Any:
    return torch.ops.cortex if extension.serves(device) else gdn_torch


def _tensor(result: Any) -> Tensor:
    assert isinstance(result, Tensor)
    return result


# Counters that a launch finds and leaves at zero, by device; the last is the largest. The smaller
# ones stay, since CUDA graphs captured with them go on using them.
_arrivals_of: dict[torch.device, list[Tensor]] = {}


def _arrivals(count: int, device: torch.device) -> Tensor:
    made = _arrivals_of.setdefault(device, [])
    if not made or made[-1].shape[0] < count:
        size = max(1024, 1 << (count - 1).bit_length() if count else 1)
        # An inference tensor could not be changed outside inference mode.
        with torch.inference_mode(mode=False):
            made.append(torch.zeros(size, dtype=torch.int32, device=device))
    return made[-1]
