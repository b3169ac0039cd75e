"""What grammars of every format allow: random schemas, random walks, arguments that validate."""

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from cortex.core.errors import BadRequestError
from cortex.core.neuron_api import ToolFormat
from cortex.core.openai import JsonSchemaFormat
from cortex.neuron.chat.formats import SYNTAXES
from cortex.neuron.chat.grammar import Markers, forced_calls, json_answer, optional_calls
from cortex.neuron.chat.output import OutputParser, OutputSpec, ToolCallStart, ToolCallText
from cortex.neuron.chat.schema import ToolTable
from cortex.neuron.chat.tokenizer import ChatTokenizer
from cortex.neuron.chat.toolrules import whole_pattern
from cortex.neuron.engine.protocol import Constraint
from tests.support.call_texts import written
from tests.support.chat_models import MARKERS, PROPERTY, WEATHER, make_tokenizer, tool, tools

FORMATS: list[ToolFormat] = ["qwen_xml", "hermes", "llama3", "mistral", "mistral_list"]
NAMES = [*MARKERS, "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]
TOOLS = tools(WEATHER, tool("now"))
MAX_STEPS = 1000
# What ends a value or a call, in the order in which it is tried.
ENDINGS = ["\n</parameter>\n", "</function>\n", '"', "}", "]"]


class Model:
    """A tokenizer with the markers of every format, and what can be said under a grammar."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        text = Path(tokenizer.path).read_text()
        self._ll_tokenizer = LLTokenizer(text, eos_token=list(tokenizer.eos_ids))
        self._endings = [tokenizer.encode(each) for each in ENDINGS]

    def markers(self, name: ToolFormat, **fields: Any) -> Markers:
        return Markers.of(self.tokenizer, syntax=SYNTAXES[name], thinking="off", **fields)

    def accepts(self, constraint: Constraint | None, text: str) -> bool:
        assert constraint is not None
        matcher = LLMatcher(self._ll_tokenizer, constraint.lark, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = self.tokenizer.encode(text)
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    def say(self, constraint: Constraint, rng: random.Random) -> str:
        """Return a random text that the grammar allows, which tends to come to an end."""
        matcher = LLMatcher(self._ll_tokenizer, constraint.lark, log_level=0)
        said: list[int] = []
        for _ in range(MAX_STEPS):
            assert not matcher.is_error(), matcher.get_error()
            if matcher.is_stopped() or (matcher.is_accepting() and rng.random() < 0.5):
                break
            ending = next((e for e in self._endings if matcher.validate_tokens(e) == len(e)), None)
            if ending is not None and rng.random() < 0.5:
                assert matcher.consume_tokens(ending)
                said += ending
                continue
            bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
            usual = [at for at in allowed if at not in self.tokenizer.eos_ids]
            if not usual:
                break
            said.append(rng.choice(usual))
            assert matcher.consume_token(said[-1])
        else:
            pytest.fail("the walk does not end")
        return self.tokenizer.decode(said, keep_special=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(make_tokenizer(tmp_path_factory.mktemp("tokenizer"), markers=NAMES))


@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls_of_each_format_are_held_to_the_tools(model: Model, name: ToolFormat) -> None:
    constraint = forced_calls(TOOLS, model.markers(name))
    good = [("weather", {"city": "Rome", "days": 3}), ("now", {})]
    assert model.accepts(constraint, written(name, good[:1]))
    assert model.accepts(constraint, written(name, good))
    for bad in (
        ("later", {}),
        ("weather", {"days": 3}),
        ("weather", {"city": "Rome", "days": 0}),
        ("weather", {"city": "Rome", "town": "x"}),
        ("now", {"x": 1}),
    ):
        assert not model.accepts(constraint, written(name, [bad]))
    assert not model.accepts(constraint, "Sure! " + written(name, good))
    single = forced_calls(TOOLS, model.markers(name), is_single=True)
    assert model.accepts(single, written(name, good[:1]))
    assert not model.accepts(single, written(name, good))


@pytest.mark.parametrize("name", ["qwen_xml", "hermes", "mistral", "mistral_list"])
def test_optional_calls_hold_from_the_opening_marker_on(model: Model, name: ToolFormat) -> None:
    constraint = optional_calls(TOOLS, model.markers(name))
    assert constraint is not None
    opening = SYNTAXES[name].opening
    assert constraint.trigger_id == model.tokenizer.marker_id(opening)
    good, bad = (written(name, [(each, {})]).removeprefix(opening) for each in ("now", "later"))
    assert model.accepts(constraint, good)
    assert not model.accepts(constraint, bad)


def test_a_text_of_llama_s_is_free_unless_it_begins_as_a_call_does(model: Model) -> None:
    constraint = optional_calls(TOOLS, model.markers("llama3"))
    for good in ("", "Hello {x}", '\n\n[{"a": 1}]', '{"name": "now", "parameters": {}}'):
        assert model.accepts(constraint, good)
    assert model.accepts(constraint, '<|python_tag|>{"name": "now", "parameters": {}}')
    for bad in ('{"a": 1}', ' {"name": "later", "parameters": {}}', "<|python_tag|>hello"):
        assert not model.accepts(constraint, bad)


def test_a_call_id_stands_where_the_model_s_template_has_one(model: Model) -> None:
    constraint = forced_calls(TOOLS, model.markers("mistral", has_call_ids=True))
    assert model.accepts(constraint, "[TOOL_CALLS]now[CALL_ID]a1B2c3D4e[ARGS]{}")
    assert not model.accepts(constraint, "[TOOL_CALLS]now[ARGS]{}")


TEXT = {"properties": {"v": {"type": "string", "minLength": 2, "maxLength": 4}}}
CODE = {"properties": {"v": {"type": "string", "pattern": r"^[a-c]/[0-9]+$"}}}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (TEXT, ["ab", "a\nbc", "éé"], ["a", "abcde"]),
        (CODE, ["a/1", "c/234"], ["a/", "d/1", "a/1 ", "xa/1"]),
    ],
)
def test_length_and_pattern_of_a_text_are_kept(
    model: Model, name: ToolFormat, schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    constraint = forced_calls(tools(tool("f", schema)), model.markers(name))
    for value in good:
        assert model.accepts(constraint, written(name, [("f", {"v": value})]))
    for value in bad:
        assert not model.accepts(constraint, written(name, [("f", {"v": value})]))


@pytest.mark.parametrize(
    ("pattern", "whole"),
    [
        ("^a$", "(?:a)"),
        ("a", "(?s:.*)(?:a)(?s:.*)"),
        ("^a|b$", None),
        ("a|b", "(?s:.*)(?:a|b)(?s:.*)"),
        ("a^b", None),
        ("[^a]", "(?s:.*)(?:[^a])(?s:.*)"),
        (r"\$", r"(?s:.*)(?:\$)(?s:.*)"),
        ("a/b", r"(?s:.*)(?:a\/b)(?s:.*)"),
    ],
)
def test_a_pattern_is_found_anywhere_in_a_text(pattern: str, whole: str | None) -> None:
    assert whole_pattern(pattern) == whole


@pytest.mark.parametrize("name", FORMATS)
def test_a_strict_tool_that_cannot_be_followed_is_refused_by_name(
    model: Model, name: ToolFormat
) -> None:
    odd = {"type": "object", "properties": {"v": {"type": "array", "uniqueItems": True}}}
    strict = tool("f", odd)
    strict["function"]["strict"] = True
    with pytest.raises(BadRequestError, match=r"tool 'f' is strict.*uniqueItems") as caught:
        forced_calls(tools(tool("now"), strict), model.markers(name))
    assert caught.value.param == "tools[1].function.parameters"
    assert forced_calls(tools(tool("f", odd)), model.markers(name)).lark


_scalars: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        lambda least, more: {"type": "integer", "minimum": least, "maximum": least + more},
        st.integers(-20, 20),
        st.integers(0, 30),
    ),
    st.builds(
        lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
        st.integers(0, 3),
        st.integers(0, 5),
    ),
    st.sampled_from(
        [
            {"type": "number"},
            {"type": "boolean"},
            {"type": "null"},
            {"type": "string"},
            {"type": "string", "pattern": "^[a-f]{2,4}$"},
            {"type": "string", "pattern": "[0-9]"},
            {"enum": ["a", "b c", 'q"'], "type": "string"},
            {"const": "only"},
            {"type": ["integer", "null"]},
            {"anyOf": [{"type": "integer"}, {"type": "boolean"}]},
        ]
    ),
)
_names = st.text("abcdefghij_", min_size=1, max_size=6)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build(properties: dict[str, Any], needed: list[bool]) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": properties,
            "required": [name for name, is_so in zip(properties, needed, strict=False) if is_so],
            "additionalProperties": False,
        }

    return st.builds(
        build, st.dictionaries(_names, inner, max_size=4), st.lists(st.booleans(), max_size=4)
    )


def _lists(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda items, least: {
            "type": "array",
            "items": items,
            "minItems": least,
            "maxItems": least + 2,
        },
        inner,
        st.integers(0, 2),
    )


_schemas = st.recursive(
    _scalars, lambda inner: st.one_of(_objects(inner), _lists(inner)), max_leaves=6
)
_parameters = _objects(_schemas)


@settings(PROPERTY, max_examples=600)
@given(name=st.sampled_from(FORMATS), schema=_parameters, seed=st.integers(0, 1 << 30))
def test_arguments_of_calls_always_parse_and_validate(
    model: Model, name: ToolFormat, schema: dict[str, Any], seed: int
) -> None:
    declared = tools(tool("f", schema), WEATHER)
    constraint = forced_calls(declared, model.markers(name))
    text = model.say(constraint, random.Random(seed))
    table = ToolTable(declared)
    parser = OutputParser(OutputSpec(tools=table, syntax=SYNTAXES[name], is_forced=True))
    events = [event for each in text for event in parser.feed(each)] + parser.finish()
    names = [event.name for event in events if isinstance(event, ToolCallStart)]
    assert names
    assert {type(event) for event in events} <= {ToolCallStart, ToolCallText}
    for at, called in enumerate(names):
        pieces = [e.text for e in events if isinstance(e, ToolCallText) and e.index == at]
        jsonschema.validate(json.loads("".join(pieces)), table.schemas[called])


@settings(PROPERTY, max_examples=60)
@given(schema=_parameters, seed=st.integers(0, 1 << 30))
def test_json_answers_always_validate(model: Model, schema: dict[str, Any], seed: int) -> None:
    constraint = json_answer(JsonSchemaFormat(schema=schema, strict=True), model.markers("hermes"))
    text = model.say(constraint, random.Random(seed))
    jsonschema.validate(json.loads(text), schema)


KEYWORDS: list[dict[str, Any]] = [
    {"uniqueItems": True, "type": "array"},
    {"propertyNames": {"pattern": "a"}, "type": "object"},
    {"not": {"type": "string"}},
    {"contains": {"type": "integer"}, "type": "array"},
    {"if": {"type": "integer"}, "then": {"minimum": 1}},
    {"dependentRequired": {"a": ["b"]}, "type": "object"},
    {"format": "smell", "type": "string"},
    {"unevaluatedProperties": False, "type": "object"},
]


@settings(PROPERTY, max_examples=40)
@given(schema=_parameters, odd=st.sampled_from(KEYWORDS), name=st.sampled_from(FORMATS))
def test_what_a_strict_schema_says_in_vain_is_named(
    model: Model, schema: dict[str, Any], odd: dict[str, Any], name: ToolFormat
) -> None:
    declared = {**schema, "properties": {**schema["properties"], "odd": odd}}
    strict = tool("f", declared)
    strict["function"]["strict"] = True
    keyword = "smell" if "format" in odd else next(iter(odd))
    with pytest.raises(BadRequestError) as caught:
        forced_calls(tools(strict), model.markers(name))
    assert keyword in caught.value.message
    with pytest.raises(BadRequestError) as caught:
        json_answer(JsonSchemaFormat(schema=declared, strict=True), model.markers(name))
    assert keyword in caught.value.message


def test_a_text_that_is_not_enough_yet_cannot_hold_what_ends_it(model: Model) -> None:
    schema = {"properties": {"v": {"type": "string", "pattern": "[0-9]"}}, "required": ["v"]}
    constraint = forced_calls(tools(tool("f", schema)), model.markers("qwen_xml"))
    assert model.accepts(constraint, written("qwen_xml", [("f", {"v": "a\n5"})]))
    for early in ("a\n</parameter>\n5", "a\n</parameter>"):
        assert not model.accepts(constraint, written("qwen_xml", [("f", {"v": early})]))
