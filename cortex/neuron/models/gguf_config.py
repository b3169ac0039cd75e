"""The configuration that the metadata of a llama GGUF file describe; imports no torch."""

from typing import Any

import gguf
import numpy as np

from cortex.core.errors import CheckpointError
from cortex.neuron.models.config import (
    CheckpointConfig,
    GenerationDefaults,
    ModelConfig,
    RopeConfig,
    check_shapes,
)
from cortex.neuron.models.gguf_file import GgufFile

_ROPE_FACTORS = "rope_freqs.weight"
_ARCHITECTURE = "llama"


def read_gguf_config(file: GgufFile) -> CheckpointConfig:
    """Return the configuration that a GGUF file's metadata describe.

    Raises:
        CheckpointError: metadata are missing or ask for what is not supported.
    """
    architecture = file.value("general.architecture")
    if architecture != _ARCHITECTURE:
        raise CheckpointError(
            f"{file.path}: GGUF architecture {architecture!r} is not supported; "
            f"supported is {_ARCHITECTURE}"
        )
    num_heads = _count(file, "llama.attention.head_count")
    hidden_size = _count(file, "llama.embedding_length")
    head_dim = _count(file, "llama.attention.key_length", hidden_size // num_heads)
    num_layers = _count(file, "llama.block_count")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' is missing")
    if file.value("llama.expert_count", 0):
        raise CheckpointError(f"{file.path}: mixture-of-experts models are not supported")
    model = ModelConfig(
        family="llama",
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=_count(file, "llama.feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_count(file, "llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=_number(file, "llama.attention.layer_norm_rms_epsilon", 1e-5),
        max_position_embeddings=_count(file, "llama.context_length"),
        rope=_rope_config(file, head_dim),
        tied_head=None,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_layers=tuple(range(num_layers)),
    )
    check_shapes(model, file.path)
    return CheckpointConfig(model=model, generation=_generation_defaults(file))


def _generation_defaults(file: GgufFile) -> GenerationDefaults:
    ends = (file.value(f"tokenizer.ggml.{name}_token_id", None) for name in ("eos", "eot"))
    return GenerationDefaults(
        eos_ids=tuple(dict.fromkeys(each for each in ends if isinstance(each, int))),
        temperature=_optional(file, "general.sampling.temp"),
        top_p=_optional(file, "general.sampling.top_p"),
        min_p=_optional(file, "general.sampling.min_p"),
    )


def _count(file: GgufFile, key: str, *default: Any) -> int:
    value = file.value(key, *default)
    if not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"{file.path}: metadata {key!r} is {value!r}, not a positive number")
    return value


def _number(file: GgufFile, key: str, *default: Any) -> float:
    value = file.value(key, *default)
    if not isinstance(value, int | float):
        raise CheckpointError(f"{file.path}: metadata {key!r} is {value!r}, not a number")
    return float(value)


def _optional(file: GgufFile, key: str) -> float | None:
    return _number(file, key) if key in file.metadata else None


def _rope_config(file: GgufFile, head_dim: int) -> RopeConfig:
    rotary_dim = _count(file, "llama.rope.dimension_count", head_dim)
    theta = _number(file, "llama.rope.freq_base", 10_000.0)
    kind = file.value("llama.rope.scaling.type", "none")
    freq_factors = _freq_factors(file)
    if freq_factors and len(freq_factors) != rotary_dim // 2:
        raise CheckpointError(
            f"{file.path}: tensor {_ROPE_FACTORS!r} has {len(freq_factors)} entries, "
            f"{rotary_dim // 2} are needed"
        )
    match kind:
        case "none":
            return RopeConfig(rotary_dim=rotary_dim, theta=theta, freq_factors=freq_factors)
        case "linear":
            factor = _number(file, "llama.rope.scaling.factor")
            return RopeConfig(rotary_dim=rotary_dim, theta=theta, kind="linear", factor=factor)
        case _:
            raise CheckpointError(
                f"{file.path}: rope scaling {kind!r} is not supported; supported are none, linear"
            )


def _freq_factors(file: GgufFile) -> tuple[float, ...]:
    stored = file.tensors.get(_ROPE_FACTORS)
    if stored is None:
        return ()
    if stored.kind != gguf.GGMLQuantizationType.F32:
        raise CheckpointError(
            f"{file.path}: tensor {_ROPE_FACTORS!r} is {stored.kind.name}, it has to be F32"
        )
    return tuple(float(factor) for factor in file.read(stored).view(np.float32))
