"""Tool calls of every format: whole or in pieces, held to a grammar or not, alone or in text."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.core.neuron_api import ToolFormat
from cortex.neuron.chat.formats import SYNTAXES, tool_format_of
from cortex.neuron.chat.output import (
    ContentDelta,
    OutputParser,
    OutputSpec,
    ToolCallLost,
    ToolCallStart,
    ToolCallText,
)
from cortex.neuron.chat.schema import ToolTable
from tests.support.call_texts import written
from tests.support.chat_models import PROPERTY, WEATHER, parse_call, tool, tools

FORMATS: list[ToolFormat] = ["qwen_xml", "hermes", "llama3", "mistral", "mistral_list"]
TABLE = ToolTable(tools(WEATHER, tool("now"), tool("now_and_then", {"properties": {"x": {}}})))

Calls = list[tuple[str, Any]]


def read(
    pieces: list[str], name: ToolFormat, *, is_forced: bool = False, is_cut: bool = False
) -> tuple[str, Calls]:
    """Return the content and the calls, which must be complete."""
    spec = OutputSpec(tools=TABLE, syntax=SYNTAXES[name], is_forced=is_forced)
    parser = OutputParser(spec)
    events = [event for piece in pieces for event in parser.feed(piece)]
    events += parser.finish(is_cut=is_cut)
    names: dict[int, str] = {}
    texts: dict[int, str] = {}
    content = ""
    for event in events:
        match event:
            case ToolCallStart():
                assert event.index == len(names)
                names[event.index] = event.name
                texts[event.index] = ""
            case ToolCallText():
                assert event.index == len(names) - 1
                texts[event.index] += event.text
            case ContentDelta():
                content += event.text
            case _:
                raise AssertionError(event)
    return content, [(names[at], json.loads(texts[at])) for at in names]


@pytest.mark.parametrize("name", FORMATS)
def test_calls_of_each_format_are_read(name: ToolFormat) -> None:
    calls: Calls = [("weather", {"city": 'New\n"York"', "days": 3}), ("now", {})]
    text = written(name, calls)
    assert read([text], name) == ("", calls)
    assert read(list(text), name) == ("", calls)
    assert read(list(text), name, is_forced=True) == ("", calls)


TEXTS = {
    "hermes": '<tool_call>{"arguments": {"x": 1}, "name": "now_and_then"}</tool_call>',
    "llama3": '{"type": "function", "function": "now_and_then", "parameters": {"x": 1}}',
    "mistral": 'OK[TOOL_CALLS]now_and_then[CALL_ID]a1b2c3d4e[ARGS]{"x": 1}',
    "mistral_list": '[TOOL_CALLS] [{"name": "now_and_then", "arguments": {"x": 1}, "id": "a"}]',
}


@pytest.mark.parametrize(("name", "text"), TEXTS.items())
def test_variants_of_a_format_are_read(name: ToolFormat, text: str) -> None:
    content, calls = read(list(text), name)
    assert calls == [("now_and_then", {"x": 1})]
    assert content == ("OK" if name == "mistral" else "")


def test_a_call_s_own_id_is_kept() -> None:
    spec = OutputSpec(tools=TABLE, syntax=SYNTAXES["mistral"])
    first, *_ = OutputParser(spec).feed(TEXTS["mistral"].removeprefix("OK"))
    assert isinstance(first, ToolCallStart)
    assert first.id == "a1b2c3d4e"


def test_mistral_s_ids_are_nine_letters_and_digits() -> None:
    spec = OutputSpec(tools=TABLE, syntax=SYNTAXES["mistral"])
    starts = [
        event
        for event in OutputParser(spec).feed("[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[ARGS]{}")
        if isinstance(event, ToolCallStart)
    ]
    assert [len(start.id) for start in starts] == [9, 9]
    assert all(start.id.isalnum() for start in starts)
    assert starts[0].id != starts[1].id


def test_a_tagged_call_of_llama_may_follow_text() -> None:
    text = 'Let me see.\n<|python_tag|>{"name": "now", "parameters": {}}'
    assert read(list(text), "llama3") == ("Let me see.", [("now", {})])


@pytest.mark.parametrize(
    "text",
    [
        '{"answer": 5}',
        '{"name": "Bob", "age": 5}',
        '{"name": "later", "parameters": {}}',
        "{not json",
        '<|python_tag|>brave.search(query="x")',
        'See {"name": "now", "parameters": {}}',
    ],
)
def test_json_that_names_no_tool_is_an_answer_of_llama_s(text: str) -> None:
    assert read([text], "llama3") == (text, [])
    assert read(list(text), "llama3") == (text, [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen_xml", "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</tool_call> x"),
        ("hermes", '<tool_call>{"name": "now", "arguments": {oops}}</tool_call> x'),
        ("hermes", '<tool_call>{"name": "now", "arguments": {}}'),
        ("mistral", "[TOOL_CALLS]two words[ARGS]{}"),
        ("mistral", '[TOOL_CALLS]now[ARGS]["a"]'),
        ("mistral", '[TOOL_CALLS]now[ARGS]{"a": 1'),
        ("mistral_list", '[TOOL_CALLS] [{"name": "now", "arguments": 5}] x'),
        ("mistral_list", '[TOOL_CALLS] [{"name": "now"'),
    ],
)
def test_what_cannot_be_read_comes_back_as_text(name: ToolFormat, text: str) -> None:
    assert read([text], name, is_cut=True) == (text, [])
    assert read(list(text), name, is_cut=True) == (text, [])


def test_of_a_list_that_breaks_off_the_whole_calls_are_kept() -> None:
    text = '[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "we'
    assert read(list(text), "mistral_list") == (', {"name": "we', [("now", {})])


def test_a_stop_text_that_begins_before_a_broken_call_is_still_found() -> None:
    spec = OutputSpec(tools=TABLE, syntax=SYNTAXES["hermes"], stops=("x<tool",))
    parser = OutputParser(spec)
    events = parser.feed("abx") + parser.feed("<tool_call>no call") + parser.finish()
    assert "".join(event.text for event in events if isinstance(event, ContentDelta)) == "ab"
    assert parser.stop_match == "x<tool"


def test_a_certain_call_that_is_cut_says_what_is_lost() -> None:
    spec = OutputSpec(tools=TABLE, syntax=SYNTAXES["mistral"], is_forced=True)
    parser = OutputParser(spec)
    events = parser.feed('[TOOL_CALLS]weather[ARGS]{"city": "Ro') + parser.finish(is_cut=True)
    assert [type(event) for event in events] == [ToolCallStart, ToolCallText, ToolCallLost]
    assert events[-1] == ToolCallLost(0, '[TOOL_CALLS]weather[ARGS]{"city": "Ro')
    assert parser.num_calls == 0


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("<tool_call>\n<function=", "qwen_xml"),
        ('<tool_call>\n{"name"', "hermes"),
        ('<|start_header_id|> {"name": function name, "parameters": ..}', "llama3"),
        ("<|start_header_id|> parameters", None),
        ("<|python_tag|>", "llama3"),
        ("[TOOL_CALLS] [", "mistral_list"),
        ("[TOOL_CALLS]name[ARGS]", "mistral"),
        ("{{ tools }}", None),
    ],
)
def test_the_format_is_told_from_the_template(source: str, name: str | None) -> None:
    assert tool_format_of(source) == name


_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)
_arguments = st.fixed_dictionaries(
    {"city": _texts},
    optional={
        "days": st.integers(1, 9),
        "detailed": st.booleans(),
        "areas": st.lists(_texts, max_size=3),
    },
)
_calls = st.lists(
    st.tuples(st.just("weather"), _arguments)
    | st.tuples(st.just("now"), st.just({}))
    | st.tuples(
        st.just("now_and_then"),
        st.fixed_dictionaries({"x": _values.filter(lambda value: not isinstance(value, str))}),
    ),
    min_size=1,
    max_size=3,
)


def in_pieces(text: str, data: st.DataObject) -> list[str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)])]


@settings(PROPERTY, max_examples=300)
@given(st.sampled_from(FORMATS), _calls, st.booleans(), st.data())
def test_pieces_of_calls_add_up_to_the_calls(
    name: ToolFormat, calls: Calls, is_forced: bool, data: st.DataObject
) -> None:
    text = written(name, calls)
    for pieces in ([text], in_pieces(text, data), list(text)):
        assert read(pieces, name, is_forced=is_forced) == ("", calls)


@settings(PROPERTY, max_examples=300)
@given(st.sampled_from(FORMATS), _calls, st.data())
def test_a_damaged_call_is_never_lost_and_its_cut_does_not_matter(
    name: ToolFormat, calls: Calls, data: st.DataObject
) -> None:
    whole = written(name, calls)
    at = data.draw(st.integers(0, len(whole)))
    text = whole[:at] + data.draw(st.sampled_from(["", "x", "<", "}", '"'])) + whole[at + 1 :]
    try:
        content, found = read([text], name)
    except json.JSONDecodeError as exc:
        raise AssertionError(f"arguments that are no JSON: {text}") from exc
    assert read(in_pieces(text, data), name) == (content, found)
    assert read(list(text), name) == (content, found)
    if not found:
        assert content == text


@settings(PROPERTY, max_examples=100)
@given(st.sampled_from(["hermes", "qwen_xml"]), _calls)
def test_a_block_alone_is_the_call_in_a_stream(name: ToolFormat, calls: Calls) -> None:
    for call_name, arguments in calls:
        syntax = SYNTAXES[name]
        text = written(name, [(call_name, arguments)])
        body = text.removeprefix(syntax.opening).removesuffix(syntax.closing)
        parsed = parse_call(body, TABLE, syntax=syntax)
        assert parsed is not None
        assert (parsed[0], json.loads(parsed[1])) == (call_name, arguments)
