"""What the neuron wants to know of a checkpoint before an engine loads it; imports no torch."""

import functools
import math
import pathlib

import msgspec

from cortex.core.errors import CheckpointError
from cortex.neuron.models.config import CheckpointConfig, read_hf_config
from cortex.neuron.models.gguf_file import GgufFile, num_elements, read_gguf_config
from cortex.neuron.models.hf_files import list_text_tensors
from cortex.neuron.models.source import ModelSource

_MAX_REMEMBERED = 64


class ModelFacts(msgspec.Struct, kw_only=True, frozen=True):
    """A checkpoint's size, limits and generation defaults.

    `weight_bytes` and `num_parameters` count the text model's tensors as stored in the files.
    """

    family: str
    max_position_embeddings: int
    vocab_size: int
    weight_bytes: int
    num_parameters: int
    kv_elements_per_token: int
    state_bytes_per_slot_f32: int
    eos_ids: list[int]
    default_temperature: float | None = None
    default_top_p: float | None = None
    default_top_k: int | None = None


def describe(source: ModelSource) -> ModelFacts:
    """Return a checkpoint's facts, from its configuration and tensor headers alone.

    Raises:
        CheckpointError: the checkpoint cannot be read or is not supported.
    """
    path = pathlib.Path(source.path)
    if source.kind == "hf":
        config = read_hf_config(path)
        tensors = list_text_tensors(path)
        return _facts(
            config,
            weight_bytes=sum(t.num_bytes for t in tensors.values()),
            num_parameters=sum(math.prod(t.shape) for t in tensors.values()),
        )
    try:
        status = path.stat()
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}") from exc
    return _describe_gguf(path, status.st_mtime_ns, status.st_size)


# Reading the vocabulary of a GGUF file takes seconds, so what was seen is kept until it changes.
@functools.lru_cache(maxsize=_MAX_REMEMBERED)
def _describe_gguf(path: pathlib.Path, _mtime_ns: int, _size: int) -> ModelFacts:
    file = GgufFile(path)
    return _facts(
        read_gguf_config(file),
        weight_bytes=sum(int(t.n_bytes) for t in file.tensors.values()),
        num_parameters=sum(num_elements(t) for t in file.tensors.values()),
    )


def _facts(config: CheckpointConfig, *, weight_bytes: int, num_parameters: int) -> ModelFacts:
    model, generation = config.model, config.generation
    return ModelFacts(
        family=model.family,
        max_position_embeddings=model.max_position_embeddings,
        vocab_size=model.vocab_size,
        weight_bytes=weight_bytes,
        num_parameters=num_parameters,
        kv_elements_per_token=model.kv_elements_per_token,
        state_bytes_per_slot_f32=4 * model.state_elements_per_slot,
        eos_ids=list(generation.eos_ids),
        default_temperature=generation.temperature,
        default_top_p=generation.top_p,
        default_top_k=generation.top_k,
    )
