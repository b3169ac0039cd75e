"""Generated text to reasoning, content and tool calls, however it is cut."""

from collections.abc import Iterator
from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.neuron.chat.output import (
    ContentDelta,
    OutputParser,
    OutputSpec,
    ReasoningDelta,
    StopMatcher,
    ToolCallLost,
    ToolCallStart,
    ToolCallText,
)
from cortex.neuron.chat.schema import ToolTable
from tests.support.chat_models import PROPERTY, WEATHER, tool, tools

TABLE = ToolTable(tools(WEATHER, tool("now")))
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
    "</function>\n</tool_call>"
)
NOW = "<tool_call>\n<function=now>\n</function>\n</tool_call>"

THINKING = OutputSpec(knows_thinking=True)
OPEN = OutputSpec(knows_thinking=True, starts_thinking=True)
TOOLS = OutputSpec(knows_thinking=True, tools=TABLE)
OPEN_TOOLS = OutputSpec(knows_thinking=True, starts_thinking=True, tools=TABLE)

Parsed = list[tuple[str, ...]]


def ids() -> Iterator[str]:
    return (f"call_{at}" for at in count())


def parse(pieces: str | list[str], spec: OutputSpec, *, is_cut: bool = False) -> Parsed:
    """The events as tuples, neighbours of a kind joined."""
    parser = OutputParser(spec, new_call_id=ids().__next__)
    events = [
        event
        for piece in ([pieces] if isinstance(pieces, str) else pieces)
        for event in parser.feed(piece)
    ]
    events += parser.finish(is_cut=is_cut)
    parsed: Parsed = []
    for event in events:
        if isinstance(event, ToolCallStart):
            parsed.append(("call", event.id, event.name, ""))
            continue
        if isinstance(event, ToolCallText):
            parsed[-1] = (*parsed[-1][:3], parsed[-1][3] + event.text)
            continue
        assert not isinstance(event, ToolCallLost)
        kind = {ReasoningDelta: "reasoning", ContentDelta: "content"}[type(event)]
        if parsed and parsed[-1][0] == kind:
            parsed[-1] = (kind, parsed[-1][1] + event.text)
        else:
            parsed.append((kind, event.text))
    return parsed


@pytest.mark.parametrize(
    ("text", "spec", "expected"),
    [
        ("Hello\n", OutputSpec(), [("content", "Hello\n")]),
        ("", OutputSpec(), []),
        ("  x", OutputSpec(), [("content", "  x")]),
        ("a <think> b", OutputSpec(), [("content", "a <think> b")]),
        ("    code", THINKING, [("content", "    code")]),
        ("a <think>b</think> c", THINKING, [("content", "a <think>b</think> c")]),
        ("<think>\nhm\n</think>\n\nYes.", THINKING, [("reasoning", "hm"), ("content", "Yes.")]),
        ("\n<think>hm</think>Yes", THINKING, [("reasoning", "hm"), ("content", "Yes")]),
        ("<think>\n\n</think>\n\nYes", THINKING, [("content", "Yes")]),
        ("</think>\n\nYes", THINKING, [("content", "Yes")]),
        ("hm\n</think>\n\nYes.\n", OPEN, [("reasoning", "hm"), ("content", "Yes.\n")]),
        ("hm\n\nmore  </think>  ok", OPEN, [("reasoning", "hm\n\nmore"), ("content", "  ok")]),
        ("all of it", OPEN, [("reasoning", "all of it")]),
        ("cut </thi", OPEN, [("reasoning", "cut </thi")]),
        ("<think>a", OPEN, [("reasoning", "<think>a")]),
        ("x " + CALL, THINKING, [("content", "x " + CALL)]),
        (CALL, TOOLS, [("call", "call_0", "weather", '{"city":"Rome"}')]),
        (
            "Let me look.\n\n" + CALL + "\n" + NOW + "\n",
            TOOLS,
            [
                ("content", "Let me look."),
                ("call", "call_0", "weather", '{"city":"Rome"}'),
                ("call", "call_1", "now", "{}"),
            ],
        ),
        (
            "hm\n</think>\n\n" + NOW,
            OPEN_TOOLS,
            [("reasoning", "hm"), ("call", "call_0", "now", "{}")],
        ),
        (
            "hm\n" + NOW + "\n</think>\n\nDone.",
            OPEN_TOOLS,
            [("reasoning", "hm"), ("call", "call_0", "now", "{}"), ("content", "Done.")],
        ),
        (
            NOW + "\n\nThat is it.",
            TOOLS,
            [("call", "call_0", "now", "{}"), ("content", "That is it.")],
        ),
        (
            "<tool_call>nonsense</tool_call> after",
            TOOLS,
            [("content", "<tool_call>nonsense</tool_call> after")],
        ),
        ("5 < 6 and <tool", TOOLS, [("content", "5 < 6 and <tool")]),
        ("Hello \n", TOOLS, [("content", "Hello \n")]),
        ('<tool_call>{"name": "now"}</tool_call>', TOOLS, [("call", "call_0", "now", "{}")]),
    ],
)
def test_output_is_told_apart(text: str, spec: OutputSpec, expected: Parsed) -> None:
    assert parse(text, spec) == expected
    assert parse(list(text), spec) == expected


def test_a_call_without_end_marker_counts_only_when_the_model_ended_it() -> None:
    text = NOW.removesuffix("</tool_call>")
    assert parse(text, TOOLS) == [("call", "call_0", "now", "{}")]
    assert parse(text, TOOLS, is_cut=True) == [("content", text)]


def test_half_a_call_comes_back_as_text() -> None:
    assert parse("a <tool_call>\n<function=we", TOOLS) == [
        ("content", "a <tool_call>\n<function=we")
    ]


def test_a_single_call_ends_the_output() -> None:
    spec = OutputSpec(tools=TABLE, is_single_call=True)
    parser = OutputParser(spec, new_call_id=ids().__next__)
    assert parser.feed(NOW + NOW + "text") == [
        ToolCallStart(0, "call_0", "now"),
        ToolCallText(0, "{}"),
    ]
    assert parser.is_done
    assert parser.feed("more") == []
    assert parser.finish() == []
    assert parser.num_calls == 1


def test_call_ids_differ_and_have_the_usual_form() -> None:
    parser = OutputParser(TOOLS)
    events = [e for e in parser.feed(NOW + NOW) if isinstance(e, ToolCallStart)]
    assert [event.index for event in events] == [0, 1]
    assert events[0].id != events[1].id
    assert all(event.id.startswith("call_") and len(event.id) > 12 for event in events)


def test_the_state_tells_whose_tokens_come() -> None:
    parser = OutputParser(OPEN)
    assert (parser.is_thinking, parser.is_content) == (True, False)
    parser.feed("hm</think>")
    assert (parser.is_thinking, parser.is_content) == (False, True)


def stopped(pieces: list[str], *stops: str, **spec: Any) -> tuple[Parsed, str | None]:
    parser = OutputParser(OutputSpec(stops=stops, **spec))
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    text = "".join(event.text for event in events if isinstance(event, ContentDelta))
    return ([("content", text)] if text else []), parser.stop_match


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "match"),
    [
        (["Hello END more"], ["END"], "Hello ", "END"),
        (["Hello E", "N", "D more"], ["END"], "Hello ", "END"),
        (["EN", "EN", "D"], ["END"], "EN", "END"),
        (["aab"], ["ab"], "a", "ab"),
        (["a", "a", "b"], ["ab"], "a", "ab"),
        (["EN"], ["END"], "EN", None),
        (["abcd"], ["bcd", "c"], "ab", "c"),
        (["a", "b", "c", "d"], ["bcd", "c"], "ab", "c"),
        (["xabc"], ["abc", "bc", "c"], "x", "abc"),
        (["END"], ["END"], "", "END"),
        (["one\ntwo"], ["\n"], "one", "\n"),
    ],
)
def test_a_stop_ends_the_content_before_it(
    pieces: list[str], stops: list[str], text: str, match: str | None
) -> None:
    parsed, found = stopped(pieces, *stops)
    assert parsed == ([("content", text)] if text else [])
    assert found == match


def test_a_stop_holds_back_no_more_than_may_become_one() -> None:
    matcher = StopMatcher(("STOP",))
    assert [matcher.feed(piece) for piece in ("go", " ST", "A", "ST", "O")] == [
        "go",
        " ",
        "STA",
        "",
        "",
    ]
    assert matcher.flush() == "STO"


def test_a_stop_in_reasoning_or_in_a_call_does_not_count() -> None:
    parsed, found = stopped(
        ["a Rome b</think>ok " + CALL],
        "Rome",
        knows_thinking=True,
        starts_thinking=True,
        tools=TABLE,
    )
    assert parsed == [("content", "ok")]
    assert found is None


def test_white_space_before_a_stop_is_kept_beside_tools() -> None:
    assert stopped(["a \n", "END"], "END", tools=TABLE) == ([("content", "a \n")], "END")


FRAGMENTS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=weather>", "</function>",
    "<parameter=city>", "</parameter>", "\n", " ", "Rome", "STOP", "ST", "<", "</", CALL, NOW,
    '{"name": "now"}', "é",
]  # fmt: skip
SPECS = [
    OutputSpec(
        knows_thinking=thinking != "no",
        starts_thinking=thinking == "open",
        tools=table,
        is_single_call=single,
        stops=stops,
    )
    for thinking in ("no", "closed", "open")
    for table, single in ((None, False), (TABLE, False), (TABLE, True))
    for stops in ((), ("STOP",), ("TO", "ST"), ("\n\n",))
]


@PROPERTY
@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.sampled_from(SPECS),
    st.booleans(),
    st.data(),
)
def test_the_cut_of_the_text_does_not_matter(
    text: str, spec: OutputSpec, is_cut: bool, data: st.DataObject
) -> None:
    whole = parse(text, spec, is_cut=is_cut)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert parse(pieces, spec, is_cut=is_cut) == whole
    assert parse(list(text), spec, is_cut=is_cut) == whole


@PROPERTY
@given(st.text(max_size=60))
def test_plain_text_passes_unchanged(text: str) -> None:
    assert "".join(part[1] for part in parse(list(text), OutputSpec())) == text
