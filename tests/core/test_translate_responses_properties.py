"""10,000 random chunk streams, cut anywhere: what comes of them is valid and says the same."""

import random
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.core.errors import UpstreamMalformedError
from cortex.core.openai import ChatCompletion, parse_chat_request
from cortex.core.response_draft import Draft, from_chat
from cortex.core.responses import parse_items, parse_request
from cortex.core.translate_responses import placed, to_chat
from cortex.core.translate_responses_stream import ResponseStream
from tests.support.chunk_streams import Said, random_pieces, random_stream
from tests.support.response_events import check_grammar, read_events

# Hypothesis draws where the random numbers begin; a stream each would take it minutes.
EXAMPLES = 100
STREAMS_PER_EXAMPLE = 100
SOME_PER_EXAMPLE = 10

ASKED = [
    {},
    {"reasoning": {"summary": "auto"}},
    {"include": ["reasoning.encrypted_content"]},
    {"tools": [{"type": "custom", "name": "f1"}]},
]
INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}

begins = st.integers(0, (1 << 32) - 1)
often = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)


def draft_of(fields: dict[str, Any]) -> Draft:
    request = parse_request(msgspec.json.encode({"model": "m", "input": "Hi", **fields}))
    return Draft(request, to_chat(request, []).tools, "resp_1", 1000)


def translate(pieces: list[bytes], fields: dict[str, Any]) -> bytes:
    stream = ResponseStream(draft_of(fields))
    out: list[bytes] = []
    try:
        out.extend(map(stream.feed, pieces))
        out += [stream.end(), stream.conclude(is_stored=True)]
    except UpstreamMalformedError as exc:
        out.append(stream.fail(exc))
    return b"".join(out)


def told(item: dict[str, Any]) -> list[Any]:
    """Return an item of the output as a block of `Said`."""
    if item["type"] == "function_call":
        return ["tool_use", item["call_id"], item["name"], item["arguments"]]
    if item["type"] == "custom_tool_call":
        return ["tool_use", item["call_id"], item["name"], item["input"]]
    kind = "text" if item["type"] == "message" else "thinking"
    return [kind, "".join(part["text"] for part in [*item.get("summary", []), *item["content"]])]


def blocks_of(said: Said) -> list[list[Any]]:
    blocks = [list(block) for block in said.blocks]
    if not said.has_ids:
        for at, block in enumerate(blocks):
            if block[0] == "tool_use":
                block[1] = f"call_1{at:04x}"
    return blocks


@often
@given(begin=begins)
def test_every_stream_however_cut_becomes_a_valid_one_that_says_the_same(begin: int):
    rng = random.Random(begin)
    for _ in range(STREAMS_PER_EXAMPLE):
        source, said = random_stream(rng)
        fields = rng.choice(ASKED)
        translated = translate(random_pieces(rng, source), fields)
        assert translated == translate([source], fields)
        events = read_events(translated)
        check_grammar(events)
        response = events[-1]["response"]
        # Arguments of another form than a custom tool has are its input as they are.
        assert [told(item) for item in response["output"]] == blocks_of(said)
        reason = INCOMPLETE.get(said.finish)
        assert response["status"] == ("completed" if reason is None else "incomplete")
        assert response["incomplete_details"] == (None if reason is None else {"reason": reason})
        assert response["usage"] == {
            "input_tokens": said.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": said.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": said.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": said.prompt_tokens + said.completion_tokens,
        }


@often
@given(begin=begins)
def test_a_stream_that_breaks_anywhere_ends_in_one_error_and_a_failed_response(begin: int):
    rng = random.Random(begin)
    for _ in range(SOME_PER_EXAMPLE):
        source, _ = random_stream(rng)
        cut = rng.randrange(source.index(b'"finish_reason":"'))
        fault = rng.choice((b"", b"\n\ndata: junk\n\n", b'\n\ndata: {"error":{"message":"x"}}\n\n'))
        pieces = random_pieces(rng, source[:cut] + fault)
        events = read_events(translate(pieces, rng.choice(ASKED)))
        check_grammar(events)
        assert events[-1]["type"] == "response.failed"


@often
@given(begin=begins)
def test_an_output_that_is_sent_back_is_what_the_model_said(begin: int):
    rng = random.Random(begin)
    for _ in range(SOME_PER_EXAMPLE):
        source, said = random_stream(rng)
        fields = rng.choice(ASKED)
        output = read_events(translate([source], fields))[-1]["response"]["output"]
        items = [{"role": "user", "content": "hi"}, *output, {"role": "user", "content": "go on"}]
        request = parse_request(msgspec.json.encode({"model": "m", "input": items, **fields}))
        assert isinstance(request.input, list)
        chat = to_chat(request, placed(parse_items(request.input))).chat
        first, *turns, last = parse_chat_request(msgspec.json.encode(chat)).messages
        assert (first.content, last.content) == ("hi", "go on")
        assert {turn.role for turn in turns} <= {"assistant"}
        texts = [block[1] for block in said.blocks if block[0] == "text"]
        thoughts = [block[1] for block in said.blocks if block[0] == "thinking"]
        assert "".join(str(turn.content or "") for turn in turns) == "".join(texts)
        # Thoughts of one turn that came apart are put on lines of their own.
        joined = "".join(turn.reasoning_content or "" for turn in turns)
        assert joined.replace("\n", "") == "".join(thoughts).replace("\n", "")
        calls = [call for turn in turns for call in turn.tool_calls or []]
        expected = [block for block in said.blocks if block[0] == "tool_use"]
        assert [call.function.name for call in calls] == [block[2] for block in expected]
        for call, (_, call_id, name, arguments) in zip(calls, expected, strict=True):
            told_back = msgspec.json.decode(str(call.function.arguments))
            if name == "f1" and "tools" in fields:
                told_back = msgspec.json.decode(told_back["input"])
            assert told_back == msgspec.json.decode(arguments)
            assert not said.has_ids or call.id == call_id


@often
@given(begin=begins)
def test_a_whole_answer_has_the_items_of_the_streamed_one(begin: int):
    rng = random.Random(begin)
    for _ in range(SOME_PER_EXAMPLE):
        _, said = random_stream(rng)
        fields = rng.choice(ASKED)
        parts = {
            kind: "".join(block[1] for block in said.blocks if block[0] == kind)
            for kind in ("thinking", "text")
        }
        calls = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for kind, call_id, name, arguments in (b for b in said.blocks if b[0] == "tool_use")
        ]
        message = {"content": parts["text"], "reasoning_content": parts["thinking"]}
        whole = {"message": message | {"tool_calls": calls or None}, "finish_reason": said.finish}
        body = {"id": "chatcmpl-7", "created": 1, "model": "x", "choices": [whole]}
        answer = from_chat(msgspec.convert(body, ChatCompletion), draft_of(fields), is_stored=True)
        deltas = [{"index": at, **call} for at, call in enumerate(calls)]
        chunks = [
            {"choices": [{"delta": message | {"tool_calls": deltas}}]},
            {"choices": [{"delta": {}, "finish_reason": said.finish}]},
        ]
        source = b"".join(b"data: " + msgspec.json.encode(each) + b"\n\n" for each in chunks)
        streamed = read_events(translate([source], fields))[-1]["response"]
        assert msgspec.json.decode(msgspec.json.encode(answer)) == streamed
