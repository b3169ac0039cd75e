"""Reading Anthropic event streams in tests, strictly."""

from typing import Any

import msgspec
from anthropic.lib.streaming._messages import accumulate_event

from cortex.core.sse import SseSplitter


def read_events(stream: bytes) -> list[dict[str, Any]]:
    """Decode a stream's events; each must name its own type."""
    splitter = SseSplitter()
    found = []
    for event in splitter.feed(stream):
        data = msgspec.json.decode(event.data)
        assert data["type"] == event.name.decode()
        found.append(data)
    assert not splitter.has_rest
    return found


# All that an event, and what stands in it, may hold: nothing of another dialect is among it.
_FIELDS = {
    "ping": {"type"},
    "error": {"type", "error"},
    "message_start": {"type", "message"},
    "content_block_start": {"type", "index", "content_block"},
    "content_block_delta": {"type", "index", "delta"},
    "content_block_stop": {"type", "index"},
    "message_delta": {"type", "delta", "usage"},
    "message_stop": {"type"},
}
_MESSAGE = {"id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"}
_USAGE = {
    "input_tokens",
    "output_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
}
_BLOCKS = {
    "text": {"type", "text"},
    "thinking": {"type", "thinking", "signature"},
    "tool_use": {"type", "id", "name", "input"},
}
_DELTAS = {
    "text_delta": {"type", "text"},
    "thinking_delta": {"type", "thinking"},
    "signature_delta": {"type", "signature"},
    "input_json_delta": {"type", "partial_json"},
}
_STOP_REASONS = {"end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"}


def check_fields(events: list[dict[str, Any]]) -> None:
    """Prove that events hold what the dialect has, all of it and nothing else."""
    for event in events:
        assert set(event) == _FIELDS[event["type"]]
        if event["type"] == "message_start":
            message = event["message"]
            assert set(message) == _MESSAGE
            assert (message["content"], message["stop_reason"]) == ([], None)
            assert set(message["usage"]) == _USAGE
        elif event["type"] == "content_block_start":
            block = event["content_block"]
            assert set(block) == _BLOCKS[block["type"]]
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            assert set(delta) == _DELTAS[delta["type"]]
        elif event["type"] == "message_delta":
            assert set(event["delta"]) == {"stop_reason", "stop_sequence"}
            assert event["delta"]["stop_reason"] in _STOP_REASONS
            assert set(event["usage"]) == _USAGE
            assert all(isinstance(each, int) for each in event["usage"].values())
        elif event["type"] == "error":
            assert set(event["error"]) == {"type", "message"}


def joined_blocks(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the blocks that a stream's events add up to; `input` is what its JSON says."""
    blocks: list[dict[str, Any]] = []
    pieces: list[str] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
            pieces = []
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            if delta["type"] == "signature_delta":
                blocks[-1]["signature"] += delta["signature"]
            else:
                pieces += [text for field, text in delta.items() if field != "type"]
        elif event["type"] == "content_block_stop":
            kind, text = blocks[-1]["type"], "".join(pieces)
            if kind == "tool_use":
                blocks[-1]["input"] = msgspec.json.decode(text or "{}")
            else:
                blocks[-1][kind] = text
    return blocks


def check_grammar(events: list[dict[str, Any]]) -> None:
    """Prove start, delta and stop nesting, and that the stream ended in one of the two ways."""
    check_fields(events)
    events = [event for event in events if event["type"] != "ping"]
    is_broken = events[-1]["type"] == "error"
    ending = 1 if is_broken else 2
    if not is_broken:
        assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    if len(events) > ending or not is_broken:
        assert events[0]["type"] == "message_start"
    next_index, open_kind = 0, None
    for event in events[1:-ending]:
        if event["type"] == "content_block_start":
            assert open_kind is None
            assert event["index"] == next_index
            open_kind = event["content_block"]["type"]
        elif event["type"] == "content_block_delta":
            assert event["index"] == next_index
            assert (
                event["delta"]["type"]
                in {
                    "text": {"text_delta"},
                    "thinking": {"thinking_delta", "signature_delta"},
                    "tool_use": {"input_json_delta"},
                }[open_kind or ""]
            )
        else:
            assert event["type"] == "content_block_stop"
            assert event["index"] == next_index
            assert open_kind is not None
            open_kind, next_index = None, next_index + 1
    assert is_broken or open_kind is None


def accumulate(events: list[dict[str, Any]]) -> Any:
    """Return the message that the official SDK makes of a stream."""
    snapshot = None
    buffers: dict[int, bytes] = {}
    for event in events:
        if event["type"] not in ("ping", "message_stop"):
            snapshot = accumulate_event(event=event, current_snapshot=snapshot, json_bufs=buffers)
    return snapshot
