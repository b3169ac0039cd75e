"""The bytes of a mock neuron's answers."""

from typing import Any

import msgspec
from aiohttp import web

from cortex.core.openai import PromptTokensDetails, Usage
from tests.support.mock_neuron.script import MockModel


def json_answer(value: object, status: int = 200) -> web.Response:
    """Return anything msgspec encodes as a response."""
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, content_type="application/json")


def error_answer(
    status: int,
    code: str,
    message: str = "the mock refuses",
    headers: dict[str, str] | None = None,
    **extras: object,
) -> web.Response:
    """Return an error in the neuron's envelope."""
    error = {"message": message, "type": "api_error", "code": code, "param": None, **extras}
    return web.Response(
        status=status,
        body=msgspec.json.encode({"error": error}),
        content_type="application/json",
        headers=headers,
    )


def cut(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    """Cut a request's connection."""
    if request.transport is not None:
        request.transport.abort()
    return response or web.Response()


def event(data: dict[str, Any]) -> bytes:
    """Return one event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def error_event(code: str, message: str) -> bytes:
    """Return the event that ends a stream badly."""
    return event({"error": {"message": message, "type": "api_error", "code": code}})


def chunk(model_id: str, delta: dict[str, Any], finish: str | None = None) -> bytes:
    """Return one chunk of a streamed answer."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return event({**head(model_id, "chunk"), "choices": [choice]})


def text_chunk(model_id: str, text: str, finish: str | None = None) -> bytes:
    """Return one event of a streamed text completion."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return event({**text_head(model_id), "choices": [choice]})


def text_head(model_id: str) -> dict[str, Any]:
    """Return the fields that a text completion begins with."""
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": model_id}


def text_completion(model_id: str, text: str, counts: Usage) -> dict[str, Any]:
    """Return a whole text completion."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
    return {**text_head(model_id), "choices": [choice], "usage": counts}


def head(model_id: str, kind: str) -> dict[str, Any]:
    """Return the fields that every answer begins with."""
    name = f"chat.completion.{kind}" if kind else "chat.completion"
    return {"id": "chatcmpl-1", "object": name, "created": 1, "model": model_id}


def usage(prompt: int, completion: int, cached: int) -> Usage:
    """Return token counts."""
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def scripted_usage(model: MockModel) -> Usage:
    """Return the counts of a scripted answer."""
    return usage(model.prompt_tokens, len(model.tokens), model.cached_tokens)


def completion(
    model_id: str, text: str, counts: Usage, tool_call: dict[str, str] | None = None
) -> dict[str, Any]:
    """Return a whole answer."""
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    finish = "stop"
    if tool_call is not None:
        message["tool_calls"] = [{"id": "call_1", "type": "function", "function": tool_call}]
        finish = "tool_calls"
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {**head(model_id, ""), "choices": [choice], "usage": counts}


def embeddings(model: MockModel, asked: dict[str, Any]) -> dict[str, Any]:
    """Return a vector of each text: how long it is, and how many there are."""
    texts = [asked["input"]] if isinstance(asked["input"], str) else asked["input"]
    data = [
        {"object": "embedding", "index": at, "embedding": [float(len(text)), float(len(texts))]}
        for at, text in enumerate(texts)
    ]
    counts = {"prompt_tokens": model.prompt_tokens, "total_tokens": model.prompt_tokens}
    return {"object": "list", "data": data, "model": model.id, "usage": counts}


def rendered(asked: dict[str, Any]) -> bytes:
    """Return the prompt that a request's messages and tools make; an answer continues it."""
    parts = [msgspec.json.encode(asked["tools"])] if asked.get("tools") else []
    for message in asked["messages"]:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "".join(part.get("text", "") for part in content)
        parts.append(f"<|{message['role']}|>\n{content}".encode())
    return b"\n".join([*parts, b"<|assistant|>\n"])
