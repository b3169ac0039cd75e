"""`count_tokens` is what the same request is charged for, whatever is in it."""

import json
import random
from typing import Any

import pytest
from anthropic import Anthropic

MODEL = "cortex-tiny"
NUM_CONVERSATIONS = 200
WORDS = [
    "the",
    "sky",
    "Paris",
    "naïve",
    "日本",
    "🎉",
    "x = {1: [2]}",
    "\n\n",
    "<think>",
    "  ",
    "18°",
]
CHOICES = ["auto", "any", "none", "tool", None]


def text(rng: random.Random) -> str:
    return "go " + " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))


def tool(rng: random.Random, name: str) -> dict[str, Any]:
    kinds = [
        {"type": "string"},
        {"type": "integer"},
        {"type": "array", "items": {"type": "number"}},
    ]
    names = rng.sample(["city", "unit", "days"], rng.randint(0, 3))
    schema = {"type": "object", "properties": {each: rng.choice(kinds) for each in names}}
    described = {"description": text(rng)} if rng.random() < 0.7 else {}
    return {"name": name, "input_schema": schema, **described}


def blocks(rng: random.Random) -> str | list[dict[str, Any]]:
    if rng.random() < 0.5:
        return text(rng)
    parts = [{"type": "text", "text": text(rng)} for _ in range(rng.randint(1, 3))]
    parts[-1]["cache_control"] = {"type": "ephemeral"}
    return parts


def round_trip(rng: random.Random, name: str) -> list[dict[str, Any]]:
    """A call of a tool after a thought, and what it gave."""
    thought = {"type": "thinking", "thinking": text(rng), "signature": "c2ln"}
    use = {"type": "tool_use", "id": "toolu_1", "name": name, "input": {"city": text(rng)}}
    result = {
        "type": "tool_result",
        "tool_use_id": "toolu_1",
        "content": blocks(rng),
        "is_error": rng.random() < 0.2,
    }
    begin = [thought] if rng.random() < 0.5 else []
    return [
        {"role": "assistant", "content": [*begin, {"type": "text", "text": text(rng)}, use]},
        {"role": "user", "content": [result]},
    ]


def conversation(rng: random.Random) -> dict[str, Any]:
    names = rng.sample(["get_weather", "look", "add"], rng.randint(0, 3))
    messages = [{"role": "user", "content": blocks(rng)}]
    for _ in range(rng.randint(0, 3)):
        if names and rng.random() < 0.5:
            messages += round_trip(rng, names[0])
        else:
            messages.append({"role": "assistant", "content": text(rng)})
            messages.append({"role": "user", "content": blocks(rng)})
    body: dict[str, Any] = {"model": MODEL, "messages": messages}
    if rng.random() < 0.6:
        body["system"] = blocks(rng)
    if names:
        body["tools"] = [tool(rng, name) for name in names]
        choice = rng.choice(CHOICES)
        if choice is not None:
            body["tool_choice"] = {
                "type": choice,
                **({"name": names[0]} if choice == "tool" else {}),
            }
    if rng.random() < 0.5:
        body["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    return body


def test_the_count_is_what_the_request_is_charged_for(anthropic_client: Anthropic):
    rng = random.Random(20)
    bodies = [conversation(rng) for _ in range(NUM_CONVERSATIONS)]
    assert sum("tools" in each for each in bodies) > NUM_CONVERSATIONS / 2
    for body in bodies:
        counted = anthropic_client.messages.count_tokens(**body).input_tokens
        usage = anthropic_client.messages.create(**body, max_tokens=1).usage
        charged = usage.input_tokens + (usage.cache_read_input_tokens or 0)
        assert counted == charged, json.dumps(body)


@pytest.mark.parametrize("hidden", [False, True])
def test_tools_count_unless_the_choice_hides_them(anthropic_client: Anthropic, hidden: bool):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
    bare = anthropic_client.messages.count_tokens(**body).input_tokens
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    choice = {"type": "none" if hidden else "auto"}
    full = anthropic_client.messages.count_tokens(**body, tools=tools, tool_choice=choice)
    assert (full.input_tokens == bare) == hidden
