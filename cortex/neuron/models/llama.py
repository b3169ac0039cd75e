"""The llama family: pre-norm decoder, rotary grouped-query attention, gated feed-forward."""

import torch
from torch import Tensor

from cortex.neuron.layers.attention import Attention
from cortex.neuron.layers.context import Caches, CacheSpec, StepBatch
from cortex.neuron.layers.linear import GatedMlp
from cortex.neuron.layers.norm import RmsNorm
from cortex.neuron.layers.plan import make_plan
from cortex.neuron.layers.rotary import RotaryAngles
from cortex.neuron.models.base import Vision, WeightSource
from cortex.neuron.models.builder import LayerBuilder, rope_frequencies
from cortex.neuron.models.config import ModelConfig


class Llama:
    """A llama-family model; see `CausalLM` for its attributes."""

    def __init__(
        self, config: ModelConfig, weights: WeightSource, device: torch.device, dtype: torch.dtype
    ) -> None:
        build = LayerBuilder(weights, config, device, dtype)
        self._embedding, self._head = build.embedding_and_head()
        self._layers = [_Layer(config, build, i) for i in range(config.num_layers)]
        self._norm = RmsNorm(build.vector("norm.weight", config.hidden_size), config.rms_norm_eps)
        self._frequencies = rope_frequencies(config.rope, device)
        self.cache_spec = CacheSpec(
            num_kv_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            kv_head_dim=config.head_dim,
        )
        self.dtype = dtype
        self.device = device
        self.vocab_size = config.vocab_size
        self.max_position_embeddings = config.max_position_embeddings
        self.weight_bytes = build.num_bytes
        self.vision: Vision | None = None

    def forward(self, batch: StepBatch, caches: Caches) -> Tensor:
        """Run one step and return the logits of `batch.logit_rows`, (L, vocab_size) float32."""
        assert self._head is not None, "it was loaded for its hidden states alone"
        return self._head(self.encode(batch, caches)).float()

    def encode(self, batch: StepBatch, caches: Caches) -> Tensor:
        """Run one step and return the last hidden states of `batch.logit_rows`, (L, hidden)."""
        plan = make_plan(batch, caches)
        angles = RotaryAngles(self._frequencies, batch.positions, self.dtype)
        x = self._embedding(batch.token_ids)
        for i, layer in enumerate(self._layers):
            keys, values = caches.keys[i], caches.values[i]
            x = x + layer.attention(layer.attention_norm(x), angles, plan, keys, values)
            x = x + layer.mlp(layer.mlp_norm(x))
        return self._norm(x[batch.logit_rows])


class _Layer:
    attention: Attention
    mlp: GatedMlp

    def __init__(self, config: ModelConfig, build: LayerBuilder, index: int) -> None:
        name = f"layers.{index}"
        hidden, dim = config.hidden_size, config.head_dim
        kv_rows = config.num_kv_heads * dim
        self.attention_norm = RmsNorm(
            build.vector(f"{name}.input_layernorm.weight", hidden), config.rms_norm_eps
        )
        self.attention = Attention(
            projection=build.linear(
                [
                    (f"{name}.self_attn.q_proj", config.num_heads * dim),
                    (f"{name}.self_attn.k_proj", kv_rows),
                    (f"{name}.self_attn.v_proj", kv_rows),
                ],
                hidden,
                has_bias=config.attention_bias,
            ),
            output=build.linear(
                [(f"{name}.self_attn.o_proj", hidden)],
                config.num_heads * dim,
                has_bias=config.attention_bias,
            ),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=dim,
        )
        self.mlp_norm = RmsNorm(
            build.vector(f"{name}.post_attention_layernorm.weight", hidden), config.rms_norm_eps
        )
        self.mlp = build.mlp(f"{name}.mlp")
