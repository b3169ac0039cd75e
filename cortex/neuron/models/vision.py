"""The vision tower of Qwen3.5: patches, learned and rotary positions, blocks, a merger."""

import torch
from torch import Tensor

from cortex.neuron.layers.rotary import RotaryAngles, inverse_frequencies
from cortex.neuron.layers.vision import (
    GeluMlp,
    LayerNorm,
    PatchAttention,
    in_merge_order,
    interpolate_positions,
    to_patches,
)
from cortex.neuron.models.builder import LayerBuilder
from cortex.neuron.models.vision_config import CHANNELS, VisionConfig

_NAME = "visual"


class VisionTower:
    """Turns an image into tokens of the language model; see `models.base.Vision`."""

    def __init__(
        self, config: VisionConfig, build: LayerBuilder, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._config = config
        self._device = device
        self._dtype = dtype
        self.token_side = config.token_side
        self.image_token_id = config.image_token_id
        hidden, side = config.hidden_size, config.grid_side
        self._mean = torch.tensor(config.rules.mean, device=device)
        self._std = torch.tensor(config.rules.std, device=device)
        self._patch_embed = build.linear_of(
            *_patch_projection(config, build, f"{_NAME}.patch_embed.proj", dtype)
        )
        self._positions = build.matrix(f"{_NAME}.pos_embed.weight", side**2, hidden).view(
            side, side, hidden
        )
        # Half of the pairs turn by a patch's row, the others by its column.
        head_dim = hidden // config.num_heads
        spatial = inverse_frequencies(head_dim // 2, config.rope_theta)
        self._frequencies = torch.cat((spatial, spatial)).to(device)
        self._axes = torch.tensor([0, 1], device=device).repeat_interleave(spatial.shape[0])
        self._blocks = [_Block(config, build, f"{_NAME}.blocks.{i}") for i in range(config.depth)]
        self._merge_norm = _norm(build, f"{_NAME}.merger.norm", hidden)
        merged = hidden * config.merge_size**2
        self._merge = GeluMlp(
            build.linear([(f"{_NAME}.merger.linear_fc1", merged)], merged, has_bias=True),
            build.linear(
                [(f"{_NAME}.merger.linear_fc2", config.out_hidden_size)], merged, has_bias=True
            ),
            approximate="none",
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map (height, width, 3) uint8 to (tokens, hidden), row by row."""
        config = self._config
        colours = (pixels.to(self._device).float() / 255.0 - self._mean) / self._std
        patches = to_patches(colours, config.patch_size, config.merge_size).to(self._dtype)
        rows, columns = (each // config.patch_size for each in pixels.shape[:2])
        places = interpolate_positions(self._positions, rows, columns)
        x = self._patch_embed(patches) + in_merge_order(places, config.merge_size)
        angles = self._angles(rows, columns)
        for block in self._blocks:
            x = x + block.attention(block.attention_norm(x), angles)
            x = x + block.mlp(block.mlp_norm(x))
        squares = self._merge_norm(x).view(-1, config.merge_size**2 * config.hidden_size)
        return self._merge(squares)

    def _angles(self, rows: int, columns: int) -> RotaryAngles:
        row = torch.arange(rows, device=self._device)[:, None].expand(rows, columns)
        column = torch.arange(columns, device=self._device)[None].expand(rows, columns)
        places = in_merge_order(torch.stack((row, column), dim=-1), self._config.merge_size)
        return RotaryAngles(self._frequencies, places.T.contiguous(), self._dtype, self._axes)


class _Block:
    def __init__(self, config: VisionConfig, build: LayerBuilder, name: str) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.attention_norm = _norm(build, f"{name}.norm1", hidden)
        self.attention = PatchAttention(
            projection=build.linear([(f"{name}.attn.qkv", 3 * hidden)], hidden, has_bias=True),
            output=build.linear([(f"{name}.attn.proj", hidden)], hidden, has_bias=True),
            num_heads=config.num_heads,
        )
        self.mlp_norm = _norm(build, f"{name}.norm2", hidden)
        self.mlp = GeluMlp(
            build.linear([(f"{name}.mlp.linear_fc1", inner)], hidden, has_bias=True),
            build.linear([(f"{name}.mlp.linear_fc2", hidden)], inner, has_bias=True),
            approximate="tanh",
        )


def _norm(build: LayerBuilder, name: str, size: int) -> LayerNorm:
    return LayerNorm(build.vector(f"{name}.weight", size), build.vector(f"{name}.bias", size))


def _patch_projection(
    config: VisionConfig, build: LayerBuilder, name: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the weight (hidden, 3 * patch_size ** 2) and the bias of the patch embedding.

    The checkpoint's kernel spans `temporal_patch_size` frames of a video. An image is the same
    frame each time, so the sum over the frames does the same with half of the work.
    """
    size = config.patch_size
    kernel = build.transient(
        f"{name}.weight", config.hidden_size, CHANNELS, config.temporal_patch_size, size, size
    )
    bias = build.transient(f"{name}.bias", config.hidden_size)
    return kernel.sum(2).flatten(1).to(dtype), bias.to(dtype)
