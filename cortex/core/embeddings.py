"""Wire structs of OpenAI's embeddings: texts that a model makes vectors of."""

from typing import Annotated, Literal, cast

import msgspec
from msgspec import Meta

from cortex.core.decode import decode_body
from cortex.core.errors import ModelCapabilityError
from cortex.core.openai import kept

EMBEDDINGS_PATH = "/v1/embeddings"
# What `capabilities` calls models that make vectors, and models that write.
EMBEDDINGS = "embeddings"
TEXT = "text"

MAX_INPUTS = 2048
MAX_INPUT_CHARS = 1 << 20
MAX_INPUT_TOKENS = 1 << 17
MAX_DIMENSIONS = 1 << 16
# Numbers in one answer. A gateway reads no answer over 64 MiB, and written out in decimal one
# takes four times the room that it takes in base64.
MAX_FLOATS = 1 << 21
MAX_BASE64_FLOATS = 1 << 23

InputText = Annotated[str, Meta(max_length=MAX_INPUT_CHARS)]
TokenIds = Annotated[list[int], Meta(max_length=MAX_INPUT_TOKENS)]
EncodingFormat = Literal["float", "base64"]


class EmbeddingRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Body of `POST /v1/embeddings`.

    Attributes:
        input: a text, a list of texts, the ids of one text, or a list of those.
        dimensions: how many numbers of each vector are wanted, from the first on.
    """

    model: str
    input: (
        InputText | Annotated[list[InputText | int | TokenIds], Meta(max_length=MAX_INPUT_TOKENS)]
    )
    encoding_format: EncodingFormat | None = None
    dimensions: Annotated[int, Meta(ge=1, le=MAX_DIMENSIONS)] | None = None
    user: str | None = None  # accepted and without effect here

    def __post_init__(self) -> None:
        if isinstance(self.input, list) and len({type(each) for each in self.input}) != 1:
            raise ValueError(
                "input must be a text, a list of texts, a list of token ids or a list of such "
                "lists, and hold at least one"
            )
        if len(self.inputs) > MAX_INPUTS:
            raise ValueError(f"input holds {len(self.inputs)} texts, {MAX_INPUTS} at most")
        empty = next((at for at, each in enumerate(self.inputs) if not each), None)
        if empty is not None:
            raise ValueError(f"{self.place(empty)} is empty; every text needs at least one token")

    @property
    def inputs(self) -> list[str | list[int]]:
        """The texts one by one."""
        if isinstance(self.input, str):
            return [self.input]
        # `__post_init__` saw to it that kinds are not mixed.
        if isinstance(self.input[0], int):
            return [cast(list[int], self.input)]
        return cast(list[str | list[int]], self.input)

    def place(self, index: int) -> str:
        """Return what an error calls one of the texts."""
        is_single = isinstance(self.input, str) or isinstance(self.input[0], int)
        return "input" if is_single else f"input[{index}]"


class EmbeddingVector(msgspec.Struct, kw_only=True, frozen=True):
    """One text's vector: its numbers, or these as little-endian float32, written as base64."""

    object: str = "embedding"
    index: int
    embedding: list[float] | bytes


class EmbeddingUsage(msgspec.Struct, kw_only=True, frozen=True):
    """Tokens read; none are written."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, kw_only=True, frozen=True):
    """Answer of `POST /v1/embeddings`, vectors in the order of the texts."""

    object: str = kept("list")
    data: list[EmbeddingVector]
    model: str
    usage: EmbeddingUsage


_decoder = msgspec.json.Decoder(EmbeddingRequest)


def parse_embedding_request(body: bytes) -> EmbeddingRequest:
    """Decode a request for embeddings; raises as `decode_body` does."""
    return decode_body(_decoder, body)


def cannot(model_id: str, capability: str) -> ModelCapabilityError:
    """Return what a request is told that asks a model for what it is not made for.

    Args:
        capability: what was asked for, `EMBEDDINGS` or `TEXT`.
    """
    if capability == EMBEDDINGS:
        message = (
            f"model '{model_id}' makes no embeddings; choose one whose capabilities in "
            "/v1/models name embeddings"
        )
    else:
        message = f"model '{model_id}' makes embeddings and writes no text; ask {EMBEDDINGS_PATH}"
    return ModelCapabilityError(message, param="model")
