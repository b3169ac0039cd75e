import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.core.errors import UpstreamConnectionError, UpstreamMalformedError
from cortex.core.openai import Usage, usage_comment
from cortex.core.translate_stream import MAX_CALLS, MAX_HELD_CHARS, StreamTranslator
from tests.support.anthropic_events import accumulate, check_grammar, read_events

USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    body = {"id": "chatcmpl-1", "created": 1, "model": "x", "choices": choices, **more}
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def call(index: int | None, arguments: str, **more: Any) -> dict[str, Any]:
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


def kinds(stream: bytes) -> list[str]:
    return [event["type"] for event in read_events(stream)]


def test_a_second_call_is_relayed_live_once_the_first_is_complete():
    translator = StreamTranslator("m")
    translator.feed(chunk(call(0, '{"a":1}', id="a", name="f")))
    assert kinds(translator.feed(chunk(call(1, '{"b"', id="b", name="g")))) == [
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
    ]
    assert kinds(translator.feed(chunk(call(1, ":2}")))) == ["content_block_delta"]
    assert kinds(translator.feed(chunk({"content": "So."}))) == [
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
    ]


def test_a_second_call_waits_while_the_first_is_incomplete():
    translator = StreamTranslator("m")
    translator.feed(chunk(call(0, '{"a":{"b":1}', id="a", name="f")))
    assert translator.feed(chunk(call(1, '{"b":', id="b", name="g"))) == b""
    assert kinds(translator.feed(chunk(call(0, "}")))) == [
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
    ]
    assert kinds(translator.feed(chunk(call(1, "2}")))) == ["content_block_delta"]


def test_white_space_after_a_complete_call_is_dropped_and_more_is_a_fault():
    translator = StreamTranslator("m")
    translator.feed(chunk(call(0, "{}", id="a", name="f")) + chunk({"content": "x"}))
    assert translator.feed(chunk(call(0, " \n"))) == b""
    with pytest.raises(UpstreamMalformedError, match="goes on after its end"):
        translator.feed(chunk(call(0, "{}")))


@pytest.mark.parametrize("index", [0, None])
def test_calls_that_share_an_index_or_have_none_are_told_apart(index: int | None):
    events = translate(
        chunk(call(index, '{"x":', id="a", name="f")),
        chunk(call(index, "1}")),
        chunk(call(index, '{"y":2}', id="b", name="f")),
        chunk({}, "stop"),
    )
    first, second = accumulate(events).content
    assert (first.id, first.input) == ("a", {"x": 1})
    assert (second.id, second.input) == ("b", {"y": 2})
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_calls_without_index_and_id_begin_with_their_names():
    nameless = {"tool_calls": [{"function": {"arguments": "1}"}}]}
    events = translate(
        chunk({"tool_calls": [{"function": {"name": "f", "arguments": '{"x":'}}]}),
        chunk(nameless),
        chunk({"tool_calls": [{"function": {"name": "g", "arguments": "{}"}}]}),
        chunk({}, "tool_calls"),
    )
    first, second = accumulate(events).content
    assert (first.name, first.input, second.name, second.input) == ("f", {"x": 1}, "g", {})
    assert first.id.startswith("toolu_")
    assert first.id != second.id


def test_two_calls_of_one_id_get_different_ones():
    events = translate(
        chunk(call(0, "{}", id="same", name="f")),
        chunk(call(1, "{}", id="same", name="f")),
        chunk({}, "tool_calls"),
    )
    first, second = accumulate(events).content
    assert first.id == "same"
    assert second.id != "same"


def test_a_name_that_comes_late_is_waited_for_and_one_that_never_comes_is_an_error():
    late = [chunk(call(0, '{"a":', id="a")), chunk(call(0, "1}", name="f")), chunk({}, "stop")]
    (block,) = accumulate(translate(*late)).content
    assert (block.name, block.input) == ("f", {"a": 1})
    assert translate(late[0], chunk({}, "stop"))[-1]["type"] == "error"


def test_too_many_calls_are_a_fault():
    translator = StreamTranslator("m")
    for index in range(MAX_CALLS):
        translator.feed(chunk(call(index, "{}", name="f")))
    with pytest.raises(UpstreamMalformedError, match="over 1024 tool calls"):
        translator.feed(chunk(call(MAX_CALLS, "{}", name="f")))


def test_too_much_held_back_is_a_fault():
    translator = StreamTranslator("m")
    translator.feed(chunk(call(0, "", name="f")) + chunk(call(1, "", name="g")))
    half = "x" * (MAX_HELD_CHARS // 2)
    translator.feed(chunk(call(1, half)))
    translator.feed(chunk(call(1, half)))
    with pytest.raises(UpstreamMalformedError, match="too large"):
        translator.feed(chunk(call(1, "x")))


def test_nulls_and_fields_of_other_engines_are_taken():
    choice = {
        "index": 0,
        "delta": {"role": None, "content": "x", "reasoning": None, "tool_calls": None},
        "logprobs": {"odd": 1},
        "finish_reason": None,
    }
    events = translate(
        _choices(choice | {"delta": None}),
        _choices(choice),
        _choices(choice | {"index": 1}),
        _choices(choice | {"delta": {}, "finish_reason": "stop", "stop_reason": 151645}),
    )
    message = accumulate(events)
    assert [block.text for block in message.content] == ["x"]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)


def test_an_answer_of_nothing_is_a_message_without_blocks():
    events = translate(chunk({"role": "assistant", "content": ""}), chunk({}, "stop"))
    assert [event["type"] for event in events] == ["message_start", "message_delta", "message_stop"]


def test_usage_that_a_comment_tells_before_the_first_chunk_is_told_at_the_start():
    comment = usage_comment(Usage(prompt_tokens=9))
    events = translate(comment, chunk({"role": "assistant"}), chunk({}, "stop"))
    assert events[0]["type"] == "message_start"
    assert events[0]["message"]["usage"]["input_tokens"] == 9


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


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (b'{ "error":{"message":"full","code":"queue_full"}}', "overloaded_error"),
        (b'{"error":{"message":"full","type":"rate_limit_error","code":9}}', "rate_limit_error"),
        (b'{"id":"1","error":{"message":"full","type":"odd"}}', "api_error"),
        (b'{"error":"full"}', "api_error"),
    ],
)
def test_an_upstream_error_keeps_its_kind_and_message(error: bytes, kind: str):
    (event,) = translate(b"data: " + error + b"\n\n")
    assert event["error"]["type"] == kind
    assert "full" in event["error"]["message"]


def test_an_event_named_error_is_one_whatever_it_says():
    (event,) = translate(b"event: error\ndata: out of memory\n\n")
    assert event["type"] == "error"
    assert "out of memory" in event["error"]["message"]


def test_what_was_good_before_a_fault_comes_out_before_it():
    translator = StreamTranslator("m")
    out = translator.feed(chunk({"content": "a"}) + b"data: {nope\n\n")
    assert kinds(out) == ["message_start", "content_block_start", "content_block_delta"]
    with pytest.raises(UpstreamMalformedError):
        translator.feed(b"")
    assert kinds(translator.end()) == ["error"]


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


@pytest.mark.parametrize(
    "junk",
    [
        b"data: {nope\n\n",
        b'data: {"choices": 3}\n\n',
        b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n',
        b"data: " + b"[" * 100_000 + b"\n\n",
    ],
)
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


FRAGMENTS = st.builds(
    lambda index, call_id, name, arguments: {
        "tool_calls": [
            {
                "index": index,
                "id": call_id,
                "function": {"name": name, "arguments": arguments},
            }
        ]
    },
    st.sampled_from([None, 0, 1, 2]),
    st.sampled_from([None, "", "a", "b"]),
    st.sampled_from([None, "", "f", "g"]),
    st.sampled_from([None, "", " ", "{", "}", '"a":1', "{}", '{"a":"}"}']),
)
SOUP = st.one_of(
    st.builds(chunk, DELTAS.filter(lambda delta: isinstance(delta, dict))),
    st.builds(chunk, FRAGMENTS),
    st.builds(chunk, FRAGMENTS),
    st.builds(chunk, st.just({}), st.sampled_from(["stop", "length", "tool_calls", "odd"])),
    st.sampled_from(
        [
            chunk(usage=USAGE),
            b": hm\n\n",
            b"event: x\n\n",
            b"\n",
            b"data: [DONE]\n\n",
            b'data: {"error": {"message": "gone"}}\n\n',
            b"data: junk\n\n",
        ]
    ),
)


@settings(deadline=None)
@given(soup=st.lists(SOUP, max_size=12), cuts=st.lists(st.integers(0, 2000), max_size=20))
def test_whatever_a_source_says_the_stream_is_valid_and_ends_once(
    soup: list[bytes], cuts: list[int]
):
    source = b"".join(soup)
    edges = sorted({0, len(source), *(cut for cut in cuts if cut < len(source))})
    translator = StreamTranslator("m")
    out = []
    try:
        for start, stop in itertools.pairwise(edges):
            out.append(translator.feed(source[start:stop]))
        out.append(translator.end())
    except UpstreamMalformedError as exc:
        out.append(translator.fail(exc))
    events = read_events(b"".join(out))
    check_grammar(events)
    kinds_seen = [event["type"] for event in events]
    assert kinds_seen.count("error") + kinds_seen.count("message_stop") == 1
    ids = [
        event["content_block"]["id"]
        for event in events
        if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use"
    ]
    assert len(ids) == len(set(ids))
