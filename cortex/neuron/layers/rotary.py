"""Rotary position embedding (rotate-half form) over the leading dimensions of each head."""

import math

import torch
from torch import Tensor


def inverse_frequencies(rotary_dim: int, theta: float) -> Tensor:
    """Return theta ** (-2 i / rotary_dim) for each pair i, (rotary_dim / 2,) float32."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    return 1.0 / theta**exponents


def llama3_frequencies(
    frequencies: Tensor,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_positions: int,
) -> Tensor:
    """Stretch slow rotations by `factor`, keep fast ones, and blend in between.

    A rotation is slow when its wavelength is over original_max_positions / low_freq_factor and
    fast when it is under original_max_positions / high_freq_factor.
    """
    turns = original_max_positions * frequencies / (2 * math.pi)
    blend = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return frequencies * (blend + (1.0 - blend) / factor)


def interleaved_axes(num_pairs: int, sections: tuple[int, int]) -> Tensor:
    """Return which of a token's positions each pair turns by: (num_pairs,) int64 of 0, 1 and 2.

    Time (0), row (1) and column (2) alternate as long as rows and columns have pairs left; time
    takes the rest.
    """
    axes = torch.zeros(num_pairs, dtype=torch.int64)
    for axis, count in enumerate(sections, start=1):
        axes[axis : 3 * count : 3] = axis
    return axes


class RotaryAngles:
    """Cosines and sines of one step's positions, shared by all layers.

    Args:
        frequencies: (rotary_dim / 2,) float32, radians per position.
        positions: (N,) int64, or (A, N) where a token has several.
        dtype: of the heads to be rotated.
        axes: (rotary_dim / 2,) int64, which of several positions each pair turns by.
    """

    def __init__(
        self,
        frequencies: Tensor,
        positions: Tensor,
        dtype: torch.dtype,
        axes: Tensor | None = None,
    ) -> None:
        if positions.ndim > 1:
            assert axes is not None, "several positions a token, and no axes"
            spread = positions.index_select(0, axes).T
        else:
            spread = positions[:, None]
        angles = spread.to(torch.float32) * frequencies
        cos, sin = angles.cos(), angles.sin()
        # The sign of rotate-half is folded into the sines.
        self._cos = torch.cat((cos, cos), dim=-1)[:, None].to(dtype)
        self._sin = torch.cat((-sin, sin), dim=-1)[:, None].to(dtype)
        self._half = frequencies.shape[0]

    def rotate(self, heads: Tensor) -> Tensor:
        """Return heads, (N, heads, head_dim), rotated by their token's position."""
        dim = 2 * self._half
        turning = heads if heads.shape[-1] == dim else heads[..., :dim]
        turned = torch.addcmul(turning * self._cos, turning.roll(self._half, dims=-1), self._sin)
        if heads.shape[-1] == dim:
            return turned
        return torch.cat((turned, heads[..., dim:]), dim=-1)
