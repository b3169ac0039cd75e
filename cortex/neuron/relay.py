"""One request for an external engine: admission, the request handed on, the answer handed back."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import msgspec

from cortex.core.config import CommandHarness
from cortex.core.errors import (
    ContextLengthExceededError,
    CortexError,
    EngineDiedError,
    RemoteError,
    UnsupportedFieldError,
    UpstreamConnectionError,
    UpstreamMalformedError,
)
from cortex.core.openai import Usage
from cortex.neuron.accounts import Accounts, Watch
from cortex.neuron.command.engine import CommandEngine
from cortex.neuron.command.rewrite import (
    Head,
    StreamRewriter,
    answer,
    upstream_request,
    without_bound,
)
from cortex.neuron.command.upstream import Reply
from cortex.neuron.engine_client import recovering_error
from cortex.neuron.resident import Serving
from cortex.neuron.tokenize import TokenizeRequest, TokenizeResponse

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
TOKENIZE_PATH = "/tokenize"
TOKENIZE_S = 30.0
EVENT_STREAM = "text/event-stream"

_encoder = msgspec.json.Encoder()
_T = TypeVar("_T")


class Relay:
    """Answers requests for chat and for text completions with external engines.

    Args:
        limits: how long an engine may be silent.
        clock: monotonic seconds.
    """

    def __init__(
        self, accounts: Accounts, *, limits: CommandHarness, clock: Callable[[], float]
    ) -> None:
        self._accounts = accounts
        self._limits = limits
        self._clock = clock

    async def stream(
        self, path: str, body: bytes, head: Head, serving: Serving, headers: Mapping[str, str]
    ) -> AsyncGenerator[bytes, None]:
        """Yield the events of a streamed reply.

        Args:
            path: where at the engine the request goes.
            headers: those that the engine is to see.

        Raises:
            CortexError: before the first event or after it; then without `[DONE]`.
        """
        with self._accounts.counted(serving.model_id):
            watch = self._accounts.watch()
            rewriter = StreamRewriter(serving.model_id, include_usage=head.include_usage)
            with (
                await serving.admission.acquire(head.num_choices),
                _open_request(serving) as engine,
            ):
                stream = _Stream(engine, path, rewriter, self._limits, self._clock)
                try:
                    request = upstream_request(
                        body,
                        head,
                        engine.upstream_model,
                        continuous=engine.spec.continuous_usage,
                        default_max_tokens=_default_bound(engine, path),
                    )
                    await _sent(lambda each: stream.open(each, headers), request, path)
                    while (piece := await stream.next_piece()) is not None:
                        if rewriter.has_content:
                            watch.token()
                        if piece:
                            yield piece
                finally:
                    stream.close()
            yield rewriter.end()
            self._done(engine, watch, rewriter.usage)

    async def complete(
        self, path: str, body: bytes, head: Head, serving: Serving, headers: Mapping[str, str]
    ) -> bytes:
        """Return a whole reply as JSON; raises CortexError.

        A long answer takes its time: nothing bounds it but the life of the engine.
        """
        with self._accounts.counted(serving.model_id):
            watch = self._accounts.watch()
            with (
                await serving.admission.acquire(head.num_choices),
                _open_request(serving) as engine,
            ):
                request = upstream_request(
                    body,
                    head,
                    engine.upstream_model,
                    default_max_tokens=_default_bound(engine, path),
                )
                whole = await _sent(lambda each: _whole(engine, path, each, headers), request, path)
            completion, usage = answer(whole, serving.model_id)
            self._done(engine, watch, usage)
            return completion

    async def tokenize(self, request: TokenizeRequest, serving: Serving) -> TokenizeResponse:
        """Count a prompt's tokens by the engine's own tokenizer.

        An engine without a route for that (`/tokenize` as vLLM and SGLang have it) is asked for
        one token instead, since its answer tells the prompt's.

        Raises:
            UnsupportedFieldError: such an engine is asked for a plain prompt, or the tokens.
        """
        with (
            self._accounts.counted(serving.model_id),
            await serving.admission.acquire(),
            _open_request(serving) as engine,
        ):
            fields = {**msgspec.to_builtins(request), "model": engine.upstream_model}
            fields.pop("return_tokens")
            asked = {name: value for name, value in fields.items() if value is not None}
            found = await _tokenized(engine, _encoder.encode(asked))
            if found is not None:
                tokens = found.tokens if request.return_tokens else None
                return TokenizeResponse(
                    count=found.count, tokens=tokens, max_model_len=found.max_model_len
                )
            _refuse_uncountable(request)
            one_token = {**asked, "max_tokens": 1, "stream": False}
            whole = await _whole(engine, CHAT_PATH, _encoder.encode(one_token))
        _, usage = answer(whole, serving.model_id)
        if usage is None:
            raise UpstreamMalformedError(
                f"the engine of model '{serving.model_id}' does not tell how long a prompt is"
            )
        return TokenizeResponse(count=usage.prompt_tokens)

    def _done(self, engine: CommandEngine, watch: Watch, usage: Usage | None) -> None:
        """Count the request; an engine that tells no usage is counted as a request without any."""
        timing = self._accounts.done(
            engine.model_id, watch, usage or Usage(prompt_tokens=0, completion_tokens=0)
        )
        uncached = timing.prompt_tokens - timing.cached_tokens
        engine.note_rates(
            uncached / timing.ttft_s if timing.ttft_s else 0.0,
            (timing.completion_tokens - 1) / timing.decode_s if timing.decode_s > 0 else 0.0,
        )


class _Stream:
    """The events of one answer as they come; `close` it in any case."""

    def __init__(
        self,
        engine: CommandEngine,
        path: str,
        rewriter: StreamRewriter,
        limits: CommandHarness,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._path = path
        self._rewriter = rewriter
        self._limits = limits
        self._clock = clock
        self._heard_s = clock()
        self._has_begun = False
        self._reply: Reply | None = None

    async def open(self, request: bytes, headers: Mapping[str, str]) -> None:
        """Send the request and wait for the head of the answer."""
        try:
            async with asyncio.timeout(self._limits.first_token_s):
                self._reply = await _posted(self._engine, self._path, request, headers)
        except TimeoutError as exc:
            raise self._silent() from exc
        if self._reply.content_type != EVENT_STREAM:
            raise UpstreamMalformedError(
                f"the engine of model '{self._engine.model_id}' did not answer a stream with events"
            )

    async def next_piece(self) -> bytes | None:
        """Return what came next, rewritten, perhaps nothing; None at the end.

        Raises:
            EngineDiedError: the engine broke off.
            UpstreamConnectionError: it sent no token for too long.
        """
        assert self._reply is not None
        left_s = self._heard_s + self._limit_s - self._clock()
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                piece = await self._reply.read()
        except TimeoutError as exc:
            raise self._silent() from exc
        except EngineDiedError as exc:
            raise self._engine.farewell or exc from exc
        if not piece:
            if self._engine.farewell is not None and not self._rewriter.has_ended:
                raise self._engine.farewell
            return None
        rewritten = self._rewriter.feed(piece)
        if rewritten:
            # A comment only says that the engine is there, not that it gets on.
            self._heard_s = self._clock()
            self._engine.note_life()
        self._has_begun = self._has_begun or self._rewriter.has_content
        return rewritten

    def close(self) -> None:
        """Let go of the answer; the engine sees one that has not ended as a client that left."""
        if self._reply is not None:
            self._reply.close()

    @property
    def _limit_s(self) -> float:
        return self._limits.stall_s if self._has_begun else self._limits.first_token_s

    def _silent(self) -> UpstreamConnectionError:
        return UpstreamConnectionError(
            f"the engine of model '{self._engine.model_id}' sent no token for {self._limit_s:g} s"
        )


class _Tokenized(msgspec.Struct, kw_only=True, frozen=True):
    """An engine's answer to `POST /tokenize`."""

    count: int
    max_model_len: int | None = None
    tokens: list[int] | None = None


_tokenized_decoder = msgspec.json.Decoder(_Tokenized)


async def _tokenized(engine: CommandEngine, request: bytes) -> _Tokenized | None:
    """Return what the engine's tokenizer says; None where it cannot be asked like that."""
    try:
        async with asyncio.timeout(TOKENIZE_S):
            return _tokenized_decoder.decode(await _whole(engine, TOKENIZE_PATH, request))
    except TimeoutError as exc:
        raise UpstreamConnectionError(
            f"the engine of model '{engine.model_id}' counted no tokens within {TOKENIZE_S:g} s"
        ) from exc
    except msgspec.DecodeError:
        return None
    except (UpstreamMalformedError, RemoteError):
        return None


def _refuse_uncountable(request: TokenizeRequest) -> None:
    """Raise for what an answer's usage does not tell."""
    for option, is_given in (
        ("prompt", request.messages is None),
        ("return_tokens", request.return_tokens),
    ):
        if is_given:
            raise UnsupportedFieldError(
                f"the engine of model '{request.model}' has no /tokenize, so that only messages "
                f"can be counted; leave {option} out",
                param=option,
            )


def _default_bound(engine: CommandEngine, path: str) -> int | None:
    # A text completion has a default of its own.
    return engine.spec.default_max_tokens if path == CHAT_PATH else None


async def _sent(send: Callable[[bytes], Awaitable[_T]], request: bytes, path: str) -> _T:
    """Send a request; an answer that may be longer than there is room for may fill the room.

    Engines refuse a bound that does not fit beside the prompt, and agents set one without knowing
    the context. Without any, a chat's answer ends with the context at the latest.
    """
    try:
        return await send(request)
    except ContextLengthExceededError:
        unbounded = without_bound(request) if path == CHAT_PATH else None
        if unbounded is None:
            raise
    return await send(unbounded)


@contextmanager
def _open_request(serving: Serving) -> Iterator[CommandEngine]:
    """Yield the engine of this moment, which has one more request in hand inside the context."""
    engine = serving.engine
    assert isinstance(engine, CommandEngine)
    engine.note_open(1)
    try:
        yield engine
    finally:
        engine.note_open(-1)


async def _posted(
    engine: CommandEngine, path: str, request: bytes, headers: Mapping[str, str] | None = None
) -> Reply:
    """Return an answer whose status is well.

    Raises:
        CortexError: the engine refused, or cannot be reached.
    """
    try:
        reply = await engine.post(path, request, headers)
    except (UpstreamConnectionError, EngineDiedError) as exc:
        if engine.farewell is not None:
            raise engine.farewell from exc
        if isinstance(exc, UpstreamConnectionError) and not engine.can_serve:
            # Nothing was begun, so the caller may simply come again.
            raise recovering_error(engine.model_id) from exc
        raise
    if 200 <= reply.status < 300:
        return reply
    try:
        error: CortexError = await reply.error()
    finally:
        reply.close()
    raise error


async def _whole(
    engine: CommandEngine, path: str, request: bytes, headers: Mapping[str, str] | None = None
) -> bytes:
    reply = await _posted(engine, path, request, headers)
    try:
        return await reply.read_all()
    except EngineDiedError as exc:
        raise engine.farewell or exc from exc
    finally:
        reply.close()
