"""What the neuron wants to know of a checkpoint before an engine loads it; imports no torch."""

import math
import pathlib
from collections.abc import Iterable

import msgspec

from cortex.neuron.models.config import CheckpointConfig, read_hf_config
from cortex.neuron.models.gguf_config import read_gguf_config
from cortex.neuron.models.gguf_file import GgufTensor, read_gguf
from cortex.neuron.models.hf_files import StoredTensor, list_tensors
from cortex.neuron.models.source import ModelSource


class ModelFacts(msgspec.Struct, kw_only=True, frozen=True):
    """A checkpoint's size and limits.

    `weight_bytes` and `num_parameters` count the tensors that are loaded, as stored in the files;
    `takes_images` says that a vision tower is among them.
    """

    family: str
    max_position_embeddings: int
    vocab_size: int
    weight_bytes: int
    num_parameters: int
    kv_elements_per_token: int
    state_bytes_per_slot_f32: int
    takes_images: bool = False


def describe(source: ModelSource) -> ModelFacts:
    """Return a checkpoint's facts, from its configuration and tensor headers alone.

    Raises:
        CheckpointError: the checkpoint cannot be read or is not supported.
    """
    config = read_config(source).model
    path = pathlib.Path(source.path)
    tensors: Iterable[StoredTensor | GgufTensor]
    if source.kind == "gguf":
        tensors = read_gguf(path).tensors.values()
    else:
        tensors = list_tensors(path, with_vision=config.vision is not None).values()
    return ModelFacts(
        family=config.family,
        max_position_embeddings=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        weight_bytes=sum(each.num_bytes for each in tensors),
        num_parameters=sum(math.prod(each.shape) for each in tensors),
        kv_elements_per_token=config.kv_elements_per_token,
        state_bytes_per_slot_f32=4 * config.state_elements_per_slot,
        takes_images=config.vision is not None,
    )


def read_config(source: ModelSource) -> CheckpointConfig:
    """Return a checkpoint's configuration and generation defaults.

    Raises:
        CheckpointError: a file is missing or malformed, or asks for what is not supported.
    """
    path = pathlib.Path(source.path)
    return read_gguf_config(read_gguf(path)) if source.kind == "gguf" else read_hf_config(path)
