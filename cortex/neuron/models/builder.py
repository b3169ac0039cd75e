"""Making layers from a checkpoint's tensors, one tensor at a time."""

import torch
from torch import Tensor

from cortex.neuron.layers.embedding import Embedding
from cortex.neuron.layers.linear import GatedMlp, Linear
from cortex.neuron.layers.rotary import inverse_frequencies, llama3_frequencies
from cortex.neuron.models.base import WeightSource
from cortex.neuron.models.config import ModelConfig, RopeConfig

_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head.weight"


class LayerBuilder:
    """Builds layers on a device, fusing what shares its input, and counts their bytes."""

    def __init__(
        self, weights: WeightSource, config: ModelConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._weights = weights
        self._config = config
        self._device = device
        self._dtype = dtype
        self.num_bytes = 0

    def linear(
        self, parts: list[tuple[str, int]], in_features: int, *, has_bias: bool = False
    ) -> Linear:
        """Return one product for several projections of the same input.

        Args:
            parts: module names and their numbers of output rows, in order.
            in_features: columns of each.
            has_bias: whether each part has a bias too.
        """
        return self.linear_of(*self.fused(parts, in_features, has_bias=has_bias))

    def linear_of(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """Return a product with a weight that is already on the device."""
        linear = Linear(weight, bias)
        self.num_bytes += linear.num_bytes
        return linear

    def fused(
        self, parts: list[tuple[str, int]], in_features: int, *, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the parts' weights below each other, (sum of rows, in_features), and biases."""
        weight = self._stacked([(f"{name}.weight", (rows, in_features)) for name, rows in parts])
        if not has_bias:
            return weight, None
        return weight, self._stacked([(f"{name}.bias", (rows,)) for name, rows in parts])

    def vector(self, name: str, *shape: int) -> Tensor:
        """Return a small tensor in float32 on the device."""
        tensor = self._owned(name, shape, torch.float32)
        self.num_bytes += tensor.nbytes
        return tensor

    def matrix(self, name: str, *shape: int) -> Tensor:
        """Return a tensor in the model's dtype on the device."""
        tensor = self._owned(name, shape, self._dtype)
        self.num_bytes += tensor.nbytes
        return tensor

    def transient(self, name: str, *shape: int) -> Tensor:
        """Return a tensor in float32 on the device that the caller makes something else of."""
        return self._owned(name, shape, torch.float32)

    def mlp(self, name: str) -> GatedMlp:
        """Return the feed-forward block of a layer."""
        hidden, inner = self._config.hidden_size, self._config.intermediate_size
        has_bias = self._config.mlp_bias
        gate_up = [(f"{name}.gate_proj", inner), (f"{name}.up_proj", inner)]
        return GatedMlp(
            self.linear(gate_up, hidden, has_bias=has_bias),
            self.linear([(f"{name}.down_proj", hidden)], inner, has_bias=has_bias),
        )

    def embedding_and_head(self) -> tuple[Embedding, Linear | None]:
        """Return the token embedding and the output head, if any, which may share one table.

        On a CPU a tied head keeps its own copy, in the layout its products want.
        """
        config = self._config
        table = self.matrix(_EMBEDDING, config.vocab_size, config.hidden_size)
        if not config.has_head:
            return Embedding(table), None
        is_tied = config.tied_head
        if is_tied is None:
            is_tied = _HEAD not in self._weights
        if not is_tied:
            return Embedding(table), self.linear(
                [("lm_head", config.vocab_size)], config.hidden_size
            )
        head = Linear(table)
        if self._device.type == "cpu":
            self.num_bytes += head.num_bytes
        return Embedding(table), head

    def _owned(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # Always a copy: a tensor that aliases its mapped file dies when the file is cut short.
        return self._weights.tensor(name, shape).to(self._device, dtype, copy=True)

    def _stacked(self, parts: list[tuple[str, tuple[int, ...]]]) -> Tensor:
        rows = sum(shape[0] for _, shape in parts)
        fused = torch.empty(rows, *parts[0][1][1:], dtype=self._dtype, device=self._device)
        start = 0
        for name, shape in parts:
            fused[start : start + shape[0]].copy_(self._weights.tensor(name, shape))
            start += shape[0]
        return fused


def rope_frequencies(rope: RopeConfig, device: torch.device) -> Tensor:
    """Return the scaled inverse frequencies, (rotary_dim / 2,) float32."""
    frequencies = inverse_frequencies(rope.rotary_dim, rope.theta)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = llama3_frequencies(
            frequencies,
            factor=rope.factor,
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            original_max_positions=rope.original_max_positions,
        )
    if rope.freq_factors:
        frequencies = frequencies / torch.tensor(rope.freq_factors)
    return frequencies.to(device)
