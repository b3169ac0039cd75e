"""What a client does with an answer: read it strictly, and go on with the calls that it makes."""

import copy
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tests.support import anthropic_events, chat_chunks, response_events

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The calls of an answer, as (id, name, JSON text), and for Anthropic its blocks."""

    calls: list[tuple[str, str, str]]
    blocks: list[dict[str, Any]] = field(default_factory=list)


def route_of(path: str) -> str:
    """Return a path without its query."""
    return path.partition("?")[0]


def forced(path: str, body: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a request that the model can only answer with a call of one tool."""
    choices: dict[str, dict[str, Any]] = {
        CHAT: {"type": "function", "function": {"name": name}},
        MESSAGES: {"type": "tool", "name": name},
        RESPONSES: {"type": "function", "name": name},
    }
    return {**body, "tool_choice": choices[route_of(path)]}


def read_stream(path: str, body: dict[str, Any], stream: bytes) -> Answer:
    """Prove that a stream is whole and valid in its dialect, and return what it holds."""
    route = route_of(path)
    if route == MESSAGES:
        events = anthropic_events.read_events(stream)
        anthropic_events.check_grammar(events)
        message = anthropic_events.accumulate(events)
        assert events[-1]["type"] == "message_stop"
        return _of_message(message.to_dict())
    if route == RESPONSES:
        events = response_events.read_events(stream)
        response_events.check_grammar(events)
        assert events[-1]["type"] in ("response.completed", "response.incomplete")
        return _of_response(events[-1]["response"])
    chunks = chat_chunks.read_chunks(stream)
    wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
    if route == TEXT:
        chat_chunks.check_texts(chunks, wants_usage=wants_usage)
        return Answer(calls=[])
    chat_chunks.check_chunks(chunks, wants_usage=wants_usage)
    return _of_chat(chat_chunks.accumulate(chunks))


def read_whole(path: str, answer: bytes) -> Answer:
    """Return what an answer holds that was not streamed; it has a usage in every dialect."""
    decoded = msgspec.json.decode(answer)
    route = route_of(path)
    if route in (CHAT, TEXT):
        assert decoded["usage"]["total_tokens"] > 0
        if route == TEXT:
            return Answer(calls=[])
        return _of_chat(decoded["choices"][0]["message"])
    assert decoded["usage"]["input_tokens"] + decoded["usage"]["output_tokens"] > 0
    return _of_message(decoded) if route == MESSAGES else _of_response(decoded)


def _of_message(message: dict[str, Any]) -> Answer:
    blocks = message["content"]
    uses = [block for block in blocks if block["type"] == "tool_use"]
    assert (message["stop_reason"] == "tool_use") <= bool(uses)
    assert message["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"] > 0
    return Answer(
        calls=[(use["id"], use["name"], _text(use["input"])) for use in uses], blocks=blocks
    )


def _of_response(response: dict[str, Any]) -> Answer:
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    return Answer(calls=[(call["call_id"], call["name"], call["arguments"]) for call in calls])


def _of_chat(message: dict[str, Any]) -> Answer:
    calls = [(call["id"], call["function"]) for call in message.get("tool_calls") or []]
    return Answer(calls=[(call_id, each["name"], each["arguments"]) for call_id, each in calls])


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()


def continued(path: str, body: dict[str, Any], answer: Answer) -> dict[str, Any]:
    """Return a recorded follow-up whose last calls and their results are those of `answer`."""
    body = copy.deepcopy(body)
    route = route_of(path)
    if route == RESPONSES:
        body["input"] = _continued_items(body["input"], answer)
    elif route == MESSAGES:
        _continue_blocks(body["messages"], answer)
    else:
        body["messages"] = _continued_turns(body["messages"], answer)
    return body


def _continued_turns(turns: list[dict[str, Any]], answer: Answer) -> list[dict[str, Any]]:
    at = max(i for i, turn in enumerate(turns) if turn.get("tool_calls"))
    model = turns[at + 1]
    assert model["role"] == "tool"
    calls = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, name, arguments in answer.calls
    ]
    results = [{**model, "tool_call_id": call_id} for call_id, _, _ in answer.calls]
    return [*turns[:at], {**turns[at], "tool_calls": calls}, *results]


def _continue_blocks(turns: list[dict[str, Any]], answer: Answer) -> None:
    at = max(
        i
        for i, turn in enumerate(turns)
        if any(_is_a(block, "tool_result") for block in turn["content"])
    )
    model = next(block for block in turns[at]["content"] if _is_a(block, "tool_result"))
    turns[at - 1]["content"] = answer.blocks
    turns[at]["content"] = [{**model, "tool_use_id": call_id} for call_id, _, _ in answer.calls]


def _is_a(block: object, kind: str) -> bool:
    return isinstance(block, dict) and block["type"] == kind


def _continued_items(items: list[dict[str, Any]], answer: Answer) -> list[dict[str, Any]]:
    call = next(item for item in items if item.get("type") == "function_call")
    result = next(item for item in items if item.get("type") == "function_call_output")
    at = items.index(call)
    rest = [item for item in items[at:] if item is not call and item is not result]
    found: list[dict[str, Any]] = []
    for call_id, name, arguments in answer.calls:
        found.append({**call, "call_id": call_id, "name": name, "arguments": arguments})
        found.append({**result, "call_id": call_id})
    return [*items[:at], *found, *rest]
