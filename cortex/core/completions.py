"""Wire structs of OpenAI's text completions: a prompt that a model goes on from, no chat."""

from typing import Annotated, cast

import msgspec
from msgspec import Meta

from cortex.core.decode import decode_body
from cortex.core.errors import UnsupportedFieldError
from cortex.core.openai import MAX_CHOICES, GenerationRequest, Usage, kept

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 128
MAX_PROMPT_TOKENS = 1 << 21
# Of all prompts together, those that `best_of` drops included.
MAX_ANSWERS = 128
MAX_LOGPROBS = 20

_WHITE_SPACE = b" \t\r\n"
_SEVERAL = (b'"', b"[")


TokenIds = Annotated[list[int], Meta(max_length=MAX_PROMPT_TOKENS)]


class CompletionRequest(GenerationRequest, kw_only=True, frozen=True):
    """Body of `POST /v1/completions`.

    Attributes:
        prompt: a text, a list of texts, the ids of one prompt, or a list of those.
        best_of: so many answers are made of each prompt, and the `n` likeliest returned.
        logprobs: how many rivals of each token are told; 0 tells the token's own alone.
    """

    prompt: str | Annotated[list[str | int | TokenIds], Meta(max_length=MAX_PROMPT_TOKENS)]
    suffix: str | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prompt, list) and len({type(each) for each in self.prompt}) != 1:
            raise ValueError(
                "prompt must be a text, a list of texts, a list of token ids or a list of such "
                "lists, and hold at least one"
            )
        if len(self.prompts) > MAX_PROMPTS:
            raise ValueError(f"prompt holds {len(self.prompts)} prompts, {MAX_PROMPTS} at most")
        if self.best_of is not None and self.best_of < self.num_returned:
            raise ValueError(
                f"best_of is {self.best_of} and n {self.n}; make best_of at least as large"
            )
        if self.num_choices > MAX_ANSWERS:
            raise ValueError(
                f"prompt asks for {self.num_choices} answers, counted over all prompts; "
                f"{MAX_ANSWERS} at most"
            )

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        # `__post_init__` saw to it that kinds are not mixed.
        if isinstance(prompt[0], int):
            return [cast(list[int], prompt)]
        return cast(list[str | list[int]], prompt)

    @property
    def num_returned(self) -> int:
        """How many answers of each prompt are returned."""
        return self.n or 1

    @property
    def num_made(self) -> int:
        """How many answers of each prompt are made."""
        return self.best_of or self.num_returned

    @property
    def num_choices(self) -> int:
        """How many answers are made of all prompts."""
        return len(self.prompts) * self.num_made


class TextLogprobs(msgspec.Struct, kw_only=True, frozen=True):
    """Log probabilities of a choice, one entry per token in each list.

    Attributes:
        text_offset: where in `text` each token begins, in characters.
    """

    tokens: list[str] = []
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float]] = []
    text_offset: list[int] = []


class TextChoice(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """One answer, or a piece of it in a stream."""

    index: int = kept(0)
    text: str = kept("")
    logprobs: TextLogprobs | None = kept(None)
    finish_reason: str | None = kept(None)
    stop_reason: str | None = None  # the stop string that ended it; an extension others have too


class TextCompletion(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Answer of a text completion, whole or one event of its stream.

    `choices` is empty in the event that tells a stream's usage.
    """

    id: str
    object: str = kept("text_completion")
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


_decoder = msgspec.json.Decoder(CompletionRequest)
_items_decoder = msgspec.json.Decoder(list[msgspec.Raw])


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Decode a text completion's request.

    Raises:
        UnsupportedFieldError: it asks for what no model here can do.
        CortexError: as `decode_body`.
    """
    request = decode_body(_decoder, body)
    if request.suffix:
        raise UnsupportedFieldError(
            "suffix is not supported; write the model's own fill-in-the-middle markers into prompt",
            param="suffix",
        )
    if request.echo and request.logprobs is not None:
        raise UnsupportedFieldError(
            "echo with logprobs is not supported, since those of a prompt's tokens are not "
            "computed; leave one of them out",
            param="echo",
        )
    if request.stream and request.num_made > request.num_returned:
        raise UnsupportedFieldError(
            "best_of over n is not supported with stream, since the best answer is known at the "
            "end only; leave one of them out",
            param="best_of",
        )
    return request


def count_prompts(prompt: msgspec.Raw) -> int:
    """Return how many prompts the JSON of a `prompt` holds; 1 where that cannot be told."""
    raw = bytes(prompt).strip(_WHITE_SPACE)
    if not raw.startswith(b"[") or not raw[1:].lstrip(_WHITE_SPACE).startswith(_SEVERAL):
        return 1
    try:
        return max(1, len(_items_decoder.decode(raw)))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 1
