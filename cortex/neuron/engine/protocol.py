"""Frames between a neuron and an engine process, over a Unix socket.

Each frame is a 4-byte little-endian length and a msgpack body (`COMMANDS` from the neuron,
`EVENTS` from the engine). This module imports no torch: the neuron reads it too.
"""

from typing import Literal

import msgspec

from cortex.neuron.models.source import ModelSource

MAX_FRAME_BYTES = 64 << 20
LENGTH_BYTES = 4
# Of one image, so that its frame has room for the rest.
MAX_PIXEL_BYTES = 48 << 20

# `TokenEvent.code` where the request's grammar, and so its tools or its schema, is at fault.
INVALID_GRAMMAR = "invalid_grammar"

FinishReason = Literal["stop", "length", "cancelled", "error"]


class LoadModel(msgspec.Struct, kw_only=True, frozen=True, tag="load"):
    """First command to a fresh engine process."""

    source: ModelSource
    device: str = "cpu"  # "cpu" or "cuda:N"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = None  # None: the checkpoint's own, bounded by memory
    max_num_seqs: int = 32  # state slots, and the widest decode batch
    max_batched_tokens: int = 512  # tokens in one step
    block_size: int = 32  # tokens per KV block
    cache_bytes: int | None = None  # KV cache; None: a default for the device
    prefix_cache: bool = True  # go on from what earlier prompts have left in the caches
    snapshot_bytes: int = 1 << 30  # states kept for that, where a model has a state, at most
    max_snapshots: int = 32
    num_threads: int = 1


class ThinkBudget(msgspec.Struct, kw_only=True, frozen=True):
    """How much a sequence may think before the end of its thought is forced.

    Attributes:
        max_tokens: tokens of all its thoughts together, markers aside.
        begin_id: the token that opens a thought; None where the prompt leaves one open.
        end_id: the token that closes it.
    """

    max_tokens: int
    begin_id: int | None = None
    end_id: int


class Sampling(msgspec.Struct, kw_only=True, frozen=True):
    """How one request's tokens are drawn. temperature 0 is greedy; 0 or 1 switch the others off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    num_logprobs: int | None = None  # None: no logprobs; 0: the chosen token's only
    think: ThinkBudget | None = None


class Constraint(msgspec.Struct, kw_only=True, frozen=True):
    """A grammar that output must follow.

    With `trigger_id` the grammar starts each time the model emits that token (which is not part
    of the match) and free text resumes once the grammar is complete; without it the grammar
    holds from the first token (or from the token after `skip_until_id` if that is set, which is
    how a thinking block stays free) and the request stops when it is complete.
    """

    lark: str  # llguidance's Lark-like syntax
    tokenizer_path: str  # tokenizer.json the grammar's tokens refer to
    trigger_id: int | None = None
    skip_until_id: int | None = None


class ImageSpan(msgspec.Struct, kw_only=True, frozen=True):
    """Where in a prompt an image stands.

    Attributes:
        start: index of the first of its tokens.
        width, height: in pixels, multiples of what one token covers.
        digest: the same for the same pixels and size, and for no other ones.
    """

    start: int
    width: int
    height: int
    digest: bytes


class ImagePixels(msgspec.Struct, kw_only=True, frozen=True, tag="pixels"):
    """The pixels of the next image of a request, before its `Submit`: a frame each.

    Attributes:
        pixels: red, green and blue of each, row by row.
    """

    request_id: int
    pixels: bytes


class Submit(msgspec.Struct, kw_only=True, frozen=True, tag="submit"):
    """Start generating for one sequence; `images` are in the order of the prompt."""

    request_id: int
    prompt_ids: list[int]
    max_tokens: int
    stop_ids: list[int] = []
    sampling: Sampling = Sampling()
    constraint: Constraint | None = None
    images: list[ImageSpan] = []


class Embed(msgspec.Struct, kw_only=True, frozen=True, tag="embed"):
    """Make the vector of one text; for a model that makes vectors."""

    request_id: int
    prompt_ids: list[int]


class Cancel(msgspec.Struct, kw_only=True, frozen=True, tag="cancel"):
    """Stop a sequence and free what it holds; unknown ids are ignored."""

    request_id: int


class Shutdown(msgspec.Struct, kw_only=True, frozen=True, tag="shutdown"):
    """End the process after the current step."""


class Progress(msgspec.Struct, kw_only=True, frozen=True, tag="progress"):
    """A load goes on."""

    phase: Literal["starting", "weights", "caches", "warmup"]
    bytes_done: int = 0
    bytes_total: int = 0


class Loaded(msgspec.Struct, kw_only=True, frozen=True, tag="loaded"):
    """The model can serve."""

    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    num_kv_blocks: int
    block_size: int
    weight_bytes: int
    cache_bytes: int  # snapshots included
    num_snapshots: int = 0
    prefix_match: Literal["block", "snapshot"] | None = None  # None: no prefix cache
    torch_version: str
    device: str
    dtype: str


class LoadFailed(msgspec.Struct, kw_only=True, frozen=True, tag="load_failed"):
    """The model cannot be loaded; the process ends after this."""

    code: Literal["unreadable_checkpoint", "unsupported_model", "out_of_memory", "internal"]
    message: str


class Logprob(msgspec.Struct, kw_only=True, frozen=True):
    """One token's log probability and its `num_logprobs` likeliest rivals, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class TokenEvent(msgspec.Struct, kw_only=True, frozen=True):
    """New tokens of one sequence, or its end.

    A stop token that ended the sequence is included in `token_ids`. `cached_tokens` counts
    prompt tokens taken from a prefix cache; a prompt that takes several steps has an event of
    its own for it after the first. `is_refusal` goes with an error for which the
    request is to blame: it would end the same way again. `code` is the error's machine-readable
    cause where it has one. `vector` is the whole answer to an `Embed`, as little-endian float32.
    """

    request_id: int
    token_ids: list[int] = []
    finish: FinishReason | None = None
    error: str | None = None
    is_refusal: bool = False
    code: str | None = None
    logprobs: list[Logprob] | None = None
    cached_tokens: int = 0
    vector: bytes | None = None


class EngineStats(msgspec.Struct, kw_only=True, frozen=True):
    """What the scheduler holds after a step, and running rates in tokens per second.

    `cached_blocks` are those of the free blocks whose content a prompt could go on from.
    """

    num_running: int = 0
    num_waiting: int = 0
    free_slots: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    num_snapshots: int = 0
    tok_s_prefill: float = 0.0
    tok_s_decode: float = 0.0


class StepDone(msgspec.Struct, kw_only=True, frozen=True, tag="step"):
    """What one engine step produced; also sent with no events when a cancel changed the stats."""

    events: list[TokenEvent]
    stats: EngineStats


Command = LoadModel | ImagePixels | Submit | Embed | Cancel | Shutdown
Event = Progress | Loaded | LoadFailed | StepDone

COMMANDS = msgspec.msgpack.Decoder(Command)
EVENTS = msgspec.msgpack.Decoder(Event)
_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: Command | Event) -> bytes:
    """Return the length-prefixed frame of one message."""
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body
