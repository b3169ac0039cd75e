"""The official anthropic SDK against `cortex up` with the bundled model."""

import json
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from anthropic.types import Message

MODEL = "cortex-tiny"
# The SDK has no argument for it any more; the field is still part of the dialect.
GREEDY = {"temperature": 0}
WEATHER = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_message_is_answered_with_one_text_block(anthropic_client: Anthropic):
    reply = anthropic_client.messages.create(
        model=MODEL,
        max_tokens=100,
        messages=ask("What is the capital of France?"),
        extra_body=GREEDY,
    )
    assert [block.type for block in reply.content] == ["text"]
    assert "Paris" in reply.content[0].text
    assert reply.stop_reason == "end_turn"
    assert reply.usage.input_tokens > 0
    assert reply.usage.output_tokens > 0


def test_a_stream_accumulates_to_the_same_message(anthropic_client: Anthropic):
    whole = anthropic_client.messages.create(
        model=MODEL, max_tokens=100, messages=ask("Count from 1 to 9."), extra_body=GREEDY
    )
    with anthropic_client.messages.stream(
        model=MODEL, max_tokens=100, messages=ask("Count from 1 to 9."), extra_body=GREEDY
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.stop_reason == "end_turn"
    wire = [kind for kind in kinds if kind not in ("text", "ping")]
    assert wire[:2] == ["message_start", "content_block_start"]
    assert wire[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_tool_is_used_and_its_result_answered(anthropic_client: Anthropic):
    question = ask("What is the weather in Paris?")
    first = anthropic_client.messages.create(
        model=MODEL, max_tokens=200, messages=question, tools=[WEATHER], extra_body=GREEDY
    )
    assert first.stop_reason == "tool_use"
    use = first.content[-1]
    assert use.type == "tool_use"
    assert use.name == "get_weather"
    assert set(use.input) == {"city"}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "18 degrees and sunny"}
    second = anthropic_client.messages.create(
        model=MODEL,
        max_tokens=80,
        messages=[
            *question,
            {"role": "assistant", "content": [block.to_dict() for block in first.content]},
            {"role": "user", "content": [result]},
        ],
        tools=[WEATHER],
        extra_body=GREEDY,
    )
    assert second.content[0].type == "text"
    assert second.content[0].text


def test_a_streamed_tool_use_accumulates_to_its_input(anthropic_client: Anthropic):
    with anthropic_client.messages.stream(
        model=MODEL,
        max_tokens=200,
        messages=ask("What is the weather in Rome?"),
        tools=[WEATHER],
        extra_body=GREEDY,
    ) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    assert set(final.content[-1].input) == {"city"}


def test_thinking_comes_as_a_block_of_its_own(anthropic_client: Anthropic):
    with anthropic_client.messages.stream(
        model=MODEL,
        max_tokens=2000,
        thinking={"type": "enabled", "budget_tokens": 1024},
        messages=ask("What is the capital of Italy?"),
    ) as stream:
        final = stream.get_final_message()
    assert final.content[0].type == "thinking"
    assert final.content[0].thinking
    assert final.content[0].signature is not None


def test_system_blocks_and_unknown_betas_are_taken(anthropic_client: Anthropic):
    reply = anthropic_client.messages.create(
        model=MODEL,
        max_tokens=60,
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1.2.3"},
            {"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}},
        ],
        messages=ask("Hello!"),
        extra_headers={"anthropic-beta": "something-2030-01-01"},
        extra_body={"context_management": {"edits": []}, "output_config": {"effort": "high"}},
        extra_query={"beta": "true"},
    )
    assert reply.content[0].text


def test_a_stop_sequence_is_named_in_the_answer(anthropic_client: Anthropic):
    reply = anthropic_client.messages.create(
        model=MODEL,
        max_tokens=60,
        messages=ask("Count from 1 to 9."),
        stop_sequences=["5"],
        extra_body=GREEDY,
    )
    assert reply.stop_reason == "stop_sequence"
    assert reply.stop_sequence == "5"
    assert "5" not in reply.content[0].text


def test_max_tokens_is_named_as_the_reason(anthropic_client: Anthropic):
    reply = anthropic_client.messages.create(
        model=MODEL, max_tokens=4, messages=ask("Count from 1 to 20.")
    )
    assert reply.stop_reason == "max_tokens"


def test_counted_tokens_equal_the_usage_of_the_same_message(anthropic_client: Anthropic):
    body = {"model": MODEL, "system": "Be kind.", "messages": ask("Who are you?")}
    counted = anthropic_client.messages.count_tokens(**body, tools=[WEATHER])
    reply = anthropic_client.messages.create(**body, tools=[WEATHER], max_tokens=1)
    assert counted.input_tokens == reply.usage.input_tokens


def test_an_unknown_model_is_a_not_found_error(anthropic_client: Anthropic):
    with pytest.raises(anthropic.NotFoundError) as caught:
        anthropic_client.messages.create(model="claude-none", max_tokens=9, messages=ask("hi"))
    assert caught.value.body["error"]["type"] == "not_found_error"
    assert "claude-none" in str(caught.value)


def test_a_missing_max_tokens_is_an_invalid_request_that_names_it(anthropic_client: Anthropic):
    with pytest.raises(anthropic.BadRequestError) as caught:
        anthropic_client.post(
            "/v1/messages", body={"model": MODEL, "messages": ask("hi")}, cast_to=object
        )
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert "max_tokens" in str(caught.value)


def test_models_are_listed_in_the_dialects_own_shape(anthropic_client: Anthropic):
    page = anthropic_client.models.list()
    assert MODEL in [model.id for model in page.data]
    assert page.data[0].type == "model"
    assert page.has_more is False
    one_by_one = [model.id for model in anthropic_client.models.list(limit=1)]
    assert one_by_one == [model.id for model in page.data]
    assert anthropic_client.models.retrieve(MODEL).display_name == MODEL
    with pytest.raises(anthropic.BadRequestError) as caught:
        anthropic_client.models.list(limit=0)
    assert caught.value.body["error"]["type"] == "invalid_request_error"


both_ways = pytest.mark.parametrize("streamed", [False, True])
NOW = {"name": "get_time", "input_schema": {"type": "object"}}
PIXEL = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}


def answer(client: Anthropic, streamed: bool, **fields: Any) -> Message:
    """Ask, and return the whole message, which the SDK puts together where it is streamed."""
    extra = {**GREEDY, **fields.pop("extra_body", {})}
    body = {"model": MODEL, "max_tokens": 60, "messages": ask("Who are you?"), **fields}
    if not streamed:
        return client.messages.create(**body, extra_body=extra)
    with client.messages.stream(**body, extra_body=extra) as stream:
        return stream.get_final_message()


def text_of(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


@both_ways
@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": [{"type": "text", "text": "Who are you?"}]}],
        [
            {
                "role": "user",
                "content": [
                    {
                        "type": "text",
                        "text": "Who are you?",
                        "cache_control": {"type": "ephemeral", "ttl": "1h"},
                    }
                ],
            }
        ],
        [
            {
                "role": "user",
                "content": [
                    {
                        "type": "document",
                        "source": {
                            "type": "text",
                            "media_type": "text/plain",
                            "data": "Who are you?",
                        },
                    }
                ],
            }
        ],
    ],
)
def test_the_same_words_in_any_block_get_the_same_answer(
    anthropic_client: Anthropic, streamed: bool, turns: list[Any]
):
    plain = answer(anthropic_client, streamed)
    blocks = answer(anthropic_client, streamed, messages=turns)
    assert text_of(blocks) == text_of(plain)
    assert blocks.usage.input_tokens + blocks.usage.cache_read_input_tokens == (
        plain.usage.input_tokens + plain.usage.cache_read_input_tokens
    )


@both_ways
def test_system_text_counts_wherever_it_stands(anthropic_client: Anthropic, streamed: bool):
    first = answer(anthropic_client, streamed, system="Be kind.")
    blocks = [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]
    second = answer(anthropic_client, streamed, system=blocks)
    turns = [*ask("Who are you?"), {"role": "system", "content": "Be kind."}]
    third = answer(anthropic_client, streamed, messages=turns)
    assert text_of(first) == text_of(second) == text_of(third)


@both_ways
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"type": "any", "disable_parallel_tool_use": True}, {"get_weather", "get_time"}),
        ({"type": "tool", "name": "get_time"}, {"get_time"}),
        ({"type": "none"}, set()),
    ],
)
def test_a_choice_of_tools_is_kept(
    anthropic_client: Anthropic, streamed: bool, choice: Any, names: set[str]
):
    reply = answer(
        anthropic_client, streamed, tools=[WEATHER, NOW], tool_choice=choice, max_tokens=300
    )
    uses = [block for block in reply.content if block.type == "tool_use"]
    assert len(uses) == (1 if names else 0)
    assert {use.name for use in uses} <= names
    assert reply.stop_reason == ("tool_use" if names else "end_turn")


@both_ways
@pytest.mark.parametrize("is_error", [False, True])
@pytest.mark.parametrize(
    "content", ["18 degrees", [{"type": "text", "text": "18 degrees", "cache_control": None}], None]
)
def test_a_result_of_a_tool_is_taken_in_every_form(
    anthropic_client: Anthropic, streamed: bool, is_error: bool, content: Any
):
    result: dict[str, Any] = {"type": "tool_result", "tool_use_id": "t1", "is_error": is_error}
    if content is not None:
        result["content"] = content
    turns = [
        *ask("What is the weather in Paris?"),
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I look.", "signature": "c2ln"},
                {"type": "redacted_thinking", "data": "c2VjcmV0"},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}},
            ],
        },
        {"role": "user", "content": [result, {"type": "text", "text": "Go on."}]},
    ]
    reply = answer(anthropic_client, streamed, messages=turns, tools=[WEATHER])
    assert reply.stop_reason in ("end_turn", "max_tokens", "tool_use")
    assert reply.usage.output_tokens > 0


@both_ways
@pytest.mark.parametrize("kind", ["enabled", "adaptive"])
def test_thoughts_come_with_a_signature_and_can_be_sent_back(
    anthropic_client: Anthropic, streamed: bool, kind: str
):
    thinking = {"type": kind} if kind == "adaptive" else {"type": kind, "budget_tokens": 1024}
    question = ask("What is the capital of Italy?")
    first = answer(
        anthropic_client, streamed, messages=question, thinking=thinking, max_tokens=2000
    )
    assert first.content[0].type == "thinking"
    assert first.content[0].thinking
    assert first.content[0].signature == "Y29ydGV4"
    turns = [
        *question,
        {"role": "assistant", "content": [block.to_dict() for block in first.content]},
        *ask("And of Spain?"),
    ]
    second = answer(anthropic_client, streamed, messages=turns, thinking=thinking, max_tokens=2000)
    assert second.content[0].type == "thinking"


@both_ways
def test_thoughts_keep_within_their_budget(anthropic_client: Anthropic, streamed: bool):
    question = ask("What is the capital of Italy?")
    long, short = (
        answer(
            anthropic_client,
            streamed,
            messages=question,
            thinking={"type": "enabled", "budget_tokens": budget},
            max_tokens=2000,
        ).content
        for budget in (1024, 3)
    )
    assert long[0].thinking.startswith(short[0].thinking)
    assert len(short[0].thinking) < len(long[0].thinking)
    assert short[-1].type == "text"


@both_ways
def test_disabled_thinking_thinks_nothing(anthropic_client: Anthropic, streamed: bool):
    reply = answer(anthropic_client, streamed, thinking={"type": "disabled"})
    assert [block.type for block in reply.content] == ["text"]


@both_ways
def test_a_stop_sequence_is_named_in_both_forms(anthropic_client: Anthropic, streamed: bool):
    reply = answer(
        anthropic_client, streamed, messages=ask("Count from 1 to 9."), stop_sequences=["x", "5"]
    )
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", "5")


@both_ways
@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_a_wanted_form_of_the_answer_is_kept(
    anthropic_client: Anthropic, streamed: bool, field: str
):
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "schema": schema}
    body = {field: {"format": wanted, "effort": "low"} if field == "output_config" else wanted}
    reply = answer(anthropic_client, streamed, extra_body=body, max_tokens=200)
    assert json.loads(text_of(reply))["city"] in ("Paris", "Rome")


@both_ways
def test_fields_that_change_no_answer_change_none(anthropic_client: Anthropic, streamed: bool):
    plain = answer(anthropic_client, streamed)
    marked = answer(
        anthropic_client,
        streamed,
        max_tokens=1_000_000 if streamed else 60,
        metadata={"user_id": '{"device_id": "x"}'},
        service_tier="auto",
        extra_query={"beta": "true"},
        extra_headers={
            "anthropic-beta": "claude-code-20250219,from-the-future-2031-01-01",
            "x-claude-code-session-id": "s",
            "anthropic-version": "2031-01-01",
        },
        extra_body={
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "output_config": {"effort": "xhigh"},
            "mcp_servers": [],
            "container": None,
            "from_the_future": {"a": 1},
            "top_k": 1,
            "top_p": 0.9,
        },
    )
    assert text_of(marked) == text_of(plain)


def test_usage_is_whole_at_the_start_and_at_the_end_of_a_stream(anthropic_client: Anthropic):
    with anthropic_client.messages.stream(
        model=MODEL, max_tokens=20, messages=ask("Who are you?"), extra_body=GREEDY
    ) as stream:
        events = [event for event in stream if event.type in ("message_start", "message_delta")]
    start, end = events[0].message.usage, events[-1].usage
    counted = anthropic_client.messages.count_tokens(model=MODEL, messages=ask("Who are you?"))
    for usage in (start, end):
        assert usage.input_tokens + usage.cache_read_input_tokens == counted.input_tokens
        assert usage.cache_creation_input_tokens == 0
    assert end.output_tokens > 0


@both_ways
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mcp_servers": [{"type": "url", "url": "https://x", "name": "s"}]}, "mcp_servers"),
        ({"container": "c1"}, "container"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"type": "mcp_toolset", "mcp_server_name": "s"}]}, "mcp_toolset"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "budget_tokens"),
        ({"stop_sequences": [7]}, "stop_sequences"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "document",
                                "source": {**PIXEL, "media_type": "application/pdf"},
                            }
                        ],
                    }
                ]
            },
            "application/pdf",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": PIXEL}]}]},
            "image",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "tool_result",
                                "tool_use_id": "t",
                                "content": [{"type": "image", "source": PIXEL}],
                            }
                        ],
                    }
                ]
            },
            "image",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_words(
    anthropic_client: Anthropic, streamed: bool, fields: dict[str, Any], words: str
):
    body = {"model": MODEL, "max_tokens": 9, "messages": ask("hi"), "stream": streamed, **fields}
    with pytest.raises(anthropic.BadRequestError) as caught:
        anthropic_client.post("/v1/messages", body=body, cast_to=object)
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert words in caught.value.body["error"]["message"]
