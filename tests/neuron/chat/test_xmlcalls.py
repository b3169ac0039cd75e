"""Tool call blocks to calls, and values cast by the declared schema."""

import json
from typing import Any

import pytest

from cortex.neuron.chat.schema import ToolTable, cast, json_types
from tests.support.chat_models import WEATHER, parse_call, tool, tools

TABLE = ToolTable(
    tools(WEATHER, tool("weather_map"), tool("odd>name", {"properties": {"a>b": {}}}))
)


def arguments(body: str, *, is_closed: bool = True) -> Any:
    call = parse_call(body, TABLE, is_closed=is_closed)
    assert call is not None
    return json.loads(call[1])


def xml(name: str, **parameters: str) -> str:
    inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in parameters.items())
    return f"\n<function={name}>\n{inner}</function>\n"


def test_values_are_cast_by_the_declared_schema() -> None:
    body = xml(
        "weather", city="New\nYork", days="3", unit="celsius", detailed="True", areas='["a", "b"]'
    )
    assert arguments(body) == {
        "city": "New\nYork",
        "days": 3,
        "unit": "celsius",
        "detailed": True,
        "areas": ["a", "b"],
    }


def test_a_string_stays_a_string_whatever_it_looks_like() -> None:
    assert arguments(xml("weather", city="12")) == {"city": "12"}
    assert arguments(xml("weather", city="")) == {"city": ""}


def test_a_value_that_does_not_fit_stays_text() -> None:
    assert arguments(xml("weather", days="three", areas="a, b", detailed="maybe")) == {
        "days": "three",
        "areas": "a, b",
        "detailed": "maybe",
    }


def test_an_undeclared_parameter_is_text() -> None:
    assert arguments(xml("weather", colour="5")) == {"colour": "5"}


def test_a_closing_tag_inside_a_value_is_part_of_it() -> None:
    body = xml("weather", city="write </parameter> here\nand </function> there", days="1")
    assert arguments(body) == {"city": "write </parameter> here\nand </function> there", "days": 1}


def test_only_the_newlines_of_the_syntax_are_stripped() -> None:
    assert arguments(xml("weather", city="\n  a\n")) == {"city": "\n  a\n"}


def test_the_longest_declared_name_is_meant() -> None:
    call = parse_call(xml("weather_map"), TABLE)
    assert call == ("weather_map", "{}")


def test_names_with_odd_characters_are_read() -> None:
    call = parse_call("<function=odd>name><parameter=a>b>\nx\n</parameter></function>", TABLE)
    assert call == ("odd>name", '{"a>b":"x"}')


def test_a_block_without_its_inner_end_is_read() -> None:
    assert arguments("<function=weather>\n<parameter=city>\nRome\n</parameter>\n") == {
        "city": "Rome"
    }


def test_json_calls_are_read() -> None:
    assert arguments('\n{"name": "weather", "arguments": {"city": "Rome"}}\n') == {"city": "Rome"}
    assert arguments('{"name": "f", "arguments": "{\\"a\\": 1}"}') == {"a": 1}
    assert arguments('{"name": "f", "parameters": {"a": 1}}') == {"a": 1}
    assert arguments('{"name": "f"}') == {}


@pytest.mark.parametrize(
    "body",
    [
        "",
        "hello",
        "[1]",
        '{"arguments": {}}',
        '{"name": 5}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "oops"}',
        "<function=>\n</function>",
        "<function=weather",
        "<function=weather>\n<parameter=city>\nRome\n</function>",
        "<function=weather>\nRome\n</function>",
        "<function=weather>\n</function>\nand more",
        "<function=a\nb>\n</function>",
    ],
)
def test_what_cannot_be_read_is_no_call(body: str) -> None:
    assert parse_call(body, TABLE) is None


def test_an_unclosed_block_must_hold_a_whole_call() -> None:
    assert arguments(xml("weather", city="Rome"), is_closed=False) == {"city": "Rome"}
    half = "<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
    assert parse_call(half, TABLE, is_closed=False) is None


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "integer"}, 5),
        (" 5\n", {"type": "integer"}, 5),
        ("5.0", {"type": "integer"}, 5),
        ("5.5", {"type": "integer"}, "5.5"),
        ("5", {"type": "number"}, 5),
        ("1e999", {"type": "number"}, "1e999"),
        ("true", {"type": "boolean"}, True),
        ("FALSE", {"type": "boolean"}, False),
        ("1", {"type": "boolean"}, "1"),
        ("null", {"type": ["string", "null"]}, None),
        ("None", {"type": ["integer", "null"]}, None),
        ("null", {"type": "string"}, "null"),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ("[1]", {"type": "object"}, "[1]"),
        ("[1]", {"anyOf": [{"type": "string"}, {"type": "array"}]}, [1]),
        ("[1", {"anyOf": [{"type": "string"}, {"type": "array"}]}, "[1"),
        ("2", {"enum": [1, 2]}, 2),
        ("2", {"enum": ["1", "2"]}, "2"),
        ("x", {"const": "x"}, "x"),
        ("3", {}, 3),
        ("word", {}, "word"),
        ('{"a": 1}', {"properties": {}}, {"a": 1}),
        ("[1]", {"items": {}}, [1]),
        ("7", {"$ref": "#/$defs/n"}, 7),
        ("7", {"$ref": "#/$defs/missing"}, 7),
        ("7", {"$ref": "#/$defs/loop"}, 7),
        ("7", {"oneOf": [{"type": "string"}, {"type": "integer"}]}, "7"),
        ("7", True, 7),
        ("[" * 5000, {"type": "array"}, "[" * 5000),
    ],
)
def test_text_becomes_what_its_schema_allows(text: str, schema: Any, value: Any) -> None:
    root = {"$defs": {"n": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}}
    got = cast(text, schema, root)
    assert got == value
    assert type(got) is type(value)


def test_types_of_a_schema_that_contains_itself_end() -> None:
    root: dict[str, Any] = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}}
    assert json_types({"$ref": "#/$defs/a"}, root) == frozenset()
