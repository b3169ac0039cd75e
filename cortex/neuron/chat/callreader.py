"""Tool calls piece by piece: their names at once, their arguments as they are generated.

Each format is read by a generator that yields what became certain, and None where it needs more
text. What a reader makes of a text does not depend on how the text is cut.
"""

from cortex.neuron.chat.callparts import (
    CallEnd,
    CallEvent,
    CallText,
    Reading,
    Source,
    decoded,
    next_is,
    skip_space,
)
from cortex.neuron.chat.formats import CallSyntax
from cortex.neuron.chat.jsoncalls import bracketed_calls, json_call
from cortex.neuron.chat.jsonspan import MalformedCallError
from cortex.neuron.chat.schema import ToolTable
from cortex.neuron.chat.xmlcalls import FUNCTION, xml_call


class CallReader:
    """Reads the text after an opening marker, up to the end of what the marker opened.

    Args:
        is_certain: the text is generated under a grammar, so that what it begins it also ends:
            events come as early as possible. Otherwise those of a call come together, at its
            end, once its arguments are known to be a JSON object.

    Attributes:
        is_done: everything is read; `rest` is what follows it.
        is_failed: this is no call; `lost` and then `rest` are to be taken for other text.
        has_started: a call's name was told and its end was not.
    """

    def __init__(self, syntax: CallSyntax, tools: ToolTable, *, is_certain: bool) -> None:
        self._source = Source()
        self._is_certain = is_certain
        self._steps = _steps(self._source, syntax, tools, is_certain=is_certain)
        self._held: list[CallEvent] = []
        self.is_done = False
        self.is_failed = False
        self.has_started = False

    @property
    def rest(self) -> str:
        """Text that is not read yet."""
        return self._source.ahead

    @property
    def lost(self) -> str:
        """Text that was read since the last complete call."""
        return "".join(self._source.taken)

    def feed(self, text: str) -> list[CallEvent]:
        """Return what became certain."""
        self._source.ahead += text
        return self._run()

    def end(self) -> list[CallEvent]:
        """Return what is certain at the end of all text; either done or failed then."""
        self._source.is_ended = True
        return self._run()

    def _run(self) -> list[CallEvent]:
        events: list[CallEvent] = []
        try:
            for event in self._steps:
                if event is None:
                    return events
                self._held.append(event)
                if isinstance(event, CallEnd):
                    self._check()
                    self._source.taken.clear()
                if self._is_certain or isinstance(event, CallEnd):
                    events += self._held
                    self._held.clear()
                    self.has_started = not isinstance(event, CallEnd)
        except MalformedCallError:
            self.is_failed = True
        else:
            self.is_done = True
        return events

    def _check(self) -> None:
        if self._is_certain:
            return
        text = "".join(event.text for event in self._held if isinstance(event, CallText))
        if not isinstance(decoded(text), dict):
            raise MalformedCallError


def _steps(source: Source, syntax: CallSyntax, tools: ToolTable, *, is_certain: bool) -> Reading:
    if syntax.closing:
        return _block(source, tools, syntax.closing, is_certain=is_certain)
    if syntax.is_bare:
        return json_call(source, tools, is_bare=True)
    return bracketed_calls(source, tools)


def _block(source: Source, tools: ToolTable, closing: str, *, is_certain: bool) -> Reading:
    """A call between markers, as JSON or as XML: models of both kinds write the other, too."""
    yield from skip_space(source)
    if (yield from next_is(source, "{", FUNCTION)) == "{":
        yield from json_call(source, tools, closing)
    else:
        yield from xml_call(source, tools, closing, is_certain=is_certain)
