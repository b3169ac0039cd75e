"""Reading streams of the Responses API in tests, strictly."""

from typing import Any

import msgspec
from openai import omit
from openai._models import construct_type
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent

from cortex.core.sse import SseSplitter

ENDS = ("response.completed", "response.incomplete", "response.failed")


def read_events(stream: bytes) -> list[dict[str, Any]]:
    """Decode a stream's events; each must name its own type."""
    splitter = SseSplitter()
    found = []
    for event in splitter.feed(stream):
        if event.is_comment:
            continue
        data = msgspec.json.decode(event.data)
        assert data["type"] == event.name.decode()
        found.append(data)
    assert not splitter.has_rest
    return found


def check_grammar(events: list[dict[str, Any]]) -> None:
    """Prove the order of a whole stream, and that its deltas make up what its ends say."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in ENDS
    assert sum(kind in ENDS for kind in kinds) == 1
    is_failed = kinds[-1] == "response.failed"
    assert kinds.count("error") == is_failed
    if is_failed:
        assert kinds[-2] == "error"
    items: dict[int, dict[str, Any]] = {}
    done: dict[int, dict[str, Any]] = {}
    for event in events[2 : -2 if is_failed else -1]:
        index = event["output_index"]
        if event["type"] == "response.output_item.added":
            assert index == len(items)
            items[index] = {"id": event["item"]["id"], "text": "", "parts": 0, "is_open": False}
            continue
        assert index not in done
        item = items[index]
        if event["type"] == "response.output_item.done":
            assert not item["is_open"]
            assert event["item"]["id"] == item["id"]
            assert _text_of(event["item"]) == (item["text"] or _empty_of(event["item"]))
            done[index] = event["item"]
            continue
        assert event["item_id"] == item["id"]
        _step(event, item)
    final = events[-1]["response"]
    if is_failed:
        assert final["status"] == "failed"
        assert final["error"]["message"]
    else:
        assert final["output"] == [done[index] for index in sorted(items)]
        assert final["usage"] is None or final["usage"]["total_tokens"] >= 0


def _step(event: dict[str, Any], item: dict[str, Any]) -> None:
    kind = event["type"]
    if kind.endswith("part.added"):
        assert not item["is_open"]
        assert item["parts"] == 0
        item["is_open"], item["parts"] = True, 1
    elif kind.endswith("part.done"):
        assert event["part"]["text"] == item["text"]
        item["is_open"] = False
    elif kind.endswith(".delta"):
        assert item["is_open"] or "arguments" in kind or "input" in kind
        item["text"] += event["delta"]
    else:
        assert kind.endswith(".done")
        told = event.get("text", event.get("arguments", event.get("input")))
        assert told == item["text"] or (told == "{}" and not item["text"])


def _empty_of(item: dict[str, Any]) -> str:
    return "{}" if item["type"] == "function_call" else ""


def _text_of(item: dict[str, Any]) -> str:
    if item["type"] == "function_call":
        return str(item["arguments"])
    if item["type"] == "custom_tool_call":
        return str(item["input"])
    return "".join(part["text"] for part in [*item.get("summary", []), *item["content"]])


def accumulate(events: list[dict[str, Any]]) -> Any:
    """Return the response that the official SDK makes of a stream."""
    state: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    last: Any = None
    for event in events:
        if event["type"] == "error":
            continue
        for told in state.handle_event(construct_type(type_=ResponseStreamEvent, value=event)):
            last = told
    return last.response
