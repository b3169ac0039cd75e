"""Generated text, piece by piece, to reasoning, content and tool calls.

The result does not depend on how the text is cut into pieces.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from cortex.neuron.chat.schema import ToolTable
from cortex.neuron.chat.toolcalls import parse_call

THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the reasoning text."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDone:
    """A complete tool call; `arguments` is the text of a JSON object."""

    index: int
    id: str
    name: str
    arguments: str


OutputEvent = ReasoningDelta | ContentDelta | ToolCallDone


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """What a request's output may consist of.

    Attributes:
        knows_thinking: `<think>` blocks are reasoning.
        starts_thinking: the prompt ends inside an open `<think>`.
        tools: declared tools; None leaves `<tool_call>` blocks as text.
        is_single_call: output ends with the first tool call.
        stops: texts that end the content, none of them empty.
    """

    knows_thinking: bool = False
    starts_thinking: bool = False
    tools: ToolTable | None = None
    is_single_call: bool = False
    stops: tuple[str, ...] = ()


class _State(Enum):
    START = "start"  # before content, where a <think> may open
    THINKING = "thinking"
    CONTENT = "content"
    TOOL = "tool"
    DONE = "done"


class _Lead(Enum):
    """What to drop of the white space before content."""

    NOTHING = ""
    NEWLINES = "\r\n"  # after a thinking block
    ALL = " \t\r\n"  # after a tool call


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
        held = max(_overlap(text, stop) for stop in self._stops)
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

    def __init__(
        self,
        spec: OutputSpec,
        *,
        new_call_id: Callable[[], str] = lambda: f"call_{secrets.token_hex(12)}",
    ) -> None:
        self._spec = spec
        self._new_call_id = new_call_id
        self._state = _State.START
        if spec.starts_thinking:
            self._state = _State.THINKING
        elif not spec.knows_thinking:
            self._state = _State.CONTENT
        self._lead = _Lead.NOTHING
        self._buffer = ""
        self._body: list[str] = []  # of the tool block in progress
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

    def feed(self, text: str) -> list[OutputEvent]:
        """Return what became certain with this piece of text."""
        self._buffer += text
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
                body = "".join(self._body) + rest
                self._end_call(body, is_closed=False, is_cut=is_cut)
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
        text = self._buffer.lstrip()
        if not text:
            return False
        for marker in (THINK, END_THINK):
            if text.startswith(marker):
                # A closing marker here repeats the prompt's own.
                self._buffer = text[len(marker) :]
                self._lead = _Lead.NEWLINES
                self._thinking_lead = True
                if marker == THINK:
                    self._state = _State.THINKING
                return True
            if marker.startswith(text):
                return False
        self._state = _State.CONTENT
        return True

    def _step_thinking(self) -> bool:
        markers = (END_THINK, TOOL_CALL) if self._spec.tools else (END_THINK,)
        before, marker = self._cut_at_marker(markers)
        self._reasoning(before)
        if marker is None:
            return False
        self._trimmer.take()
        self._lead = _Lead.NEWLINES
        # Some models call a tool without closing their thought.
        self._state = _State.TOOL if marker == TOOL_CALL else _State.START
        return True

    def _step_content(self) -> bool:
        if not self._spec.tools:
            text, self._buffer = self._buffer, ""
            self._content(text)
            return False
        before, marker = self._cut_at_marker((TOOL_CALL,))
        self._content(before)
        if self._state is _State.DONE:
            return True
        if marker is None:
            return False
        self._emit_content(self._stop.flush())
        self._state = _State.TOOL
        return True

    def _step_tool(self) -> bool:
        body, marker = self._cut_at_marker((END_TOOL_CALL,))
        self._body.append(body)
        if marker is None:
            return False
        self._end_call("".join(self._body), is_closed=True)
        return True

    def _cut_at_marker(self, markers: tuple[str, ...]) -> tuple[str, str | None]:
        """Take the buffer up to the first marker, which goes too; without one, hold back the
        end that may become one."""
        text = self._buffer
        found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            self._buffer = text[at + len(marker) :]
            return text[:at], marker
        held = max(_overlap(text, marker) for marker in markers)
        self._buffer = text[len(text) - held :]
        return text[: len(text) - held], None

    def _end_call(self, body: str, *, is_closed: bool, is_cut: bool = False) -> None:
        assert self._spec.tools is not None
        self._body = []
        self._state = _State.CONTENT
        call = None if is_cut else parse_call(body, self._spec.tools, is_closed=is_closed)
        if call is None:
            self._lead = _Lead.NOTHING
            self._content(f"{TOOL_CALL}{body}{END_TOOL_CALL if is_closed else ''}")
            return
        # White space between text and a tool call belongs to neither.
        self._trimmer.take()
        self._events.append(
            ToolCallDone(
                index=self.num_calls,
                id=self._new_call_id(),
                name=call.name,
                arguments=call.arguments,
            )
        )
        self.num_calls += 1
        self._lead = _Lead.ALL
        if self._spec.is_single_call:
            self._state = _State.DONE
        elif self._spec.knows_thinking:
            self._state = _State.START

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


def _overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of `text` that begins `marker` but is not all of it."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
