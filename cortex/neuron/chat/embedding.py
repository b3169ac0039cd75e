"""Embeddings: texts as they are asked for to what the engine needs, and its vectors to the answer.

What takes long is in pieces, to be called from a thread.
"""

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from cortex.core.embeddings import (
    EMBEDDINGS,
    MAX_BASE64_FLOATS,
    MAX_FLOATS,
    EmbeddingList,
    EmbeddingRequest,
    EmbeddingUsage,
    EmbeddingVector,
    cannot,
)
from cortex.core.errors import (
    BadRequestError,
    ContextLengthExceededError,
    EngineDiedError,
    UnsupportedFieldError,
)
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.engine.protocol import TokenEvent
from cortex.neuron.models.embedding_config import EmbeddingSpec

# Between two pieces of this much text a caller who has left is noticed.
PIECE_CHARS = 1 << 18
# A text of more than this many characters for every token that fits is not tokenized at all.
MAX_CHARS_PER_TOKEN = 128

_encoder = msgspec.json.Encoder()


def spec_of(model: ChatModel | None, model_id: str) -> EmbeddingSpec:
    """Return how a model makes vectors.

    Raises:
        ModelCapabilityError: it makes none.
    """
    if model is None or model.embedding is None:
        raise cannot(model_id, EMBEDDINGS)
    return model.embedding


def check_answer(request: EmbeddingRequest, spec: EmbeddingSpec) -> int:
    """Return how many numbers each vector of the answer has.

    Raises:
        UnsupportedFieldError: the model's vectors cannot be cut down to `dimensions`.
        BadRequestError: the answer would be too large.
    """
    dimensions = request.dimensions or spec.dimension
    if not spec.allows(dimensions):
        raise UnsupportedFieldError(
            f"dimensions {dimensions} is not possible: this model's vectors have "
            f"{spec.dimension} numbers and {_cuts(spec)}",
            param="dimensions",
        )
    num_floats = dimensions * len(request.inputs)
    limit = MAX_BASE64_FLOATS if request.encoding_format == "base64" else MAX_FLOATS
    if num_floats > limit:
        way_out = "" if request.encoding_format == "base64" else " or take encoding_format base64"
        raise BadRequestError(
            f"input asks for {len(request.inputs)} vectors of {dimensions} numbers, and one "
            f"answer holds {limit} numbers at most; send fewer texts at a time{way_out}",
            param="input",
        )
    return dimensions


def _cuts(spec: EmbeddingSpec) -> str:
    if spec.dimensions:
        return f"may be cut down to {', '.join(map(str, spec.dimensions))}"
    if spec.any_dimensions:
        return "can only be cut down"
    return "were not made to be cut down; leave dimensions out"


def pieces(request: EmbeddingRequest) -> Iterator[range]:
    """Yield runs of texts, each of about `PIECE_CHARS`."""
    first = size = 0
    for at, each in enumerate(request.inputs):
        size += len(each)
        if size >= PIECE_CHARS:
            yield range(first, at + 1)
            first, size = at + 1, 0
    if first < len(request.inputs):
        yield range(first, len(request.inputs))


def tokenize(request: EmbeddingRequest, run: range, model: ChatModel) -> list[list[int]]:
    """Return the ids of a run of texts; those that come as ids are taken as they are.

    Raises:
        ContextLengthExceededError: a text is longer than the model takes; names its index.
        BadRequestError: a token is none of the model's, or a text has none.
    """
    return [_token_ids(request, at, model) for at in run]


def _token_ids(request: EmbeddingRequest, index: int, model: ChatModel) -> list[int]:
    given, place, limit = request.inputs[index], request.place(index), model.max_model_len
    tokenizer = model.tokenizer
    if isinstance(given, str):
        if len(given) > limit * max(MAX_CHARS_PER_TOKEN, tokenizer.max_token_chars):
            raise _too_long(limit, place, index, f"{len(given)} characters")
        is_lowercased = model.embedding is not None and model.embedding.is_lowercased
        ids = tokenizer.encode(given.lower() if is_lowercased else given, add_special=True)
    else:
        ids = given
        unknown = next((at for at in ids if not 0 <= at < tokenizer.vocab_size), None)
        if unknown is not None:
            raise BadRequestError(
                f"{place} names token {unknown}; this model's tokens are "
                f"0 to {tokenizer.vocab_size - 1}",
                param=place,
            )
    if len(ids) > limit:
        raise _too_long(limit, place, index, f"{len(ids)} tokens")
    if not ids:
        raise BadRequestError(f"{place} has no token; every text needs one", param=place)
    return ids


def _too_long(limit: int, place: str, index: int, size: str) -> ContextLengthExceededError:
    return ContextLengthExceededError(
        f"This model's maximum context length is {limit} tokens, but {place} has {size}; "
        "shorten it.",
        param=place,
        extras={"max": limit, "index": index},
    )


def vector_of(event: TokenEvent) -> bytes:
    """Return the vector that an event brings, as little-endian float32.

    Raises:
        BadRequestError: the engine refuses the text.
        EngineDiedError: it could not compute it.
    """
    if event.is_refusal:
        raise BadRequestError(f"input cannot be embedded: {event.error}", param="input")
    if event.vector is None:
        reason = event.error or "the engine ended it before it was complete"
        raise EngineDiedError(f"the embeddings could not be computed: {reason}; try again")
    return event.vector


def answer(
    request: EmbeddingRequest, vectors: Sequence[bytes], *, dimensions: int, num_tokens: int
) -> bytes:
    """Return the answer's JSON.

    Vectors that are cut down are normalised again.

    Args:
        vectors: of all texts, in their order.
    """
    numbers = np.stack([np.frombuffer(each, dtype="<f4") for each in vectors])
    if dimensions < numbers.shape[1]:
        cut = numbers[:, :dimensions].astype(np.float64)
        norms = np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)
        numbers = (cut / norms).astype("<f4")
    is_base64 = request.encoding_format == "base64"
    return _encoder.encode(
        EmbeddingList(
            data=[
                EmbeddingVector(
                    index=at,
                    # Bytes are written as base64.
                    embedding=row.tobytes() if is_base64 else row.tolist(),
                )
                for at, row in enumerate(numbers)
            ],
            model=request.model,
            usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
        )
    )
