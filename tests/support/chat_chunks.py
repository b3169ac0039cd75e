"""Reading streams of chat completions in tests, strictly."""

from typing import Any

import msgspec

from cortex.core.sse import SseSplitter

FINISHES = ("stop", "length", "tool_calls")
_FIELDS = {"id", "object", "created", "model", "choices"}


def read_chunks(stream: bytes) -> list[dict[str, Any]]:
    """Decode a stream's chunks; it must end in `[DONE]`, or in an error as its last word."""
    splitter = SseSplitter()
    data = [event.data for event in splitter.feed(stream) if not event.is_comment]
    assert not splitter.has_rest
    is_done = data[-1] == b"[DONE]"
    chunks = [msgspec.json.decode(each) for each in (data[:-1] if is_done else data)]
    assert is_done or list(chunks[-1]) == ["error"]
    return chunks


def check_chunks(chunks: list[dict[str, Any]], *, wants_usage: bool) -> None:
    """Prove the order of a whole stream with one choice, and that its calls can be put together."""
    choices = _choices(chunks, "chat.completion.chunk", wants_usage=wants_usage)
    assert choices[0]["delta"]["role"] == "assistant"
    assert choices[-1]["finish_reason"] in FINISHES
    num_calls = 0
    for choice in choices:
        for call in choice["delta"].get("tool_calls") or []:
            if call["index"] == num_calls:
                assert call["id"]
                assert call["type"] == "function"
                assert call["function"]["name"]
                num_calls += 1
            else:
                assert call["index"] == num_calls - 1
                assert "name" not in call["function"]
    assert (choices[-1]["finish_reason"] == "tool_calls") <= (num_calls > 0)


def check_texts(chunks: list[dict[str, Any]], *, wants_usage: bool) -> None:
    """Prove the order of a whole stream of a text completion with one choice."""
    choices = _choices(chunks, "text_completion", wants_usage=wants_usage)
    assert all(isinstance(choice["text"], str) for choice in choices)
    assert choices[-1]["finish_reason"] in ("stop", "length")


def _choices(chunks: list[dict[str, Any]], kind: str, *, wants_usage: bool) -> list[dict[str, Any]]:
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert all(chunk.keys() >= _FIELDS for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {kind}
    if wants_usage:
        usage = chunks[-1]["usage"]
        assert chunks[-1]["choices"] == []
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        chunks = chunks[:-1]
    choices: list[dict[str, Any]] = [chunk["choices"][0] for chunk in chunks]
    assert [choice["index"] for choice in choices] == [0] * len(choices)
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    return choices


def accumulate(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the message that a client makes of a stream with one choice."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls") or []:
                if call["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append({**call, "function": dict(call["function"])})
                else:
                    function = message["tool_calls"][call["index"]]["function"]
                    function["arguments"] += call["function"].get("arguments") or ""
    return message
