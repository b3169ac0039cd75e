"""Configuration and tensor list of a GGUF file of the llama architecture; imports no torch."""

import math
import pathlib
from typing import Any

import gguf

from cortex.core.errors import CheckpointError
from cortex.neuron.models.config import (
    CheckpointConfig,
    GenerationDefaults,
    ModelConfig,
    RopeConfig,
    check_shapes,
)

ROPE_FACTORS_NAME = "rope_freqs.weight"
_ARCHITECTURE = "llama"
_MISSING = object()


class GgufFile:
    """An open GGUF file: metadata by key, tensors by name (memory-mapped).

    Raises:
        CheckpointError: the file cannot be read, is cut short or is of another architecture.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except OSError as exc:
            raise CheckpointError(f"cannot read {path}: {exc.strerror or exc}") from exc
        except (ValueError, KeyError, IndexError, OverflowError) as exc:
            raise CheckpointError(f"{path} is not a complete GGUF file: {exc}") from exc
        self._fields = reader.fields
        self.tensors: dict[str, gguf.ReaderTensor] = {t.name: t for t in reader.tensors}
        architecture = self.value("general.architecture")
        if architecture != _ARCHITECTURE:
            raise CheckpointError(
                f"{path}: GGUF architecture {architecture!r} is not supported; "
                f"supported is {_ARCHITECTURE}"
            )

    def value(self, key: str, default: Any = _MISSING) -> Any:
        """Return a metadata value; without a default, raise CheckpointError if it is missing."""
        field = self._fields.get(key)
        if field is not None:
            return field.contents()
        if default is _MISSING:
            raise CheckpointError(f"{self.path}: metadata {key!r} is missing")
        return default


def read_gguf_config(file: GgufFile) -> CheckpointConfig:
    """Return the configuration that a GGUF file's metadata describe.

    Raises:
        CheckpointError: metadata are missing or ask for what is not supported.
    """
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
        vocab_size=int(embedding.shape[1]),
        hidden_size=hidden_size,
        intermediate_size=_count(file, "llama.feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_count(file, "llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=float(file.value("llama.attention.layer_norm_rms_epsilon", 1e-5)),
        max_position_embeddings=_count(file, "llama.context_length"),
        rope=_rope_config(file, head_dim),
        tied_head=None,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_layers=tuple(range(num_layers)),
    )
    check_shapes(model, file.path)
    eos_keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    eos_ids = [file.value(key, None) for key in eos_keys]
    eos = tuple(dict.fromkeys(int(eos_id) for eos_id in eos_ids if eos_id is not None))
    return CheckpointConfig(model=model, generation=GenerationDefaults(eos_ids=eos))


def tensor_shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """Return a tensor's shape with rows first; GGUF lists the fastest dimension first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def num_elements(tensor: gguf.ReaderTensor) -> int:
    """Return how many numbers a tensor holds."""
    return math.prod(tensor_shape(tensor))


def _count(file: GgufFile, key: str, default: Any = _MISSING) -> int:
    value = file.value(key, default)
    if not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"{file.path}: metadata {key!r} is {value!r}, not a positive number")
    return value


def _rope_config(file: GgufFile, head_dim: int) -> RopeConfig:
    rotary_dim = _count(file, "llama.rope.dimension_count", head_dim)
    theta = float(file.value("llama.rope.freq_base", 10_000.0))
    kind = file.value("llama.rope.scaling.type", "none")
    factors = file.tensors.get(ROPE_FACTORS_NAME)
    freq_factors = () if factors is None else tuple(float(f) for f in factors.data)
    if freq_factors and len(freq_factors) != rotary_dim // 2:
        raise CheckpointError(
            f"{file.path}: tensor {ROPE_FACTORS_NAME!r} has {len(freq_factors)} entries, "
            f"{rotary_dim // 2} are needed"
        )
    match kind:
        case "none":
            return RopeConfig(rotary_dim=rotary_dim, theta=theta, freq_factors=freq_factors)
        case "linear":
            factor = float(file.value("llama.rope.scaling.factor"))
            return RopeConfig(rotary_dim=rotary_dim, theta=theta, kind="linear", factor=factor)
        case _:
            raise CheckpointError(
                f"{file.path}: rope scaling {kind!r} is not supported; supported are none, linear"
            )
