"""Token events of one request's choices to the OpenAI reply: chunks, or one completion."""

from dataclasses import dataclass, field

import msgspec

from cortex.core.errors import BadRequestError, EngineDiedError
from cortex.core.openai import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    CompletionTokensDetails,
    Delta,
    FinishReason,
    FunctionCall,
    FunctionDelta,
    PromptTokensDetails,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
    sse_event,
    usage_comment,
)
from cortex.neuron.chat.detokenize import TextStream
from cortex.neuron.chat.output import (
    ContentDelta,
    OutputEvent,
    OutputParser,
    ReasoningDelta,
    ToolCallLost,
    ToolCallStart,
    ToolCallText,
)
from cortex.neuron.chat.prepare import Prepared
from cortex.neuron.chat.tokenizer import ChatTokenizer
from cortex.neuron.engine.protocol import INVALID_GRAMMAR, Logprob, TokenEvent

# JSON has no infinity; this is what others send for an impossible token.
_MIN_LOGPROB = -9999.0


@dataclass(slots=True)
class Piece:
    """What one token event adds to a choice."""

    events: list[OutputEvent] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class ChoiceReader:
    """Reads one choice's token events.

    Attributes:
        finish_reason: why it ended; None before.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._tokenizer = prepared.tokenizer
        self._stop_ids = frozenset(prepared.stop_ids)
        self._wants_logprobs = prepared.logprobs
        self._grammar_param = "response_format" if prepared.output.tools is None else "tools"
        constraint = prepared.constraint
        self._trigger_id = None if constraint is None else constraint.trigger_id
        self._text = TextStream(
            prepared.tokenizer, prepared.context_ids, shown=prepared.output.markers
        )
        self._parser = OutputParser(prepared.output)
        self.finish_reason: FinishReason | None = None
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.num_cached_tokens = 0

    @property
    def stop_reason(self) -> str | None:
        """The stop string that ended the choice."""
        return self._parser.stop_match

    def read(self, event: TokenEvent) -> Piece:
        """Take an event; nothing more is read once the choice is finished."""
        piece = Piece()
        if self.finish_reason is not None:
            return piece
        if event.is_refusal:
            param = self._grammar_param if event.code == INVALID_GRAMMAR else None
            advice = f"; change {param}" if param else ""
            raise BadRequestError(
                f"the request cannot be answered: {event.error}{advice}", param=param
            )
        if event.finish in ("error", "cancelled"):
            reason = event.error or "the engine ended it before it was complete"
            raise EngineDiedError(f"the answer could not be completed: {reason}; try again")
        self.num_cached_tokens = max(self.num_cached_tokens, event.cached_tokens)
        for at in range(len(event.token_ids)):
            if self._parser.is_done:
                break
            self._read_token(at, event, piece)
        if self._parser.is_done or event.finish is not None:
            self._finish(event, piece)
        return piece

    def _read_token(self, at: int, event: TokenEvent, piece: Piece) -> None:
        token_id = event.token_ids[at]
        is_last = at == len(event.token_ids) - 1
        self.num_tokens += 1
        if is_last and event.finish == "stop" and token_id in self._stop_ids:
            return
        self.num_reasoning_tokens += self._parser.is_thinking
        was_content = self._parser.is_content
        text = self._text.feed((token_id,))
        if text:
            is_opening = token_id == self._trigger_id
            piece.events += self._parser.feed(text, is_opening=is_opening)
        is_content = was_content and (self._parser.is_content or self._parser.is_done)
        if self._wants_logprobs and event.logprobs and is_content:
            piece.logprobs.append(_token_logprob(event.logprobs[at], self._tokenizer))

    def _finish(self, event: TokenEvent, piece: Piece) -> None:
        is_cut = event.finish == "length" and not self._parser.is_done
        if not self._parser.is_done:
            piece.events += self._parser.feed(self._text.flush())
        piece.events += self._parser.finish(is_cut=is_cut)
        if is_cut:
            self.finish_reason = "length"
        else:
            self.finish_reason = "tool_calls" if self._parser.num_calls else "stop"


class Reply:
    """What all replies share: one reader per choice, prompt by prompt, and the counts."""

    def __init__(self, *prompts: Prepared, completion_id: str, created: int, model: str) -> None:
        self._id = completion_id
        self._created = created
        self._model = model
        self._prepared = prompts[0]
        self._prompts = prompts
        self._readers = [ChoiceReader(each) for each in prompts for _ in range(each.num_choices)]

    def is_finished(self, choice_idx: int) -> bool:
        """Whether a choice is complete.

        It may be so before the engine said so (a stop string, a single tool call): then the
        engine's sequence is to be cancelled.
        """
        return self._readers[choice_idx].finish_reason is not None

    @property
    def is_complete(self) -> bool:
        """Whether every choice is finished."""
        return all(reader.finish_reason is not None for reader in self._readers)

    def usage(self) -> Usage:
        """Return the tokens so far; a prompt counts once whatever the number of choices."""
        num_prompt = sum(len(each.prompt_ids) for each in self._prompts)
        num_completion = sum(reader.num_tokens for reader in self._readers)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_completion,
            total_tokens=num_prompt + num_completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._num_cached()),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=sum(reader.num_reasoning_tokens for reader in self._readers)
            ),
        )

    def _num_cached(self) -> int:
        cached = [reader.num_cached_tokens for reader in self._readers]
        step = self._prepared.num_choices
        return sum(max(cached[at : at + step]) for at in range(0, len(cached), step))


class ChatStream(Reply):
    """Makes the chunks of a streamed reply; the caller sends keep-alives and `[DONE]`.

    Args:
        completion_id, created, model: as they stand in every chunk; `created` in Unix seconds.
    """

    def start(self) -> bytes:
        """Return the usage so far and the first chunks, one per choice, which name the role."""
        roles = [
            self._chunk(ChunkChoice(index=at, delta=Delta(role="assistant", content="")))
            for at in range(len(self._readers))
        ]
        return b"".join([usage_comment(self.usage()), *roles])

    def feed(self, choice_idx: int, event: TokenEvent) -> bytes:
        """Return the chunks that an event makes certain, perhaps none.

        Raises:
            EngineDiedError: the engine could not complete the choice; the stream is to end with
                that error and without `[DONE]`.
        """
        if self.is_finished(choice_idx):
            return b""
        reader = self._readers[choice_idx]
        piece = reader.read(event)
        deltas = _deltas(piece.events)
        if piece.logprobs and not any(delta.content for delta in deltas):
            deltas.append(Delta(content=""))
        chunks: list[bytes] = []
        logprobs = ChoiceLogprobs(content=piece.logprobs) if piece.logprobs else None
        for delta in deltas:
            mine = logprobs if delta.content is not None else None
            chunks.append(self._chunk(ChunkChoice(index=choice_idx, delta=delta, logprobs=mine)))
            logprobs = None if mine is not None else logprobs
        if reader.finish_reason is not None:
            end = ChunkChoice(
                index=choice_idx,
                finish_reason=reader.finish_reason,
                stop_reason=reader.stop_reason,
            )
            chunks.append(self._chunk(end))
        return b"".join(chunks)

    def end(self) -> bytes:
        """Return the final usage, as a chunk too if the request asked for one."""
        usage = self.usage()
        if not self._prepared.include_usage:
            return usage_comment(usage)
        chunk = ChatCompletionChunk(
            id=self._id, created=self._created, model=self._model, choices=[], usage=usage
        )
        return usage_comment(usage) + sse_event(chunk)

    def _chunk(self, choice: ChunkChoice) -> bytes:
        return sse_event(
            ChatCompletionChunk(
                id=self._id, created=self._created, model=self._model, choices=[choice]
            )
        )


class ChatCollector(Reply):
    """Collects a reply that does not stream; takes the same arguments as `ChatStream`."""

    def __init__(self, prepared: Prepared, *, completion_id: str, created: int, model: str) -> None:
        super().__init__(prepared, completion_id=completion_id, created=created, model=model)
        self._pieces = [Piece() for _ in self._readers]

    def feed(self, choice_idx: int, event: TokenEvent) -> None:
        """Take an event; raises as `ChatStream.feed`."""
        piece = self._readers[choice_idx].read(event)
        self._pieces[choice_idx].events += piece.events
        self._pieces[choice_idx].logprobs += piece.logprobs

    def completion(self) -> ChatCompletion:
        """Return the reply, once every choice is finished."""
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[self._choice(at) for at in range(len(self._readers))],
            usage=self.usage(),
        )

    def _choice(self, at: int) -> Choice:
        reader, piece = self._readers[at], self._pieces[at]
        content = "".join(
            e.text for e in piece.events if isinstance(e, ContentDelta | ToolCallLost)
        )
        reasoning = "".join(e.text for e in piece.events if isinstance(e, ReasoningDelta))
        calls = _tool_calls(piece.events)
        return Choice(
            index=at,
            message=AssistantMessage(
                content=None if calls and not content else content,
                reasoning_content=reasoning or None,
                tool_calls=calls or None,
            ),
            finish_reason=reader.finish_reason,
            stop_reason=reader.stop_reason,
            logprobs=ChoiceLogprobs(content=piece.logprobs) if self._prepared.logprobs else None,
        )


def _deltas(events: list[OutputEvent]) -> list[Delta]:
    """Return events as deltas, neighbours of a kind joined: one token event makes few chunks."""
    deltas: list[Delta] = []
    for event in events:
        if isinstance(event, ToolCallLost):
            # Its beginning is told already and cannot be taken back; the finish reason tells.
            continue
        more = _delta(event)
        joined = _joined(deltas[-1], more) if deltas else None
        if joined is None:
            deltas.append(more)
        else:
            deltas[-1] = joined
    return deltas


def _delta(event: ReasoningDelta | ContentDelta | ToolCallStart | ToolCallText) -> Delta:
    if isinstance(event, ContentDelta):
        return Delta(content=event.text)
    if isinstance(event, ReasoningDelta):
        return Delta(reasoning_content=event.text)
    if isinstance(event, ToolCallText):
        part = FunctionDelta(arguments=event.text)
        return Delta(tool_calls=[ToolCallDelta(index=event.index, function=part)])
    begin = FunctionDelta(name=event.name, arguments="")
    return Delta(
        tool_calls=[ToolCallDelta(index=event.index, id=event.id, type="function", function=begin)]
    )


def _joined(first: Delta, second: Delta) -> Delta | None:
    """Return two deltas as one, or None where they are of different kinds or calls."""
    if first.content is not None and second.content is not None:
        return Delta(content=first.content + second.content)
    if first.reasoning_content is not None and second.reasoning_content is not None:
        return Delta(reasoning_content=first.reasoning_content + second.reasoning_content)
    if first.tool_calls is None or second.tool_calls is None:
        return None
    (call,), (more,) = first.tool_calls, second.tool_calls
    if more.id is not None or call.function is None or more.function is None:
        return None
    text = (call.function.arguments or "") + (more.function.arguments or "")
    function = msgspec.structs.replace(call.function, arguments=text)
    return Delta(tool_calls=[msgspec.structs.replace(call, function=function)])


def _tool_calls(events: list[OutputEvent]) -> list[ToolCall]:
    """Return the calls that are complete."""
    starts = {event.index: event for event in events if isinstance(event, ToolCallStart)}
    lost = {event.index for event in events if isinstance(event, ToolCallLost)}
    texts: dict[int, list[str]] = {at: [] for at in starts}
    for event in events:
        if isinstance(event, ToolCallText):
            texts[event.index].append(event.text)
    return [
        ToolCall(id=start.id, function=FunctionCall(name=start.name, arguments="".join(texts[at])))
        for at, start in starts.items()
        if at not in lost
    ]


def _token_logprob(logprob: Logprob, tokenizer: ChatTokenizer) -> TokenLogprob:
    raw = tokenizer.token_bytes(logprob.token_id)
    return TokenLogprob(
        token=raw.decode("utf-8", "replace"),
        logprob=max(logprob.logprob, _MIN_LOGPROB),
        bytes=list(raw),
        top_logprobs=[_top_logprob(at, value, tokenizer) for at, value in logprob.top],
    )


def _top_logprob(token_id: int, logprob: float, tokenizer: ChatTokenizer) -> TopLogprob:
    raw = tokenizer.token_bytes(token_id)
    return TopLogprob(
        token=raw.decode("utf-8", "replace"),
        logprob=max(logprob, _MIN_LOGPROB),
        bytes=list(raw),
    )
