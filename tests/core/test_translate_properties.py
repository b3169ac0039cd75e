"""10,000 random chunk streams, cut anywhere: what comes of them is valid and says the same."""

import random
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.core.anthropic import MessagesRequest
from cortex.core.errors import UpstreamMalformedError
from cortex.core.openai import ChatCompletion, Message, parse_chat_request
from cortex.core.translate import SIGNATURE, from_openai, to_openai
from cortex.core.translate_stream import StreamTranslator
from tests.support.anthropic_events import check_grammar, joined_blocks, read_events
from tests.support.chunk_streams import Said, random_pieces, random_stream

# Hypothesis draws where the random numbers begin; a stream each would take it minutes.
EXAMPLES = 100
STREAMS_PER_EXAMPLE = 100
SOME_PER_EXAMPLE = 10

STOP_REASONS = {"length": "max_tokens", "content_filter": "refusal"}

begins = st.integers(0, (1 << 32) - 1)
often = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)


def translate(pieces: list[bytes]) -> bytes:
    translator = StreamTranslator("m")
    out = []
    try:
        out += [translator.feed(piece) for piece in pieces]
        out.append(translator.end())
    except UpstreamMalformedError as exc:
        out.append(translator.fail(exc))
    return b"".join(out)


def blocks_of(said: Said) -> list[dict[str, Any]]:
    """Return the blocks that a stream ought to become; ids that it leaves out are not there."""
    blocks: list[dict[str, Any]] = []
    for kind, *rest in said.blocks:
        if kind == "tool_use":
            call_id, name, arguments = rest
            block = {"type": kind, "id": call_id, "name": name}
            blocks.append(block | {"input": msgspec.json.decode(arguments)})
        elif kind == "thinking":
            blocks.append({"type": kind, "thinking": rest[0], "signature": SIGNATURE})
        else:
            blocks.append({"type": kind, "text": rest[0]})
    if not said.has_ids:
        for block in blocks:
            block.pop("id", None)
    return blocks


def stop_reason_of(said: Said) -> str:
    if isinstance(said.stop, str):
        return "stop_sequence"
    has_calls = any(kind == "tool_use" for kind, *_ in said.blocks)
    return STOP_REASONS.get(said.finish, "tool_use" if has_calls else "end_turn")


@often
@given(begin=begins)
def test_every_stream_however_cut_becomes_a_valid_one_that_says_the_same(begin: int):
    rng = random.Random(begin)
    for _ in range(STREAMS_PER_EXAMPLE):
        source, said = random_stream(rng)
        translated = translate(random_pieces(rng, source))
        events = read_events(translated)
        check_grammar(events)
        if said.has_ids:
            assert translated == translate([source])
        blocks = joined_blocks(events)
        ids = [block["id"] for block in blocks if block["type"] == "tool_use"]
        assert len(set(ids)) == len(ids)
        assert all(ids)
        if not said.has_ids:
            for block in blocks:
                block.pop("id", None)
        assert blocks == blocks_of(said)
        end = events[-2]
        assert end["delta"]["stop_reason"] == stop_reason_of(said)
        assert end["delta"]["stop_sequence"] == (said.stop if isinstance(said.stop, str) else None)
        assert end["usage"] == {
            "input_tokens": said.prompt_tokens - said.cached_tokens,
            "output_tokens": said.completion_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": said.cached_tokens,
        }


@often
@given(begin=begins)
def test_a_stream_that_breaks_anywhere_ends_in_one_error_event(begin: int):
    rng = random.Random(begin)
    for _ in range(SOME_PER_EXAMPLE):
        source, _ = random_stream(rng)
        cut = rng.randrange(source.index(b'"finish_reason":"'))
        fault = rng.choice((b"", b"\n\ndata: junk\n\n", b'\n\ndata: {"error":{"message":"x"}}\n\n'))
        events = read_events(translate(random_pieces(rng, source[:cut] + fault)))
        check_grammar(events)
        kinds = [event["type"] for event in events]
        assert (kinds[-1], kinds.count("error")) == ("error", 1)
        assert "message_delta" not in kinds
        assert "message_stop" not in kinds


@often
@given(begin=begins)
def test_an_answer_that_is_sent_back_becomes_the_turn_that_it_was(begin: int):
    rng = random.Random(begin)
    for _ in range(SOME_PER_EXAMPLE):
        source, said = random_stream(rng)
        blocks = joined_blocks(read_events(translate([source])))
        body = {
            "model": "m",
            "max_tokens": 1,
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": blocks},
                {"role": "user", "content": "go on"},
            ],
        }
        request = msgspec.json.decode(msgspec.json.encode(body), type=MessagesRequest)
        encoded = msgspec.json.encode(to_openai(request))
        turn: Message = parse_chat_request(encoded).messages[1]
        texts = [block[1] for block in said.blocks if block[0] == "text"]
        thoughts = [block[1] for block in said.blocks if block[0] == "thinking"]
        calls = [block for block in said.blocks if block[0] == "tool_use"]
        assert turn.content == ("".join(texts) if texts or not calls else None)
        assert turn.reasoning_content == ("".join(thoughts) or None)
        sent_back = turn.tool_calls or []
        assert len(sent_back) == len(calls)
        for call, (_, call_id, name, arguments) in zip(sent_back, calls, strict=True):
            assert call.function.name == name
            assert msgspec.json.decode(str(call.function.arguments)) == msgspec.json.decode(
                arguments
            )
            if said.has_ids:
                assert call.id == call_id
        for foreign in (b"tool_use", b"signature", b"stop_sequences", b"input_schema"):
            assert b'"%b":' % foreign not in encoded


@often
@given(begin=begins)
def test_a_whole_answer_has_the_blocks_of_the_streamed_one(begin: int):
    rng = random.Random(begin)
    for _ in range(SOME_PER_EXAMPLE):
        _, said = random_stream(rng)
        # A whole answer has its parts in this order, each once.
        order = {"thinking": 0, "text": 1, "tool_use": 2}
        said.blocks.sort(key=lambda block: order[block[0]])
        parts = {
            kind: "".join(block[1] for block in said.blocks if block[0] == kind)
            for kind in ("thinking", "text")
        }
        calls = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for kind, call_id, name, arguments in (b for b in said.blocks if b[0] == "tool_use")
        ]
        message = {"content": parts["text"], "reasoning_content": parts["thinking"]}
        choice = {
            "message": message | {"tool_calls": calls or None},
            "finish_reason": said.finish,
            "stop_reason": said.stop,
        }
        body = {"id": "chatcmpl-7", "created": 1, "model": "x", "choices": [choice]}
        reply = from_openai(msgspec.convert(body, ChatCompletion), "m")
        joined = Said(finish=said.finish, stop=said.stop)
        for block in said.blocks:
            if block[0] == "tool_use":
                joined.blocks.append(block)
            else:
                joined.text(*block)
        assert msgspec.to_builtins(reply.content) == blocks_of(joined)
        assert reply.stop_reason == stop_reason_of(said)
