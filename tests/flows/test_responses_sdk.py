"""The official openai SDK's Responses API against `cortex up` with the bundled model."""

import json
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

MODEL = "cortex-tiny"
GREEDY: dict[str, Any] = {"temperature": 0}
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
    "strict": False,
}


def test_a_question_the_model_was_trained_for_is_answered(openai_client: OpenAI):
    reply = openai_client.responses.create(
        model=MODEL, input="What is the capital of France?", **GREEDY
    )
    assert "Paris" in reply.output_text
    assert (reply.status, reply.error, reply.incomplete_details) == ("completed", None, None)
    assert [item.type for item in reply.output] == ["message"]
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens


def test_a_stream_is_the_same_answer_in_events(openai_client: OpenAI):
    whole = openai_client.responses.create(model=MODEL, input="Count from 1 to 9.", **GREEDY)
    with openai_client.responses.stream(
        model=MODEL, input="Count from 1 to 9.", **GREEDY
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert final.usage == whole.usage
    deltas = [each.delta for each in events if each.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert len(deltas) > 5
    assert [each.sequence_number for each in events] == list(range(len(events)))


def test_instructions_and_items_of_all_roles_are_taken(openai_client: OpenAI):
    items: Any = [
        {"role": "developer", "content": "Answer briefly."},
        {"role": "user", "content": [{"type": "input_text", "text": "Who are you?"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "A small model."}]},
        {"role": "user", "content": "What is the capital of Italy?"},
    ]
    reply = openai_client.responses.create(
        model=MODEL, instructions="Be kind.", input=items, **GREEDY
    )
    assert reply.output_text
    assert reply.instructions == "Be kind."


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_tool_is_called_and_its_result_answered(openai_client: OpenAI, is_stream: bool):
    question: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    fields: dict[str, Any] = {"model": MODEL, "input": question, "tools": [WEATHER], **GREEDY}
    if is_stream:
        with openai_client.responses.stream(**fields) as stream:
            first: Any = stream.get_final_response()
    else:
        first = openai_client.responses.create(**fields)
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert call.name == "get_weather"
    assert set(json.loads(call.arguments)) == {"city"}
    output: Any = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": "18 degrees and sunny",
    }
    continued = openai_client.responses.create(
        model=MODEL,
        input=[output],
        previous_response_id=first.id,
        tools=[WEATHER],
        max_output_tokens=80,
        **GREEDY,
    )
    resent = openai_client.responses.create(
        model=MODEL,
        input=[*question, call.model_dump(exclude_none=True), output],
        tools=[WEATHER],
        max_output_tokens=80,
        store=False,
        **GREEDY,
    )
    assert continued.output_text
    assert continued.output_text == resent.output_text


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "get_weather"},
        {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "get_weather"}],
        },
    ],
)
def test_a_forced_tool_is_called_whatever_was_asked(openai_client: OpenAI, choice: Any):
    reply = openai_client.responses.create(
        model=MODEL,
        input="Who are you?",
        tools=[WEATHER],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_output_tokens=120,
        **GREEDY,
    )
    (call,) = [item for item in reply.output if item.type == "function_call"]
    assert call.name == "get_weather"
    assert isinstance(json.loads(call.arguments), dict)


def test_a_custom_tool_is_called_with_a_text(openai_client: OpenAI):
    tool: Any = {"type": "custom", "name": "note", "description": "Write a note."}
    reply = openai_client.responses.create(
        model=MODEL,
        input="Who are you?",
        tools=[tool, {"type": "web_search"}],
        tool_choice={"type": "custom", "name": "note"},
        max_output_tokens=200,
        **GREEDY,
    )
    (call,) = [item for item in reply.output if item.type == "custom_tool_call"]
    assert call.name == "note"
    assert isinstance(call.input, str)
    assert [each.type for each in reply.tools] == ["custom"]


class City(BaseModel):
    name: str
    is_large: bool


def test_an_answer_is_parsed_into_a_type(openai_client: OpenAI):
    reply = openai_client.responses.parse(
        model=MODEL, input="What is the capital of France?", text_format=City, **GREEDY
    )
    assert isinstance(reply.output_parsed, City)


def test_an_answer_that_was_cut_is_incomplete(openai_client: OpenAI):
    reply = openai_client.responses.create(
        model=MODEL, input="Count from 1 to 9.", max_output_tokens=2, **GREEDY
    )
    assert reply.status == "incomplete"
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert reply.usage is not None
    assert reply.usage.output_tokens == 2


def test_log_probabilities_are_told(openai_client: OpenAI):
    reply: Any = openai_client.responses.create(
        model=MODEL,
        input="What is the capital of France?",
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        max_output_tokens=4,
        **GREEDY,
    )
    logprobs = reply.output[0].content[0].logprobs
    assert "".join(each.token for each in logprobs) == reply.output_text
    assert all(len(each.top_logprobs) == 2 for each in logprobs)


def test_a_response_is_fetched_paged_deleted_and_gone(openai_client: OpenAI):
    made = openai_client.responses.create(
        model=MODEL, input="Who are you?", metadata={"k": "v"}, **GREEDY
    )
    fetched = openai_client.responses.retrieve(made.id)
    assert (fetched.output_text, fetched.metadata) == (made.output_text, {"k": "v"})
    items = list(openai_client.responses.input_items.list(made.id, limit=1))
    assert [item.type for item in items] == ["message"]
    with pytest.raises(openai.BadRequestError, match="is complete"):
        openai_client.responses.cancel(made.id)
    openai_client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.retrieve(made.id)


def test_errors_arrive_as_the_sdks_own(openai_client: OpenAI):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        openai_client.responses.create(model="no-such-model", input="Hi", stream=True)
    with pytest.raises(openai.BadRequestError, match="background is not supported"):
        openai_client.responses.create(model=MODEL, input="Hi", background=True)
    with pytest.raises(openai.BadRequestError, match="is not kept here"):
        openai_client.responses.create(model=MODEL, input="Hi", previous_response_id="resp_no")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        openai_client.responses.create(model=MODEL, input="word " * 50_000)


def test_tokens_are_counted_as_the_answer_reports_them(openai_client: OpenAI):
    asked: dict[str, Any] = {
        "model": MODEL,
        "input": "What is the weather in Paris?",
        "instructions": "Be brief.",
        "tools": [WEATHER],
    }
    counted = openai_client.responses.input_tokens.count(**asked)
    reply = openai_client.responses.create(**asked, max_output_tokens=1, store=False)
    assert reply.usage is not None
    assert counted.input_tokens == reply.usage.input_tokens
