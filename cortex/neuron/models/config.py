"""What a checkpoint's configuration says, as checked structs; imports no torch.

`read_hf_config` parses the `config.json` and `generation_config.json` of a Hugging Face layout
directory; `cortex.neuron.models.gguf_file` makes the same structs from a GGUF file.
"""

import pathlib
from typing import Annotated, Literal

import msgspec

from cortex.core.errors import CheckpointError
from cortex.neuron.models.hf_files import has_vision_tower, read_json
from cortex.neuron.models.vision_config import RawVision, VisionConfig, make_vision_config

SUPPORTED_MODEL_TYPES = ("llama", "qwen3_5", "qwen3_5_text")

_Positive = Annotated[int, msgspec.Meta(gt=0)]
_Family = Literal["llama", "qwen3_5"]
_SILU_NAMES = ("silu", "swish")
_DEFAULT_THETA = 10_000.0


class RopeConfig(msgspec.Struct, kw_only=True, frozen=True):
    """Rotary embedding: which leading dimensions of a head turn, and how fast."""

    rotary_dim: int
    theta: float = _DEFAULT_THETA
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    # Divisors of the frequencies, one for each pair of dimensions; GGUF stores llama3 scaling so.
    freq_factors: tuple[float, ...] = ()
    # Pairs that turn by an image token's row and by its column, interleaved with those that turn
    # by its time; None: a token has one position.
    image_sections: tuple[int, int] | None = None


class GdnConfig(msgspec.Struct, kw_only=True, frozen=True):
    """Shapes of the Gated DeltaNet layers."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: queries, keys and values of all heads."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim


class ModelConfig(msgspec.Struct, kw_only=True, frozen=True):
    """Everything that fixes a model's shapes and maths."""

    family: _Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    # None: the head is tied when the checkpoint has no tensor for it.
    tied_head: bool | None
    # False: loaded for its hidden states alone.
    has_head: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    gdn: GdnConfig | None = None
    # None: the checkpoint has no vision tower, or its weights are not there.
    vision: VisionConfig | None = None
    # Indices of the layers that attend; the others are GDN layers.
    attention_layers: tuple[int, ...]

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers of K and V that one token adds over all layers."""
        return 2 * len(self.attention_layers) * self.num_kv_heads * self.head_dim

    @property
    def state_elements_per_slot(self) -> int:
        """Numbers of convolution windows and recurrent states of one sequence."""
        if self.gdn is None:
            return 0
        recurrent = self.gdn.num_value_heads * self.gdn.value_dim * self.gdn.key_dim
        window = (self.gdn.conv_width - 1) * self.gdn.conv_dim
        return (self.num_layers - len(self.attention_layers)) * (recurrent + window)


class GenerationDefaults(msgspec.Struct, kw_only=True, frozen=True):
    """What the checkpoint's author recommends for generation; None where nothing is said."""

    eos_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class CheckpointConfig(msgspec.Struct, kw_only=True, frozen=True):
    """A model's configuration and its generation defaults."""

    model: ModelConfig
    generation: GenerationDefaults


class _RawRope(msgspec.Struct, kw_only=True):
    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    mrope_section: list[int] | None = None
    mrope_interleaved: bool | None = None


class _RawText(msgspec.Struct, kw_only=True):
    model_type: str | None = None
    vocab_size: _Positive | None = None
    hidden_size: _Positive | None = None
    intermediate_size: _Positive | None = None
    num_hidden_layers: _Positive | None = None
    num_attention_heads: _Positive | None = None
    num_key_value_heads: _Positive | None = None
    head_dim: _Positive | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: _Positive | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    rope_parameters: _RawRope | None = None
    rope_scaling: _RawRope | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = True
    layer_types: list[str] | None = None
    full_attention_interval: _Positive | None = None
    linear_conv_kernel_dim: _Positive = 4
    linear_key_head_dim: _Positive = 128
    linear_value_head_dim: _Positive = 128
    linear_num_key_heads: _Positive = 16
    linear_num_value_heads: _Positive = 32
    attn_output_gate: bool | None = None
    output_gate_type: str | None = None
    eos_token_id: int | list[int] | None = None


class _RawQuantization(msgspec.Struct, kw_only=True):
    quant_method: str | None = None


class _RawConfig(_RawText, kw_only=True):
    text_config: _RawText | None = None
    vision_config: RawVision | None = None
    image_token_id: int | None = None
    quantization_config: _RawQuantization | None = None


class _RawGeneration(msgspec.Struct, kw_only=True):
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_id: int | list[int] | None = None


def read_hf_config(directory: pathlib.Path) -> CheckpointConfig:
    """Parse the configuration of a Hugging Face layout directory.

    Raises:
        CheckpointError: a file is missing or malformed, or asks for what is not supported.
    """
    path = directory / "config.json"
    raw = read_json(path, _RawConfig)
    model_type = raw.model_type
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise CheckpointError(
            f"{path}: model_type {model_type!r} is not supported; "
            f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    quantization = raw.quantization_config
    if quantization is not None and quantization.quant_method != "fp8":
        raise CheckpointError(
            f"{path}: quantization {quantization.quant_method!r} is not supported; "
            "use the unquantised checkpoint, an fp8 one or a GGUF file"
        )
    text = raw.text_config if raw.text_config is not None else raw
    family: _Family = "llama" if model_type == "llama" else "qwen3_5"
    tied = text.tie_word_embeddings
    if tied is None or (
        raw.text_config is not None and raw.tie_word_embeddings not in (None, tied)
    ):
        # Silent or contradictory: the presence of the head's tensor decides.
        tied = raw.tie_word_embeddings if tied is None else None
    vision = None
    if raw.vision_config is not None and has_vision_tower(directory):
        vision = _vision_config(raw, raw.vision_config, text, directory)
    model = _model_config(text, family=family, tied=tied, path=path, vision=vision)
    generation = _generation_defaults(directory, [raw.eos_token_id, text.eos_token_id])
    return CheckpointConfig(model=model, generation=generation)


def _vision_config(
    raw: _RawConfig, tower: RawVision, text: _RawText, directory: pathlib.Path
) -> VisionConfig:
    path = directory / "config.json"
    rope = text.rope_parameters or text.rope_scaling or _RawRope()
    if rope.mrope_interleaved is False:
        raise CheckpointError(f"{path}: positions of images in blocks are not supported")
    image_token_id = _required(raw.image_token_id, "image_token_id", path)
    if not 0 <= image_token_id < (text.vocab_size or 0):
        raise CheckpointError(f"{path}: image_token_id {image_token_id} is outside the vocabulary")
    vision = make_vision_config(tower, image_token_id=image_token_id, directory=directory)
    if vision.out_hidden_size != text.hidden_size:
        raise CheckpointError(
            f"{path}: the vision tower makes tokens of {vision.out_hidden_size} numbers, the "
            f"language model takes {text.hidden_size}"
        )
    return vision


def _model_config(
    text: _RawText,
    *,
    family: _Family,
    tied: bool | None,
    path: pathlib.Path,
    vision: VisionConfig | None,
) -> ModelConfig:
    _refuse_unsupported(text, path)
    hidden_size = _required(text.hidden_size, "hidden_size", path)
    num_heads = _required(text.num_attention_heads, "num_attention_heads", path)
    num_layers = _required(text.num_hidden_layers, "num_hidden_layers", path)
    num_kv_heads = text.num_key_value_heads or num_heads
    head_dim = text.head_dim or hidden_size // num_heads
    is_hybrid = family == "qwen3_5"
    config = ModelConfig(
        family=family,
        vocab_size=_required(text.vocab_size, "vocab_size", path),
        hidden_size=hidden_size,
        intermediate_size=_required(text.intermediate_size, "intermediate_size", path),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=text.rms_norm_eps,
        max_position_embeddings=text.max_position_embeddings or (32768 if is_hybrid else 2048),
        rope=_rope_config(text, head_dim, default_partial=0.25 if is_hybrid else 1.0, path=path),
        tied_head=tied,
        attention_bias=text.attention_bias,
        mlp_bias=text.mlp_bias,
        gdn=_gdn_config(text) if is_hybrid else None,
        vision=vision,
        attention_layers=_attention_layers(text, num_layers, is_hybrid=is_hybrid, path=path),
    )
    check_shapes(config, path)
    return config


def check_shapes(config: ModelConfig, path: pathlib.Path) -> None:
    """Raise CheckpointError where head counts or the rotary dimension do not fit together."""
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"{path}: {config.num_heads} attention heads cannot share "
            f"{config.num_kv_heads} key/value heads evenly"
        )
    if config.rope.rotary_dim % 2 or not 0 < config.rope.rotary_dim <= config.head_dim:
        raise CheckpointError(
            f"{path}: {config.rope.rotary_dim} rotary dimensions do not fit heads of "
            f"{config.head_dim}; an even number from 2 on is needed"
        )
    gdn = config.gdn
    if gdn is not None and gdn.num_value_heads % gdn.num_key_heads:
        raise CheckpointError(
            f"{path}: {gdn.num_value_heads} linear value heads cannot share "
            f"{gdn.num_key_heads} linear key heads evenly"
        )


def _refuse_unsupported(text: _RawText, path: pathlib.Path) -> None:
    if text.hidden_act not in _SILU_NAMES:
        raise CheckpointError(f"{path}: hidden_act {text.hidden_act!r} is not supported, only silu")
    if text.sliding_window is not None and text.use_sliding_window:
        raise CheckpointError(f"{path}: sliding-window attention is not supported")
    if text.attn_output_gate is False:
        raise CheckpointError(f"{path}: attention without an output gate is not supported")
    if text.output_gate_type not in (None, *_SILU_NAMES):
        raise CheckpointError(
            f"{path}: output_gate_type {text.output_gate_type!r} is not supported, only swish"
        )


def _required(value: int | None, name: str, path: pathlib.Path) -> int:
    if value is None:
        raise CheckpointError(f"{path}: {name} is missing")
    return value


def _gdn_config(text: _RawText) -> GdnConfig:
    return GdnConfig(
        num_key_heads=text.linear_num_key_heads,
        num_value_heads=text.linear_num_value_heads,
        key_dim=text.linear_key_head_dim,
        value_dim=text.linear_value_head_dim,
        conv_width=text.linear_conv_kernel_dim,
    )


def _attention_layers(
    text: _RawText, num_layers: int, *, is_hybrid: bool, path: pathlib.Path
) -> tuple[int, ...]:
    allowed = {"full_attention", "linear_attention"} if is_hybrid else {"full_attention"}
    types = text.layer_types
    if types is None:
        interval = (text.full_attention_interval or 4) if is_hybrid else 1
        return tuple(i for i in range(num_layers) if (i + 1) % interval == 0)
    if len(types) != num_layers:
        raise CheckpointError(
            f"{path}: layer_types names {len(types)} layers, num_hidden_layers says {num_layers}"
        )
    unknown = sorted(set(types) - allowed)
    if unknown:
        raise CheckpointError(f"{path}: layers of type {unknown[0]!r} are not supported")
    return tuple(i for i, kind in enumerate(types) if kind == "full_attention")


def _rope_config(
    text: _RawText, head_dim: int, *, default_partial: float, path: pathlib.Path
) -> RopeConfig:
    rope = text.rope_parameters or text.rope_scaling or _RawRope()
    partial = _first(rope.partial_rotary_factor, text.partial_rotary_factor, default_partial)
    theta = _first(rope.rope_theta, text.rope_theta, _DEFAULT_THETA)
    rotary_dim = int(head_dim * partial)
    kind = rope.rope_type or rope.type or "default"
    match kind:
        # In a text-only prompt the three positions of "mrope" are equal: plain rotation.
        case "default" | "mrope":
            sections = rope.mrope_section
            if sections is not None and len(sections) != 3:
                raise CheckpointError(f"{path}: mrope_section has to name three numbers")
            return RopeConfig(
                rotary_dim=rotary_dim,
                theta=theta,
                image_sections=None if sections is None else (sections[1], sections[2]),
            )
        case "linear" if rope.factor:
            return RopeConfig(rotary_dim=rotary_dim, theta=theta, kind="linear", factor=rope.factor)
        case "llama3" if rope.factor and rope.original_max_position_embeddings:
            return RopeConfig(
                rotary_dim=rotary_dim,
                theta=theta,
                kind="llama3",
                factor=rope.factor,
                low_freq_factor=_first(rope.low_freq_factor, 1.0),
                high_freq_factor=_first(rope.high_freq_factor, 4.0),
                original_max_positions=rope.original_max_position_embeddings,
            )
        case "linear" | "llama3":
            raise CheckpointError(f"{path}: rope scaling {kind!r} lacks its factors")
        case _:
            raise CheckpointError(
                f"{path}: rope scaling {kind!r} is not supported; "
                "supported are default, linear and llama3"
            )


def _first(*values: float | None) -> float:
    """Return the first value that is given; the last one always is."""
    return next(value for value in values if value is not None)


def _generation_defaults(
    directory: pathlib.Path, eos_of_config: list[int | list[int] | None]
) -> GenerationDefaults:
    path = directory / "generation_config.json"
    raw = read_json(path, _RawGeneration) if path.exists() else _RawGeneration()
    eos_ids: list[int] = []
    for entry in [*eos_of_config, raw.eos_token_id]:
        eos_ids.extend(entry if isinstance(entry, list) else [] if entry is None else [entry])
    return GenerationDefaults(
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        # An explicit `do_sample: false` means greedy.
        temperature=0.0 if raw.do_sample is False else raw.temperature,
        top_p=raw.top_p,
        top_k=raw.top_k,
        min_p=raw.min_p,
        repetition_penalty=raw.repetition_penalty,
    )
