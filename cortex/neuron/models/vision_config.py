"""What a checkpoint says of its vision tower, and what size an image is brought to for it.

Imports no torch: the neuron counts an image's tokens before any weights are loaded.
"""

import math
import pathlib
from typing import Annotated

import msgspec

from cortex.core.errors import CheckpointError
from cortex.neuron.models.hf_files import read_json

# Sides further apart than this make strips of a few pixels that no tower was trained on.
MAX_ASPECT_RATIO = 200
CHANNELS = 3

_Positive = Annotated[int, msgspec.Meta(gt=0)]
_ACTIVATION = "gelu_pytorch_tanh"


class ImageSize(msgspec.Struct, frozen=True):
    """An image's size in pixels."""

    width: int
    height: int


class ImageRules(msgspec.Struct, kw_only=True, frozen=True):
    """How an image is prepared: the least and most pixels, and the normalisation of colours."""

    min_pixels: _Positive = 1 << 16
    max_pixels: _Positive = 1 << 24
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


class VisionConfig(msgspec.Struct, kw_only=True, frozen=True):
    """Shapes of a vision tower.

    Attributes:
        merge_size: so many patches each way become one token.
        out_hidden_size: of the language model's tokens.
        grid_side: of the square of learned positions.
        image_token_id: stands in a prompt for each of an image's tokens.
    """

    depth: _Positive
    hidden_size: _Positive
    intermediate_size: _Positive
    num_heads: _Positive
    patch_size: _Positive
    merge_size: _Positive
    temporal_patch_size: _Positive
    out_hidden_size: _Positive
    grid_side: _Positive
    image_token_id: int
    rope_theta: float = 10_000.0
    rules: ImageRules = ImageRules()

    @property
    def token_side(self) -> int:
        """Pixels that one token covers each way; a size is a multiple of it."""
        return self.patch_size * self.merge_size

    def num_tokens(self, size: ImageSize) -> int:
        """Return the tokens of an image that has its final size."""
        return (size.width // self.token_side) * (size.height // self.token_side)

    def final_size(self, size: ImageSize, max_pixels: int | None = None) -> ImageSize:
        """Return the size that an image is brought to, near its aspect ratio.

        Args:
            max_pixels: a bound below the checkpoint's own.

        Raises:
            ValueError: one side is over `MAX_ASPECT_RATIO` times the other.
        """
        width, height, side = size.width, size.height, self.token_side
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise ValueError(f"one side is over {MAX_ASPECT_RATIO} times the other")
        most = min(self.rules.max_pixels, max_pixels or self.rules.max_pixels)
        least = min(self.rules.min_pixels, most)
        # Banker's rounding, as the towers were trained with.
        wide, high = (round(each / side) * side for each in (width, height))
        if wide * high > most:
            shrink = math.sqrt(width * height / most)
            wide, high = (
                max(side, math.floor(each / shrink / side) * side) for each in (width, height)
            )
        elif wide * high < least:
            grow = math.sqrt(least / (width * height))
            wide, high = (math.ceil(each * grow / side) * side for each in (width, height))
        return ImageSize(wide, high)


class _RawRope(msgspec.Struct, kw_only=True):
    rope_theta: float = 10_000.0


class RawVision(msgspec.Struct, kw_only=True):
    """`vision_config` of a config.json."""

    depth: _Positive = 27
    hidden_size: _Positive = 1152
    hidden_act: str = _ACTIVATION
    intermediate_size: _Positive = 4304
    num_heads: _Positive = 16
    in_channels: _Positive = CHANNELS
    patch_size: _Positive = 16
    spatial_merge_size: _Positive = 2
    temporal_patch_size: _Positive = 2
    out_hidden_size: _Positive = 3584
    num_position_embeddings: _Positive = 2304
    deepstack_visual_indexes: list[int] = []
    rope_parameters: _RawRope = msgspec.field(default_factory=_RawRope)


class _RawSize(msgspec.Struct, kw_only=True):
    shortest_edge: _Positive | None = None
    longest_edge: _Positive | None = None


class _RawProcessor(msgspec.Struct, kw_only=True):
    size: _RawSize = msgspec.field(default_factory=_RawSize)
    min_pixels: _Positive | None = None
    max_pixels: _Positive | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None


class _RawProcessors(msgspec.Struct, kw_only=True):
    image_processor: _RawProcessor | None = None


def make_vision_config(
    raw: RawVision, *, image_token_id: int, directory: pathlib.Path
) -> VisionConfig:
    """Return the checked configuration of a tower, with the rules of the directory's files.

    Raises:
        CheckpointError: it asks for what is not supported, or a file is malformed.
    """
    path = directory / "config.json"
    if raw.hidden_act != _ACTIVATION:
        raise CheckpointError(
            f"{path}: a vision tower with hidden_act {raw.hidden_act!r} is not supported, "
            f"only {_ACTIVATION}"
        )
    if raw.deepstack_visual_indexes:
        raise CheckpointError(f"{path}: vision towers with deepstack layers are not supported")
    if raw.in_channels != CHANNELS:
        raise CheckpointError(f"{path}: a vision tower has to take {CHANNELS} colour channels")
    head_dim, left = divmod(raw.hidden_size, raw.num_heads)
    grid_side = math.isqrt(raw.num_position_embeddings)
    if left or head_dim % 4 or grid_side**2 != raw.num_position_embeddings:
        raise CheckpointError(
            f"{path}: a vision tower of {raw.num_heads} heads over {raw.hidden_size} with "
            f"{raw.num_position_embeddings} positions does not fit together"
        )
    return VisionConfig(
        depth=raw.depth,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_heads=raw.num_heads,
        patch_size=raw.patch_size,
        merge_size=raw.spatial_merge_size,
        temporal_patch_size=raw.temporal_patch_size,
        out_hidden_size=raw.out_hidden_size,
        grid_side=grid_side,
        image_token_id=image_token_id,
        rope_theta=raw.rope_parameters.rope_theta,
        rules=_rules(directory),
    )


def _rules(directory: pathlib.Path) -> ImageRules:
    """Return the rules in preprocessor_config.json, else processor_config.json, else defaults."""
    raw: _RawProcessor | None = None
    path = directory / "preprocessor_config.json"
    if path.exists():
        raw = read_json(path, _RawProcessor)
    else:
        path = directory / "processor_config.json"
        if path.exists():
            raw = read_json(path, _RawProcessors).image_processor
    if raw is None:
        return ImageRules()
    defaults = ImageRules()
    rules = ImageRules(
        min_pixels=raw.min_pixels or raw.size.shortest_edge or defaults.min_pixels,
        max_pixels=raw.max_pixels or raw.size.longest_edge or defaults.max_pixels,
        mean=raw.image_mean or defaults.mean,
        std=raw.image_std or defaults.std,
    )
    if rules.min_pixels > rules.max_pixels or not all(rules.std):
        raise CheckpointError(
            f"{path}: images of {rules.min_pixels} to {rules.max_pixels} pixels, divided by "
            f"{list(rules.std)}, cannot be made"
        )
    return rules
