import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.core.errors import UpstreamConnectionError, UpstreamMalformedError
from cortex.core.translate_stream import StreamTranslator
from tests.support.anthropic_events import accumulate, check_grammar, read_events

USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    body = {"id": "chatcmpl-1", "created": 1, "model": "x", "choices": choices, **more}
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def call(index: int, arguments: str, **more: Any) -> dict[str, Any]:
    function = {"arguments": arguments}
    if "name" in more:
        function["name"] = more.pop("name")
    return {"tool_calls": [{"index": index, "function": function, **more}]}


def translate(*pieces: bytes) -> list[dict[str, Any]]:
    translator = StreamTranslator("m")
    return read_events(b"".join([*map(translator.feed, pieces), translator.end()]))


def test_thoughts_text_and_a_call_become_blocks_one_after_the_other():
    events = translate(
        chunk({"role": "assistant", "content": ""}),
        chunk({"reasoning_content": "Hm"}),
        chunk({"reasoning_content": "."}),
        chunk({"content": "I "}),
        chunk({"content": "look."}),
        chunk(call(0, "", id="c1", name="look", type="function")),
        chunk(call(0, '{"at":')),
        chunk(call(0, '"it"}')),
        chunk({}, "tool_calls"),
        chunk(usage=USAGE),
        b"data: [DONE]\n\n",
    )
    check_grammar(events)
    message = accumulate(events)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.content[0].thinking == "Hm."
    assert message.content[0].signature == "Y29ydGV4"
    assert message.content[1].text == "I look."
    assert message.content[2].input == {"at": "it"}
    assert (message.content[2].id, message.content[2].name) == ("c1", "look")
    assert (message.stop_reason, message.model, message.id) == ("tool_use", "m", "msg_1")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (9, 4)


def test_text_is_passed_on_as_it_comes():
    translator = StreamTranslator("m")
    translator.feed(chunk({"content": "a"}))
    assert read_events(translator.feed(chunk({"content": "b"}))) == [
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "text_delta", "text": "b"},
        }
    ]


def test_interleaved_parallel_calls_keep_their_arguments_apart():
    events = translate(
        chunk(call(0, "", id="a", name="f")),
        chunk(call(1, "", id="b", name="g")),
        chunk(call(0, '{"x":')),
        chunk(call(1, '{"y":')),
        chunk(call(0, "1}")),
        chunk(call(1, "2}")),
        chunk({"content": "Both."}),
        chunk({}, "tool_calls"),
        b"data: [DONE]\n\n",
    )
    check_grammar(events)
    first, second, text = accumulate(events).content
    assert (first.id, first.name, first.input) == ("a", "f", {"x": 1})
    assert (second.id, second.name, second.input) == ("b", "g", {"y": 2})
    assert text.text == "Both."


def test_usage_in_the_first_chunk_is_told_at_the_start():
    events = translate(chunk({"role": "assistant"}, usage={"prompt_tokens": 9}), chunk({}, "stop"))
    assert events[0]["message"]["usage"]["input_tokens"] == 9


def test_a_stop_string_is_named():
    choice = {"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": "END"}
    events = translate(_choices(choice))
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "END"}


def _choices(*choices: dict[str, Any]) -> bytes:
    body = {"id": "chatcmpl-1", "choices": list(choices)}
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def test_comments_become_pings():
    translator = StreamTranslator("m")
    assert translator.feed(b": keep-alive\n\n") == b'event: ping\ndata: {"type": "ping"}\n\n'


def test_an_upstream_error_ends_the_stream_with_an_error_event_and_nothing_after():
    error = b'data: {"error": {"message": "gone", "type": "api_error", "code": "engine_died"}}\n\n'
    events = translate(chunk({"content": "a"}), error, chunk({"content": "b"}))
    assert events[-1] == {"type": "error", "error": {"type": "api_error", "message": "gone"}}
    assert sum(event["type"] == "error" for event in events) == 1


def test_a_source_that_stops_early_is_an_error_and_no_end():
    events = translate(chunk({"content": "a"}))
    assert events[-1]["type"] == "error"
    assert "message_stop" not in [event["type"] for event in events]


def test_a_failure_is_told_once():
    translator = StreamTranslator("m")
    translator.feed(chunk({"content": "a"}))
    failed = translator.fail(UpstreamConnectionError("node a is gone"))
    assert read_events(failed)[0]["error"]["message"] == "node a is gone"
    assert translator.fail(UpstreamConnectionError("again")) == b""
    assert translator.feed(chunk({"content": "b"})) == b""
    assert translator.end() == b""


@pytest.mark.parametrize("junk", [b"data: {nope\n\n", b'data: {"choices": 3}\n\n'])
def test_what_is_no_chunk_is_refused(junk: bytes):
    with pytest.raises(UpstreamMalformedError):
        StreamTranslator("m").feed(junk)


TEXT = st.text(max_size=8)
DELTAS = st.one_of(
    st.builds(lambda text: {"content": text}, TEXT),
    st.builds(lambda text: {"reasoning_content": text}, TEXT),
    st.just({"role": "assistant", "content": None}),
    st.just(b": keep-alive\n\n"),
)
ARGUMENTS = st.dictionaries(TEXT, st.one_of(st.integers(), TEXT, st.booleans()), max_size=3)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[dict[str, Any]], str, str]:
    """Draw a whole OpenAI stream: its bytes, its calls' arguments, its text and thoughts."""
    deltas = draw(st.lists(DELTAS, max_size=8))
    arguments = draw(st.lists(ARGUMENTS, max_size=3))
    pending = []
    for index, value in enumerate(arguments):
        encoded = msgspec.json.encode(value).decode()
        cut = draw(st.integers(0, len(encoded)))
        pending.append(
            [
                call(index, encoded[:cut], id=f"c{index}", name=f"f{index}"),
                call(index, encoded[cut:]),
            ]
        )
    mixed = list(deltas)
    for pair in pending:
        first = draw(st.integers(0, len(mixed)))
        mixed.insert(first, pair[0])
        mixed.insert(draw(st.integers(first + 1, len(mixed))), pair[1])
    text = "".join(d["content"] or "" for d in mixed if isinstance(d, dict) and "content" in d)
    thoughts = "".join(
        d["reasoning_content"] for d in mixed if isinstance(d, dict) and "reasoning_content" in d
    )
    body = b"".join(each if isinstance(each, bytes) else chunk(each) for each in mixed)
    end = chunk({}, "tool_calls" if arguments else "stop") + chunk(usage=USAGE)
    return body + end + b"data: [DONE]\n\n", arguments, text, thoughts


@settings(deadline=None)
@given(stream=streams(), cuts=st.lists(st.integers(0, 4000), max_size=30))
def test_any_stream_however_cut_becomes_a_valid_one_of_the_same_content(
    stream: tuple[bytes, list[dict[str, Any]], str, str], cuts: list[int]
):
    source, arguments, text, thoughts = stream
    edges = sorted({0, len(source), *(cut for cut in cuts if cut < len(source))})
    pieces = [source[a:b] for a, b in itertools.pairwise(edges)]
    events = translate(*pieces)
    check_grammar(events)
    assert events[-1]["type"] == "message_stop"
    message = accumulate(events)
    uses = {b.name: b for b in message.content if b.type == "tool_use"}
    for index, value in enumerate(arguments):
        assert uses[f"f{index}"].input == value
        assert uses[f"f{index}"].id == f"c{index}"
    assert "".join(b.text for b in message.content if b.type == "text") == text
    assert "".join(b.thinking for b in message.content if b.type == "thinking") == thoughts
    assert message.usage.output_tokens == 4
