from typing import Any

import msgspec
import pytest

from cortex.core.errors import BadRequestError, MalformedJsonError, UnsupportedFieldError
from cortex.core.responses import (
    parse_items,
    parse_request,
    parse_tools,
)


def parse(**fields: Any) -> Any:
    return parse_request(msgspec.json.encode({"model": "m", "input": "Hi", **fields}))


def raws(*values: object) -> list[msgspec.Raw]:
    return [msgspec.Raw(msgspec.json.encode(value)) for value in values]


def test_unknown_fields_items_and_contents_decode():
    request = parse(odd=1, input=[{"type": "odd", "x": [1]}, {"role": "user", "content": []}])
    assert [item.kind for item in parse_items(request.input)] == ["odd", "message"]


def test_an_item_of_nothing_but_an_id_is_a_reference():
    (item,) = parse_items(raws({"id": "msg_1"}))
    assert item.kind == "item_reference"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"moderation": {"model": "x"}}, "moderation"),
    ],
)
def test_what_only_another_service_can_do_is_refused_by_name(fields: dict[str, Any], param: str):
    with pytest.raises(UnsupportedFieldError, match=param) as caught:
        parse(**fields)
    assert caught.value.param == param


def test_what_is_switched_off_is_not_refused():
    assert parse(background=False, conversation=None).background is False


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"temperature": 3}, "temperature"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"metadata": {"k": "v" * 513}}, "metadata[...]"),
        ({"truncation": "odd"}, "truncation"),
        ({"tool_choice": "odd"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ],
)
def test_a_field_that_is_out_of_bounds_is_named(fields: dict[str, Any], param: str):
    with pytest.raises(BadRequestError) as caught:
        parse(**fields)
    assert caught.value.param == param


def test_no_input_is_needed_to_go_on_from_a_response():
    assert parse(input=None, previous_response_id="resp_1").input is None


def test_an_item_or_a_tool_that_cannot_be_read_is_named_by_its_place():
    with pytest.raises(BadRequestError) as caught:
        parse_items(raws({"role": "user", "content": "a"}, {"role": "user", "content": 3}))
    assert caught.value.param == "input[1].content"
    with pytest.raises(BadRequestError) as caught:
        parse_tools(raws({"type": "function"}))
    assert caught.value.param == "tools[0].name"


def test_half_of_a_surrogate_pair_in_an_item_is_read_as_the_replacement_character():
    (item,) = parse_items([msgspec.Raw(b'{"role":"user","content":"a\\ud83d"}')])
    assert item.content == "a\ufffd"


def test_responses_are_kept_unless_the_request_says_no():
    assert [parse(store=each).wants_store for each in (None, True, False)] == [True, True, False]


def test_bytes_that_are_no_text_are_refused_wherever_they_are():
    tool = b'{"x": "c\xfface", "type": "function", "name": "n"}'
    with pytest.raises(MalformedJsonError, match="not valid UTF-8"):
        parse_request(b'{"model": "m", "input": "x", "tools": [' + tool + b"]}")
