"""An OpenAI chunk stream as a stream of Responses events, event by event.

The grammar of the result: created and in_progress; items, each of added, its parts with their
deltas, and done; one event that ends it. A text or a thought is done when something else follows,
a call when another item begins after its arguments have become a whole JSON object, or at the
end. Calls may overlap: every event names its item.
"""

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from cortex.core.chunks import (
    CallPiece,
    ChoicePiece,
    ChunkTranslator,
    is_new_call,
    is_whole_object,
    read_logprobs,
)
from cortex.core.errors import CortexError, UpstreamMalformedError
from cortex.core.openai import KEEPALIVE, TokenLogprob, Usage
from cortex.core.response_draft import CANCELLED, Draft, custom_input
from cortex.core.responses import (
    IncompleteDetails,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Response,
    SummaryText,
)
from cortex.core.tool_choice import MAX_TOOLS

# Of text and arguments in one answer: each item is told whole at its end.
MAX_HELD_CHARS = 16 << 20
MAX_CALLS = MAX_TOOLS

Kind = Literal["reasoning", "message", "call"]

_encode = msgspec.json.Encoder().encode


@dataclass(slots=True, kw_only=True)
class _Open:
    """An item that is under way.

    Attributes:
        index: its place in the output; None for a call that waits for its name.
        where: the fields that its events name it by, as JSON.
        call_id, told_id: of a call, as its source says and as the caller is told.
    """

    kind: Kind
    index: int | None = None
    where: bytes = b""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    call_idx: int | None = None
    call_id: str | None = None
    told_id: str = ""
    name: str = ""
    is_custom: bool = False
    is_over: bool = False

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.pieces)


class ResponseStream(ChunkTranslator):
    """Turns the bytes of one OpenAI stream into those of one Responses stream.

    After `end` or `cancel` the last event is still to come: `conclude` returns it.
    """

    def __init__(self, draft: Draft) -> None:
        super().__init__(KEEPALIVE)
        self._draft = draft
        self._sequence = 0
        self._started = False
        self._state: Literal["open", "ended", "cancelled", "closed"] = "open"
        self._text: _Open | None = None
        self._calls: list[_Open] = []
        self._told_ids: set[str] = set()
        self._done: dict[int, OutputItem] = {}
        self._next_index = 0
        self._num_held_chars = 0

    @property
    def is_open(self) -> bool:
        """Whether its end is still to come."""
        return self._state == "open"

    @property
    def is_complete(self) -> bool:
        """Whether the source has come to its proper end, so that `conclude` can follow."""
        return self._state == "ended"

    @property
    def is_cancelled(self) -> bool:
        """Whether it was cancelled before its end."""
        return self._state == "cancelled"

    @property
    def response(self) -> Response:
        """The response at this moment."""
        if self._state == "cancelled":
            details = IncompleteDetails(reason=CANCELLED)
            return self._draft.response("cancelled", details=details, is_stored=False)
        if self._state == "open":
            return self._draft.response("in_progress")
        return self._draft.ended(self._finish, is_stored=self._draft.request.wants_store)

    def conclude(self, *, is_stored: bool) -> bytes:
        """Return the last event, after `end` or `cancel`."""
        if self._state == "cancelled":
            response, name = self.response, b"response.incomplete"
        elif self._state == "ended":
            response = self._draft.ended(self._finish, is_stored=is_stored)
            name = b"response." + response.status.encode()
        else:
            return b""
        self._state = "closed"
        return self._event(name, b'"response":' + _encode(response))

    def cancel(self) -> Response:
        """End it here; what it has come to so far stays."""
        assert self.is_open
        self._cut()
        self._state = "cancelled"
        return self.response

    def fail(self, exc: CortexError) -> bytes:
        """Return the events that end the stream with an error."""
        if self._state == "closed":
            return b""
        out: list[bytes] = []
        self._start("", out)
        self._cut()
        self._state = "closed"
        told = {"code": exc.code, "message": exc.message, "param": exc.param}
        # SDKs look for an object under `error`, typed clients for the fields beside it.
        fields = _encode({**told, "error": {"type": exc.kind, **told}})
        out.append(self._event(b"error", fields[1:-1]))
        response = self._draft.failed(exc)
        out.append(self._event(b"response.failed", b'"response":' + _encode(response)))
        return b"".join(out)

    def _cut(self) -> None:
        """Leave what is under way as it is."""
        for each in self._items():
            if not each.is_over:
                assert each.index is not None
                self._done[each.index] = self._item(each, "incomplete")
        self._collect()

    def _is_over(self) -> bool:
        return self._state != "open"

    def _has_nameless_call(self) -> bool:
        return any(call.index is None for call in self._calls)

    def _note_usage(self, usage: Usage) -> None:
        self._draft.take_usage(usage)

    def _close(self, out: list[bytes]) -> None:
        is_cut = self._finish in ("length", "content_filter")
        under_way = [each for each in self._items() if not each.is_over]
        for each in under_way:
            is_last = each is under_way[-1]
            self._end_item(each, out, "incomplete" if is_cut and is_last else "completed")
        self._state = "ended"

    def _start(self, completion_id: str, out: list[bytes]) -> None:
        if self._started:
            return
        self._started = True
        told = b'"response":' + _encode(self._draft.response("in_progress"))
        out.append(self._event(b"response.created", told))
        out.append(self._event(b"response.in_progress", told))

    def _take(self, choice: ChoicePiece, out: list[bytes]) -> None:
        delta = choice.delta
        if delta is not None:
            thought = delta.reasoning_content or delta.reasoning
            if thought:
                self._add_text("reasoning", thought, [], out)
            told = read_logprobs(choice.logprobs)
            logprobs = (told.content if told else None) or []
            if delta.content or logprobs:
                self._add_text("message", delta.content or "", logprobs, out)
            for call in delta.tool_calls or ():
                self._add_call(call, out)
        if choice.finish_reason is not None:
            self._finish = choice.finish_reason

    def _add_text(
        self, kind: Kind, text: str, logprobs: list[TokenLogprob], out: list[bytes]
    ) -> None:
        item = self._text
        if item is None or item.is_over or item.kind != kind:
            item = _Open(kind=kind)
            self._begin(item, out)
            self._text = item
        self._hold(item, text)
        item.logprobs += logprobs
        if kind == "message":
            more = b',"logprobs":' + _encode(logprobs)
            self._delta(b"response.output_text.delta", item, text, out, more)
        elif self._draft.request.wants_summary:
            self._delta(b"response.reasoning_summary_text.delta", item, text, out)
        else:
            self._delta(b"response.reasoning_text.delta", item, text, out)

    def _add_call(self, piece: CallPiece, out: list[bytes]) -> None:
        call = self._call_of(piece)
        if call is None:
            if len(self._calls) == MAX_CALLS:
                raise UpstreamMalformedError(f"the answer has over {MAX_CALLS} tool calls")
            call = _Open(kind="call", call_idx=piece.index)
            self._calls.append(call)
        call.name = call.name or piece.name
        call.call_id = call.call_id or piece.id
        if call.is_over:
            if piece.arguments.strip():
                raise UpstreamMalformedError(f"the call of '{call.name}' goes on after its end")
            return
        if piece.arguments:
            self._hold(call, piece.arguments)
        if call.index is not None:
            self._call_delta(call, piece.arguments, out)
        elif call.name:
            self._begin(call, out)
            self._call_delta(call, call.text, out)

    def _call_of(self, piece: CallPiece) -> _Open | None:
        """Return the call that a fragment belongs to, None if it begins one."""
        for call in reversed(self._calls):
            if piece.index is None or call.call_idx == piece.index:
                return None if is_new_call(piece, call.call_id, call.name) else call
        return None

    def _hold(self, item: _Open, text: str) -> None:
        self._num_held_chars += len(text)
        if self._num_held_chars > MAX_HELD_CHARS:
            raise UpstreamMalformedError("the answer is too large to hold")
        item.pieces.append(text)

    def _items(self) -> list[_Open]:
        """Return the items that are under way, or have been, in the order of the output."""
        begun = [each for each in (self._text, *self._calls) if each and each.index is not None]
        return sorted(begun, key=lambda each: each.index or 0)

    def _begin(self, item: _Open, out: list[bytes]) -> None:
        """Begin an item: what it follows is over, calls only where they are complete."""
        for each in self._items():
            if not each.is_over and (each.kind != "call" or is_whole_object(each.pieces)):
                self._end_item(each, out, "completed")
        index = item.index = self._next_index
        self._next_index += 1
        if item.kind == "call":
            self._begin_call(item, index, out)
            return
        part: msgspec.Struct
        shell: OutputItem
        if item.kind == "message":
            part, place = OutputText(text=""), b"content_index"
            shell = OutputMessage(id=self._draft.item_id("msg", index), status="in_progress")
            opening = b"response.content_part.added"
        else:
            shell = ReasoningItem(id=self._draft.item_id("rs", index))
            if self._draft.request.wants_summary:
                part, place = SummaryText(text=""), b"summary_index"
                opening = b"response.reasoning_summary_part.added"
            else:
                part, place = ReasoningText(text=""), b"content_index"
                opening = b"response.content_part.added"
        self._added(index, shell, out)
        item.where = b'"item_id":%b,"output_index":%d,"%b":0' % (_encode(shell.id), index, place)
        out.append(self._event(opening, item.where + b',"part":' + _encode(part)))

    def _begin_call(self, call: _Open, index: int, out: list[bytes]) -> None:
        own_id = None if call.call_id in self._told_ids else call.call_id
        shell = self._draft.call(index, call.name, own_id, "", "in_progress")
        call.told_id = shell.call_id
        self._told_ids.add(shell.call_id)
        call.is_custom = self._draft.tool(call.name).kind == "custom"
        self._added(index, shell, out)
        call.where = b'"item_id":%b,"output_index":%d' % (_encode(shell.id), index)

    def _added(self, index: int, shell: OutputItem, out: list[bytes]) -> None:
        fields = b'"output_index":%d,"item":%b' % (index, _encode(shell))
        out.append(self._event(b"response.output_item.added", fields))

    def _call_delta(self, call: _Open, text: str, out: list[bytes]) -> None:
        # The input of a custom tool is inside the arguments: it is told once it is whole.
        if text and not call.is_custom:
            self._delta(b"response.function_call_arguments.delta", call, text, out)

    def _end_item(self, item: _Open, out: list[bytes], status: ItemStatus) -> None:
        item.is_over = True
        assert item.index is not None
        text = item.text
        done = self._done[item.index] = self._item(item, status)
        if item.kind == "call":
            self._end_call(item, text, out)
        elif item.kind == "message":
            logprobs = _encode(item.logprobs)
            fields = b'%b,"text":%b,"logprobs":%b' % (item.where, _encode(text), logprobs)
            out.append(self._event(b"response.output_text.done", fields))
            part: msgspec.Struct = OutputText(text=text, logprobs=item.logprobs)
            self._part_done(b"response.content_part.done", item, part, out)
        else:
            fields = b'%b,"text":%b' % (item.where, _encode(text))
            if self._draft.request.wants_summary:
                out.append(self._event(b"response.reasoning_summary_text.done", fields))
                part = SummaryText(text=text)
                self._part_done(b"response.reasoning_summary_part.done", item, part, out)
            else:
                out.append(self._event(b"response.reasoning_text.done", fields))
                part = ReasoningText(text=text)
                self._part_done(b"response.content_part.done", item, part, out)
        fields = b'"output_index":%d,"item":%b' % (item.index, _encode(done))
        out.append(self._event(b"response.output_item.done", fields))
        self._collect()

    def _end_call(self, call: _Open, arguments: str, out: list[bytes]) -> None:
        if call.is_custom:
            told = custom_input(arguments)
            if told:
                self._delta(b"response.custom_tool_call_input.delta", call, told, out)
            fields = b'%b,"input":%b' % (call.where, _encode(told))
            out.append(self._event(b"response.custom_tool_call_input.done", fields))
        else:
            fields = b'%b,"arguments":%b' % (call.where, _encode(arguments or "{}"))
            out.append(self._event(b"response.function_call_arguments.done", fields))

    def _item(self, item: _Open, status: ItemStatus) -> OutputItem:
        assert item.index is not None
        if item.kind == "message":
            return self._draft.message(item.index, item.text, item.logprobs, status)
        if item.kind == "reasoning":
            return self._draft.reasoning(item.index, item.text)
        return self._draft.call(item.index, item.name, item.told_id, item.text, status)

    def _collect(self) -> None:
        """Put what is done into the draft, in the order of the output."""
        self._draft.output = [self._done[index] for index in sorted(self._done)]

    def _part_done(self, name: bytes, item: _Open, part: msgspec.Struct, out: list[bytes]) -> None:
        out.append(self._event(name, item.where + b',"part":' + _encode(part)))

    def _delta(
        self, name: bytes, item: _Open, text: str, out: list[bytes], more: bytes = b""
    ) -> None:
        out.append(self._event(name, b'%b,"delta":%b%b' % (item.where, _encode(text), more)))

    def _event(self, name: bytes, fields: bytes) -> bytes:
        sequence = self._sequence
        self._sequence += 1
        return b'event: %b\ndata: {"type":"%b","sequence_number":%d,%b}\n\n' % (
            name,
            name,
            sequence,
            fields,
        )
