"""What the neuron wants to know of a checkpoint before an engine loads it; imports no torch."""

import math
import pathlib
from collections.abc import Iterable

import msgspec

from cortex.neuron.models.config import CheckpointConfig, read_hf_config
from cortex.neuron.models.embedding_config import EmbeddingSpec, read_embedding_spec
from cortex.neuron.models.encoder_config import read_encoder_config
from cortex.neuron.models.gguf_config import read_gguf_config
from cortex.neuron.models.gguf_file import GgufTensor, read_gguf
from cortex.neuron.models.hf_files import StoredTensor, list_encoder_tensors, list_tensors
from cortex.neuron.models.source import ModelSource


class ModelFacts(msgspec.Struct, kw_only=True, frozen=True):
    """A checkpoint's size and limits.

    `weight_bytes` and `num_parameters` count the tensors that are loaded, as stored in the files;
    `takes_images` says that a vision tower is among them; `embedding` says how a model makes
    vectors, None for one that is made to write.
    """

    family: str
    max_position_embeddings: int
    vocab_size: int
    weight_bytes: int
    num_parameters: int
    kv_elements_per_token: int
    state_bytes_per_slot_f32: int
    takes_images: bool = False
    embedding: EmbeddingSpec | None = None


def describe(source: ModelSource) -> ModelFacts:
    """Return a checkpoint's facts, from its configuration and tensor headers alone.

    Raises:
        CheckpointError: the checkpoint cannot be read or is not supported.
    """
    path = pathlib.Path(source.path)
    embedding = read_embedding_spec(source)
    if embedding is not None and embedding.is_encoder:
        return _describe_encoder(path, embedding)
    config = read_config(source).model
    # Vectors are made of texts alone.
    with_vision = config.vision is not None and embedding is None
    tensors: Iterable[StoredTensor | GgufTensor]
    if source.kind == "gguf":
        tensors = read_gguf(path).tensors.values()
    else:
        tensors = list_tensors(path, with_vision=with_vision).values()
    return ModelFacts(
        family=config.family,
        max_position_embeddings=bounded(config.max_position_embeddings, embedding),
        vocab_size=config.vocab_size,
        weight_bytes=sum(each.num_bytes for each in tensors),
        num_parameters=sum(math.prod(each.shape) for each in tensors),
        kv_elements_per_token=config.kv_elements_per_token,
        state_bytes_per_slot_f32=4 * config.state_elements_per_slot,
        takes_images=with_vision,
        embedding=embedding,
    )


def bounded(max_tokens: int, embedding: EmbeddingSpec | None) -> int:
    """Return the tokens of the longest text, which an embedding model's author may bound."""
    if embedding is None or embedding.max_tokens is None:
        return max_tokens
    return min(max_tokens, embedding.max_tokens)


def _describe_encoder(path: pathlib.Path, embedding: EmbeddingSpec) -> ModelFacts:
    config = read_encoder_config(path)
    tensors = list_encoder_tensors(path).values()
    return ModelFacts(
        family="bert",
        max_position_embeddings=bounded(config.max_tokens, embedding),
        vocab_size=config.vocab_size,
        weight_bytes=sum(each.num_bytes for each in tensors),
        num_parameters=sum(math.prod(each.shape) for each in tensors),
        kv_elements_per_token=0,
        state_bytes_per_slot_f32=0,
        embedding=embedding,
    )


def read_config(source: ModelSource) -> CheckpointConfig:
    """Return a checkpoint's configuration and generation defaults.

    Raises:
        CheckpointError: a file is missing or malformed, or asks for what is not supported.
    """
    path = pathlib.Path(source.path)
    return read_gguf_config(read_gguf(path)) if source.kind == "gguf" else read_hf_config(path)
