from typing import Any

import msgspec
import pytest

from cortex.core.anthropic import CountTokensRequest, MessagesRequest
from cortex.core.errors import BadRequestError, UnsupportedFieldError, UpstreamMalformedError
from cortex.core.openai import ChatCompletion, PromptTokensDetails, Usage, parse_chat_request
from cortex.core.translate import from_openai, to_openai, usage_of

USER = {"role": "user", "content": "hi"}


def translated(**fields: Any) -> dict[str, Any]:
    """Translate a request body and return the JSON a node would get."""
    body = {"model": "m", "max_tokens": 5, "messages": [USER], **fields}
    request = msgspec.json.decode(msgspec.json.encode(body), type=MessagesRequest)
    encoded = msgspec.json.encode(to_openai(request))
    parse_chat_request(encoded)
    return msgspec.json.decode(encoded)


def messages(*turns: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return translated(messages=list(turns), **fields)["messages"]


def test_the_plain_fields_are_carried_over():
    chat = translated(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        stop_sequences=["END"],
        metadata={"user_id": "u"},
        stream=True,
    )
    assert (chat["model"], chat["max_tokens"]) == ("m", 5)
    assert (chat["temperature"], chat["top_p"], chat["top_k"]) == (0.5, 0.9, 7)
    assert (chat["stop"], chat["user"]) == (["END"], "u")
    assert (chat["stream"], chat["stream_options"]) == (True, {"include_usage": True})


def test_system_text_of_all_places_becomes_one_leading_message():
    assert messages(
        USER,
        {"role": "system", "content": "late"},
        system=[{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
    ) == [{"role": "system", "content": "one\ntwo\n\nlate"}, USER]


@pytest.mark.parametrize(
    "system",
    [
        [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1"},
            {"type": "text", "text": "Be kind."},
        ],
        "x-anthropic-billing-header: cc_version=1\nBe kind.",
    ],
)
def test_the_billing_header_is_dropped_unless_it_is_to_be_kept(system: Any):
    assert messages(USER, system=system)[0] == {"role": "system", "content": "Be kind."}
    request = msgspec.convert(
        {"model": "m", "messages": [USER], "system": system}, CountTokensRequest
    )
    kept = to_openai(request, drop_billing_header=False).messages[0].content
    assert "x-anthropic-billing-header" in kept


def test_tool_results_come_before_the_rest_of_their_turn():
    turn = {
        "role": "user",
        "content": [
            {"type": "text", "text": "And now?"},
            {"type": "tool_result", "tool_use_id": "t1", "content": "18 degrees"},
            {
                "type": "tool_result",
                "tool_use_id": "t2",
                "is_error": True,
                "content": [{"type": "text", "text": "no such city"}],
            },
        ],
    }
    assert messages(USER, turn)[1:] == [
        {"role": "tool", "tool_call_id": "t1", "content": "18 degrees"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no such city"},
        {"role": "user", "content": "And now?"},
    ]


def test_an_assistant_turn_keeps_thoughts_text_and_calls_apart():
    turn = {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "s"},
            {"type": "redacted_thinking", "data": "zzz"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": "it"}},
        ],
    }
    (message,) = messages(USER, turn)[1:]
    assert message["content"] == "I look."
    assert message["reasoning_content"] == "Hm."
    (call,) = message["tool_calls"]
    assert call["id"] == "t1"
    assert call["function"] == {"name": "look", "arguments": '{"at":"it"}'}


def test_images_become_image_parts_also_out_of_tool_results():
    image = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/jpeg", "data": "QUJD"},
    }
    result = {"type": "tool_result", "tool_use_id": "t", "content": [image]}
    part = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,QUJD"}}
    assert messages({"role": "user", "content": [image]})[0]["content"] == [part]
    assert messages({"role": "user", "content": [result]})[1]["content"] == [part]


def test_a_text_document_is_read_and_unknown_blocks_count_by_their_text():
    content = [
        {
            "type": "document",
            "title": "T",
            "context": "of 2020",
            "citations": {"enabled": True},
            "source": {"type": "text", "media_type": "text/plain", "data": "body"},
        },
        {"type": "search_result", "content": [{"type": "text", "text": "found"}]},
        {"type": "from_the_future", "flux": 3, "text": "later"},
    ]
    told = messages({"role": "user", "content": content})[0]["content"]
    assert told == "T\nof 2020\nbody\nfound\nlater"


def test_a_document_of_blocks_or_of_text_in_base64_is_read():
    inner = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    blocks = {"type": "document", "title": "T", "source": {"type": "content", "content": inner}}
    assert messages({"role": "user", "content": [blocks]})[0]["content"] == "T\none\ntwo"
    source = {"type": "base64", "media_type": "text/csv", "data": "YSxi"}
    table = {"type": "document", "source": source}
    assert messages({"role": "user", "content": [table]})[0]["content"] == "a,b"
    source["data"] = "/w=="
    with pytest.raises(BadRequestError, match="not text in UTF-8"):
        messages({"role": "user", "content": [table]})


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            {"type": "base64", "media_type": "application/pdf", "data": "QUJD"},
            "type 'base64' and application/pdf here; send its text",
        ),
        ({"type": "url", "url": "https://example.org/a.pdf"}, "type 'url' here"),
        ({"type": "file", "file_id": "f1"}, "type 'file' here"),
    ],
)
def test_a_document_that_is_no_text_is_refused_by_its_place(source: Any, words: str):
    document = {"type": "document", "title": "T", "source": source}
    with pytest.raises(UnsupportedFieldError, match=words) as caught:
        messages({"role": "user", "content": [document]})
    assert caught.value.param == "messages[0].content[0].source"
    result = {"type": "tool_result", "tool_use_id": "t", "content": [document]}
    with pytest.raises(UnsupportedFieldError, match=words) as caught:
        messages({"role": "user", "content": [result]})
    assert caught.value.param == "messages[0].content[0].content[0].source"


def test_blocks_of_the_vendors_own_tools_are_taken():
    turns = messages(
        {
            "role": "assistant",
            "content": [
                {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"q": "x"}},
                {
                    "type": "web_search_tool_result",
                    "tool_use_id": "s",
                    "content": {"type": "web_search_tool_result_error", "error_code": "busy"},
                },
                {"type": "text", "text": "No luck.", "citations": None},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "search_result",
                    "source": "https://example.org",
                    "title": "T",
                    "content": [{"type": "text", "text": "found"}],
                }
            ],
        },
    )
    assert turns == [
        {"role": "assistant", "content": "No luck."},
        {"role": "user", "content": "found"},
    ]


@pytest.mark.parametrize(
    "source", [None, {"type": "file", "file_id": "f1"}, {"type": "base64"}, "stored"]
)
def test_an_image_that_is_not_there_is_refused(source: Any):
    with pytest.raises(BadRequestError, match="an image needs a source"):
        messages({"role": "user", "content": [{"type": "image", "source": source}]})


def test_a_custom_tool_may_lack_a_schema_and_a_search_for_tools_finds_all():
    search = {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"}
    chat = translated(tools=[{"type": "custom", "name": "now", "defer_loading": True}, search])
    assert [tool["function"] for tool in chat["tools"]] == [
        {"name": "now", "parameters": {"type": "object"}}
    ]


def test_a_wanted_output_schema_becomes_the_response_format():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    chat = translated(output_config={"format": {"type": "json_schema", "schema": schema}})
    assert chat["response_format"]["type"] == "json_schema"
    assert chat["response_format"]["json_schema"]["schema"] == schema
    older = translated(output_format={"type": "json_schema", "schema": schema})
    assert older["response_format"] == chat["response_format"]
    assert translated(output_config={"effort": "low"})["response_format"] is None


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 2},
        {"type": "bash_20250124", "name": "bash"},
        {"type": "mcp_toolset", "mcp_server_name": "s"},
    ],
)
def test_the_vendors_own_tools_are_refused_by_type_and_place(tool: dict[str, Any]):
    with pytest.raises(UnsupportedFieldError, match=f"type '{tool['type']}'") as caught:
        translated(tools=[{"name": "look"}, tool])
    assert caught.value.param == "tools[1].type"
    (kept,) = translated(tools=[{**tool, "name": "mine", "input_schema": {}}])["tools"]
    assert kept["function"]["name"] == "mine"


@pytest.mark.parametrize(
    ("field", "value"),
    [("mcp_servers", [{"type": "url", "url": "https://x", "name": "s"}]), ("container", "c1")],
)
def test_what_only_the_vendor_can_do_is_refused_by_name(field: str, value: Any):
    with pytest.raises(UnsupportedFieldError, match=field) as caught:
        translated(**{field: value})
    assert caught.value.param == field
    assert translated(mcp_servers=[], container=None)["model"] == "m"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "f"}])
def test_a_choice_that_wants_a_tool_needs_one(choice: dict[str, Any]):
    with pytest.raises(BadRequestError, match="needs at least one tool") as caught:
        translated(tool_choice=choice)
    assert caught.value.param == "tool_choice"
    assert translated(tool_choice={"type": "auto"})["tool_choice"] is None


def test_tools_and_their_choice_are_carried_over():
    tools = [{"name": "look", "description": "d", "input_schema": {"type": "object"}}]
    chat = translated(tools=tools, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    (tool,) = chat["tools"]
    assert tool["type"] == "function"
    assert tool["function"]["name"] == "look"
    assert tool["function"]["parameters"] == {"type": "object"}
    assert (chat["tool_choice"], chat["parallel_tool_calls"]) == ("required", False)
    named = translated(tools=tools, tool_choice={"type": "tool", "name": "look"})
    assert named["tool_choice"] == {"type": "function", "function": {"name": "look"}}
    assert translated(tools=tools, tool_choice={"type": "none"})["tool_choice"] == "none"


@pytest.mark.parametrize(
    ("thinking", "wanted"),
    [
        (None, False),
        ({"type": "disabled"}, False),
        ({"type": "adaptive"}, True),
        ({"type": "enabled", "budget_tokens": 1024}, True),
    ],
)
def test_thinking_is_switched_as_asked(thinking: Any, wanted: bool):
    told = translated(thinking=thinking)["chat_template_kwargs"]
    assert told["enable_thinking"] is wanted


def test_the_template_is_told_a_budget_of_thinking_and_an_effort():
    chat = translated(
        thinking={"type": "enabled", "budget_tokens": 1024}, output_config={"effort": "max"}
    )
    assert chat["thinking_budget"] == 1024
    assert chat["chat_template_kwargs"] == {
        "enable_thinking": True,
        "thinking_budget": 1024,
        "reasoning_effort": "high",
    }
    off = translated(
        thinking={"type": "disabled", "budget_tokens": 9}, output_config={"effort": "low"}
    )
    assert off["thinking_budget"] is None
    assert off["chat_template_kwargs"] == {"enable_thinking": False, "reasoning_effort": "low"}


def test_what_a_coding_agent_sends_by_default_is_taken():
    chat = translated(
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=1f;"},
            {"type": "text", "text": "You code.", "cache_control": {"type": "ephemeral"}},
        ],
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": "hi", "cache_control": {"type": "x"}}],
            },
            {"role": "system", "content": "It is Monday."},
        ],
        thinking={"type": "adaptive"},
        output_config={"effort": "high"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        metadata={"user_id": '{"device_id": "x"}'},
        max_tokens=32000,
        stream=True,
    )
    assert chat["messages"] == [
        {"role": "system", "content": "You code.\n\nIt is Monday."},
        {"role": "user", "content": "hi"},
    ]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tool_choice": {"type": "tool"}}, "name"),
        ({"tools": [{"description": "d"}]}, "name"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "schema"),
        ({"max_tokens": None}, "max_tokens"),
        ({"system": 4}, "system"),
    ],
)
def test_a_bad_request_does_not_decode(fields: dict[str, Any], word: str):
    with pytest.raises(msgspec.ValidationError, match=word):
        translated(**fields)


@pytest.mark.parametrize(
    "block",
    [{"type": "tool_result", "content": "x"}, {"type": "tool_use", "id": "1", "input": {}}],
)
def test_a_block_without_what_it_needs_is_refused(block: dict[str, Any]):
    role = "user" if block["type"] == "tool_result" else "assistant"
    with pytest.raises(BadRequestError, match="needs a"):
        messages(USER, {"role": role, "content": [block]})


def completion(**message: Any) -> ChatCompletion:
    body = {
        "id": "chatcmpl-9",
        "created": 1,
        "model": "x",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 3,
            "total_tokens": 13,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }
    return msgspec.convert(body, ChatCompletion)


def test_an_answer_becomes_thinking_text_and_tool_blocks():
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}]
    reply = from_openai(completion(content="Yes.", reasoning_content="Hm.", tool_calls=calls), "m")
    assert msgspec.to_builtins(reply.content) == [
        {"type": "thinking", "thinking": "Hm.", "signature": "Y29ydGV4"},
        {"type": "text", "text": "Yes."},
        {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
    ]
    assert (reply.id, reply.model, reply.role) == ("msg_9", "m", "assistant")
    assert reply.usage.input_tokens == 6
    assert reply.usage.cache_read_input_tokens == 4
    assert reply.usage.output_tokens == 3


@pytest.mark.parametrize(
    ("finish", "stop", "wanted"),
    [
        ("stop", None, "end_turn"),
        ("stop", "END", "stop_sequence"),
        ("length", None, "max_tokens"),
        ("tool_calls", None, "end_turn"),
        ("content_filter", None, "refusal"),
        ("something_new", None, "end_turn"),
        (None, None, "end_turn"),
    ],
)
def test_the_reason_of_the_end_is_translated(finish: str | None, stop: str | None, wanted: str):
    answer = completion(content="x")
    choice = msgspec.structs.replace(answer.choices[0], finish_reason=finish, stop_reason=stop)
    reply = from_openai(msgspec.structs.replace(answer, choices=[choice]), "m")
    assert (reply.stop_reason, reply.stop_sequence) == (wanted, stop)


@pytest.mark.parametrize(
    ("finish", "wanted"),
    [("tool_calls", "tool_use"), ("stop", "tool_use"), ("length", "max_tokens")],
)
def test_an_answer_with_calls_ends_for_tool_use_unless_it_was_cut(finish: str, wanted: str):
    answer = completion(tool_calls=[{"id": "c", "function": {"name": "f", "arguments": "{}"}}])
    choice = msgspec.structs.replace(answer.choices[0], finish_reason=finish)
    reply = from_openai(msgspec.structs.replace(answer, choices=[choice]), "m")
    assert reply.stop_reason == wanted


def test_the_id_of_a_stop_token_is_no_stop_sequence():
    choice = {"message": {"content": "x"}, "finish_reason": "stop", "stop_reason": 151645}
    answer = msgspec.convert(
        {"id": "1", "created": 1, "model": "x", "choices": [choice]}, ChatCompletion
    )
    reply = from_openai(answer, "m")
    assert (reply.stop_reason, reply.stop_sequence) == ("end_turn", None)


def test_more_cached_than_prompt_tokens_do_not_make_a_negative_count():
    usage = Usage(prompt_tokens=5, prompt_tokens_details=PromptTokensDetails(cached_tokens=9))
    found = usage_of(usage)
    assert (found.input_tokens, found.cache_read_input_tokens) == (0, 5)
    assert usage_of(None).input_tokens == 0


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("", {}),
        (None, {}),
        ({"a": 1}, {"a": 1}),
        ('{"a": 1', {"arguments": '{"a": 1'}),
        ("[1]", {"arguments": [1]}),
    ],
)
def test_arguments_are_always_an_object_and_never_lost(arguments: Any, wanted: dict[str, Any]):
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    (block,) = from_openai(completion(tool_calls=calls), "m").content
    assert block.input == wanted
    assert block.id.startswith("toolu_")


def test_an_answer_without_choices_is_malformed():
    with pytest.raises(UpstreamMalformedError):
        from_openai(msgspec.structs.replace(completion(content=""), choices=[]), "m")


IMAGE_URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}


@pytest.mark.parametrize(
    ("block", "place"),
    [
        (IMAGE_URL, r"messages\[1\]\.content\[1\]: .*'image_url'"),
        (
            {"type": "from_the_future", "flux": 3},
            r"messages\[1\]\.content\[1\]: .*'from_the_future'",
        ),
        ({"type": "document"}, r"messages\[1\]\.content\[1\]: .*'document'"),
        (
            {"type": "tool_result", "tool_use_id": "t", "content": [IMAGE_URL]},
            r"messages\[1\]\.content\[1\]\.content\[0\]: .*'image_url'",
        ),
    ],
)
def test_a_block_that_would_be_lost_is_refused_by_its_type_and_place(block: Any, place: str):
    with pytest.raises(BadRequestError, match=place):
        messages(USER, {"role": "user", "content": [{"type": "text", "text": "x"}, block]})


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_a_text_block_needs_its_text(role: str):
    with pytest.raises(msgspec.ValidationError, match=r"`text` - at `\$.messages"):
        messages(USER, {"role": role, "content": [{"type": "text"}]})


def test_a_system_block_that_is_no_text_is_refused_by_its_type_and_place():
    image = {"type": "image", "source": {"type": "url", "url": "http://x"}}
    with pytest.raises(BadRequestError, match=r"system\[1\]: .*'image'"):
        translated(system=[{"type": "text", "text": "x"}, image])


@pytest.mark.parametrize(
    "block",
    [
        {"type": "redacted_thinking", "data": "x"},
        {"type": "thinking", "thinking": "Hm.", "signature": "x"},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {
            "type": "web_search_tool_result",
            "tool_use_id": "s",
            "content": [{"type": "web_search_result", "url": "http://x", "title": "T"}],
        },
        {"type": "container_upload", "file_id": "f"},
        {"type": "mcp_tool_use", "id": "s", "name": "n", "input": {}},
        {"type": "search_result", "source": "s", "title": "T", "content": []},
        {"type": "text", "text": ""},
    ],
)
def test_known_blocks_that_say_nothing_to_a_model_are_left_out(block: Any):
    content = [block, {"type": "text", "text": "hi"}]
    assert messages({"role": "user", "content": content})[0]["content"] == "hi"
