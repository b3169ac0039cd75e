"""The Gated DeltaNet mixer: short convolution, gated delta rule, gated norm."""

import torch
from torch import Tensor

from cortex.neuron.kernels import gdn
from cortex.neuron.layers.linear import Linear
from cortex.neuron.layers.plan import GdnPlan, StepPlan


class GatedDeltaNet:
    """Linear attention whose whole past is one state per sequence.

    Args:
        projection: hidden to [queries, keys and values | z | b | a].
        output: value heads back to hidden.
        conv_weight: (conv_dim, width), oldest tap first.
        a_log, dt_bias: (num_value_heads,) float32.
        norm_weight: (value_dim,) float32, of the norm of the value heads that z gates.
        norm_eps: added to the mean square.
    """

    def __init__(
        self,
        *,
        projection: Linear,
        output: Linear,
        conv_weight: Tensor,
        a_log: Tensor,
        dt_bias: Tensor,
        norm_weight: Tensor,
        norm_eps: float,
    ) -> None:
        self._projection = projection
        self._output = output
        self._conv_weight = conv_weight
        self._a_log = a_log
        self._dt_bias = dt_bias
        self._norm_weight = norm_weight
        self._norm_eps = norm_eps
        heads = a_log.shape[0]
        self._widths = [conv_weight.shape[0], heads * norm_weight.shape[0], heads, heads]

    def __call__(self, x: Tensor, plan: StepPlan, windows: Tensor, states: Tensor) -> Tensor:
        """Map (N, hidden) to (N, hidden); the sequences' windows and states are updated.

        Args:
            x: (N, hidden).
            plan: the step's rows.
            windows: one layer's (slots, conv_width - 1, conv_dim).
            states: one layer's (slots, value_heads, value_dim, key_dim) float32.
        """
        assert plan.gdn is not None
        projected = self._projection(x)
        count = plan.num_decode
        if count == x.shape[0]:
            out = self._decode(projected, plan.gdn, windows, states)
        elif count == 0:
            out = self._prefill(projected, plan.gdn, windows, states)
        else:
            decoded = self._decode(projected[:count], plan.gdn, windows, states)
            prefilled = self._prefill(projected[count:], plan.gdn, windows, states)
            out = torch.cat((decoded, prefilled))
        return self._output(out)

    def _decode(self, projected: Tensor, plan: GdnPlan, windows: Tensor, states: Tensor) -> Tensor:
        mixed, z, b, a = torch.split(projected, self._widths, dim=-1)
        return gdn.gdn_decode_step(
            mixed,
            z,
            b,
            a,
            conv_weight=self._conv_weight,
            a_log=self._a_log,
            dt_bias=self._dt_bias,
            norm_weight=self._norm_weight,
            norm_eps=self._norm_eps,
            windows=windows,
            states=states,
            slots=plan.decode_slots,
        )

    def _prefill(self, projected: Tensor, plan: GdnPlan, windows: Tensor, states: Tensor) -> Tensor:
        mixed, z, b, a = torch.split(projected, self._widths, dim=-1)
        assert plan.tables is not None
        convolved = gdn.causal_conv1d_full(
            mixed,
            self._conv_weight,
            windows=windows,
            slots=plan.prefill_slots,
            starts=plan.prefill_starts,
        )
        beta, g = gdn.fused_gdn_gating(b, a, self._a_log, self._dt_bias)
        core = gdn.gdn_prefill(
            convolved, g, beta, plan.tables, states=states, slots=plan.prefill_slots
        )
        gate = torch.unflatten(z, -1, core.shape[1:])
        return gdn.gdn_gated_norm(core, gate, self._norm_weight, self._norm_eps).flatten(1)
