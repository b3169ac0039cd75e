"""The grammars for tool calls and JSON answers, checked with llguidance itself."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from cortex.core.errors import BadRequestError
from cortex.core.neuron_api import ToolFormat
from cortex.core.openai import JsonSchemaFormat
from cortex.neuron.chat import grammarparts
from cortex.neuron.chat.formats import SYNTAXES
from cortex.neuron.chat.grammar import (
    Markers,
    Thinking,
    forced_calls,
    json_answer,
    optional_calls,
)
from cortex.neuron.chat.schema import ToolTable
from cortex.neuron.chat.tokenizer import ChatTokenizer
from cortex.neuron.engine.protocol import Constraint
from tests.support.chat_models import PROPERTY, WEATHER, make_tokenizer, parse_call, tool, tools

TOOLS = tools(WEATHER, tool("now"))


def markers_of(
    tokenizer: ChatTokenizer, name: ToolFormat = "qwen_xml", thinking: Thinking = "off"
) -> Markers:
    return Markers.of(tokenizer, syntax=SYNTAXES[name], thinking=thinking)


class Checker:
    """Feeds the tokens of a text to a grammar."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        text = Path(tokenizer.path).read_text()
        self._ll_tokenizer = LLTokenizer(text, eos_token=list(tokenizer.eos_ids))

    def markers(self, *, is_xml: bool = True, thinking: Thinking = "off") -> Markers:
        return markers_of(self.tokenizer, "qwen_xml" if is_xml else "hermes", thinking)

    def accepts(self, constraint: Constraint | None, text: str) -> bool:
        """Whether the text is a complete match."""
        assert constraint is not None
        matcher = LLMatcher(self._ll_tokenizer, constraint.lark, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = self.tokenizer.encode(text)
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    def stops_after(self, constraint: Constraint, text: str) -> bool:
        """Whether nothing but the end may follow the text."""
        matcher = LLMatcher(self._ll_tokenizer, constraint.lark, log_level=0)
        return bool(matcher.consume_tokens(self.tokenizer.encode(text)) and matcher.is_stopped())


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Checker:
    return Checker(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def call(name: str, **parameters: str) -> str:
    inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in parameters.items())
    return f"\n<function={name}>\n{inner}</function>\n</tool_call>"


@pytest.mark.parametrize(
    "text",
    [
        call("now"),
        call("weather", city="Rome"),
        call("weather", city=""),
        call("weather", city="New\n York </parameter> x é"),
        call("weather", unit="celsius", city="Rome"),
        call("weather", city="Rome", unit="fahrenheit", days="3", detailed="true"),
        call("weather", areas='["a", "b"]', city="Rome"),
        call("weather", areas='[\n  "a"\n]', detailed="False", city="Rome"),
        call("weather", areas="[]", city="Rome"),
    ],
)
def test_declared_calls_are_allowed(checker: Checker, text: str) -> None:
    constraint = optional_calls(TOOLS, checker.markers())
    assert checker.accepts(constraint, text)


@pytest.mark.parametrize(
    "text",
    [
        call("later"),
        call("weathe", city="Rome"),
        call("now", city="Rome"),
        call("weather"),
        call("weather", days="3"),
        call("weather", city="Rome", town="Rome"),
        call("weather", city="Rome", unit="kelvin"),
        call("weather", city="Rome", days="0"),
        call("weather", city="Rome", days="three"),
        call("weather", city="Rome", detailed="yes"),
        call("weather", city="Rome", areas='"a"'),
        call("weather", city="Rome", areas="[1]"),
        call("weather", city="Rome").replace("</function>\n", ""),
        call("weather", city="Rome") + call("now"),
        "\n<parameter=city>\nRome\n</parameter>\n</tool_call>",
        "Rome",
    ],
)
def test_anything_else_is_refused(checker: Checker, text: str) -> None:
    constraint = optional_calls(TOOLS, checker.markers())
    assert not checker.accepts(constraint, text)


def test_a_parameter_may_come_once_only(checker: Checker) -> None:
    twice = call("weather", city="Rome").replace(
        "</function>", "<parameter=city>\nRome\n</parameter>\n</function>"
    )
    assert not checker.accepts(optional_calls(TOOLS, checker.markers()), twice)


def test_optional_calls_begin_at_the_marker_and_end_with_the_other(checker: Checker) -> None:
    constraint = optional_calls(TOOLS, checker.markers())
    assert constraint is not None
    assert constraint.trigger_id == checker.tokenizer.marker_id("<tool_call>")
    assert constraint.skip_until_id is None
    assert constraint.tokenizer_path == checker.tokenizer.path
    assert checker.stops_after(constraint, call("now"))


def test_without_marker_tokens_optional_calls_are_free(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, markers=[])
    markers = markers_of(tokenizer)
    assert optional_calls(TOOLS, markers) is None


def test_without_marker_tokens_forced_calls_spell_them_out(tmp_path: Path) -> None:
    other = Checker(make_tokenizer(tmp_path, markers=[]))
    for thinking, before in (
        ("off", ""),
        ("possible", "<think>a</think>\n\n"),
        ("open", "a</think>"),
    ):
        constraint = forced_calls(TOOLS, other.markers(thinking=thinking))
        assert other.accepts(constraint, before + "<tool_call>" + call("now"))
        assert constraint.skip_until_id is None


def test_forced_calls_hold_from_the_first_token(checker: Checker) -> None:
    constraint = forced_calls(TOOLS, checker.markers())
    one = "<tool_call>" + call("now")
    assert (constraint.trigger_id, constraint.skip_until_id) == (None, None)
    assert checker.accepts(constraint, one)
    assert checker.accepts(constraint, one + "\n" + one)
    assert not checker.accepts(constraint, "Sure! " + one)
    assert not checker.stops_after(constraint, one)
    eight = "\n".join([one] * 8)
    assert checker.stops_after(constraint, eight)


def test_a_single_forced_call_is_the_whole_answer(checker: Checker) -> None:
    constraint = forced_calls(TOOLS, checker.markers(), is_single=True)
    assert checker.stops_after(constraint, "<tool_call>" + call("now"))


def test_an_open_thought_stays_free_before_a_forced_call(checker: Checker) -> None:
    constraint = forced_calls(TOOLS, checker.markers(thinking="open"))
    assert constraint.skip_until_id == checker.tokenizer.marker_id("</think>")
    assert checker.accepts(constraint, "\n\n<tool_call>" + call("now"))
    assert checker.accepts(constraint, "<tool_call>" + call("now"))


def test_a_model_may_think_before_a_forced_call(checker: Checker) -> None:
    constraint = forced_calls(TOOLS, checker.markers(thinking="possible"))
    assert checker.accepts(constraint, "<think>\nhm <b>\n</think>\n\n<tool_call>" + call("now"))
    assert checker.accepts(constraint, "<tool_call>" + call("now"))
    assert not checker.accepts(constraint, "<think>\nhm\n</think>\n\nno")


def test_json_style_calls_follow_name_and_schema(checker: Checker) -> None:
    constraint = optional_calls(TOOLS, checker.markers(is_xml=False))
    for good in (
        '\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>',
        '\n{"name":"now","arguments":{}}\n</tool_call>',
    ):
        assert checker.accepts(constraint, good)
    for bad in (
        '\n{"name": "later", "arguments": {}}\n</tool_call>',
        '\n{"name": "weather", "arguments": {}}\n</tool_call>',
        '\n{"name": "weather", "arguments": {"city": 5}}\n</tool_call>',
    ):
        assert not checker.accepts(constraint, bad)


def test_references_are_followed_in_both_styles(checker: Checker) -> None:
    schema = {
        "type": "object",
        "properties": {"spot": {"$ref": "#/$defs/spot"}},
        "required": ["spot"],
        "$defs": {"spot": {"type": "object", "properties": {"x": {"$ref": "#/$defs/n"}},
                           "required": ["x"]}, "n": {"type": "integer"}},
    }  # fmt: skip
    declared = tools(tool("go", schema))
    xml = optional_calls(declared, checker.markers())
    assert checker.accepts(xml, call("go", spot='{"x": 1}'))
    assert not checker.accepts(xml, call("go", spot='{"x": "a"}'))
    plain = optional_calls(declared, checker.markers(is_xml=False))
    assert checker.accepts(plain, '\n{"name": "go", "arguments": {"spot": {"x": 1}}}\n</tool_call>')


def test_an_enumeration_lists_values_of_any_type(checker: Checker) -> None:
    schema = {"properties": {"v": {"enum": ["a b", "", 1, 2.5, True, None, 'q"\\\n']}}}
    constraint = optional_calls(tools(tool("f", schema)), checker.markers())
    for value in ("a b", "", "1", "2.5", "true", "True", "null", "None", 'q"\\\n'):
        assert checker.accepts(constraint, call("f", v=value))
    for value in ("b", "3", "yes"):
        assert not checker.accepts(constraint, call("f", v=value))


def test_a_tool_with_open_parameters_takes_any_names(checker: Checker) -> None:
    schema = {"type": "object", "additionalProperties": True}
    constraint = optional_calls(tools(tool("f", schema)), checker.markers())
    assert checker.accepts(constraint, call("f", anything="x", more="y"))
    assert checker.accepts(constraint, call("f"))


def test_a_tool_of_very_many_parameters_takes_them_in_declared_order(checker: Checker) -> None:
    schema = {"properties": {f"p{at}": {"type": "string"} for at in range(70)}, "required": ["p9"]}
    constraint = optional_calls(tools(tool("f", schema)), checker.markers())
    assert checker.accepts(constraint, call("f", p1="a", p9="b", p69="c"))
    assert not checker.accepts(constraint, call("f", p9="b", p1="a"))
    assert not checker.accepts(constraint, call("f", p1="a"))


ODD = ['a"b', "a\\b", "%json {}", "\u2028é😀", "a\rb", " a ", "[5]", "/x/", "#", "\x7f", "\x00"]


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_literal(checker: Checker, name: str) -> None:
    declared = tools(tool(name, {"properties": {name: {"type": "string"}}}))
    constraint = optional_calls(declared, checker.markers())
    written = call(name, **{name: "x"})
    assert checker.accepts(constraint, written)
    parsed = parse_call(written.removesuffix("</tool_call>"), ToolTable(declared))
    assert parsed is not None
    assert (parsed[0], msgspec.json.decode(parsed[1])) == (name, {name: "x"})


@pytest.mark.parametrize("name", ["a>b", "</function>", "a\nb", "<[5]>", "</tool_call>"])
def test_a_parameter_name_that_breaks_the_syntax_of_calls_is_refused(
    checker: Checker, name: str
) -> None:
    declared = tools(tool("f", {"properties": {name: {"type": "string"}}}))
    with pytest.raises(
        BadRequestError, match=r"tool 'f': parameter .* newline, '<' or '>'"
    ) as caught:
        forced_calls(declared, checker.markers())
    assert caught.value.param == "tools"
    assert forced_calls(declared, checker.markers(is_xml=False)).lark


def test_json_arguments_are_an_object_even_where_the_schema_does_not_say(checker: Checker) -> None:
    declared = tools(tool("f", {"properties": {"v": {"type": "integer"}}}))
    constraint = optional_calls(declared, checker.markers(is_xml=False))
    assert checker.accepts(constraint, '\n{"name": "f", "arguments": {"v": 1}}\n</tool_call>')
    assert not checker.accepts(constraint, '\n{"name": "f", "arguments": "v"}\n</tool_call>')


ENDLESS = {"$ref": "#"}
WIDE = {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(1000)}}


# Compiled, this would overflow the stack and end the process.
DEEP = {
    "$defs": {
        f"d{at}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{at + 1}"}}}
        for at in range(900)
    },
    "$ref": "#/$defs/d0",
}


def test_what_parameters_share_is_not_written_out_beyond_the_bound(
    checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammarparts, "MAX_GRAMMAR_CHARS", 20_000)
    shared = {"type": "object", "description": "x" * 1000, "properties": {"a": {"type": "string"}}}
    root = {
        "$defs": {"shared": shared},
        "properties": {f"p{at}": {"$ref": "#/$defs/shared"} for at in range(30)},
    }
    constraint = forced_calls(tools(tool("f", root)), checker.markers())
    assert "xxx" not in constraint.lark


@pytest.mark.parametrize("is_xml", [True, False])
def test_a_tool_whose_references_go_too_deep_is_only_held_to_its_types(
    checker: Checker, is_xml: bool
) -> None:
    root = {**DEEP, "properties": {"v": {"type": "array", "items": {"$ref": "#/$defs/d0"}}}}
    constraint = forced_calls(tools(tool("f", root)), checker.markers(is_xml=is_xml))
    assert "$ref" not in constraint.lark


@pytest.mark.parametrize("schema", [ENDLESS, WIDE, DEEP])
def test_a_schema_that_compiles_and_cannot_be_followed_is_refused(
    checker: Checker, schema: dict[str, Any]
) -> None:
    with pytest.raises(BadRequestError, match="response_format cannot be followed") as caught:
        json_answer(JsonSchemaFormat(schema=schema), checker.markers())
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("is_xml", [True, False])
@pytest.mark.parametrize("schema", [{"type": "object", "allOf": [{"$ref": "#/$defs/a"}]}, WIDE])
def test_a_parameter_whose_schema_cannot_be_followed_is_only_held_to_its_type(
    checker: Checker, schema: dict[str, Any], is_xml: bool
) -> None:
    root = {
        "$defs": {"a": {"$ref": "#/$defs/a"}},
        "properties": {"v": schema},
        "required": ["v"],
    }
    constraint = forced_calls(tools(tool("f", root)), checker.markers(is_xml=is_xml))
    written = '{"name": "f", "arguments": {"v": {"x": 1}}}'
    text = call("f", v='{"x": 1}') if is_xml else f"\n{written}\n</tool_call>"
    assert checker.accepts(constraint, f"<tool_call>{text}")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"$ref": "http://elsewhere/schema"}},
        {"type": "array", "items": {"type": "string", "pattern": "(unclosed"}},
        {"type": "object", "properties": {"a": {"type": "nonsense"}}},
        {"type": "array", "minItems": 5, "maxItems": 2},
        {"type": "nonsense"},
        {"type": 7, "properties": [], "enum": {}},
        {"enum": [{"a": 1}, [2]]},
        {"allOf": [{"type": "integer"}, {"type": "string"}]},
        {"type": "array", "items": {}, "x-guidance": {"whitespace_pattern": "(("}},
        True,
        None,
        [],
    ],
)
def test_schemas_that_cannot_be_followed_are_followed_loosely(
    checker: Checker, schema: Any
) -> None:
    declared = tools(tool("f", {"properties": {"v": schema}, "required": 5}), tool("now"))
    for is_xml in (True, False):
        constraint = optional_calls(declared, checker.markers(is_xml=is_xml))
        assert constraint is not None
    assert checker.accepts(optional_calls(declared, checker.markers()), call("now"))


def test_too_many_parameters_are_refused(checker: Checker) -> None:
    schema = {"properties": {f"p{at}": {} for at in range(500)}}
    with pytest.raises(BadRequestError, match="more than 1024 parameters") as caught:
        optional_calls(tools(*[tool(f"f{at}", schema) for at in range(3)]), checker.markers())
    assert caught.value.param == "tools"


def test_a_parameter_without_a_name_is_refused(checker: Checker) -> None:
    with pytest.raises(BadRequestError, match="tool 'f': parameter '' is without a name"):
        forced_calls(tools(tool("f", {"properties": {"": {}}})), checker.markers())


def test_an_endless_parameter_name_is_refused(checker: Checker) -> None:
    with pytest.raises(BadRequestError, match="over 256 characters"):
        optional_calls(tools(tool("f", {"properties": {"x" * 257: {}}})), checker.markers())


def test_an_absurdly_large_grammar_is_refused(
    checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammarparts, "MAX_GRAMMAR_CHARS", 3000)
    values = [f"a rather long value {at}" for at in range(250)]
    with pytest.raises(BadRequestError, match="over 3000 characters"):
        optional_calls(tools(tool("f", {"properties": {"v": {"enum": values}}})), checker.markers())


def test_a_json_object_is_any_object(checker: Checker) -> None:
    constraint = json_answer(None, checker.markers())
    assert checker.accepts(constraint, '{"a": [1, {"b": null}]}')
    assert not checker.accepts(constraint, "[1]")
    assert not checker.accepts(constraint, "Sure: {}")
    assert checker.stops_after(constraint, "{}")


def test_a_json_schema_is_followed(checker: Checker) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    constraint = json_answer(JsonSchemaFormat(schema=schema, strict=True), checker.markers())
    assert checker.accepts(constraint, '{\n  "a": 1,\n  "b": "x"\n}')
    assert not checker.accepts(constraint, '{"a": 1}')
    assert not checker.accepts(constraint, '{"a": 1, "b": "z"}')


def test_an_open_thought_stays_free_before_json(checker: Checker) -> None:
    constraint = json_answer(None, checker.markers(thinking="open"))
    assert constraint.skip_until_id == checker.tokenizer.marker_id("</think>")
    assert checker.accepts(constraint, "\n\n{}")


def test_a_schema_that_cannot_be_followed_strictly_is_refused(checker: Checker) -> None:
    schema = {"type": "string", "format": "smell"}
    with pytest.raises(BadRequestError, match="smell") as caught:
        json_answer(JsonSchemaFormat(schema=schema, strict=True), checker.markers())
    assert caught.value.param == "response_format"
    loose = json_answer(JsonSchemaFormat(schema=schema), checker.markers())
    assert checker.accepts(loose, '"rose"')


def test_json_or_calls_allows_either(checker: Checker) -> None:
    answer = JsonSchemaFormat(schema={"type": "object", "required": ["a"]})
    constraint = forced_calls(TOOLS, checker.markers(), or_json=answer)
    assert checker.accepts(constraint, '{"a": 1}')
    assert checker.accepts(constraint, "<tool_call>" + call("now"))
    assert not checker.accepts(constraint, "neither")


def test_a_bad_answer_schema_beside_tools_is_named_as_such(checker: Checker) -> None:
    answer = JsonSchemaFormat(schema={"type": "string", "pattern": "(("})
    with pytest.raises(BadRequestError) as caught:
        forced_calls(TOOLS, checker.markers(), or_json=answer)
    assert caught.value.param == "response_format"


_names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="<>\n"), min_size=1, max_size=12
)


@settings(PROPERTY, max_examples=40)
@given(name=_names, parameter=_names, value=st.text(st.characters(codec="ascii"), max_size=20))
def test_what_the_grammar_allows_the_parser_reads(
    checker: Checker, name: str, parameter: str, value: str
) -> None:
    declared = tools(tool(name, {"properties": {parameter: {"type": "string"}}}))
    constraint = optional_calls(declared, checker.markers())
    text = call(name, **{parameter: value})
    parsed = parse_call(text.removesuffix("</tool_call>"), ToolTable(declared))
    assert checker.accepts(constraint, text)
    assert parsed is not None
    assert parsed[0] == name
    assert msgspec.json.decode(parsed[1]) == {parameter: value}
