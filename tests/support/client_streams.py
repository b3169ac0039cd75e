"""Streams as clients of each dialect ask for them, and how each says that one has failed."""

from dataclasses import dataclass, field
from typing import Any

from tests.support import anthropic_events, chat_chunks, response_events

USER = {"role": "user", "content": "Count from 1 to 50."}
# An answer of the bundled model without an end, where a dialect can ask for one.
ENDLESS = {"logit_bias": {"0": -100, "1": -100, "2": -100}, "max_tokens": 2000}


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """A route and what is asked there."""

    route: str
    body: dict[str, Any]
    # Bytes that are there once the model has said something.
    begun: bytes
    endless: dict[str, Any] = field(default_factory=dict)

    def body_for(self, model: str, *, stream: bool = True) -> dict[str, Any]:
        """Return the request for a model."""
        return {"model": model, **self.body, "stream": stream}


STREAMS = {
    "chat": Streamed(
        route="/v1/chat/completions",
        body={"messages": [USER]},
        endless=ENDLESS,
        begun=b'"content":"1',
    ),
    "text": Streamed(
        route="/v1/completions",
        body={"prompt": "Count from 1 to 50.", "max_tokens": 100},
        endless=ENDLESS,
        begun=b'"text":"',
    ),
    "messages": Streamed(
        route="/v1/messages",
        body={"messages": [USER], "max_tokens": 400},
        begun=b'"text_delta"',
    ),
    "responses": Streamed(
        route="/v1/responses",
        body={"input": [USER]},
        begun=b"response.output_text.delta",
    ),
}


def message_of_failure(dialect: str, stream: bytes) -> str:
    """Return what a failed stream says went wrong, as its last word and in its dialect's form."""
    if dialect == "messages":
        events = anthropic_events.read_events(stream)
        anthropic_events.check_grammar(events)
        assert events[-1]["type"] == "error"
        assert "message_stop" not in [event["type"] for event in events]
        return str(events[-1]["error"]["message"])
    if dialect == "responses":
        events = response_events.read_events(stream)
        response_events.check_grammar(events)
        assert events[-1]["type"] == "response.failed"
        return str(events[-1]["response"]["error"]["message"])
    error = chat_chunks.read_chunks(stream)[-1]["error"]
    assert error.keys() >= {"message", "type", "code"}
    return str(error["message"])
