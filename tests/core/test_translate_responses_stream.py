import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.core.errors import RateLimitError, UpstreamConnectionError, UpstreamMalformedError
from cortex.core.openai import Usage, usage_comment
from cortex.core.response_draft import Draft
from cortex.core.responses import parse_request
from cortex.core.translate_responses import to_chat
from cortex.core.translate_responses_stream import MAX_CALLS, MAX_HELD_CHARS, ResponseStream
from tests.support.response_events import accumulate, check_grammar, read_events

USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 4,
    "total_tokens": 13,
    "prompt_tokens_details": {"cached_tokens": 2},
    "completion_tokens_details": {"reasoning_tokens": 1},
}
DONE = b"data: [DONE]\n\n"


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, **more.pop("choice", {})}
    body = {"id": "chatcmpl-1", "choices": [] if delta is None else [choice], **more}
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def call(index: int | None, arguments: str, **more: Any) -> dict[str, Any]:
    function = {"arguments": arguments}
    if "name" in more:
        function["name"] = more.pop("name")
    return {"tool_calls": [{"index": index, "function": function, **more}]}


def stream_of(**fields: Any) -> ResponseStream:
    request = parse_request(msgspec.json.encode({"model": "m", "input": "Hi", **fields}))
    return ResponseStream(Draft(request, to_chat(request, []).tools, "resp_1", 1000))


def translate(*pieces: bytes, **fields: Any) -> list[dict[str, Any]]:
    stream = stream_of(**fields)
    out = [*map(stream.feed, pieces), stream.end(), stream.conclude(is_stored=True)]
    return read_events(b"".join(out))


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_a_text_has_its_events_in_the_vendors_order():
    events = translate(
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "Hel"}),
        chunk({"content": "lo"}),
        chunk({}, "stop"),
        chunk(usage=USAGE),
        DONE,
    )
    check_grammar(events)
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[4] == {
        "type": "response.output_text.delta",
        "sequence_number": 4,
        "item_id": "msg_10000",
        "output_index": 0,
        "content_index": 0,
        "delta": "Hel",
        "logprobs": [],
    }
    assert events[-1]["response"]["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 13,
    }
    assert accumulate(events).output_text == "Hello"


def test_thoughts_text_and_a_call_are_items_one_after_the_other():
    events = translate(
        chunk({"reasoning_content": "H"}),
        chunk({"reasoning": "m."}),
        chunk({"content": "I look."}),
        chunk(call(0, "", id="c1", name="look", type="function")),
        chunk(call(0, '{"at":')),
        chunk(call(0, '"it"}')),
        chunk({}, "tool_calls"),
    )
    check_grammar(events)
    assert kinds(events)[2:8] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
    ]
    thought, text, function = accumulate(events).output
    assert (thought.type, thought.content[0].text, thought.summary) == ("reasoning", "Hm.", [])
    assert text.content[0].text == "I look."
    assert (function.call_id, function.name, function.arguments) == ("c1", "look", '{"at":"it"}')
    assert [each.id for each in (thought, text, function)] == ["rs_10000", "msg_10001", "fc_10002"]
    assert function.status == "completed"


def test_reasoning_is_told_as_a_summary_where_one_is_asked_for():
    events = translate(
        chunk({"reasoning_content": "Hm."}), chunk({}, "stop"), reasoning={"summary": "auto"}
    )
    check_grammar(events)
    assert kinds(events)[2:8] == [
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
    ]
    assert events[4]["summary_index"] == 0
    (item,) = events[-1]["response"]["output"]
    assert item["summary"] == [{"type": "summary_text", "text": "Hm."}]
    assert item["content"] == []


def test_reasoning_can_be_carried_to_the_next_turn_where_that_is_asked_for():
    asked = {"include": ["reasoning.encrypted_content"]}
    events = translate(chunk({"reasoning_content": "Hm."}), chunk({}, "stop"), **asked)
    (item,) = events[-1]["response"]["output"]
    assert item["encrypted_content"] == "cortex:SG0u"


def test_interleaved_parallel_calls_keep_their_arguments_apart():
    events = translate(
        chunk(call(0, "", id="a", name="f")),
        chunk(call(1, "", id="b", name="g")),
        chunk(call(0, '{"x":')),
        chunk(call(1, '{"y":')),
        chunk(call(0, "1}")),
        chunk(call(1, "2}")),
        chunk({}, "tool_calls"),
        DONE,
    )
    check_grammar(events)
    first, second = accumulate(events).output
    assert (first.call_id, first.name, first.arguments) == ("a", "f", '{"x":1}')
    assert (second.call_id, second.name, second.arguments) == ("b", "g", '{"y":2}')


def test_a_complete_call_is_done_as_soon_as_the_next_one_begins():
    stream = stream_of()
    stream.feed(chunk(call(0, '{"a":1}', id="a", name="f")))
    assert kinds(read_events(stream.feed(chunk(call(1, "{", id="b", name="g"))))) == [
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
    ]


def test_white_space_after_a_complete_call_is_dropped_and_more_is_a_fault():
    stream = stream_of()
    stream.feed(chunk(call(0, "{}", id="a", name="f")) + chunk({"content": "x"}))
    assert stream.feed(chunk(call(0, " \n"))) == b""
    with pytest.raises(UpstreamMalformedError, match="goes on after its end"):
        stream.feed(chunk(call(0, "{}")))


@pytest.mark.parametrize("index", [0, None])
def test_calls_that_share_an_index_or_have_none_are_told_apart(index: int | None):
    events = translate(
        chunk(call(index, '{"x":', id="a", name="f")),
        chunk(call(index, "1}")),
        chunk(call(index, '{"y":2}', id="b", name="f")),
        chunk({}, "stop"),
    )
    first, second = accumulate(events).output
    assert (first.call_id, first.arguments) == ("a", '{"x":1}')
    assert (second.call_id, second.arguments) == ("b", '{"y":2}')


def test_two_calls_of_one_id_get_different_ones():
    events = translate(
        chunk(call(0, "{}", id="same", name="f")),
        chunk(call(1, "{}", id="same", name="f")),
        chunk({}, "tool_calls"),
    )
    check_grammar(events)
    first, second = accumulate(events).output
    assert (first.call_id, second.call_id) == ("same", "call_10001")


def test_a_name_that_comes_late_is_waited_for_and_one_that_never_comes_is_an_error():
    late = [chunk(call(0, '{"a":', id="a")), chunk(call(0, "1}", name="f")), chunk({}, "stop")]
    events = translate(*late)
    check_grammar(events)
    assert accumulate(events).output[0].arguments == '{"a":1}'
    assert kinds(translate(late[0], chunk({}, "stop")))[-2:] == ["error", "failed"]


def test_a_call_without_arguments_has_an_empty_object():
    events = translate(chunk(call(0, "", id="a", name="f")), chunk({}, "tool_calls"))
    check_grammar(events)
    assert accumulate(events).output[0].arguments == "{}"


def test_the_input_of_a_custom_tool_is_told_as_text():
    events = translate(
        chunk(call(0, '{"inp', id="a", name="patch")),
        chunk(call(0, 'ut":"*** Begin\\n"}')),
        chunk({}, "tool_calls"),
        tools=[{"type": "custom", "name": "patch"}],
    )
    check_grammar(events)
    assert kinds(events)[2:6] == [
        "output_item.added",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.done",
        "output_item.done",
    ]
    (item,) = accumulate(events).output
    assert (item.type, item.name, item.call_id) == ("custom_tool_call", "patch", "a")
    assert item.input == "*** Begin\n"


def test_a_tool_of_a_namespace_is_told_under_its_own_name():
    tools = [{"type": "namespace", "name": "mcp", "tools": [{"type": "function", "name": "look"}]}]
    events = translate(
        chunk(call(0, "{}", id="a", name="mcp__look")), chunk({}, "tool_calls"), tools=tools
    )
    (item,) = events[-1]["response"]["output"]
    assert (item["name"], item["namespace"]) == ("look", "mcp")


def test_a_cut_answer_is_incomplete_and_says_why():
    events = translate(chunk({"content": "a"}), chunk({}, "length"))
    check_grammar(events)
    assert events[-1]["type"] == "response.incomplete"
    response = events[-1]["response"]
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"


def test_log_probabilities_come_with_the_text():
    token = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    events = translate(
        chunk({"content": "a"}, choice={"logprobs": {"content": [token]}}),
        chunk({"content": "b"}, choice={"logprobs": {"odd": 1}}),
        chunk({}, "stop"),
        include=["message.output_text.logprobs"],
    )
    assert events[4]["logprobs"] == [token]
    assert events[5]["logprobs"] == []
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == [token]


def test_an_answer_of_nothing_is_a_response_without_items():
    events = translate(chunk({"role": "assistant", "content": ""}), chunk({}, "stop"))
    assert kinds(events) == ["created", "in_progress", "completed"]


def test_what_the_request_said_is_told_back():
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}, "odd": 1}
    events = translate(
        chunk({}, "stop"),
        instructions="Be brief.",
        tools=[tool, {"type": "web_search"}],
        metadata={"k": "v"},
        temperature=0.5,
        max_output_tokens=7,
        parallel_tool_calls=False,
        truncation="auto",
    )
    told = events[0]["response"]
    assert (told["id"], told["created_at"], told["status"]) == ("resp_1", 1000, "in_progress")
    assert told["tools"] == [tool]
    assert told["instructions"] == "Be brief."
    assert told["metadata"] == {"k": "v"}
    assert (told["temperature"], told["max_output_tokens"]) == (0.5, 7)
    assert told["parallel_tool_calls"] is False
    assert told["text"] == {"format": {"type": "text"}}
    # Nothing is ever cut from a conversation here.
    assert told["truncation"] == "disabled"


def test_usage_that_comments_tell_is_taken_and_other_comments_pass():
    stream = stream_of()
    assert stream.feed(b": keep-alive\n\n") == b": keep-alive\n\n"
    stream.feed(usage_comment(Usage(prompt_tokens=9, completion_tokens=1)))
    stream.feed(chunk({}, "stop"))
    stream.end()
    (event,) = read_events(stream.conclude(is_stored=False))
    assert event["response"]["usage"]["total_tokens"] == 10
    assert event["response"]["store"] is False


def test_an_upstream_error_is_an_error_event_and_a_failed_response_and_nothing_after():
    error = b'data: {"error": {"message": "gone", "type": "api_error", "code": "engine_died"}}\n\n'
    events = translate(chunk({"content": "a"}), error, chunk({"content": "b"}))
    check_grammar(events)
    assert events[-2] == {
        "type": "error",
        "sequence_number": 5,
        "code": "engine_died",
        "message": "gone",
        "param": None,
        "error": {"type": "api_error", "code": "engine_died", "message": "gone", "param": None},
    }
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "gone"}
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "a"


def test_a_failure_before_the_first_chunk_is_a_whole_stream_too():
    stream = stream_of()
    events = read_events(stream.fail(RateLimitError("too many")))
    check_grammar(events)
    assert events[-1]["response"]["error"]["code"] == "rate_limit_exceeded"
    assert stream.fail(UpstreamConnectionError("again")) == b""
    assert stream.feed(chunk({"content": "b"})) == b""
    assert stream.end() + stream.conclude(is_stored=False) == b""


def test_a_source_that_stops_early_is_a_failure():
    events = translate(chunk({"content": "a"}))
    check_grammar(events)
    assert events[-1]["response"]["error"]["message"] == "the answer stopped before it was complete"


def test_what_was_good_before_a_fault_comes_out_before_it():
    stream = stream_of()
    out = stream.feed(chunk({"content": "a"}) + b"data: {nope\n\n")
    assert kinds(read_events(out))[-1] == "output_text.delta"
    with pytest.raises(UpstreamMalformedError):
        stream.feed(b"")


def test_a_cancelled_stream_ends_with_what_it_has_come_to():
    stream = stream_of()
    out = stream.feed(chunk({"content": "a"}))
    response = stream.cancel()
    assert (response.status, stream.is_cancelled, stream.is_open) == ("cancelled", True, False)
    assert stream.feed(chunk({"content": "b"})) == b""
    events = read_events(out + stream.conclude(is_stored=False))
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["status"] == "cancelled"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "a"


def test_too_many_calls_and_too_much_text_are_faults():
    stream = stream_of()
    for index in range(MAX_CALLS):
        stream.feed(chunk(call(index, "{}", name="f")))
    with pytest.raises(UpstreamMalformedError, match="over 1024 tool calls"):
        stream.feed(chunk(call(MAX_CALLS, "{}", name="f")))
    stream = stream_of()
    half = "x" * (MAX_HELD_CHARS // 2)
    stream.feed(chunk({"content": half}))
    stream.feed(chunk({"content": half}))
    with pytest.raises(UpstreamMalformedError, match="too large"):
        stream.feed(chunk({"content": "x"}))


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
        stream_of().feed(junk)


TEXT = st.text(max_size=8)
DELTAS = st.one_of(
    st.builds(lambda text: {"content": text}, TEXT),
    st.builds(lambda text: {"reasoning_content": text}, TEXT),
    st.just({"role": "assistant", "content": None}),
    st.just(b": keep-alive\n\n"),
)
ARGUMENTS = st.dictionaries(TEXT, st.one_of(st.integers(), TEXT, st.booleans()), max_size=3)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "reasoning": st.just({"summary": "auto"}),
        "include": st.just(["reasoning.encrypted_content"]),
        "tools": st.just([{"type": "custom", "name": "f0"}]),
    },
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[dict[str, Any]], str, str]:
    """Draw a whole OpenAI stream: its bytes, its calls' arguments, its text and thoughts."""
    mixed = draw(st.lists(DELTAS, max_size=8))
    arguments = draw(st.lists(ARGUMENTS, max_size=3))
    for index, value in enumerate(arguments):
        encoded = msgspec.json.encode(value).decode()
        cut = draw(st.integers(0, len(encoded)))
        first = draw(st.integers(0, len(mixed)))
        mixed.insert(first, call(index, encoded[:cut], id=f"c{index}", name=f"f{index}"))
        mixed.insert(draw(st.integers(first + 1, len(mixed))), call(index, encoded[cut:]))
    said = [each for each in mixed if isinstance(each, dict)]
    text = "".join(each.get("content") or "" for each in said)
    thoughts = "".join(each.get("reasoning_content") or "" for each in said)
    body = b"".join(each if isinstance(each, bytes) else chunk(each) for each in mixed)
    return body + chunk({}, "stop") + chunk(usage=USAGE) + DONE, arguments, text, thoughts


def cut_up(source: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(source), *(cut for cut in cuts if cut < len(source))})
    return [source[a:b] for a, b in itertools.pairwise(edges)]


@settings(deadline=None)
@given(stream=streams(), cuts=st.lists(st.integers(0, 4000), max_size=30), fields=FIELDS)
def test_any_stream_however_cut_becomes_a_valid_one_of_the_same_content(
    stream: tuple[bytes, list[dict[str, Any]], str, str], cuts: list[int], fields: dict[str, Any]
):
    source, arguments, text, thoughts = stream
    events = translate(*cut_up(source, cuts), **fields)
    check_grammar(events)
    response = accumulate(events)
    assert response.status == "completed"
    calls = {item.call_id: item for item in response.output if item.type == "function_call"}
    for index, value in enumerate(arguments):
        if index == 0 and "tools" in fields:
            continue
        assert msgspec.json.decode(calls[f"c{index}"].arguments) == value
    assert response.output_text == text
    told = [each for each in response.output if each.type == "reasoning"]
    parts = [part for each in told for part in [*each.summary, *(each.content or [])]]
    assert "".join(part.text for part in parts) == thoughts


FRAGMENTS = st.builds(
    lambda index, call_id, name, arguments: {
        "tool_calls": [
            {"index": index, "id": call_id, "function": {"name": name, "arguments": arguments}}
        ]
    },
    st.sampled_from([None, 0, 1, 2]),
    st.sampled_from([None, "", "a", "b"]),
    st.sampled_from([None, "", "f", "f0"]),
    st.sampled_from([None, "", " ", "{", "}", '"a":1', "{}", '{"input":"}"}']),
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
            DONE,
            b'data: {"error": {"message": "gone"}}\n\n',
            b"data: junk\n\n",
        ]
    ),
)


@settings(deadline=None)
@given(
    soup=st.lists(SOUP, max_size=12),
    cuts=st.lists(st.integers(0, 2000), max_size=20),
    fields=FIELDS,
)
def test_whatever_a_source_says_the_stream_is_valid_and_ends_once(
    soup: list[bytes], cuts: list[int], fields: dict[str, Any]
):
    stream = stream_of(**fields)
    out: list[bytes] = []
    try:
        out.extend(map(stream.feed, cut_up(b"".join(soup), cuts)))
        out += [stream.end(), stream.conclude(is_stored=True)]
    except UpstreamMalformedError as exc:
        out.append(stream.fail(exc))
    check_grammar(read_events(b"".join(out)))
