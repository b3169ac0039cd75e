"""Generated text, piece by piece, to reasoning, content and tool calls.

The result does not depend on how the text is cut into pieces.
"""

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from cortex.neuron.chat.callparts import CallEnd, CallEvent, CallStart, overlap
from cortex.neuron.chat.callreader import CallReader
from cortex.neuron.chat.formats import SYNTAXES, THINK_TAGS, CallSyntax, ThinkMarkers
from cortex.neuron.chat.schema import ToolTable

_ALNUM = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the reasoning text."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A tool call begins; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallText:
    """More of a call's arguments, which together are the text of a JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallLost:
    """A call that began will not be completed; `text` is all that the model wrote of it."""

    index: int
    text: str


OutputEvent = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallText | ToolCallLost


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """What a request's output may consist of.

    Attributes:
        knows_thinking: text between `think` markers is reasoning.
        starts_thinking: the prompt ends inside an open thought.
        tools: declared tools; None leaves calls as text.
        syntax: how calls are written.
        is_forced: a grammar holds the whole answer, so that its calls are whole.
        is_single_call: output ends with the first tool call.
        stops: texts that end the content, none of them empty.
    """

    knows_thinking: bool = False
    starts_thinking: bool = False
    think: ThinkMarkers = THINK_TAGS
    tools: ToolTable | None = None
    syntax: CallSyntax = SYNTAXES["hermes"]
    is_forced: bool = False
    is_single_call: bool = False
    stops: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that are syntax here, even where their tokens are special."""
        thoughts = (self.think.opening, self.think.closing) if self.knows_thinking else ()
        return thoughts if self.tools is None else (*thoughts, *self.syntax.markers)


class _State(Enum):
    START = "start"  # before content, where a thought or a bare call may begin
    THINKING = "thinking"
    CONTENT = "content"
    TOOL = "tool"
    DONE = "done"


class _Lead(Enum):
    """What to drop of the white space before content."""

    NOTHING = ""
    NEWLINES = "\r\n"  # after a thinking block
    ALL = " \t\r\n"  # after a tool call
    SEPARATORS = " \t\r\n;,"  # between calls without markers


class StopMatcher:
    """Finds stop texts across pieces; holds back no more than what may still become one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.match: str | None = None

    def feed(self, text: str) -> str:
        """Return what is certain to stand before any stop; sets `match` when one is found."""
        if not self._stops:
            return text
        text = self._held + text
        # The stop that is complete first wins, and of those the longest: so pieces do not matter.
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.match = min(found)
            self._held = ""
            return text[:at]
        held = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held


class _Trimmer:
    """Holds back trailing white space until it is known whether anything follows."""

    def __init__(self) -> None:
        self._held: list[str] = []

    def feed(self, text: str) -> str:
        body = text.rstrip()
        if not body:
            self._held.append(text)
            return ""
        ready = "".join(self._held) + body
        self._held = [text[len(body) :]]
        return ready

    def take(self) -> str:
        held = "".join(self._held)
        self._held = []
        return held


class OutputParser:
    """Parses one choice's text.

    Attributes:
        stop_match: the stop text that ended the output, if one did.
        num_calls: tool calls found so far.
    """

    def __init__(self, spec: OutputSpec, *, new_call_id: Callable[[], str] | None = None) -> None:
        self._spec = spec
        self._new_call_id = new_call_id or (lambda: _new_call_id(spec.syntax))
        self._is_bare = spec.tools is not None and spec.syntax.is_bare
        self._state = _State.START
        if spec.starts_thinking:
            self._state = _State.THINKING
        elif not (spec.knows_thinking or self._is_bare):
            self._state = _State.CONTENT
        self._lead = _Lead.NOTHING
        self._buffer = ""
        self._reader: CallReader | None = None
        self._marker = ""  # what opened the call that is being read
        self._is_certain = False
        self._is_after_bare = False
        self._stop = StopMatcher(spec.stops)
        self._trimmer = _Trimmer()
        self._events: list[OutputEvent] = []
        self._thinking_lead = True
        self.num_calls = 0

    @property
    def stop_match(self) -> str | None:
        """The stop text that ended the output, or None."""
        return self._stop.match

    @property
    def is_done(self) -> bool:
        """Whether whatever follows is dropped: the request may be cancelled."""
        return self._state is _State.DONE

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._state is _State.THINKING

    @property
    def is_content(self) -> bool:
        """Whether what comes next is, or may become, content."""
        return self._state in (_State.CONTENT, _State.START)

    def feed(self, text: str, *, is_opening: bool = False) -> list[OutputEvent]:
        """Return what became certain with this piece of text.

        Args:
            is_opening: the text ends with a marker from which on a grammar holds.
        """
        self._buffer += text
        self._is_certain = is_opening
        while self._buffer and self._step():
            pass
        return self._take_events()

    def finish(self, *, is_cut: bool = False) -> list[OutputEvent]:
        """Return what was held back at the end of the output.

        Args:
            is_cut: the output ended at its token limit and not by itself, so that a tool call
                without its end marker is not to be carried out.
        """
        rest, self._buffer = self._buffer, ""
        match self._state:
            case _State.START | _State.CONTENT:
                self._content(rest)
            case _State.THINKING:
                self._reasoning(rest)
                self._trimmer.take()
            case _State.TOOL:
                self._buffer = rest
                self._end_call(is_cut=is_cut)
            case _State.DONE:
                pass
        if self._state is not _State.DONE:
            self._emit_content(self._stop.flush())
        if self._state is not _State.DONE or self._stop.match is not None:
            held = self._trimmer.take()
            if held and self.num_calls == 0:
                self._events.append(ContentDelta(held))
        self._state = _State.DONE
        return self._take_events()

    def _take_events(self) -> list[OutputEvent]:
        events, self._events = self._events, []
        return events

    def _step(self) -> bool:
        """Consume part of the buffer; False when more text is needed."""
        match self._state:
            case _State.START:
                return self._step_start()
            case _State.THINKING:
                return self._step_thinking()
            case _State.CONTENT:
                return self._step_content()
            case _State.TOOL:
                return self._step_tool()
            case _State.DONE:
                self._buffer = ""
                return False

    def _step_start(self) -> bool:
        text = self._buffer.lstrip(_Lead.SEPARATORS.value if self._is_after_bare else None)
        if not text:
            return False
        if self._is_bare and text[0] == "{":
            self._content(self._buffer[: len(self._buffer) - len(text)])
            self._buffer = text
            self._begin_call("", is_certain=self._spec.is_forced)
            return True
        think = self._spec.think
        for marker in (think.opening, think.closing) if self._spec.knows_thinking else ():
            if text.startswith(marker):
                # A closing marker here repeats the prompt's own.
                self._buffer = text[len(marker) :]
                self._lead = _Lead.NEWLINES
                self._thinking_lead = True
                if marker == think.opening:
                    self._state = _State.THINKING
                return True
            if marker.startswith(text):
                return False
        self._state = _State.CONTENT
        return True

    def _step_thinking(self) -> bool:
        closing, opening = self._spec.think.closing, self._spec.syntax.opening
        before, marker = self._cut_at_marker((closing, opening) if self._spec.tools else (closing,))
        self._reasoning(before)
        if marker is None:
            return False
        self._trimmer.take()
        self._lead = _Lead.NEWLINES
        if marker == closing:
            self._state = _State.START
        else:
            # Some models call a tool without closing their thought, which no grammar foresees.
            self._begin_call(marker, is_certain=self._is_certain)
        return True

    def _step_content(self) -> bool:
        if not self._spec.tools:
            text, self._buffer = self._buffer, ""
            self._content(text)
            return False
        before, marker = self._cut_at_marker((self._spec.syntax.opening,))
        self._content(before)
        if self._state is _State.DONE:
            return True
        if marker is None:
            return False
        self._begin_call(marker, is_certain=self._is_certain or self._spec.is_forced)
        return True

    def _begin_call(self, marker: str, *, is_certain: bool) -> None:
        assert self._spec.tools is not None
        self._state = _State.TOOL
        self._marker = marker
        self._reader = CallReader(self._spec.syntax, self._spec.tools, is_certain=is_certain)

    def _step_tool(self) -> bool:
        assert self._reader is not None
        text, self._buffer = self._buffer, ""
        self._tell(self._reader.feed(text))
        return self._leave_call()

    def _end_call(self, *, is_cut: bool) -> None:
        """Take leave of the call that is being read at the end of all text."""
        reader = self._reader
        assert reader is not None
        if not is_cut:
            self._tell(reader.end())
        if not reader.is_done and self._state is _State.TOOL:
            self._lose(reader, reader.lost + reader.rest)

    def _cut_at_marker(self, markers: tuple[str, ...]) -> tuple[str, str | None]:
        """Take the buffer up to the first marker, which goes too; without one, hold back the
        end that may become one."""
        text = self._buffer
        found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            self._buffer = text[at + len(marker) :]
            return text[:at], marker
        held = max(overlap(text, marker) for marker in markers)
        self._buffer = text[len(text) - held :]
        return text[: len(text) - held], None

    def _leave_call(self) -> bool:
        """Go on after a call, or after what turned out to be none; False while it goes on."""
        reader = self._reader
        assert reader is not None
        if self._state is _State.DONE:
            return True
        if not (reader.is_done or reader.is_failed):
            return False
        self._buffer = reader.rest
        if reader.is_failed:
            self._lose(reader, reader.lost)
            return True
        self._is_after_bare = self._is_bare
        self._lead = _Lead.SEPARATORS if self._is_bare else _Lead.ALL
        is_open = self._spec.knows_thinking or self._is_bare
        self._state = _State.START if is_open else _State.CONTENT
        return True

    def _lose(self, reader: CallReader, text: str) -> None:
        """Give text back that is no call."""
        text = self._marker + text
        self._state = _State.CONTENT
        if reader.has_started:
            self.num_calls -= 1
            self._events.append(ToolCallLost(self.num_calls, text))
            return
        self._lead = _Lead.NOTHING
        self._content(text)

    def _tell(self, events: list[CallEvent]) -> None:
        for event in events:
            if isinstance(event, CallEnd):
                self._marker = ""
                if self._spec.is_single_call:
                    self._state = _State.DONE
                    return
            elif isinstance(event, CallStart):
                self._emit_content(self._stop.flush())
                # White space between text and a tool call belongs to neither.
                self._trimmer.take()
                call_id = event.id or self._new_call_id()
                self._events.append(ToolCallStart(self.num_calls, call_id, event.name))
                self.num_calls += 1
            else:
                self._events.append(ToolCallText(self.num_calls - 1, event.text))

    def _reasoning(self, text: str) -> None:
        if self._thinking_lead:
            text = text.lstrip("\r\n")
        if text:
            self._thinking_lead = False
            ready = self._trimmer.feed(text)
            if ready:
                self._events.append(ReasoningDelta(ready))

    def _content(self, text: str) -> None:
        text = text.lstrip(self._lead.value)
        if not text:
            return
        self._lead = _Lead.NOTHING
        self._emit_content(self._stop.feed(text))
        if self._stop.match is not None:
            self._state = _State.DONE

    def _emit_content(self, text: str) -> None:
        if not text:
            return
        ready = self._trimmer.feed(text) if self._spec.tools else text
        if ready:
            self._events.append(ContentDelta(ready))


def _new_call_id(syntax: CallSyntax) -> str:
    if syntax.id_chars is not None:
        return "".join(secrets.choice(_ALNUM) for _ in range(syntax.id_chars))
    return f"call_{secrets.token_hex(12)}"
