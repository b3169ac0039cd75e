from typing import Any

import msgspec
import pytest

from cortex.core.errors import (
    ContextLengthExceededError,
    CortexError,
    EngineDiedError,
    RateLimitError,
    UpstreamMalformedError,
)
from cortex.core.openai import ChatCompletion
from cortex.core.response_draft import Draft, custom_input, error_code, from_chat
from cortex.core.responses import parse_request
from cortex.core.translate_responses import to_chat

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}


def answer(message: dict[str, Any], finish: str = "stop", **fields: Any) -> dict[str, Any]:
    more = fields.pop("choice", {})
    body = {
        "id": "chatcmpl-1",
        "created": 1,
        "model": "x",
        "choices": [{"message": message, "finish_reason": finish, **more}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    completion = msgspec.json.decode(msgspec.json.encode(body), type=ChatCompletion)
    request = parse_request(msgspec.json.encode({"model": "m", "input": "Hi", **fields}))
    draft = Draft(request, to_chat(request, []).tools, "resp_1", 1000)
    response = msgspec.json.encode(from_chat(completion, draft, is_stored=True))
    told: dict[str, Any] = msgspec.json.decode(response)
    return told


def test_a_text_is_a_message_and_usage_is_told_in_full():
    response = answer({"content": "Hello"})
    assert response["output"] == [
        {
            "type": "message",
            "id": "msg_10000",
            "status": "completed",
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
            ],
        }
    ]
    assert (response["status"], response["model"], response["store"]) == ("completed", "m", True)
    assert response["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 5,
    }


def test_thoughts_text_and_parallel_calls_are_items():
    calls = [CALL, {**CALL, "id": "c2"}, CALL]
    response = answer({"content": "A", "reasoning_content": "Hm.", "tool_calls": calls})
    assert [item["type"] for item in response["output"]] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
        "function_call",
    ]
    assert response["output"][0]["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert [item["call_id"] for item in response["output"][2:]] == ["c1", "c2", "call_10004"]
    assert "encrypted_content" not in response["output"][0]
    assert "namespace" not in response["output"][2]


def test_arguments_that_come_as_an_object_or_not_at_all_are_told_as_text():
    function = {"name": "f", "arguments": {"a": 1}}
    calls = [{**CALL, "function": function}, {"function": {"name": "f", "arguments": None}}]
    response = answer({"content": None, "tool_calls": calls})
    assert [item["arguments"] for item in response["output"]] == ['{"a":1}', "{}"]


def test_a_custom_tool_is_called_with_a_text():
    function = {"name": "p", "arguments": '{"input":"x"}'}
    tools = [{"type": "custom", "name": "p"}]
    response = answer({"content": None, "tool_calls": [{"function": function}]}, tools=tools)
    (item,) = response["output"]
    assert (item["type"], item["id"], item["input"]) == ("custom_tool_call", "ctc_10000", "x")


@pytest.mark.parametrize("arguments", ["", "{", "[1]", '{"input":1}', '{"other":"x"}'])
def test_arguments_of_another_form_are_a_custom_tools_input_themselves(arguments: str):
    assert custom_input(arguments) == arguments


def test_no_arguments_are_an_empty_object_for_a_function_and_no_text_for_a_custom_tool():
    tools = [{"type": "custom", "name": "p"}, {"type": "function", "name": "f"}]
    calls = [
        {"id": "a", "function": {"name": "p", "arguments": ""}},
        {"id": "b", "function": {"name": "f", "arguments": ""}},
    ]
    custom, function = answer({"content": None, "tool_calls": calls}, tools=tools)["output"]
    assert (custom["input"], function["arguments"]) == ("", "{}")


def test_a_summary_holds_the_whole_thought_and_what_is_carried_on_does_too():
    response = answer(
        {"content": "A", "reasoning": "Hm."},
        reasoning={"summary": "detailed"},
        include=["reasoning.encrypted_content"],
    )
    assert response["output"][0] == {
        "type": "reasoning",
        "id": "rs_10000",
        "summary": [{"type": "summary_text", "text": "Hm."}],
        "content": [],
        "encrypted_content": "cortex:SG0u",
    }


@pytest.mark.parametrize(
    ("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_a_cut_answer_is_incomplete_with_its_last_item(finish: str, reason: str):
    response = answer({"content": "A", "tool_calls": [CALL]}, finish)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": reason}
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]


def test_log_probabilities_stand_with_the_text():
    token = {"token": "A", "logprob": -1.0, "bytes": [65], "top_logprobs": []}
    response = answer({"content": "A"}, choice={"logprobs": {"content": [token]}}, top_logprobs=1)
    assert response["output"][0]["content"][0]["logprobs"] == [token]
    assert response["top_logprobs"] == 1


def test_an_answer_without_choices_is_a_fault():
    completion = ChatCompletion(id="x", created=1, model="m", choices=[])
    request = parse_request(b'{"model":"m","input":"Hi"}')
    draft = Draft(request, to_chat(request, []).tools, "resp_1", 1000)
    with pytest.raises(UpstreamMalformedError):
        from_chat(completion, draft, is_stored=True)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ContextLengthExceededError("x"), "context_length_exceeded"),
        (RateLimitError("x"), "rate_limit_exceeded"),
        (EngineDiedError("x"), "server_error"),
    ],
)
def test_faults_have_the_dialects_words(error: CortexError, code: str):
    assert error_code(error) == code
