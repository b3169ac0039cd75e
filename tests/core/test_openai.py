"""The OpenAI wire structs: what is accepted, what is refused and how, what goes out."""

import json
from typing import Any

import msgspec
import pytest

from cortex.core.errors import (
    BadRequestError,
    ContextLengthExceededError,
    CortexError,
    EngineDiedError,
    MalformedJsonError,
    MissingModelError,
    UnsupportedFieldError,
)
from cortex.core.neuron_api import Cost, Limit
from cortex.core.openai import (
    KEEPALIVE,
    SSE_DONE,
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    FunctionCall,
    ModelCard,
    ModelList,
    ModelLocation,
    TextPart,
    ToolCall,
    Usage,
    error_body,
    error_event,
    parse_chat_request,
    parse_error,
    parse_head,
    sse_event,
)
from cortex.core.tool_choice import AllowedToolsChoice, NamedToolChoice

ASK = [{"role": "user", "content": "Hi"}]


def parse(**fields: Any) -> ChatRequest:
    return parse_chat_request(json.dumps({"model": "m", "messages": ASK, **fields}).encode())


def refusal(body: bytes) -> BadRequestError:
    with pytest.raises(BadRequestError) as caught:
        parse_chat_request(body)
    return caught.value


def encoded(struct: msgspec.Struct) -> Any:
    return json.loads(msgspec.json.encode(struct))


def test_unknown_fields_are_ignored() -> None:
    request = parse(
        prompt_cache_key="k",
        messages=[{"role": "user", "content": "Hi", "cache_control": {"type": "ephemeral"}}],
    )
    assert request.messages[0].content == "Hi"


@pytest.mark.parametrize(
    "field",
    [
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "n",
        "stop",
        "seed",
        "tools",
        "tool_choice",
        "response_format",
        "logit_bias",
        "logprobs",
        "metadata",
        "chat_template_kwargs",
    ],
)
def test_null_equals_absent(field: str) -> None:
    assert not getattr(parse(**{field: None}), field)


def test_content_may_be_text_or_parts_or_null() -> None:
    request = parse(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "done"},
        ]
    )
    assert request.messages[0].content == [TextPart(text="a")]
    assert request.messages[1].tool_calls == [
        ToolCall(id="1", function=FunctionCall(name="f", arguments="{}"))
    ]
    assert request.messages[2].tool_call_id == "1"


def test_images_sound_and_files_are_well_formed_requests() -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": "data:..."}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "x"}},
    ]
    content = parse(messages=[{"role": "user", "content": parts}]).messages[0].content
    assert [type(part).__name__ for part in content or ()] == ["ImagePart", "AudioPart", "FilePart"]


def test_reasoning_of_a_turn_comes_under_either_name() -> None:
    request = parse(
        messages=[
            {"role": "assistant", "content": "a", "reasoning": "one"},
            {"role": "assistant", "content": "b", "reasoning_content": "two"},
        ]
    )
    assert [message.thinking for message in request.messages] == ["one", "two"]


def test_tool_choice_may_name_a_function() -> None:
    choice = {"type": "function", "function": {"name": "f"}}
    request = parse(tool_choice=choice, tools=[{"type": "function", "function": {"name": "f"}}])
    assert isinstance(request.tool_choice, NamedToolChoice)
    assert request.tool_choice.function.name == "f"


def test_tool_choice_may_allow_some_of_the_tools() -> None:
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "required",
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
    }
    request = parse(tool_choice=choice, tools=[{"type": "function", "function": {"name": "f"}}])
    assert isinstance(request.tool_choice, AllowedToolsChoice)
    assert request.tool_choice.allowed_tools.mode == "required"
    (allowed,) = request.tool_choice.allowed_tools.tools
    assert allowed.function is not None
    assert allowed.function.name == "f"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice"),
    ],
)
def test_what_no_model_here_can_do_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        parse(**fields)
    assert caught.value.param == param
    assert caught.value.status == 400
    assert param in caught.value.message


def test_fields_that_ask_for_nothing_here_are_taken() -> None:
    request = parse(
        functions=[],
        function_call="none",
        modalities=["text"],
        prediction={"type": "content", "content": "x"},
        store=True,
        metadata={"a": "b"},
        service_tier="flex",
        user="u",
        safety_identifier="s",
        stream_options={"include_obfuscation": False},
    )
    assert (request.store, request.service_tier, request.user) == (True, "flex", "u")


def test_usage_is_wanted_only_when_stream_options_says_so() -> None:
    assert not parse(stream=True).include_usage
    assert not parse(stream=True, stream_options={}).include_usage
    assert parse(stream=True, stream_options={"include_usage": True}).include_usage


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("max_tokens", 0),
        ("max_completion_tokens", 1.5),
        ("n", 0),
        ("n", 9),
        ("top_logprobs", 21),
        ("stop", ["x"] * 17),
        ("stop", [1]),
        ("logit_bias", {"5": 101}),
        ("stream", "yes"),
        ("tools", {}),
        ("tool_choice", "sometimes"),
        ("tool_choice", {"type": "function", "function": {"name": ""}}),
        ("tool_choice", {"type": "allowed_tools", "allowed_tools": {"tools": []}}),
        ("tool_choice", {"type": "odd"}),
        ("reasoning_effort", 3),
        ("verbosity", 3),
        ("presence_penalty", 2.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 5e-324),
        ("seed", 1 << 64),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    body = json.dumps({"model": "m", "messages": ASK, field: value}).encode()
    error = refusal(body)
    assert error.status == 400
    assert error.code == "invalid_request"
    assert error.param is not None
    assert error.param.startswith(field)
    assert field in error.message


def test_a_nested_fault_is_named_by_its_path() -> None:
    error = refusal(b'{"model":"m","messages":[{"role":"user","content":[{"type":"smell"}]}]}')
    assert error.param == "messages[0].content[0].type"
    assert "smell" in error.message


def test_logit_bias_with_a_word_as_key_is_refused_at_that_field() -> None:
    error = refusal(b'{"model":"m","messages":[{"role":"user"}],"logit_bias":{"a":1}}')
    assert error.param == "logit_bias"


def test_empty_messages_are_refused() -> None:
    error = refusal(b'{"model":"m","messages":[]}')
    assert error.message == "invalid request: messages must hold at least one message"
    assert error.param == "messages"


def test_missing_messages_are_refused() -> None:
    error = refusal(b'{"model":"m"}')
    assert error.param == "messages"
    assert "`messages` is missing" in error.message


def test_a_request_without_model_has_its_own_code() -> None:
    error = refusal(b'{"messages":[{"role":"user","content":"Hi"}]}')
    assert isinstance(error, MissingModelError)
    assert error.code == "missing_model_field"


def test_top_logprobs_alone_is_refused() -> None:
    error = refusal(json.dumps({"model": "m", "messages": ASK, "top_logprobs": 2}).encode())
    assert error.param == "top_logprobs"


def test_required_tool_choice_without_tools_is_refused() -> None:
    error = refusal(json.dumps({"model": "m", "messages": ASK, "tool_choice": "required"}).encode())
    assert error.param == "tool_choice"


def test_a_json_schema_format_without_a_schema_is_refused() -> None:
    with pytest.raises(BadRequestError, match=r"json_schema\.schema"):
        parse(response_format={"type": "json_schema"})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"model": "\xff"}',
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=["empty", "cut", "word", "not-utf8", "deep"],
)
def test_what_is_not_json_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedJsonError):
        parse_chat_request(body)
    with pytest.raises(MalformedJsonError):
        parse_head(body)


def test_a_list_is_json_but_no_request() -> None:
    assert refusal(b"[]").message == "invalid request: Expected `object`, got `array`"


def test_the_head_reads_only_what_routing_needs() -> None:
    head = parse_head(b'{"messages":17,"model":"a/b","stream":true,"stream_options":{"x":1}}')
    assert (head.model, head.stream) == ("a/b", True)
    assert parse_head(b"{}").model is None
    assert not parse_head(b'{"model":"m","stream":null}').stream


def test_a_chunk_always_has_choices_delta_and_finish_reason() -> None:
    chunk = ChatCompletionChunk(id="c", created=7, model="m", choices=[ChunkChoice()])
    assert encoded(chunk) == {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": "m",
        "choices": [{"index": 0, "delta": {}, "finish_reason": None}],
    }


def test_a_role_chunk_keeps_its_empty_content() -> None:
    choice = ChunkChoice(delta=Delta(role="assistant", content=""))
    assert encoded(choice)["delta"] == {"role": "assistant", "content": ""}


def test_the_usage_chunk_has_no_choices() -> None:
    usage = Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7)
    chunk = encoded(ChatCompletionChunk(id="c", created=7, model="m", choices=[], usage=usage))
    assert chunk["choices"] == []
    assert chunk["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_a_completion_of_tool_calls_has_null_content() -> None:
    call = ToolCall(id="call_1", function=FunctionCall(name="f", arguments='{"a":1}'))
    completion = ChatCompletion(
        id="c",
        created=7,
        model="m",
        choices=[Choice(message=AssistantMessage(tool_calls=[call]), finish_reason="tool_calls")],
    )
    assert encoded(completion)["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"a":1}'},
                    }
                ],
            },
            "finish_reason": "tool_calls",
        }
    ]


def test_chunks_of_other_engines_decode() -> None:
    chunk = msgspec.json.decode(
        b'{"id":"x","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,'
        b'"delta":{"role":"assistant","reasoning":"hm","tool_calls":null},"logprobs":null}],"usage":null}',
        type=ChatCompletionChunk,
    )
    assert chunk.choices[0].delta.reasoning == "hm"
    assert chunk.choices[0].finish_reason is None


def test_a_model_card_leaves_out_what_is_unknown() -> None:
    assert encoded(ModelCard(id="m")) == {
        "id": "m",
        "object": "model",
        "created": 0,
        "owned_by": "cortex",
        "loaded": False,
        "feasible_on": [],
        "locations": [],
        "capabilities": [],
    }


def test_a_model_card_says_what_is_known() -> None:
    card = ModelCard(
        id="m",
        created=9,
        loaded=True,
        status="loaded",
        locations=[ModelLocation(node="n", status="loaded", vram_estimate_mb=12)],
        capabilities=["text"],
        limit=Limit(context=8192, output=1024),
        cost=Cost(input=0.0, output=0.5),
        tool_call=False,
        max_model_len=8192,
    )
    listed = encoded(ModelList(data=[card]))
    assert listed["object"] == "list"
    entry = listed["data"][0]
    assert entry["locations"] == [{"node": "n", "status": "loaded", "vram_estimate_mb": 12}]
    assert entry["limit"] == {"context": 8192, "output": 1024}
    assert entry["cost"] == {"input": 0.0, "output": 0.5}
    assert entry["tool_call"] is False
    assert "reasoning" not in entry


def test_an_error_carries_its_extras_inside() -> None:
    error = ContextLengthExceededError(
        "too long", param="messages", extras={"max": 10, "prompt_len": 12, "code": "ignored"}
    )
    assert json.loads(error_body(error)) == {
        "error": {
            "message": "too long",
            "type": "invalid_request_error",
            "code": "context_length_exceeded",
            "param": "messages",
            "max": 10,
            "prompt_len": 12,
        }
    }


def test_an_error_survives_the_way_through_another_process() -> None:
    sent = ContextLengthExceededError("too long", param="messages", extras={"max": 10})
    got = parse_error(400, error_body(sent), retry_after_s=3.0)
    assert isinstance(got, CortexError)
    assert (got.status, got.code, got.kind) == (
        400,
        "context_length_exceeded",
        "invalid_request_error",
    )
    assert (got.message, got.param, got.extras, got.retry_after_s) == (
        "too long",
        "messages",
        {"max": 10},
        3.0,
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>Bad gateway</html>", "status 502: <html>Bad gateway</html>"),
        (b"", "status 502 without a message"),
        (b'{"error": "flat"}', 'status 502: {"error": "flat"}'),
        (b"[]", "status 502: []"),
    ],
)
def test_an_answer_without_the_envelope_is_quoted(body: bytes, message: str) -> None:
    error = parse_error(502, body)
    assert (error.message, error.code, error.status) == (message, "upstream_error", 502)


def test_a_numeric_code_of_another_engine_becomes_text() -> None:
    error = parse_error(400, b'{"error":{"message":"no","type":"BadRequestError","code":400}}')
    assert (error.code, error.kind) == ("400", "BadRequestError")


def test_events_are_framed() -> None:
    assert sse_event(b'{"a":1}') == b'data: {"a":1}\n\n'
    assert sse_event(Delta(content="x")) == b'data: {"content":"x"}\n\n'
    assert SSE_DONE == b"data: [DONE]\n\n"
    assert KEEPALIVE.startswith(b":")


def test_the_error_event_carries_the_envelope() -> None:
    event = error_event(EngineDiedError("the engine ended"))
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert json.loads(event[6:])["error"]["code"] == "engine_died"
