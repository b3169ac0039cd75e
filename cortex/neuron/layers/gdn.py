"""The Gated DeltaNet mixer: short convolution, gated delta rule, gated norm."""

import torch
from torch import Tensor

from cortex.neuron.kernels import gdn
from cortex.neuron.layers.linear import Linear
from cortex.neuron.layers.norm import GatedRmsNorm
from cortex.neuron.layers.plan import StepPlan


class GatedDeltaNet:
    """Linear attention whose whole past is one state per sequence.

    Args:
        projection: hidden to [queries, keys and values | z | b | a].
        output: value heads back to hidden.
        conv_weight: (conv_dim, width), oldest tap first.
        a_log, dt_bias: (num_value_heads,) float32.
        norm: over value_dim, gated by z.
    """

    def __init__(
        self,
        *,
        projection: Linear,
        output: Linear,
        conv_weight: Tensor,
        a_log: Tensor,
        dt_bias: Tensor,
        norm: GatedRmsNorm,
        num_key_heads: int,
        num_value_heads: int,
        key_dim: int,
        value_dim: int,
    ) -> None:
        self._projection = projection
        self._output = output
        self._conv_weight = conv_weight
        self._a_log = a_log
        self._dt_bias = dt_bias
        self._norm = norm
        self._num_key_heads = num_key_heads
        self._num_value_heads = num_value_heads
        self._key_dim = key_dim
        self._value_dim = value_dim
        self._conv_dim = 2 * num_key_heads * key_dim + num_value_heads * value_dim

    def __call__(self, x: Tensor, plan: StepPlan, windows: Tensor, states: Tensor) -> Tensor:
        """Map (N, hidden) to (N, hidden); the sequences' windows and states are updated.

        Args:
            x: (N, hidden).
            plan: the step's rows.
            windows: one layer's (slots, conv_width - 1, conv_dim).
            states: one layer's (slots, value_heads, value_dim, key_dim) float32.
        """
        heads = self._num_value_heads
        mixed, z, b, a = torch.split(
            self._projection(x), [self._conv_dim, heads * self._value_dim, heads, heads], dim=-1
        )
        beta, g = gdn.fused_gdn_gating(b, a, self._a_log, self._dt_bias)
        core = self._mix(mixed, g, beta, plan, windows, states)
        out = self._norm(core, torch.unflatten(z, -1, (heads, self._value_dim)))
        return self._output(out.flatten(1))

    def _mix(
        self,
        mixed: Tensor,
        g: Tensor,
        beta: Tensor,
        plan: StepPlan,
        windows: Tensor,
        states: Tensor,
    ) -> Tensor:
        decode = plan.decode
        if decode is not None and decode.state_rows is None and not plan.prefills:
            return self._decode(mixed, g, beta, decode.slots, windows, states)
        # Rows of padding keep their zeros.
        core = torch.zeros(
            mixed.shape[0], self._num_value_heads, self._value_dim, device=mixed.device
        )
        if decode is not None:
            rows = (
                decode.rows
                if decode.rows is not None
                else torch.arange(mixed.shape[0], device=mixed.device)
            )
            rows = rows if decode.state_rows is None else rows[decode.state_rows]
            core[rows] = self._decode(
                mixed[rows], g[rows], beta[rows], decode.slots, windows, states
            )
        for prefill in plan.prefills:
            if prefill.slot is None:
                continue
            part = slice(prefill.start, prefill.stop)
            convolved = gdn.causal_conv1d_full(
                mixed[None, part], self._conv_weight, pool=windows, slots=prefill.slot
            )
            q, k, v = self._split_heads(convolved)
            core[part] = gdn.chunked_gated_delta_rule_recurrence(
                q, k, v, g[None, part], beta[None, part], pool=states, slots=prefill.slot
            )[0]
        return core

    def _decode(
        self,
        mixed: Tensor,
        g: Tensor,
        beta: Tensor,
        slots: Tensor | slice,
        windows: Tensor,
        states: Tensor,
    ) -> Tensor:
        convolved = gdn.causal_conv1d_update(mixed, self._conv_weight, pool=windows, slots=slots)
        q, k, v = self._split_heads(convolved[:, None])
        return gdn.gated_delta_rule_recurrence(
            q, k, v, g[:, None], beta[:, None], pool=states, slots=slots
        )[:, 0]

    def _split_heads(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split (batch, tokens, conv_dim) into normalised q and k heads and v heads, float32."""
        qk_dim = 2 * self._num_key_heads * self._key_dim
        qk = gdn.l2_normalise(torch.unflatten(convolved[..., :qk_dim], -1, (-1, self._key_dim)))
        q, k = qk.chunk(2, dim=-2)
        v = torch.unflatten(convolved[..., qk_dim:].float(), -1, (-1, self._value_dim))
        return q * self._key_dim**-0.5, k, v
