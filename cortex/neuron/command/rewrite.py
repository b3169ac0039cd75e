"""What is changed in a request for an external engine, and in its answer.

The model goes by the engine's name there and by ours here, and usage is asked for whether the
caller wants it or not. All other fields pass as they are, known here or not. Pure.
"""

import re
from typing import Annotated

import msgspec
from msgspec import Meta

from cortex.core.completions import count_prompts
from cortex.core.decode import decode_body
from cortex.core.errors import CortexError, EngineDiedError, UpstreamMalformedError
from cortex.core.openai import SSE_DONE, Usage, sse_event, usage_comment
from cortex.core.sse import SseEvent, SseSplitter
from cortex.neuron.command.upstream import engine_error

_Fields = dict[str, msgspec.Raw]

_CONTENT = re.compile(
    rb'"(?:content|reasoning_content|reasoning|text)":\s*"[^"]|"tool_calls":\s*\[\s*\{'
)
# Not where an answer quotes it: there its quotation marks are escaped.
_FINISHED = re.compile(rb'(?<!\\)"finish_reason":\s*"')
_NO_CHOICES = re.compile(rb"\s*\[\s*\]\s*")
_NULL = b"null"
# What a chunk of its own for usage has in common with the others.
_HEAD = ("id", "object", "created", "model")
# What bounds the answer to a chat, under either name.
_BOUNDS = ("max_completion_tokens", "max_tokens")

_encoder = msgspec.json.Encoder()
_fields = msgspec.json.Decoder(_Fields)
_usage = msgspec.json.Decoder(Usage)


class Head(msgspec.Struct, kw_only=True, frozen=True):
    """What this neuron has to know of a request that it hands on."""

    model: str
    stream: bool | None = False
    stream_options: dict[str, msgspec.Raw] | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None
    prompt: msgspec.Raw = msgspec.Raw(_NULL)
    max_tokens: msgspec.Raw = msgspec.Raw(_NULL)
    max_completion_tokens: msgspec.Raw = msgspec.Raw(_NULL)

    @property
    def is_bounded(self) -> bool:
        """Whether the caller bounds the length of an answer."""
        return any(bytes(each) != _NULL for each in (self.max_tokens, self.max_completion_tokens))

    @property
    def num_choices(self) -> int:
        """How many answers are made; as many seats are taken."""
        return count_prompts(self.prompt) * max(self.n or 1, self.best_of or 1)

    @property
    def include_usage(self) -> bool:
        """Whether the caller wants the usage of a stream."""
        options = self.stream_options or {}
        return bytes(options.get("include_usage", _NULL)) == b"true"


_head = msgspec.json.Decoder(Head)


def parse_head(body: bytes) -> Head:
    """Decode what has to be known of a request; raises as `decode_body` does."""
    return decode_body(_head, body)


def upstream_request(
    body: bytes,
    head: Head,
    name: str,
    *,
    continuous: bool = False,
    default_max_tokens: int | None = None,
) -> bytes:
    """Return a request with the engine's name of the model; a stream asks for usage.

    Args:
        continuous: ask for it with every chunk.
        default_max_tokens: the bound of an answer where the caller sets none.

    A field that is null says nothing, and strict engines refuse fields that they do not know.
    """
    given: _Fields = decode_body(_fields, body)
    said = {name: value for name, value in given.items() if bytes(value) != _NULL}
    fields: dict[str, object] = {**said, "model": name}
    if default_max_tokens is not None and not head.is_bounded:
        fields["max_tokens"] = default_max_tokens
    if head.stream:
        options = {**(head.stream_options or {}), "include_usage": True}
        fields["stream_options"] = options | (
            {"continuous_usage_stats": True} if continuous else {}
        )
    return _encoder.encode(fields)


def without_bound(request: bytes) -> bytes | None:
    """Return an engine's request for an answer as long as there is room; None if it is one."""
    given: _Fields = decode_body(_fields, request)
    kept = {name: value for name, value in given.items() if name not in _BOUNDS}
    return _encoder.encode(kept) if len(kept) < len(given) else None


def answer(body: bytes, model_id: str) -> tuple[bytes, Usage | None]:
    """Return a whole answer with our name of the model, and its usage.

    Raises:
        UpstreamMalformedError: it is no JSON object.
    """
    fields = _decoded(body, model_id)
    fields["model"] = msgspec.Raw(_encoder.encode(model_id))
    return _encoder.encode(fields), _read_usage(fields.get("usage"))


class StreamRewriter:
    """Turns an engine's event stream into this neuron's.

    Comments are dropped, since the neuron has its own. Usage is collected wherever the engine
    says it, and said once before the end: to the gateway in a comment, to the caller in a chunk
    of its own if `include_usage`.

    Attributes:
        usage: what the engine has said of it so far.
        has_content: whether the last piece fed had a token in it.
    """

    def __init__(self, model_id: str, *, include_usage: bool) -> None:
        self.usage: Usage | None = None
        self.has_content = False
        self._model_id = model_id
        self._model = msgspec.Raw(_encoder.encode(model_id))
        self._include_usage = include_usage
        self._splitter = SseSplitter()
        self._raw_usage: msgspec.Raw | None = None
        self._has_told = False
        self._head: _Fields = {}
        self._is_finished = False
        self._is_done = False

    @property
    def has_ended(self) -> bool:
        """Whether the engine has given a reason to finish, or `[DONE]`."""
        return self._is_done or self._is_finished

    def feed(self, piece: bytes) -> bytes:
        """Return what a piece of the engine's stream becomes; often nothing.

        Raises:
            CortexError: the engine reports an error.
            UpstreamMalformedError: an event is not a chunk.
        """
        self.has_content = False
        return b"".join(
            self._rewritten(event) for event in self._splitter.feed(piece) if not event.is_comment
        )

    def end(self) -> bytes:
        """Return what the stream ends with.

        Raises:
            EngineDiedError: the engine broke off: it gave neither a reason to finish nor `[DONE]`.
        """
        if not self.has_ended:
            raise EngineDiedError(
                f"the engine of model '{self._model_id}' broke off in the middle of its answer"
            )
        parts = []
        if self.usage is not None:
            parts.append(usage_comment(self.usage))
        if self._include_usage and self._raw_usage is not None:
            chunk = {**self._head, "choices": [], "usage": self._raw_usage}
            parts.append(sse_event(_encoder.encode(chunk)))
        return b"".join([*parts, SSE_DONE])

    def _rewritten(self, event: SseEvent) -> bytes:
        if event.data.strip() == b"[DONE]":
            self._is_done = True
            return b""
        fields = _decoded(event.data, self._model_id)
        choices = bytes(fields.get("choices", b""))
        if not choices:
            raise self._error(event.data)
        fields["model"] = self._model
        self._head = {name: fields[name] for name in _HEAD if name in fields}
        raw_usage = fields.pop("usage", None)
        if raw_usage is not None and bytes(raw_usage) != _NULL:
            self._raw_usage = raw_usage
            self.usage = _read_usage(raw_usage) or self.usage
        if _NO_CHOICES.fullmatch(choices):
            return b""
        self.has_content = self.has_content or _CONTENT.search(choices) is not None
        self._is_finished = self._is_finished or _FINISHED.search(choices) is not None
        chunk = sse_event(_encoder.encode(fields))
        if self.usage is None or self._has_told or self._is_finished:
            return chunk
        # As of our own engine, so that the gateway knows the prompt's count from the first chunk.
        self._has_told = True
        return usage_comment(self.usage) + chunk

    def _error(self, data: bytes) -> CortexError:
        # Within a stream nobody says whose fault it is; most often it is the engine's.
        return engine_error(self._model_id, 502, data)


def _decoded(body: bytes, model_id: str) -> _Fields:
    try:
        return _fields.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        raise UpstreamMalformedError(
            f"the engine of model '{model_id}' answered something that is no completion: {exc}"
        ) from exc


def _read_usage(raw: msgspec.Raw | None) -> Usage | None:
    if raw is None:
        return None
    try:
        return _usage.decode(raw)
    except msgspec.DecodeError:
        return None
