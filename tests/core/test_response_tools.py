from typing import Any

import msgspec
import pytest

from cortex.core.errors import BadRequestError, UnsupportedFieldError
from cortex.core.response_tools import ToolName, ToolSet, tool_set
from cortex.core.responses import parse_request, parse_tools
from cortex.core.tool_choice import AllowedToolsChoice, NamedToolChoice

LOOK = {
    "type": "function",
    "name": "look",
    "description": "Look.",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    "strict": True,
}
PATCH = {"type": "custom", "name": "patch", "description": "Change files."}
SPACE = {
    "type": "namespace",
    "name": "mcp__files",
    "description": "Files.",
    "tools": [LOOK, {"type": "custom", "name": "run"}],
}


def tools_of(*tools: object, **fields: Any) -> ToolSet:
    body = {"model": "m", "input": "Hi", "tools": list(tools), **fields}
    return tool_set(parse_request(msgspec.json.encode(body)), [])


def names(found: ToolSet) -> list[str]:
    return [tool.function.name for tool in found.tools if tool.function]


def test_a_function_is_told_as_it_is():
    (tool,) = tools_of(LOOK).tools
    assert tool.function is not None
    assert (tool.function.name, tool.function.description) == ("look", "Look.")
    assert tool.function.parameters == LOOK["parameters"]
    assert tool.function.strict is True


def test_a_function_without_parameters_has_none():
    (tool,) = tools_of({"type": "function", "name": "f", "parameters": None}).tools
    assert tool.function is not None
    assert tool.function.parameters == {"type": "object", "properties": {}}


def test_a_custom_tool_is_told_as_a_function_of_one_text():
    found = tools_of(PATCH)
    (tool,) = found.tools
    assert tool.function is not None
    assert tool.function.parameters == {
        "type": "object",
        "properties": {"input": {"type": "string"}},
        "required": ["input"],
        "additionalProperties": False,
    }
    assert found.names["patch"] == ToolName("custom", "patch")


def test_the_grammar_of_a_custom_tool_is_told_in_its_description():
    grammar = {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'}
    (tool,) = tools_of({**PATCH, "format": grammar}).tools
    assert tool.function is not None
    assert tool.function.description == (
        'Change files.\n\nThe input follows this lark grammar:\nstart: "x"'
    )


def test_the_tools_of_a_namespace_are_told_under_names_with_it():
    found = tools_of(SPACE)
    assert names(found) == ["mcp__files__look", "mcp__files__run"]
    assert found.names["mcp__files__look"] == ToolName("function", "look", "mcp__files")
    assert found.names["mcp__files__run"] == ToolName("custom", "run", "mcp__files")
    assert ToolName("function", "x", "mcp__a__").chat_name == "mcp__a__x"


@pytest.mark.parametrize("kind", ["web_search", "image_generation", "tool_search", "made_up"])
def test_a_tool_that_a_model_may_do_without_is_left_out(kind: str):
    found = tools_of(LOOK, {"type": kind})
    assert names(found) == ["look"]
    assert [msgspec.json.decode(raw) for raw in found.raws] == [LOOK]


@pytest.mark.parametrize("kind", ["file_search", "mcp", "local_shell", "code_interpreter"])
def test_a_tool_that_is_the_point_of_a_request_is_refused_by_its_type(kind: str):
    with pytest.raises(UnsupportedFieldError, match=f"type '{kind}'") as caught:
        tools_of(LOOK, {"type": kind})
    assert caught.value.param == "tools[1].type"


def test_two_tools_of_a_name_are_refused_and_those_among_the_items_may_repeat():
    with pytest.raises(BadRequestError, match="'look' twice"):
        tools_of(LOOK, LOOK)
    request = parse_request(msgspec.json.encode({"model": "m", "input": "Hi", "tools": [LOOK]}))
    further = parse_tools([msgspec.Raw(msgspec.json.encode(each)) for each in (LOOK, PATCH)])
    assert names(tool_set(request, further)) == ["look", "patch"]


@pytest.mark.parametrize("choice", ["none", "auto", "required"])
def test_a_choice_in_a_word_stays(choice: str):
    assert tools_of(LOOK, tool_choice=choice).choice == choice


def test_a_choice_without_tools_is_none_and_a_call_cannot_be_required():
    assert tools_of({"type": "web_search"}, tool_choice="auto").choice is None
    with pytest.raises(BadRequestError, match="'required' needs a tool"):
        tools_of({"type": "web_search"}, tool_choice="required")


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ({"type": "function", "name": "look"}, "look"),
        ({"type": "custom", "name": "patch"}, "patch"),
        ({"type": "function", "name": "look", "namespace": "mcp__files"}, "mcp__files__look"),
    ],
)
def test_a_named_tool_is_asked_for_by_the_models_name(choice: dict[str, str], told: str):
    chosen = tools_of(LOOK, PATCH, SPACE, tool_choice=choice).choice
    assert isinstance(chosen, NamedToolChoice)
    assert chosen.function.name == told


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"type": "function", "name": "no"}, "'no', which tools does not declare"),
        ({"type": "custom", "name": "look"}, "'look', which tools does not declare"),
        ({"type": "web_search"}, "type 'web_search', which is not available"),
        ({"type": "allowed_tools", "mode": "odd", "tools": []}, "auto or required"),
        ({"type": "allowed_tools", "mode": "required", "tools": []}, "'required' needs a tool"),
    ],
)
def test_a_choice_that_is_not_possible_is_refused(choice: dict[str, Any], words: str):
    with pytest.raises(BadRequestError, match=words) as caught:
        tools_of(LOOK, {"type": "web_search"}, tool_choice=choice)
    assert (caught.value.param or "").startswith("tool_choice")


def test_allowed_tools_stay_in_the_prompt_with_the_others():
    allowed = [{"type": "function", "name": "look"}, {"type": "web_search"}]
    choice = {"type": "allowed_tools", "mode": "required", "tools": allowed}
    found = tools_of(LOOK, PATCH, {"type": "web_search"}, tool_choice=choice)
    assert names(found) == ["look", "patch"]
    assert isinstance(found.choice, AllowedToolsChoice)
    told = found.choice.allowed_tools
    assert (told.mode, [each.function.name for each in told.tools if each.function]) == (
        "required",
        ["look"],
    )


def test_where_no_tool_that_can_be_called_is_allowed_none_is_offered():
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}
    assert tools_of(LOOK, tool_choice=choice).choice == "none"
