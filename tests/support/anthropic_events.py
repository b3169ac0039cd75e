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


def check_grammar(events: list[dict[str, Any]]) -> None:
    """Prove start, delta and stop nesting, and that the stream ended in one of the two ways."""
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
