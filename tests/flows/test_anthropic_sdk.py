"""The official anthropic SDK against `cortex up` with the bundled model."""

import anthropic
import pytest
from anthropic import Anthropic

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
