from typing import Any

import msgspec
import pytest

from cortex.core.errors import BadRequestError
from cortex.core.openai import ChatRequest
from cortex.core.responses import parse_items, parse_request
from cortex.core.translate_responses import pack_reasoning, placed, to_chat

USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a":1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "done"}


def chat(given: object = "Hi", before: list[dict[str, Any]] | None = None, **fields: Any) -> Any:
    request = parse_request(msgspec.json.encode({"model": "m", "input": given, **fields}))
    own = request.input if isinstance(request.input, list) else []
    earlier = [msgspec.Raw(msgspec.json.encode(each)) for each in before or []]
    items = [*placed(parse_items(earlier, "resp_0"), "resp_0"), *placed(parse_items(own))]
    return to_chat(request, items).chat


def told(request: ChatRequest) -> list[dict[str, Any]]:
    """Return the messages as they go out, without what is left out."""
    return [
        {name: value for name, value in each.items() if value is not None}
        for each in msgspec.to_builtins(request.messages)
    ]


def test_a_text_is_a_users_message_after_the_instructions():
    assert told(chat("Hi", instructions="Be brief.")) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


def test_instructions_come_before_the_conversation_that_is_gone_on_from():
    before = [USER, {"type": "message", "role": "assistant", "content": "Yes?"}]
    assert [each["role"] for each in told(chat("So.", before, instructions="Be brief."))] == [
        "system",
        "user",
        "assistant",
        "user",
    ]


def test_roles_and_contents_are_mapped():
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Rules."}]},
        {"role": "system", "content": "More."},
        {
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "Look:"},
                {"type": "input_image", "image_url": "data:image/png;base64,AA", "detail": "low"},
            ],
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": "A", "odd": 1}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}] * 2},
        {"role": "user", "content": []},
    ]
    assert told(chat(items)) == [
        {"role": "developer", "content": "Rules."},
        {"role": "system", "content": "More."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look:"},
                {
                    "type": "image_url",
                    "image_url": {"url": "data:image/png;base64,AA", "detail": "low"},
                },
            ],
        },
        {"role": "assistant", "content": "A"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": [{"type": "text", "text": "a"}] * 2},
        {"role": "user", "content": ""},
    ]


def test_files_and_sounds_go_on_for_the_model_to_refuse():
    contents = [
        {"type": "input_file", "filename": "a.pdf", "file_data": "AA"},
        {"type": "input_audio", "input_audio": {"data": "AA"}},
    ]
    (message,) = told(chat([{"role": "user", "content": contents}]))
    assert [part["type"] for part in message["content"]] == ["file", "input_audio"]


def test_what_the_assistant_did_in_one_turn_is_one_message():
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]}
    said = {"type": "message", "role": "assistant", "content": "I look."}
    other = {**CALL, "call_id": "c2"}
    items = [USER, thought, said, CALL, other, RESULT, {**RESULT, "call_id": "c2"}]
    assert told(chat(items))[1:] == [
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {
                    "id": each,
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"a":1}'},
                }
                for each in ("c1", "c2")
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
        {"role": "tool", "tool_call_id": "c2", "content": "done"},
    ]


def test_a_thought_after_a_text_begins_another_turn_and_one_between_calls_does_not():
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
    said = {"role": "assistant", "content": "A"}
    assert [each.get("content") for each in told(chat([said, thought, said]))] == ["A", "A"]
    (turn,) = told(chat([CALL, thought, {**CALL, "call_id": "c2"}]))
    assert len(turn["tool_calls"]) == 2
    assert turn["reasoning_content"] == "Hm."


@pytest.mark.parametrize(
    ("item", "thought"),
    [
        ({"content": [{"type": "reasoning_text", "text": "a"}], "encrypted_content": "x"}, "a"),
        ({"encrypted_content": pack_reasoning("ö"), "summary": []}, "ö"),
        ({"encrypted_content": "gAAAA", "summary": [{"type": "summary_text", "text": "s"}]}, "s"),
        ({"encrypted_content": "cortex:?", "summary": []}, None),
        ({"encrypted_content": "gAAAA", "content": None}, None),
    ],
)
def test_a_thought_is_read_from_where_it_is(item: dict[str, Any], thought: str | None):
    (turn,) = told(chat([{"type": "reasoning", **item}, {"role": "assistant", "content": "A"}]))
    assert turn.get("reasoning_content") == thought


def test_custom_calls_and_calls_in_a_namespace_are_told_by_the_models_names():
    items = [
        {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": "x\n"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "ok"},
        {**CALL, "namespace": "mcp", "arguments": {"a": 1}},
    ]
    first, result, second = told(chat(items))
    assert first["tool_calls"][0]["function"] == {"name": "patch", "arguments": '{"input":"x\\n"}'}
    assert result == {"role": "tool", "tool_call_id": "c1", "content": "ok"}
    assert second["tool_calls"][0]["function"] == {"name": "mcp__f", "arguments": '{"a":1}'}


def test_images_in_a_result_follow_the_results_as_the_users():
    output = [
        {"type": "input_text", "text": "see"},
        {"type": "input_image", "image_url": "data:image/png;base64,AA"},
    ]
    items = [CALL, {**RESULT, "output": output}, {**RESULT, "call_id": "c2"}, USER]
    result, other, images, user = told(chat(items))[1:]
    assert result["content"] == "see"
    assert other["role"] == "tool"
    assert [part["type"] for part in images["content"]] == ["image_url"]
    assert user["content"] == "Hi"


@pytest.mark.parametrize(
    ("output", "text"), [(None, ""), ({"a": 1}, '{"a":1}'), ([1], "[1]"), ([], "")]
)
def test_a_result_that_is_no_text_goes_on_as_its_json(output: object, text: str):
    assert told(chat([CALL, {**RESULT, "output": output}]))[1]["content"] == text


def test_what_the_vendors_own_tools_did_is_left_out():
    items = [USER, {"type": "web_search_call", "id": "ws_1", "status": "completed"}, USER]
    assert len(told(chat(items))) == 2


def test_tools_among_the_items_are_offered_too():
    tool = {"type": "function", "name": "look", "parameters": {"type": "object"}}
    items = [{"type": "additional_tools", "role": "developer", "tools": [tool]}, USER]
    assert chat(items).tools[0].function.name == "look"


@pytest.mark.parametrize(
    ("item", "words", "param"),
    [
        ({"type": "computer_call"}, "type 'computer_call'", "input[0].type"),
        ({"type": "message", "role": "user"}, "needs content", "input[0].content"),
        ({"role": "odd", "content": "x"}, "role is user", "input[0].role"),
        ({"type": "function_call", "name": "f"}, "name and call_id", "input[0]"),
        ({"type": "function_call_output", "output": "x"}, "needs a call_id", "input[0]"),
        (
            {"role": "user", "content": [{"type": "odd"}]},
            "type 'odd' is not known",
            "input[0].content[0].type",
        ),
        (
            {"role": "user", "content": [{"type": "input_text"}]},
            "needs a text",
            "input[0].content[0].type",
        ),
        (
            {"role": "user", "content": [{"type": "input_image", "file_id": "file_1"}]},
            "stored files are not available",
            "input[0].content[0].image_url",
        ),
    ],
)
def test_an_item_that_cannot_be_told_is_refused(item: dict[str, Any], words: str, param: str):
    with pytest.raises(BadRequestError, match=words) as caught:
        chat([item])
    assert caught.value.param == param


def test_an_input_of_nothing_to_say_is_refused():
    with pytest.raises(BadRequestError, match="input must hold at least one"):
        chat([{"type": "web_search_call"}])


def test_fields_are_mapped():
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    request = chat(
        max_output_tokens=9,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop=["x"],
        tools=[tool],
        parallel_tool_calls=False,
        tool_choice="required",
        reasoning={"effort": "low"},
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        stream=True,
        user="u",
    )
    assert (request.max_completion_tokens, request.temperature, request.top_p) == (9, 0.5, 0.9)
    assert (request.seed, request.stops, request.user) == (3, ("x",), "u")
    assert (request.parallel_tool_calls, request.tool_choice) == (False, "required")
    assert request.reasoning_effort == "low"
    assert (request.logprobs, request.top_logprobs) == (True, 2)
    assert (request.stream, request.include_usage) == (True, True)


def test_the_form_of_a_text_is_mapped():
    schema = {"type": "object", "properties": {}}
    wanted = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    request = chat(text={"format": wanted, "verbosity": "low"})
    assert request.verbosity == "low"
    form = request.response_format
    assert (form.type, form.json_schema.schema) == ("json_schema", schema)
    assert (form.json_schema.name, form.json_schema.strict) == ("n", True)
    assert chat(text={"format": {"type": "json_object"}}).response_format.type == "json_object"
    assert chat(text={"format": {"type": "text"}}).response_format is None
