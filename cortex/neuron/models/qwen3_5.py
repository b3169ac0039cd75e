"""Qwen3.5: Gated DeltaNet layers with gated full attention between them, perhaps a vision tower."""

import torch
from torch import Tensor

from cortex.neuron.layers.attention import Attention
from cortex.neuron.layers.context import Caches, CacheSpec, StepBatch
from cortex.neuron.layers.gdn import GatedDeltaNet
from cortex.neuron.layers.norm import RmsNorm
from cortex.neuron.layers.plan import make_plan
from cortex.neuron.layers.rotary import RotaryAngles, interleaved_axes
from cortex.neuron.models.base import Vision, WeightSource
from cortex.neuron.models.builder import LayerBuilder, rope_frequencies
from cortex.neuron.models.config import GdnConfig, ModelConfig
from cortex.neuron.models.vision import VisionTower

# Where the configuration does not say: pairs that turn by an image token's row and column.
_IMAGE_SECTIONS = (11, 10)


class Qwen35:
    """A qwen3_5 model; see `CausalLM` for its attributes."""

    def __init__(
        self, config: ModelConfig, weights: WeightSource, device: torch.device, dtype: torch.dtype
    ) -> None:
        gdn = config.gdn
        assert gdn is not None
        build = LayerBuilder(weights, config, device, dtype)
        self._embedding, self._head = build.embedding_and_head()
        self._layers = [_Layer(config, gdn, build, i) for i in range(config.num_layers)]
        self._norm = _zero_centred_norm(config, build, "norm.weight", config.hidden_size)
        self._frequencies = rope_frequencies(config.rope, device)
        num_attention_layers = len(config.attention_layers)
        self.cache_spec = CacheSpec(
            num_kv_layers=num_attention_layers,
            num_kv_heads=config.num_kv_heads,
            kv_head_dim=config.head_dim,
            num_gdn_layers=config.num_layers - num_attention_layers,
            gdn_value_heads=gdn.num_value_heads,
            gdn_key_dim=gdn.key_dim,
            gdn_value_dim=gdn.value_dim,
            conv_dim=gdn.conv_dim,
            conv_width=gdn.conv_width,
        )
        self.dtype = dtype
        self.device = device
        self.vocab_size = config.vocab_size
        self.max_position_embeddings = config.max_position_embeddings
        self._axes = _image_axes(config, self._frequencies)
        self.vision: Vision | None = None
        if config.vision is not None:
            self.vision = VisionTower(config.vision, build, device, dtype)
        self.weight_bytes = build.num_bytes

    def forward(self, batch: StepBatch, caches: Caches) -> Tensor:
        """Run one step and return the logits of `batch.logit_rows`, (L, vocab_size) float32."""
        assert self._head is not None, "it was loaded for its hidden states alone"
        return self._head(self.encode(batch, caches)).float()

    def encode(self, batch: StepBatch, caches: Caches) -> Tensor:
        """Run one step and return the last hidden states of `batch.logit_rows`, (L, hidden)."""
        plan = make_plan(batch, caches)
        angles = RotaryAngles(self._frequencies, batch.positions, self.dtype, self._axes)
        x = self._embedding(batch.token_ids)
        if batch.image_rows is not None and batch.image_embeddings is not None:
            x = x.index_copy(0, batch.image_rows, batch.image_embeddings)
        kv = zip(caches.keys, caches.values, strict=True)
        states = zip(caches.conv_states, caches.recurrent_states, strict=True)
        for layer in self._layers:
            normed = layer.mixer_norm(x)
            if isinstance(layer.mixer, Attention):
                x = x + layer.mixer(normed, angles, plan, *next(kv))
            else:
                x = x + layer.mixer(normed, plan, *next(states))
            x = x + layer.mlp(layer.mlp_norm(x))
        return self._norm(x[batch.logit_rows])


def _image_axes(config: ModelConfig, frequencies: Tensor) -> Tensor | None:
    if config.vision is None:
        return None
    sections = config.rope.image_sections or _IMAGE_SECTIONS
    return interleaved_axes(frequencies.shape[0], sections).to(frequencies.device)


class _Layer:
    mixer: Attention | GatedDeltaNet

    def __init__(
        self, config: ModelConfig, gdn: GdnConfig, build: LayerBuilder, index: int
    ) -> None:
        name = f"layers.{index}"
        hidden = config.hidden_size
        self.mixer_norm = _zero_centred_norm(
            config, build, f"{name}.input_layernorm.weight", hidden
        )
        if index in config.attention_layers:
            self.mixer = _attention(config, build, f"{name}.self_attn")
        else:
            self.mixer = _gated_delta_net(config, gdn, build, f"{name}.linear_attn")
        self.mlp_norm = _zero_centred_norm(
            config, build, f"{name}.post_attention_layernorm.weight", hidden
        )
        self.mlp = build.mlp(f"{name}.mlp")


def _zero_centred_norm(config: ModelConfig, build: LayerBuilder, name: str, size: int) -> RmsNorm:
    """Return a norm whose stored weight is an offset from one."""
    return RmsNorm(1.0 + build.vector(name, size), config.rms_norm_eps)


def _attention(config: ModelConfig, build: LayerBuilder, name: str) -> Attention:
    num_q, num_kv, dim = config.num_heads, config.num_kv_heads, config.head_dim
    has_bias = config.attention_bias
    parts = [(f"{name}.q_proj", 2 * num_q * dim)]
    parts += [(f"{name}.{part}_proj", num_kv * dim) for part in "kv"]
    weight, bias = build.fused(parts, config.hidden_size, has_bias=has_bias)
    order = _gates_last(num_q, num_kv, dim)
    projection = build.linear_of(
        weight[order.to(weight.device)], None if bias is None else bias[order.to(bias.device)]
    )
    norm_weight = torch.cat(
        (
            build.vector(f"{name}.q_norm.weight", dim).expand(num_q, dim),
            build.vector(f"{name}.k_norm.weight", dim).expand(num_kv, dim),
        )
    )
    return Attention(
        projection=projection,
        output=build.linear(
            [(f"{name}.o_proj", config.hidden_size)], num_q * dim, has_bias=has_bias
        ),
        num_heads=num_q,
        num_kv_heads=num_kv,
        head_dim=dim,
        qk_norm=RmsNorm(1.0 + norm_weight, config.rms_norm_eps),
        is_gated=True,
    )


def _gates_last(num_q: int, num_kv: int, dim: int) -> Tensor:
    """Return the row order that makes [q | gate per head, k, v] into [q, k, v, gates].

    The checkpoint stores each query head's rows with its gate's rows after them.
    """
    rows = torch.arange(2 * num_q * dim).view(num_q, 2, dim)
    keys_values = torch.arange(2 * num_kv * dim) + 2 * num_q * dim
    return torch.cat((rows[:, 0].flatten(), keys_values, rows[:, 1].flatten()))


def _gated_delta_net(
    config: ModelConfig, gdn: GdnConfig, build: LayerBuilder, name: str
) -> GatedDeltaNet:
    value_rows = gdn.num_value_heads * gdn.value_dim
    return GatedDeltaNet(
        projection=build.linear(
            [
                (f"{name}.in_proj_qkv", gdn.conv_dim),
                (f"{name}.in_proj_z", value_rows),
                (f"{name}.in_proj_b", gdn.num_value_heads),
                (f"{name}.in_proj_a", gdn.num_value_heads),
            ],
            config.hidden_size,
        ),
        output=build.linear([(f"{name}.out_proj", config.hidden_size)], value_rows),
        conv_weight=build.matrix(f"{name}.conv1d.weight", gdn.conv_dim, 1, gdn.conv_width)[:, 0],
        a_log=build.vector(f"{name}.A_log", gdn.num_value_heads),
        dt_bias=build.vector(f"{name}.dt_bias", gdn.num_value_heads),
        norm_weight=build.vector(f"{name}.norm.weight", gdn.value_dim),
        norm_eps=config.rms_norm_eps,
    )
