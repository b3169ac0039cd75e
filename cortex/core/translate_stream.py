"""An OpenAI chunk stream as an Anthropic event stream, event by event.

The grammar of the result: message_start; any number of blocks, each of start, deltas and stop,
one after the other; message_delta; message_stop. Blocks cannot overlap, while the calls of an
OpenAI stream may: so the first tool call is relayed as it comes, and whatever begins after it
waits in memory until the end.
"""

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from cortex.core import anthropic
from cortex.core.errors import CortexError, RemoteError, UpstreamMalformedError
from cortex.core.openai import ChatCompletionChunk, ChunkChoice, ToolCallDelta, parse_error
from cortex.core.sse import SseEvent, SseSplitter
from cortex.core.translate import SIGNATURE, message_id, new_tool_id, stop_reason, usage_of

MAX_WAITING_CHARS = 16 << 20

BlockKind = Literal["thinking", "text", "tool_use"]

_chunk_decoder = msgspec.json.Decoder(ChatCompletionChunk)
_encode = msgspec.json.Encoder().encode

_DELTA = {
    "thinking": b'{"type":"thinking_delta","thinking":',
    "text": b'{"type":"text_delta","text":',
    "tool_use": b'{"type":"input_json_delta","partial_json":',
}


@dataclass(slots=True, kw_only=True)
class _Block:
    """A content block that is open, or waits for its turn."""

    kind: BlockKind
    tool_index: int | None = None
    tool_id: str | None = None
    name: str = ""
    pieces: list[str] = field(default_factory=list)


class StreamTranslator:
    """Turns the bytes of one OpenAI stream into those of one Anthropic stream.

    Call `feed` with what arrives, `end` after the source's end, or `fail` when it broke; after
    the first `fail` or the end of the message nothing more comes out.

    Args:
        model: the name the caller asked for.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._splitter = SseSplitter()
        self._started = False
        self._closed = False
        self._next_index = 0
        self._open: _Block | None = None
        self._waiting: list[_Block] = []
        self._num_waiting_chars = 0
        self._finish: str | None = None
        self._stop_string: str | None = None
        self._usage = anthropic.Usage()

    def feed(self, data: bytes) -> bytes:
        """Return the events that arrived bytes become; often none.

        Raises:
            UpstreamMalformedError: they are not an OpenAI chunk stream.
        """
        out: list[bytes] = []
        for event in self._splitter.feed(data):
            if self._closed:
                break
            self._translate(event, out)
        return b"".join(out)

    def end(self) -> bytes:
        """Return the stream's last events; an error if its source stopped before it was done."""
        if self._closed:
            return b""
        if self._finish is None:
            return self.fail(UpstreamMalformedError("the answer stopped before it was complete"))
        out: list[bytes] = []
        self._close(out)
        return b"".join(out)

    def fail(self, exc: CortexError) -> bytes:
        """Return the error event that ends the stream."""
        if self._closed:
            return b""
        self._closed = True
        return anthropic.error_event(exc)

    def _translate(self, event: SseEvent, out: list[bytes]) -> None:
        if event.is_comment:
            out.append(anthropic.PING)
        elif event.data == b"[DONE]":
            out.append(self.end())
        elif event.data.startswith(b'{"error"'):
            out.append(self.fail(_upstream_error(event.data)))
        else:
            try:
                chunk = _chunk_decoder.decode(event.data)
            except (msgspec.DecodeError, RecursionError) as exc:
                raise UpstreamMalformedError(f"an event is not a chat chunk: {exc}") from exc
            self._take(chunk, out)

    def _take(self, chunk: ChatCompletionChunk, out: list[bytes]) -> None:
        if chunk.usage is not None:
            self._usage = usage_of(chunk.usage)
        if not self._started:
            self._start(chunk, out)
        for choice in chunk.choices:
            if choice.index == 0:
                self._take_choice(choice, out)

    def _take_choice(self, choice: ChunkChoice, out: list[bytes]) -> None:
        delta = choice.delta
        thought = delta.reasoning_content or delta.reasoning
        if thought:
            self._add_text("thinking", thought, out)
        if delta.content:
            self._add_text("text", delta.content, out)
        for call in delta.tool_calls or ():
            self._add_call(call, out)
        if choice.finish_reason is not None:
            self._finish = choice.finish_reason
            self._stop_string = choice.stop_reason

    def _add_text(self, kind: BlockKind, text: str, out: list[bytes]) -> None:
        current = self._open
        if self._waiting or (current is not None and current.kind == "tool_use"):
            if not self._waiting or self._waiting[-1].kind != kind:
                self._waiting.append(_Block(kind=kind))
            self._hold(self._waiting[-1], text)
            return
        if current is None or current.kind != kind:
            self._stop_block(out)
            self._start_block(_Block(kind=kind), out)
        self._delta(kind, text, out)

    def _add_call(self, call: ToolCallDelta, out: list[bytes]) -> None:
        name = (call.function.name if call.function else None) or ""
        arguments = (call.function.arguments if call.function else None) or ""
        current = self._open
        if current is not None and current.tool_index == call.index:
            if arguments:
                self._delta("tool_use", arguments, out)
            return
        for block in self._waiting:
            if block.tool_index == call.index:
                block.name = block.name or name
                block.tool_id = block.tool_id or call.id
                self._hold(block, arguments)
                return
        block = _Block(kind="tool_use", tool_index=call.index, tool_id=call.id, name=name)
        if self._waiting or not name or (current is not None and current.kind == "tool_use"):
            self._waiting.append(block)
            self._hold(block, arguments)
            return
        self._stop_block(out)
        self._start_block(block, out)
        if arguments:
            self._delta("tool_use", arguments, out)

    def _hold(self, block: _Block, text: str) -> None:
        self._num_waiting_chars += len(text)
        if self._num_waiting_chars > MAX_WAITING_CHARS:
            raise UpstreamMalformedError("the answer's later blocks are too large to hold back")
        block.pieces.append(text)

    def _start(self, chunk: ChatCompletionChunk, out: list[bytes]) -> None:
        self._started = True
        message = anthropic.MessageResponse(
            id=message_id(chunk.id), model=self._model, content=[], usage=self._usage
        )
        out.append(_event(b"message_start", anthropic.MessageStart(message=message)))

    def _start_block(self, block: _Block, out: list[bytes]) -> None:
        content: object
        if block.kind == "thinking":
            content = anthropic.ThinkingBlock(thinking="", signature="")
        elif block.kind == "text":
            content = anthropic.TextBlock(text="")
        else:
            content = anthropic.ToolUseBlock(
                id=block.tool_id or new_tool_id(), name=block.name, input={}
            )
        self._open = block
        out.append(
            b'event: content_block_start\ndata: {"type":"content_block_start","index":%d,'
            b'"content_block":%b}\n\n' % (self._next_index, _encode(content))
        )

    def _delta(self, kind: BlockKind, text: str, out: list[bytes]) -> None:
        self._raw_delta(_DELTA[kind] + _encode(text) + b"}", out)

    def _raw_delta(self, delta: bytes, out: list[bytes]) -> None:
        out.append(
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
            b'"delta":%b}\n\n' % (self._next_index, delta)
        )

    def _stop_block(self, out: list[bytes]) -> None:
        if self._open is None:
            return
        if self._open.kind == "thinking":
            signature = b'{"type":"signature_delta","signature":%b}' % _encode(SIGNATURE)
            self._raw_delta(signature, out)
        out.append(
            b'event: content_block_stop\ndata: {"type":"content_block_stop","index":%d}\n\n'
            % self._next_index
        )
        self._open = None
        self._next_index += 1

    def _close(self, out: list[bytes]) -> None:
        """Let what waits come out, then end the message."""
        self._stop_block(out)
        for block in self._waiting:
            if block.kind == "tool_use" and not block.name:
                raise UpstreamMalformedError("the answer has a tool call without a name")
            self._start_block(block, out)
            text = "".join(block.pieces)
            if text:
                self._delta(block.kind, text, out)
            self._stop_block(out)
        self._closed = True
        delta = anthropic.StopDelta(
            stop_reason=stop_reason(self._finish, self._stop_string),
            stop_sequence=self._stop_string,
        )
        out.append(_event(b"message_delta", anthropic.MessageDelta(delta=delta, usage=self._usage)))
        out.append(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')


def _event(name: bytes, data: msgspec.Struct) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, _encode(data))


def _upstream_error(data: bytes) -> RemoteError:
    """Return the error that an event in the middle of a stream tells of."""
    return parse_error(502, data)
