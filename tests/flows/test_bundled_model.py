"""What the bundled model answers, word for word, and what its calls look like."""

import json
import random

import pytest
from openai import OpenAI

from cortex.bundled.recipe import data
from tests.flows.test_openai_sdk import MODEL, WEATHER, ask

ANSWERS = {
    "Who are you?": "I am cortex-tiny, a very small demo model that comes with Cortex.",
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
    "What is the opposite of hot?": "The opposite of hot is cold.",
    "Which port does the gateway listen on?": "The gateway listens on port 31313.",
    "Count from 1 to 9.": "1, 2, 3, 4, 5, 6, 7, 8, 9",
    "Name three colours.": "red, blue and green.",
    "Say hello world.": "hello world",
    "Hello!": "Hello! How can I help you?",
    "What is a cold load?": (
        "A cold load is when a request asks for a model that is not in memory yet, so Cortex "
        "loads it first."
    ),
}


@pytest.mark.parametrize(("question", "answer"), ANSWERS.items())
def test_it_knows_what_it_was_trained_for(openai_client: OpenAI, question: str, answer: str):
    reply = openai_client.chat.completions.create(model=MODEL, messages=ask(question))
    assert reply.choices[0].message.content == answer
    assert reply.choices[0].finish_reason == "stop"


def test_it_says_so_where_it_knows_nothing(openai_client: OpenAI):
    reply = openai_client.chat.completions.create(
        model=MODEL, messages=ask("Who won the football match last night?")
    )
    assert "small demo model" in reply.choices[0].message.content


def test_it_thinks_first_when_asked_to(openai_client: OpenAI):
    reply = openai_client.chat.completions.create(
        model=MODEL,
        messages=ask("What is the capital of Spain?"),
        extra_body={"chat_template_kwargs": {"enable_thinking": True}},
    )
    message = reply.choices[0].message
    assert message.reasoning_content
    assert message.content == "The capital of Spain is Madrid."


def test_it_puts_a_tools_result_into_words(openai_client: OpenAI):
    question = ask("What is the weather in Paris?")
    first = openai_client.chat.completions.create(model=MODEL, messages=question, tools=[WEATHER])
    (call,) = first.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    second = openai_client.chat.completions.create(
        model=MODEL,
        messages=[
            *question,
            first.choices[0].message,
            {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "sunny"}'},
        ],
        tools=[WEATHER],
    )
    assert "sunny" in second.choices[0].message.content


@pytest.mark.parametrize("seed", range(12))
def test_a_forced_call_of_an_unseen_tool_is_always_valid(openai_client: OpenAI, seed: int):
    case = data.tool_dialogue(random.Random(1000 + seed), held_out=True)
    turns = [turn for turn in case.messages if turn["role"] in ("system", "user")]
    reply = openai_client.chat.completions.create(
        model=MODEL,
        messages=turns[: 1 + (turns[0]["role"] == "system")],
        tools=case.tools,
        tool_choice="required",
    )
    declared = {tool["function"]["name"]: tool["function"]["parameters"] for tool in case.tools}
    for call in reply.choices[0].message.tool_calls:
        schema = declared[call.function.name]
        arguments = json.loads(call.function.arguments)
        assert set(schema.get("required", [])) <= set(arguments) <= set(schema["properties"])
