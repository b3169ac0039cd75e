"""Layers of a vision tower: patches attend to all patches of their image."""

import torch
from torch import Tensor
from torch.nn import functional

from cortex.neuron.layers.linear import Linear
from cortex.neuron.layers.rotary import RotaryAngles

# What the towers served here were trained with.
_NORM_EPS = 1e-6


class LayerNorm:
    """(x - mean) / deviation * w + b over the last dimension, computed in float32.

    Args:
        weight, bias: (size,) float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Return x normalised, same shape and dtype."""
        size = self._weight.shape
        return functional.layer_norm(x.float(), size, self._weight, self._bias, _NORM_EPS).to(
            x.dtype
        )


class GeluMlp:
    """down(gelu(up(x))).

    Args:
        approximate: `tanh` or `none`.
    """

    def __init__(self, up: Linear, down: Linear, *, approximate: str) -> None:
        self._up = up
        self._down = down
        self._approximate = approximate

    def __call__(self, x: Tensor) -> Tensor:
        """Map (rows, in) to (rows, out)."""
        return self._down(functional.gelu(self._up(x), approximate=self._approximate))


class PatchAttention:
    """Attention of one image's patches to each other, without a mask.

    Args:
        projection: hidden to [queries | keys | values] of all heads.
        output: heads back to hidden.
    """

    def __init__(self, *, projection: Linear, output: Linear, num_heads: int) -> None:
        self._projection = projection
        self._output = output
        self._num_heads = num_heads

    def __call__(self, x: Tensor, angles: RotaryAngles) -> Tensor:
        """Map (patches, hidden) to (patches, hidden)."""
        heads = torch.unflatten(self._projection(x), -1, (3, self._num_heads, -1))
        q, k, v = angles.rotate(heads[:, 0]), angles.rotate(heads[:, 1]), heads[:, 2]
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        )
        return self._output(out[0].transpose(0, 1).flatten(1))


def in_merge_order(grid: Tensor, merge_size: int) -> Tensor:
    """Return a (rows, columns, ...) grid of patches as (patches, ...), square by square.

    The `merge_size` x `merge_size` patches that become one token lie side by side.
    """
    rows, columns = grid.shape[:2]
    squares = grid.reshape(
        rows // merge_size, merge_size, columns // merge_size, merge_size, *grid.shape[2:]
    )
    return squares.transpose(1, 2).flatten(0, 3)


def to_patches(pixels: Tensor, patch_size: int, merge_size: int) -> Tensor:
    """Cut (height, width, 3) into (patches, 3 * patch_size ** 2), channel by channel in each."""
    height, width, channels = pixels.shape
    grid = pixels.reshape(
        height // patch_size, patch_size, width // patch_size, patch_size, channels
    )
    grid = grid.permute(0, 2, 4, 1, 3).flatten(2)
    return in_merge_order(grid, merge_size)


def interpolate_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """Stretch a square of learned positions over a grid, corner to corner.

    Args:
        table: (side, side, hidden).

    Returns:
        (rows, columns, hidden).
    """
    low, high, share = _between(table.shape[0], rows, table.device)
    tall = torch.lerp(table[low].float(), table[high].float(), share[:, None, None])
    low, high, share = _between(table.shape[1], columns, table.device)
    return torch.lerp(tall[:, low], tall[:, high], share[None, :, None]).to(table.dtype)


def _between(side: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Spread `count` points over `side` ones; return the ones around each, and how far between."""
    at = torch.arange(count, dtype=torch.float32, device=device) * ((side - 1) / max(count - 1, 1))
    low = at.floor().clamp(max=side - 1)
    high = (low + 1).clamp(max=side - 1)
    return low.long(), high.long(), at - low
