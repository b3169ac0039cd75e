from typing import Any

import anthropic as sdk
import msgspec
import pytest

from cortex.core import anthropic, errors
from cortex.core.anthropic import CountTokensRequest, MessagesRequest
from cortex.core.errors import BadRequestError, CortexError, RemoteError
from cortex.core.openai import ModelCard

USER = {"role": "user", "content": "hi"}


def decode(**fields: Any) -> MessagesRequest:
    body = {"model": "m", "max_tokens": 5, "messages": [USER], **fields}
    return msgspec.json.decode(msgspec.json.encode(body), type=MessagesRequest)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.BadRequestError("x"), "invalid_request_error"),
        (errors.AuthenticationError("x"), "authentication_error"),
        (RemoteError("x", status=403, code="no"), "permission_error"),
        (errors.ModelNotFoundError("x"), "not_found_error"),
        (errors.MethodNotAllowedError("x"), "invalid_request_error"),
        (errors.BodyTooLargeError("x"), "request_too_large"),
        (RemoteError("x", status=429, code="slow"), "rate_limit_error"),
        (errors.InternalError("x"), "api_error"),
        (errors.UpstreamConnectionError("x"), "api_error"),
        (errors.QueueFullError("x"), "overloaded_error"),
        (errors.ModelLoadingError("x"), "overloaded_error"),
        (RemoteError("x", status=504, code="late"), "timeout_error"),
    ],
)
def test_an_error_has_the_type_that_goes_with_its_status(error: CortexError, kind: str):
    assert msgspec.json.decode(anthropic.error_body(error)) == {
        "type": "error",
        "error": {"type": kind, "message": "x"},
    }


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"prompt_len": 41570, "max": 8192}, "41570 tokens > 8192 maximum; shorten it"),
        ({}, "the engine's words"),
    ],
)
def test_a_prompt_over_the_window_is_said_in_the_words_that_clients_shorten_it_for(
    extras: dict[str, object], message: str
):
    refusal = RemoteError(
        "the engine's words", status=400, code="context_length_exceeded", extras=extras
    )
    assert msgspec.json.decode(anthropic.error_body(refusal)) == {
        "type": "error",
        "error": {
            "type": "invalid_request_error",
            "message": f"prompt is too long: {message}",
        },
    }


def test_nothing_of_the_other_dialect_is_in_an_error():
    error = errors.ModelLoadingError("x", param="model", extras={"progress": {"phase": "weights"}})
    assert anthropic.error_event(error) == (
        b'event: error\ndata: {"type":"error",'
        b'"error":{"type":"overloaded_error","message":"x"}}\n\n'
    )


def test_a_ping_is_an_event_that_names_its_type():
    assert anthropic.PING == b'event: ping\ndata: {"type": "ping"}\n\n'


def test_models_are_listed_as_one_page_that_the_sdk_reads():
    cards = [
        ModelCard(
            id="a", created=1_790_000_000, max_model_len=4096, max_output_tokens=1024, loaded=True
        ),
        ModelCard(id="b"),
    ]
    page = msgspec.to_builtins(anthropic.model_list(cards))
    assert page == {
        "data": [
            {
                "type": "model",
                "id": "a",
                "display_name": "a",
                "created_at": "2026-09-21T14:13:20Z",
                "lifecycle": "active",
                "max_input_tokens": 4096,
                "max_tokens": 1024,
            },
            {
                "type": "model",
                "id": "b",
                "display_name": "b",
                "created_at": "1970-01-01T00:00:00Z",
                "lifecycle": "active",
                "max_input_tokens": None,
                "max_tokens": None,
            },
        ],
        "has_more": False,
        "first_id": "a",
        "last_id": "b",
    }
    for entry in page["data"]:
        sdk.types.ModelInfo.model_validate(entry)


def page_of(*parameters: tuple[str, str], ids: str = "abcde"):
    query = anthropic.parse_models_query(parameters)
    page = anthropic.model_list([ModelCard(id=each) for each in ids], query)
    assert (page.first_id, page.last_id) == (
        (page.data[0].id, page.data[-1].id) if page.data else (None, None)
    )
    return "".join(each.id for each in page.data), page.has_more


def test_models_are_paged_forwards_and_backwards():
    assert page_of(("limit", "2")) == ("ab", True)
    assert page_of(("limit", "2"), ("after_id", "b")) == ("cd", True)
    assert page_of(("limit", "2"), ("after_id", "d")) == ("e", False)
    assert page_of(("after_id", "e")) == ("", False)
    assert page_of(("limit", "2"), ("before_id", "e")) == ("cd", True)
    assert page_of(("limit", "2"), ("before_id", "c")) == ("ab", False)
    assert page_of(("before_id", "a")) == ("", False)
    assert page_of(("limit", "5"), ("beta", "true")) == ("abcde", False)


def test_a_model_that_has_left_the_list_is_still_a_place_in_it():
    assert page_of(("limit", "2"), ("after_id", "c"), ids="abde") == ("de", False)
    assert page_of(("limit", "1"), ("before_id", "c"), ids="abde") == ("b", True)


def test_all_that_is_listed_is_active():
    assert page_of(("lifecycle[]", "active"), ("lifecycle[]", "retired")) == ("abcde", False)
    assert page_of(("lifecycle", "retired")) == ("", False)


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ([("limit", "0")], "limit"),
        ([("limit", "1001")], "limit"),
        ([("limit", "many")], "limit"),
        ([("after_id", "a"), ("before_id", "b")], "before_id"),
        ([("lifecycle", "unborn")], "lifecycle[0]"),
    ],
)
def test_a_page_that_cannot_be_is_refused_by_name(parameters: list[tuple[str, str]], param: str):
    with pytest.raises(BadRequestError) as caught:
        anthropic.parse_models_query(parameters)
    assert caught.value.param == param


def test_no_models_are_a_page_too():
    assert msgspec.json.encode(anthropic.model_list([])) == (
        b'{"data":[],"has_more":false,"first_id":null,"last_id":null}'
    )


def test_an_answer_is_what_the_sdk_calls_a_message():
    answer = anthropic.MessageResponse(
        id="msg_1",
        model="m",
        content=[
            anthropic.ThinkingBlock(thinking="Hm.", signature="s"),
            anthropic.TextBlock(text="Yes."),
            anthropic.ToolUseBlock(id="t", name="f", input={"a": 1}),
        ],
        stop_reason="tool_use",
        usage=anthropic.Usage(input_tokens=1, output_tokens=2),
    )
    message = sdk.types.Message.model_validate_json(msgspec.json.encode(answer))
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.usage.cache_read_input_tokens == 0
    assert message.stop_reason == "tool_use"


def test_a_request_names_the_field_that_is_missing():
    for name in ("model", "messages", "max_tokens"):
        body = {"model": "m", "max_tokens": 5, "messages": [USER]}
        del body[name]
        with pytest.raises(msgspec.ValidationError, match=f"missing required field `{name}`"):
            msgspec.convert(body, MessagesRequest)


def test_counting_asks_for_no_limit():
    request = msgspec.convert({"model": "m", "messages": [USER]}, CountTokensRequest)
    assert request.messages[0].content == "hi"


def test_what_is_not_known_is_taken():
    request = decode(
        betas=["x-2030-01-01"],
        container=None,
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "high", "later": 1},
        service_tier="auto",
        thinking={"type": "adaptive", "display": "summarized"},
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "from_the_future", "flux": [1, {"a": None}], "text": None},
                    {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}},
                ],
            }
        ],
    )
    assert request.thinking is not None
    assert request.thinking.type == "adaptive"
    content = request.messages[0].content
    assert isinstance(content, list)
    assert [block.type for block in content] == ["from_the_future", "text"]


def test_null_is_the_same_as_absent():
    names = ["system", "tools", "tool_choice", "thinking", "stream", "temperature", "top_p"]
    names += ["top_k", "stop_sequences", "metadata", "output_config"]
    request = decode(**dict.fromkeys(names))
    assert not request.stream
    assert request.tools is None
