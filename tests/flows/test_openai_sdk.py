"""The official openai SDK against `cortex up` with the bundled model."""

import json
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion

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


NOW = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
both_ways = pytest.mark.parametrize("streamed", [False, True])


def answer(client: OpenAI, streamed: bool, **fields: Any) -> ChatCompletion:
    """Ask, and return the whole answer, which the SDK puts together where it is streamed."""
    body = {"model": MODEL, "messages": ask("Who are you?"), "temperature": 0, **fields}
    body.setdefault("max_tokens", 40)
    if not streamed:
        return client.chat.completions.create(**body)
    state = ChatCompletionStreamState()
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(**body, stream=True, stream_options=options):
        state.handle_chunk(chunk)
    return state.current_completion_snapshot


@both_ways
@pytest.mark.parametrize(
    "fields",
    [
        {"max_completion_tokens": 3, "max_tokens": 40},
        {"max_completion_tokens": 3},
        {"max_tokens": 3},
    ],
)
def test_the_bound_of_new_tokens_holds_under_either_name(
    openai_client: OpenAI, streamed: bool, fields: dict[str, int]
):
    reply = answer(openai_client, streamed, **fields)
    assert reply.usage.completion_tokens == 3
    assert reply.choices[0].finish_reason == "length"


@both_ways
def test_a_bound_beyond_the_context_is_no_error(openai_client: OpenAI, streamed: bool):
    reply = answer(openai_client, streamed, max_tokens=10_000_000)
    assert reply.choices[0].finish_reason == "stop"


@both_ways
def test_a_developer_turn_is_a_system_turn(openai_client: OpenAI, streamed: bool):
    turns = [
        [{"role": role, "content": "Be kind."}, *ask("Hello!")] for role in ("developer", "system")
    ]
    first, second = (answer(openai_client, streamed, messages=each) for each in turns)
    assert first.usage.prompt_tokens == second.usage.prompt_tokens
    assert first.choices[0].message.content == second.choices[0].message.content


@both_ways
def test_content_may_be_a_list_of_parts(openai_client: OpenAI, streamed: bool):
    parts = [{"type": "text", "text": "Who are you?"}]
    reply = answer(openai_client, streamed, messages=[{"role": "user", "content": parts}])
    assert (
        reply.choices[0].message.content
        == answer(openai_client, streamed).choices[0].message.content
    )


@both_ways
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"get_weather", "get_time"}),
        ({"type": "function", "function": {"name": "get_time"}}, {"get_time"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "get_time"}}],
                },
            },
            {"get_time"},
        ),
        ("none", set()),
    ],
)
def test_a_choice_of_tools_is_kept(
    openai_client: OpenAI, streamed: bool, choice: Any, names: set[str]
):
    reply = answer(
        openai_client,
        streamed,
        tools=[WEATHER, NOW],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=200,
    )
    calls = reply.choices[0].message.tool_calls or []
    assert len(calls) == (1 if names else 0)
    assert {call.function.name for call in calls} <= names
    assert all(isinstance(json.loads(call.function.arguments), dict) for call in calls)
    assert reply.choices[0].finish_reason == ("tool_calls" if names else "stop")


@both_ways
def test_several_calls_have_ids_of_their_own(openai_client: OpenAI, streamed: bool):
    reply = answer(
        openai_client,
        streamed,
        tools=[WEATHER],
        tool_choice="required",
        temperature=1,
        seed=3,
        max_tokens=1000,
    )
    calls = reply.choices[0].message.tool_calls
    assert len({call.id for call in calls}) == len(calls)
    assert all(call.type == "function" for call in calls)


@both_ways
@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_response_format_is_kept(openai_client: OpenAI, streamed: bool, kind: str):
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    form: dict[str, Any] = {"type": kind}
    if kind == "json_schema":
        form["json_schema"] = {"name": "place", "schema": schema, "strict": True}
    reply = answer(openai_client, streamed, response_format=form, max_tokens=400)
    if reply.choices[0].finish_reason == "stop":
        value = json.loads(reply.choices[0].message.content)
        assert isinstance(value, dict)
        assert kind == "json_object" or value["city"] in ("Paris", "Rome")
    else:
        # Free JSON of a tiny model may go on for as long as it is let.
        assert kind == "json_object"


@both_ways
@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}, True),
    ],
)
def test_thinking_is_switched_by_effort_and_by_the_template(
    openai_client: OpenAI, streamed: bool, fields: dict[str, Any], thinks: bool
):
    question = ask("What is the capital of Italy?")
    reply = answer(openai_client, streamed, messages=question, max_tokens=400, **fields)
    details = reply.usage.completion_tokens_details
    assert (details.reasoning_tokens > 0) == thinks
    if not streamed:
        assert bool(getattr(reply.choices[0].message, "reasoning_content", None)) == thinks


@both_ways
@pytest.mark.parametrize("budget", [1, 4])
def test_a_budget_of_thinking_ends_it(openai_client: OpenAI, streamed: bool, budget: int):
    question = ask("What is the capital of Italy?")
    extra = {"chat_template_kwargs": {"enable_thinking": True}, "thinking_budget": budget}
    reply = answer(openai_client, streamed, messages=question, max_tokens=400, extra_body=extra)
    # Its end is a token too.
    assert reply.usage.completion_tokens_details.reasoning_tokens <= budget + 1
    assert reply.choices[0].message.content


@both_ways
def test_logprobs_come_with_every_token(openai_client: OpenAI, streamed: bool):
    reply = answer(openai_client, streamed, logprobs=True, top_logprobs=2, max_tokens=5)
    content = reply.choices[0].logprobs.content
    assert len(content) == 5
    assert all(len(each.top_logprobs) == 2 for each in content)


@both_ways
def test_several_choices_have_their_indices(openai_client: OpenAI, streamed: bool):
    reply = answer(openai_client, streamed, n=2, max_tokens=4)
    assert sorted(choice.index for choice in reply.choices) == [0, 1]


@both_ways
@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}])
def test_a_draw_that_leaves_one_token_is_the_likeliest_answer(
    openai_client: OpenAI, streamed: bool, narrow: dict[str, float]
):
    likeliest = answer(openai_client, streamed, temperature=0)
    drawn = answer(openai_client, streamed, temperature=2, extra_body=narrow)
    assert drawn.choices[0].message.content == likeliest.choices[0].message.content
    texts = [
        openai_client.completions.create(
            model=MODEL, prompt="The sky", max_tokens=12, temperature=heat, extra_body=extra
        )
        for heat, extra in ((0, {}), (2, narrow))
    ]
    assert texts[0].choices[0].text == texts[1].choices[0].text


@both_ways
def test_a_repetition_penalty_has_its_effect(openai_client: OpenAI, streamed: bool):
    asked = {"messages": ask("Count from 1 to 9."), "max_tokens": 40, "temperature": 0}
    plain = answer(openai_client, streamed, **asked)
    held = answer(openai_client, streamed, **asked, extra_body={"repetition_penalty": 10})
    assert plain.choices[0].message.content != held.choices[0].message.content


@both_ways
def test_stop_seed_bias_and_penalties_have_their_effect(openai_client: OpenAI, streamed: bool):
    plain = answer(openai_client, streamed, messages=ask("Count from 1 to 9."))
    text = plain.choices[0].message.content
    stopped = answer(openai_client, streamed, messages=ask("Count from 1 to 9."), stop="4")
    assert stopped.choices[0].message.content == text.partition("4")[0]
    sampled = [
        answer(
            openai_client,
            streamed,
            temperature=1.5,
            top_p=0.9,
            seed=11,
            presence_penalty=0.5,
            frequency_penalty=0.5,
        )
        for _ in range(2)
    ]
    assert sampled[0].choices[0].message.content == sampled[1].choices[0].message.content
    biased = answer(openai_client, streamed, logit_bias={"70": 100}, logprobs=True, max_tokens=3)
    assert len({each.token for each in biased.choices[0].logprobs.content}) == 1


@both_ways
def test_fields_that_change_no_answer_change_none(openai_client: OpenAI, streamed: bool):
    plain = answer(openai_client, streamed)
    marked = answer(
        openai_client,
        streamed,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="flex",
        modalities=["text"],
        prediction={"type": "content", "content": "Hello"},
        prompt_cache_key="k",
        safety_identifier="s",
        verbosity="low",
        extra_body={"from_the_future": {"a": [1]}},
        extra_query={"beta": "true"},
        extra_headers={"x-session-affinity": "s"},
    )
    assert marked.choices[0].message.content == plain.choices[0].message.content


@both_ways
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"n": 99}, "n"),
        ({"stop": ["x"] * 99}, "stop"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    openai_client: OpenAI, streamed: bool, fields: dict[str, Any], param: str
):
    body = {"model": MODEL, "messages": ask("hi"), "stream": streamed, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.post("/chat/completions", body=body, cast_to=object)
    assert caught.value.param == param
    assert param.partition("[")[0] in caught.value.message
