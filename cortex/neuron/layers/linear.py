"""Matrix products with weights that stay: linear layers and the gated feed-forward block."""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

# Rows a CPU weight is packed for. Chosen by measurement: decode batches of 1 to 32 rows lose
# nothing by it and prefill chunks gain a third over a weight packed for one row.
_PACKED_FOR_ROWS = 512


class Linear:
    """y = x W^T + b.

    On a CPU the weight is kept in oneDNN's blocked layout, which doubles the speed of float32
    products of every height against the plain layout.

    Args:
        weight: (out_features, in_features); on a CPU it is copied.
        bias: (out_features,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._bias = bias
        self._is_packed = _can_pack(weight)
        if self._is_packed:
            pack = torch.ops.mkldnn._reorder_linear_weight  # noqa: SLF001 - the operator's name
            self._weight: Tensor = pack(weight, _PACKED_FOR_ROWS)
        else:
            self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """Map (rows, in_features) to (rows, out_features)."""
        if not self._is_packed:
            return functional.linear(x, self._weight, self._bias)
        if x.shape[0] == 0:
            return x.new_empty(0, self.out_features)
        product = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001 - the operator's name
            x, self._weight, self._bias, "none", [], ""
        )
        return cast(Tensor, product)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu":
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call] # torch's stub
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - its name
    return weight.dtype == torch.float32


class GatedMlp:
    """Feed-forward block: down(silu(gate(x)) * up(x)).

    Args:
        gate_up: gate rows, then as many up rows.
        down: back to the hidden size.
    """

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self._gate_up = gate_up
        self._down = down

    def __call__(self, x: Tensor) -> Tensor:
        """Map (rows, hidden) to (rows, hidden)."""
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(functional.silu(gate) * up)
