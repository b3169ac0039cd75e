"""Damaged and made-up bytes through everything that reads bytes of callers and nodes.

By hand, for as long as you like: `python -m tests.fuzz.decoders --rounds 1000000`.
"""

import argparse
import random
from collections.abc import Callable

import msgspec

from cortex.core import anthropic, responses
from cortex.core.completions import parse_completion_request
from cortex.core.decode import decode_body
from cortex.core.embeddings import parse_embedding_request
from cortex.core.errors import BadRequestError, CortexError, UpstreamMalformedError
from cortex.core.openai import parse_chat_request, parse_error, parse_head
from cortex.core.response_draft import Draft
from cortex.core.response_items import kept_items
from cortex.core.translate import to_openai
from cortex.core.translate_responses import placed, to_chat
from cortex.core.translate_responses_stream import ResponseStream
from cortex.core.translate_stream import StreamTranslator
from cortex.gateway.prefixes import chain_of
from cortex.gateway.proxy import usage_of
from cortex.gateway.windows import estimate_tokens
from tests.support import response_events
from tests.support.anthropic_events import check_grammar, read_events

MAX_MUTATIONS = 4

_messages = msgspec.json.Decoder(anthropic.MessagesRequest)
_count = msgspec.json.Decoder(anthropic.CountTokensRequest)

_TOOL = {"name": "look", "description": "d", "input_schema": {"type": "object", "properties": {}}}
_FUNCTION = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
_CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
SEEDS = [
    msgspec.json.encode(value)
    for value in (
        {
            "model": "m",
            "max_tokens": 32000,
            "stream": True,
            "system": [{"type": "text", "text": "x-anthropic-billing-header: cc=1"}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi 🙂"}]},
                {"role": "system", "content": "late"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
                        {"type": "redacted_thinking", "data": "x"},
                        {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": [1.5]}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "t1",
                            "is_error": True,
                            "content": [
                                {"type": "text", "text": "no"},
                                {
                                    "type": "image",
                                    "source": {"type": "base64", "data": "QUJD"},
                                },
                            ],
                        },
                        {
                            "type": "document",
                            "title": "T",
                            "source": {"type": "base64", "media_type": "text/csv", "data": "YQ=="},
                        },
                        {"type": "search_result", "source": "s", "content": []},
                    ],
                },
            ],
            "tools": [_TOOL, {"type": "custom", "name": "now"}],
            "tool_choice": {"type": "tool", "name": "look", "disable_parallel_tool_use": True},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {}}},
            "context_management": {"edits": []},
            "metadata": {"user_id": "u"},
            "stop_sequences": ["END"],
        },
        {
            "model": "m",
            "messages": [
                {"role": "developer", "content": "d"},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "18"},
            ],
            "tools": [_FUNCTION],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [_FUNCTION]},
            },
            "logit_bias": {"5": -1.5},
            "stop": ["a", "b"],
            "response_format": {"type": "json_schema", "json_schema": {"schema": {}}},
            "stream_options": {"include_usage": True},
            "prompt_cache_key": "k",
            "seed": -9223372036854775808,
        },
        {
            "model": "m",
            "instructions": "Be brief.",
            "input": [
                {"role": "developer", "content": [{"type": "input_text", "text": "d"}]},
                {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]},
                {"type": "reasoning", "summary": [], "encrypted_content": "cortex:SG0u"},
                {"type": "message", "role": "assistant", "content": "hi 🙂"},
                {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
                {"type": "custom_tool_call", "call_id": "c2", "name": "run", "input": "x"},
                {"type": "function_call_output", "call_id": "c1", "output": [{"a": 1}]},
                {"type": "web_search_call", "id": "ws_1"},
                {"type": "item_reference", "id": "msg_1"},
            ],
            "tools": [
                {"type": "function", "name": "look", "parameters": {"type": "object"}},
                {"type": "custom", "name": "run", "format": {"type": "grammar"}},
                {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]},
                {"type": "web_search"},
            ],
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "look"}],
            },
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
            "reasoning": {"effort": "low", "summary": "auto"},
            "include": ["reasoning.encrypted_content"],
            "metadata": {"k": "v"},
        },
        {"model": "m", "prompt": [[1, 2], [3]], "logprobs": 3, "best_of": 2, "n": 1},
        {"model": "m", "input": [[1, 2], [3]], "encoding_format": "base64", "dimensions": 2},
        {"error": {"message": "no", "type": "api_error", "code": 5, "param": None, "max": 7}},
        {"id": "x", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 1}},
    )
]
STREAM = b"".join(
    b"data: " + msgspec.json.encode(value) + b"\n\n"
    for value in (
        {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"reasoning_content": "Hm."}}]},
        {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, **_CALL}]}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
        {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 1}},
    )
)
SEEDS.append(STREAM + b": keep-alive\n\ndata: [DONE]\n\n")
# What is put into a body in place of something else.
WORDS = [
    *(b"null", b"true", b"{}", b"[]", b'""', b"0", b"-1", b"1.5", b"1e308", b"1e999", b"NaN"),
    *(b"1" * 40, b'"\\ud800"', b'"\\u0000"', b"\xff", b"\x00", b'"', b"{", b"}", b"[", b"]", b","),
    *(b"[" * 2000, b'{"a":' * 2000, b"\r\n\r\n", b"data: ", b"event: error\n", b": usage {}\n\n"),
    *(b'"function"', b'"allowed_tools"', b'"base64"', b'"text"', b'"document"', b'"web_search_1"'),
]


def mutated(rng: random.Random, seed: bytes) -> bytes:
    """Return a seed with a few pieces dropped, doubled, moved or replaced."""
    data = bytearray(seed)
    for _ in range(rng.randint(0, MAX_MUTATIONS)):
        begin = rng.randint(0, len(data))
        end = min(len(data), begin + rng.choice((0, 1, 2, 8, 64)))
        piece = bytes(data[begin:end])
        kind = rng.randrange(4)
        if kind == 0:
            del data[begin:end]
        elif kind == 1:
            data[begin:end] = rng.choice(WORDS)
        elif kind == 2:
            data[begin:begin] = piece
        else:
            at = rng.randint(0, len(data))
            data[at:at] = piece
    return bytes(data)


def _as_message(body: bytes) -> None:
    translated = to_openai(decode_body(_messages, body))
    # What comes of a translation is a request that a node takes.
    parse_chat_request(msgspec.json.encode(translated))


def _as_count(body: bytes) -> None:
    msgspec.json.encode(to_openai(decode_body(_count, body)))


def _as_response(body: bytes) -> None:
    request = responses.parse_request(body)
    raws = request.input if isinstance(request.input, list) else []
    kept_items(request, raws, "resp_1")
    items = [item for item in responses.parse_items(raws) if item.kind != "item_reference"]
    translated = to_chat(request, placed(items))
    parse_chat_request(msgspec.json.encode(translated.chat))
    draft = Draft(request, translated.tools, "resp_1", 1000)
    msgspec.json.decode(msgspec.json.encode(draft.response("in_progress")))


def _as_response_stream(body: bytes) -> None:
    request = responses.parse_request(b'{"model":"m","input":"x","tools":[]}')
    stream = ResponseStream(Draft(request, to_chat(request, []).tools, "resp_1", 1000))
    out: list[bytes] = []
    halves = body[: len(body) // 2], body[len(body) // 2 :]
    try:
        # One by one: what came before a fault counts.
        out.extend(map(stream.feed, halves))
        out += [stream.end(), stream.conclude(is_stored=True)]
    except UpstreamMalformedError as exc:
        out.append(stream.fail(exc))
    response_events.check_grammar(response_events.read_events(b"".join(out)))


def _as_stream(body: bytes) -> None:
    translator = StreamTranslator("m")
    out = []
    try:
        out += [translator.feed(body[: len(body) // 2]), translator.feed(body[len(body) // 2 :])]
        out.append(translator.end())
    except UpstreamMalformedError as exc:
        out.append(translator.fail(exc))
    check_grammar(read_events(b"".join(out)))


def _as_error(body: bytes) -> None:
    assert isinstance(parse_error(502, body), CortexError)


def _as_sizes(body: bytes) -> None:
    assert min(estimate_tokens(body, 4096)) >= 0


# Each refuses in the words of the tree of errors, or not at all.
REQUESTS: list[Callable[[bytes], object]] = [
    parse_chat_request,
    parse_completion_request,
    parse_embedding_request,
    parse_head,
    _as_message,
    _as_count,
    _as_response,
]
READERS: list[Callable[[bytes], object]] = [
    _as_stream,
    _as_response_stream,
    _as_error,
    _as_sizes,
    chain_of,
    usage_of,
]


def read_all(data: bytes) -> int:
    """Give bytes to every decoder; return how many took them for a request.

    Raises:
        Exception: one of them did not say what is wrong in a way that a caller understands.
    """
    taken = 0
    for parse in REQUESTS:
        try:
            parse(data)
        except BadRequestError:
            continue
        taken += 1
    for read in READERS:
        read(data)
    return taken


def run(rounds: int, at: int) -> int:
    """Mutate and read so many times; return how many requests were taken."""
    rng = random.Random(at)
    taken = 0
    for _ in range(rounds):
        data = mutated(rng, rng.choice(SEEDS))
        try:
            taken += read_all(data)
        except Exception as exc:
            raise AssertionError(f"{data!r}") from exc
    return taken


def main() -> None:
    """Read damaged bytes until a decoder fails or the rounds are over."""
    arguments = argparse.ArgumentParser(description=main.__doc__)
    arguments.add_argument("--rounds", type=int, default=1_000_000)
    arguments.add_argument("--seed", type=int, default=random.getrandbits(32))
    asked = arguments.parse_args()
    print(f"seed {asked.seed}")
    print(f"{run(asked.rounds, asked.seed)} requests were taken, none ended in a fault")


if __name__ == "__main__":
    main()
