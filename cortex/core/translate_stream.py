"""An OpenAI chunk stream as an Anthropic event stream, event by event.

The grammar of the result: message_start; any number of blocks, each of start, deltas and stop,
one after the other; message_delta; message_stop. Blocks cannot overlap, while the calls of an
OpenAI stream may: so blocks stand in a queue, the first is relayed as it comes, and the next one
has its turn as soon as the first is known to be complete: a text when something else follows,
a call when its arguments are a whole JSON object.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from cortex.core import anthropic
from cortex.core.chunks import (
    CallPiece,
    ChoicePiece,
    ChunkTranslator,
    is_new_call,
    is_whole_object,
)
from cortex.core.errors import CortexError, UpstreamMalformedError
from cortex.core.openai import Usage
from cortex.core.tool_choice import MAX_TOOLS
from cortex.core.translate import SIGNATURE, message_id, new_tool_id, stop_reason, usage_of

# Of arguments, and of what waits for its turn, in one stream.
MAX_HELD_CHARS = 16 << 20
MAX_CALLS = MAX_TOOLS

BlockKind = Literal["thinking", "text", "tool_use"]

_DELTA = {
    "thinking": b'{"type":"thinking_delta","thinking":',
    "text": b'{"type":"text_delta","text":',
    "tool_use": b'{"type":"input_json_delta","partial_json":',
}
_encode = msgspec.json.Encoder().encode


@dataclass(slots=True, kw_only=True)
class _Block:
    """A content block that waits for its turn, is open, or is over.

    `pieces` are what a waiting block has to say, and all arguments of a call.
    """

    kind: BlockKind
    state: Literal["waiting", "open", "over"] = "waiting"
    call_idx: int | None = None
    call_id: str | None = None
    name: str = ""
    pieces: list[str] = field(default_factory=list)

    def may_end(self) -> bool:
        """Whether something else may follow: a call has to be complete for that."""
        if self.kind != "tool_use":
            return True
        return is_whole_object(self.pieces)


class StreamTranslator(ChunkTranslator):
    """Turns the bytes of one OpenAI stream into those of one Anthropic stream.

    Args:
        model: the name the caller asked for.
    """

    def __init__(self, model: str) -> None:
        super().__init__(anthropic.PING)
        self._model = model
        self._started = False
        self._closed = False
        self._next_index = 0
        self._queue: deque[_Block] = deque()
        self._calls: list[_Block] = []
        self._sent_ids: set[str] = set()
        self._num_held_chars = 0
        self._stop_string: str | None = None
        self._usage = anthropic.Usage()

    def fail(self, exc: CortexError) -> bytes:
        """Return the error event that ends the stream."""
        if self._closed:
            return b""
        self._closed = True
        return anthropic.error_event(exc)

    def _is_over(self) -> bool:
        return self._closed

    def _has_nameless_call(self) -> bool:
        return not all(block.name for block in self._calls)

    def _note_usage(self, usage: Usage) -> None:
        self._usage = usage_of(usage)

    def _take(self, choice: ChoicePiece, out: list[bytes]) -> None:
        delta = choice.delta
        if delta is not None:
            thought = delta.reasoning_content or delta.reasoning
            if thought:
                self._add_text("thinking", thought, out)
            if delta.content:
                self._add_text("text", delta.content, out)
            for call in delta.tool_calls or ():
                self._add_call(call, out)
        if choice.finish_reason is not None:
            self._finish = choice.finish_reason
            # Other engines put the id of a stop token into the same field.
            if isinstance(choice.stop_reason, str):
                self._stop_string = choice.stop_reason

    def _add_text(self, kind: BlockKind, text: str, out: list[bytes]) -> None:
        block = self._queue[-1] if self._queue else None
        if block is None or block.kind != kind:
            block = _Block(kind=kind)
            self._queue.append(block)
            self._advance(out)
        self._add(block, text, out)

    def _add_call(self, call: CallPiece, out: list[bytes]) -> None:
        name, arguments = call.name, call.arguments
        block = self._call_of(call)
        if block is None:
            if len(self._calls) == MAX_CALLS:
                raise UpstreamMalformedError(f"the answer has over {MAX_CALLS} tool calls")
            block = _Block(kind="tool_use", call_idx=call.index)
            self._calls.append(block)
            self._queue.append(block)
        block.name = block.name or name
        block.call_id = block.call_id or call.id
        if block.state == "waiting":
            self._advance(out)
        if not arguments:
            return
        if block.state == "over":
            if arguments.strip():
                raise UpstreamMalformedError(f"the call of '{block.name}' goes on after its end")
            return
        self._add(block, arguments, out)
        if len(self._queue) > 1:
            self._advance(out)

    def _call_of(self, call: CallPiece) -> _Block | None:
        """Return the call that a fragment belongs to, None if it begins one."""
        for block in reversed(self._calls):
            if call.index is None or block.call_idx == call.index:
                return None if is_new_call(call, block.call_id, block.name) else block
        return None

    def _add(self, block: _Block, text: str, out: list[bytes]) -> None:
        """Relay a piece of an open block, hold one of a waiting block."""
        if block.state == "open":
            self._delta(block.kind, text, out)
            if block.kind != "tool_use":
                return
        self._num_held_chars += len(text)
        if self._num_held_chars > MAX_HELD_CHARS:
            raise UpstreamMalformedError("the answer's tool calls are too large to hold")
        block.pieces.append(text)

    def _advance(self, out: list[bytes]) -> None:
        """Open the queue's first block, and end it if it is complete and another one waits."""
        while self._queue:
            block = self._queue[0]
            if block.state == "waiting":
                if block.kind == "tool_use" and not block.name:
                    return
                self._open_block(block, out)
            if len(self._queue) == 1 or not block.may_end():
                return
            self._stop_block(out)

    def _start(self, completion_id: str, out: list[bytes]) -> None:
        if self._started:
            return
        self._started = True
        message = anthropic.MessageResponse(
            id=message_id(completion_id), model=self._model, content=[], usage=self._usage
        )
        out.append(_event(b"message_start", anthropic.MessageStart(message=message)))

    def _open_block(self, block: _Block, out: list[bytes]) -> None:
        """Send a block's start, and what it has to say so far."""
        content: object
        if block.kind == "thinking":
            content = anthropic.ThinkingBlock(thinking="", signature="")
        elif block.kind == "text":
            content = anthropic.TextBlock(text="")
        else:
            tool_id = block.call_id
            if not tool_id or tool_id in self._sent_ids:
                tool_id = new_tool_id()
            self._sent_ids.add(tool_id)
            content = anthropic.ToolUseBlock(id=tool_id, name=block.name, input={})
        block.state = "open"
        out.append(
            b'event: content_block_start\ndata: {"type":"content_block_start","index":%d,'
            b'"content_block":%b}\n\n' % (self._next_index, _encode(content))
        )
        if block.pieces:
            self._delta(block.kind, "".join(block.pieces), out)

    def _delta(self, kind: BlockKind, text: str, out: list[bytes]) -> None:
        self._raw_delta(_DELTA[kind] + _encode(text) + b"}", out)

    def _raw_delta(self, delta: bytes, out: list[bytes]) -> None:
        out.append(
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
            b'"delta":%b}\n\n' % (self._next_index, delta)
        )

    def _stop_block(self, out: list[bytes]) -> None:
        """End the queue's first block, which is open."""
        block = self._queue.popleft()
        block.state = "over"
        block.pieces.clear()
        if block.kind == "thinking":
            signature = b'{"type":"signature_delta","signature":%b}' % _encode(SIGNATURE)
            self._raw_delta(signature, out)
        out.append(
            b'event: content_block_stop\ndata: {"type":"content_block_stop","index":%d}\n\n'
            % self._next_index
        )
        self._next_index += 1

    def _close(self, out: list[bytes]) -> None:
        """Let what waits come out, then end the message."""
        while self._queue:
            if self._queue[0].state == "waiting":
                self._open_block(self._queue[0], out)
            self._stop_block(out)
        self._closed = True
        delta = anthropic.StopDelta(
            stop_reason=stop_reason(self._finish, self._stop_string, has_calls=bool(self._calls)),
            stop_sequence=self._stop_string,
        )
        out.append(_event(b"message_delta", anthropic.MessageDelta(delta=delta, usage=self._usage)))
        out.append(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')


def _event(name: bytes, data: msgspec.Struct) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, _encode(data))
