"""The BERT family: post-norm encoders with learned positions, where every token sees all others."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from cortex.neuron.layers.linear import Linear
from cortex.neuron.models.base import WeightSource
from cortex.neuron.models.encoder_config import Activation, EncoderConfig

_ACTIVATIONS: Final[dict[Activation, Callable[[Tensor], Tensor]]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


class Bert:
    """A BERT-family encoder without any head.

    Attributes:
        dtype, device: of weights and activations.
        max_tokens: of the longest text.
        weight_bytes: device memory held by weights.
    """

    def __init__(
        self, config: EncoderConfig, weights: WeightSource, device: torch.device, dtype: torch.dtype
    ) -> None:
        build = _Builder(weights, config, device, dtype)
        hidden = config.hidden_size
        self._words = build.tensor("embeddings.word_embeddings.weight", config.vocab_size, hidden)
        positions = build.tensor(
            "embeddings.position_embeddings.weight", config.num_positions, hidden
        )
        types = build.tensor("embeddings.token_type_embeddings.weight", config.num_types, hidden)
        # One text at a time is of one type, the first.
        self._positions = positions[config.first_position :] + types[0]
        self._norm = build.norm("embeddings.LayerNorm")
        self._layers = [_Layer(config, build, i) for i in range(config.num_layers)]
        self.dtype = dtype
        self.device = device
        self.vocab_size = config.vocab_size
        self.max_tokens = config.max_tokens
        self.weight_bytes = build.num_bytes

    def encode(self, token_ids: list[list[int]]) -> list[Tensor]:
        """Return the last hidden states of some texts, (tokens, hidden) each, in their order.

        All tokens lie side by side in one dimension; only attention pads texts to one length. The
        caller sets inference mode.
        """
        lengths = [len(each) for each in token_ids]
        longest = max(lengths)
        columns = torch.arange(longest, device=self.device)
        is_real = columns < torch.tensor(lengths, device=self.device)[:, None]
        flat = torch.tensor([at for each in token_ids for at in each], device=self.device)
        places = columns.expand(len(lengths), -1)[is_real]
        padding = None if min(lengths) == longest else _Padding(is_real)
        x = self._norm(self._words[flat] + self._positions[places])
        for layer in self._layers:
            x = layer(x, len(lengths), padding)
        return list(torch.split(x, lengths))


class _Padding:
    """From tokens side by side to texts of one length and back.

    Args:
        is_real: (texts, longest) bool, True where a text has a token.
    """

    def __init__(self, is_real: Tensor) -> None:
        self._is_real = is_real
        self.mask = is_real[:, None, None]
        # Padding is the first token again, which nobody attends to.
        self._rows = (is_real.flatten().cumsum(0) - 1).clamp(min=0).view(is_real.shape)

    def apply(self, x: Tensor) -> Tensor:
        """Map (tokens, ...) to (texts, longest, ...)."""
        return x[self._rows]

    def remove(self, x: Tensor) -> Tensor:
        """Map (texts, longest, ...) to (tokens, ...)."""
        return x[self._is_real]


class _LayerNorm:
    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self._weight = weight
        self._bias = bias
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """Return x normalised over its last dimension; computed in float32."""
        normed = functional.layer_norm(x.float(), x.shape[-1:], self._weight, self._bias, self._eps)
        return normed.to(x.dtype)


class _Builder:
    """Makes layers from a checkpoint's tensors and counts their bytes."""

    def __init__(
        self, weights: WeightSource, config: EncoderConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._weights = weights
        self._config = config
        self._device = device
        self._dtype = dtype
        self.num_bytes = 0

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        # Always a copy: a tensor that aliases its mapped file dies when the file is cut short.
        found = self._weights.tensor(name, shape).to(self._device, dtype or self._dtype, copy=True)
        self.num_bytes += found.nbytes
        return found

    def linear(self, names: list[str], out_features: int, in_features: int) -> Linear:
        """Return one product for several projections of the same input, each with its bias."""
        weight = [self.tensor(f"{each}.weight", out_features, in_features) for each in names]
        bias = [self.tensor(f"{each}.bias", out_features) for each in names]
        return Linear(torch.cat(weight), torch.cat(bias))

    def norm(self, name: str) -> _LayerNorm:
        hidden = self._config.hidden_size
        weight = self.tensor(f"{name}.weight", hidden, dtype=torch.float32)
        bias = self.tensor(f"{name}.bias", hidden, dtype=torch.float32)
        return _LayerNorm(weight, bias, self._config.layer_norm_eps)


class _Layer:
    def __init__(self, config: EncoderConfig, build: _Builder, index: int) -> None:
        name = f"encoder.layer.{index}"
        hidden, inner = config.hidden_size, config.intermediate_size
        self._num_heads = config.num_heads
        attention = f"{name}.attention.self"
        self._projection = build.linear(
            [f"{attention}.{each}" for each in ("query", "key", "value")], hidden, hidden
        )
        self._output = build.linear([f"{name}.attention.output.dense"], hidden, hidden)
        self._attention_norm = build.norm(f"{name}.attention.output.LayerNorm")
        self._up = build.linear([f"{name}.intermediate.dense"], inner, hidden)
        self._activation = _ACTIVATIONS[config.activation]
        self._down = build.linear([f"{name}.output.dense"], hidden, inner)
        self._norm = build.norm(f"{name}.output.LayerNorm")

    def __call__(self, x: Tensor, num_texts: int, padding: _Padding | None) -> Tensor:
        x = self._attention_norm(x + self._output(self._attend(x, num_texts, padding)))
        return self._norm(x + self._down(self._activation(self._up(x))))

    def _attend(self, x: Tensor, num_texts: int, padding: _Padding | None) -> Tensor:
        projected = self._projection(x)
        if padding is None:
            padded = projected.view(num_texts, -1, projected.shape[-1])
        else:
            padded = padding.apply(projected)
        # As (3, texts, heads, longest, head_dim).
        heads = torch.unflatten(padded, -1, (3, self._num_heads, -1))
        qkv = heads.permute(2, 0, 3, 1, 4)
        mask = None if padding is None else padding.mask
        out = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask)
        out = out.transpose(1, 2).flatten(2)
        return out.flatten(0, 1) if padding is None else padding.remove(out)
