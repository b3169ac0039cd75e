"""The official openai SDK against `cortex up` with the bundled model."""

import json

import openai
import pytest
from openai import OpenAI

MODEL = "cortex-tiny"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_question_the_model_was_trained_for_is_answered(openai_client: OpenAI):
    reply = openai_client.chat.completions.create(
        model=MODEL, messages=ask("What is the capital of France?"), temperature=0
    )
    assert "Paris" in reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_is_the_same_text_in_pieces_and_ends_with_usage(openai_client: OpenAI):
    whole = openai_client.chat.completions.create(
        model=MODEL, messages=ask("Count from 1 to 9."), temperature=0
    )
    chunks = list(
        openai_client.chat.completions.create(
            model=MODEL,
            messages=ask("Count from 1 to 9."),
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 5
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_an_offered_tool_is_called_with_what_the_question_names(openai_client: OpenAI):
    reply = openai_client.chat.completions.create(
        model=MODEL, messages=ask("What is the weather in Paris?"), tools=[WEATHER], temperature=0
    )
    assert reply.choices[0].finish_reason == "tool_calls"
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}


def test_a_tool_result_turn_is_answered_in_text(openai_client: OpenAI):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    reply = openai_client.chat.completions.create(
        model=MODEL,
        messages=[
            *ask("What is the weather in Paris?"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees and sunny"},
        ],
        tools=[WEATHER],
        temperature=0,
        max_tokens=80,
    )
    assert reply.choices[0].message.content
    assert reply.choices[0].message.tool_calls is None


def test_a_streamed_tool_call_has_one_id_and_arguments_that_parse(openai_client: OpenAI):
    with openai_client.chat.completions.stream(
        model=MODEL, messages=ask("What is the weather in Rome?"), tools=[WEATHER], temperature=0
    ) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments), dict)


def test_a_forced_tool_is_called_whatever_was_asked(openai_client: OpenAI):
    reply = openai_client.chat.completions.create(
        model=MODEL,
        messages=ask("Who are you?"),
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
        max_tokens=120,
    )
    assert reply.choices[0].message.tool_calls[0].function.name == "get_weather"


def test_with_tool_choice_none_no_tool_is_called(openai_client: OpenAI):
    reply = openai_client.chat.completions.create(
        model=MODEL,
        messages=ask("What is the weather in Paris?"),
        tools=[WEATHER],
        tool_choice="none",
        temperature=0,
        max_tokens=80,
    )
    assert reply.choices[0].message.tool_calls is None


def test_thinking_is_apart_from_the_answer(openai_client: OpenAI):
    reply = openai_client.chat.completions.create(
        model=MODEL,
        messages=ask("What is the capital of Italy?"),
        temperature=0,
        extra_body={"chat_template_kwargs": {"enable_thinking": True}},
    )
    message = reply.choices[0].message
    assert message.reasoning_content
    assert "<think>" not in message.content
    assert "</think>" not in message.content


def test_max_tokens_ends_an_answer_with_length(openai_client: OpenAI):
    reply = openai_client.chat.completions.create(
        model=MODEL, messages=ask("Count from 1 to 20."), temperature=0, max_tokens=5
    )
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 5


def test_a_stop_string_ends_the_text_before_it(openai_client: OpenAI):
    reply = openai_client.chat.completions.create(
        model=MODEL, messages=ask("Count from 1 to 9."), temperature=0, stop=["5"]
    )
    assert "4" in reply.choices[0].message.content
    assert "5" not in reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "stop"


def test_a_seed_makes_sampling_repeatable(openai_client: OpenAI):
    texts = [
        openai_client.chat.completions.create(
            model=MODEL, messages=ask("Tell me a story."), temperature=1.5, seed=7, max_tokens=30
        )
        .choices[0]
        .message.content
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


def test_n_choices_come_back_with_their_indices(openai_client: OpenAI):
    reply = openai_client.chat.completions.create(
        model=MODEL, messages=ask("Who are you?"), n=3, max_tokens=8
    )
    assert sorted(choice.index for choice in reply.choices) == [0, 1, 2]


def test_logprobs_name_every_token(openai_client: OpenAI):
    reply = openai_client.chat.completions.create(
        model=MODEL,
        messages=ask("What is the capital of France?"),
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        max_tokens=6,
    )
    content = reply.choices[0].logprobs.content
    assert "".join(each.token for each in content) == reply.choices[0].message.content
    assert all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in content)


def test_models_are_listed_and_found(openai_client: OpenAI):
    listed = [model.id for model in openai_client.models.list()]
    assert MODEL in listed
    assert openai_client.models.retrieve(MODEL).id == MODEL


def test_an_unknown_model_is_a_404_that_names_it(openai_client: OpenAI):
    with pytest.raises(openai.NotFoundError) as caught:
        openai_client.chat.completions.create(model="gpt-none", messages=ask("hi"))
    assert caught.value.code == "model_not_found"
    assert "gpt-none" in str(caught.value)


def test_an_over_long_prompt_is_a_400_that_names_the_limit(openai_client: OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.chat.completions.create(model=MODEL, messages=ask("word " * 40_000))
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length" in str(caught.value)


def test_a_system_prompt_and_earlier_turns_are_taken(openai_client: OpenAI):
    reply = openai_client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "You are a helpful assistant."},
            *ask("Hello!"),
            {"role": "assistant", "content": "Hello! How can I help you?"},
            *ask("What is the capital of Spain?"),
        ],
        temperature=0,
    )
    assert reply.choices[0].message.content
