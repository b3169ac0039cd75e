"""Grammars (llguidance's Lark syntax) that keep tool calls and JSON answers valid.

A tool call is free only where a value is: names of functions and parameters, enumerations,
numbers, nested JSON and all the syntax around them follow the declared tools.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cortex.core.errors import BadRequestError
from cortex.core.openai import JsonSchemaFormat, Tool
from cortex.neuron.chat.formats import ARGS, CALL_ID, THINK_TAGS, CallSyntax, ThinkMarkers
from cortex.neuron.chat.grammarparts import (
    UnfitError,
    dead_end,
    json_rule,
    problem_of,
    token_or_text,
)
from cortex.neuron.chat.tokenizer import ChatTokenizer
from cortex.neuron.chat.toolrules import ToolRules, check_strict
from cortex.neuron.engine.protocol import Constraint

MAX_FORCED_CALLS = 8

Thinking = Literal["off", "open", "possible"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Markers:
    """How a model writes calls and thoughts.

    Attributes:
        thinking: whether the prompt leaves a thought open, or the model may begin one.
        ids: the token of each marker; None where no single token stands for it.
        has_call_ids: the model writes an id into each of its calls.
    """

    tokenizer_path: str
    syntax: CallSyntax
    think: ThinkMarkers
    thinking: Thinking
    ids: Mapping[str, int | None]
    has_call_ids: bool = False

    @classmethod
    def of(
        cls,
        tokenizer: ChatTokenizer,
        *,
        syntax: CallSyntax,
        thinking: Thinking,
        think: ThinkMarkers = THINK_TAGS,
        has_call_ids: bool = False,
    ) -> "Markers":
        """Return the markers as this tokenizer spells them."""
        texts = (think.opening, think.closing, *syntax.markers)
        return cls(
            tokenizer_path=tokenizer.path,
            syntax=syntax,
            think=think,
            thinking=thinking,
            ids={text: tokenizer.marker_id(text) for text in texts},
            has_call_ids=has_call_ids,
        )

    def rule(self, text: str) -> str:
        """Return what matches a marker."""
        return token_or_text(self.ids[text], text)


def optional_calls(
    tools: list[Tool], markers: Markers, *, is_single: bool = False
) -> Constraint | None:
    """Return what holds from each opening marker on, or None if no single token stands for it.

    Calls without a marker are told from a text by its first character.

    Args:
        is_single: at most one call without a marker.

    Raises:
        BadRequestError: the tools are too large for a grammar, or a strict one cannot be followed.
    """
    syntax = markers.syntax
    if syntax.is_bare:
        body, rules = _calls(markers, is_single=is_single)
        free = "free: /[ \\n\\t]*([^{ \\n\\t](?s:.*))?/\n"
        lark = _tool_grammar(f"start: free | {body}\n{free}{rules}", tools, markers)
        return Constraint(lark=lark, tokenizer_path=markers.tokenizer_path)
    trigger_id = markers.ids[syntax.opening]
    if trigger_id is None or (syntax.closing and markers.ids[syntax.closing] is None):
        return None
    body, rules = _after_opening(markers, is_single=is_single)
    lark = _tool_grammar(f"start: {body}\n{rules}", tools, markers)
    return Constraint(lark=lark, tokenizer_path=markers.tokenizer_path, trigger_id=trigger_id)


def forced_calls(
    tools: list[Tool],
    markers: Markers,
    *,
    is_single: bool = False,
    or_json: JsonSchemaFormat | None = None,
) -> Constraint:
    """Return what makes the whole answer one or more calls of these tools.

    Args:
        is_single: exactly one call.
        or_json: a JSON answer that is allowed instead of calls.

    Raises:
        BadRequestError: the tools are too large for a grammar, or a schema is not usable.
    """
    lead, lead_rules, skip_until_id = _lead(markers)
    answer, rules = _calls(markers, is_single=is_single)
    if or_json is not None:
        json_answer(or_json, markers)  # raises if the schema, and not the tools, is at fault
        answer = f"({answer} | answer)"
        rules += f"answer: {_answer(or_json)}\n"
    lark = _tool_grammar(f"start: {lead}{answer}\n{rules}{lead_rules}", tools, markers)
    return Constraint(lark=lark, tokenizer_path=markers.tokenizer_path, skip_until_id=skip_until_id)


def json_answer(schema: JsonSchemaFormat | None, markers: Markers) -> Constraint:
    """Return what makes the whole answer one JSON value of a schema, or any JSON object.

    Raises:
        BadRequestError: the schema is not usable; says why.
    """
    lead, rules, skip_until_id = _lead(markers)
    lark, problem = "", None
    try:
        answer = _answer(schema or JsonSchemaFormat())
        lark = f"start: {lead}answer\nanswer: {answer}\n{rules}"
        problem = problem_of(lark) or dead_end(answer)
    except UnfitError as exc:
        problem = str(exc)
    if problem is not None:
        raise BadRequestError(
            f"response_format cannot be followed: {problem}", param="response_format"
        )
    return Constraint(lark=lark, tokenizer_path=markers.tokenizer_path, skip_until_id=skip_until_id)


def _calls(markers: Markers, *, is_single: bool) -> tuple[str, str]:
    """Return calls with all that stands around them, and the rules that this needs."""
    syntax = markers.syntax
    again = 0 if is_single else MAX_FORCED_CALLS - 1
    body, rules = _after_opening(markers, is_single=is_single)
    opening = markers.rule(syntax.opening)
    if syntax.is_bare:
        return f"{opening}? {body}", rules
    if syntax.name == "mistral_list":
        return f"{opening} {body}", rules
    between = '"\\n" ' if syntax.closing else ""
    more = f" ({between}block){{0,{again}}}" if again else ""
    return f"block{more}", f"block: {opening} {body}\n{rules}"


def _after_opening(markers: Markers, *, is_single: bool) -> tuple[str, str]:
    """Return what follows one opening marker, and the rules that this needs."""
    syntax = markers.syntax
    again = 0 if is_single else MAX_FORCED_CALLS - 1
    if syntax.closing:
        return f'"\\n" call "\\n" {markers.rule(syntax.closing)}', ""
    if syntax.is_bare:
        return (f'call ("; " call){{0,{again}}}' if again else "call"), ""
    if syntax.name == "mistral_list":
        more = f"(COMMA call){{0,{again}}} " if again else ""
        return f'" "? "[" call {more}"]"', "COMMA: /, ?/\n"
    return "call", ""


def _lead(markers: Markers) -> tuple[str, str, int | None]:
    """Return what may stand before a forced answer: its use, its rules, the token to skip to."""
    if markers.thinking == "off":
        return "", "", None
    newlines = "NEWLINES: /\\n{1,2}/\n"
    closing = markers.think.closing
    closing_id = markers.ids[closing]
    if markers.thinking == "open" and closing_id is not None:
        return "NEWLINES? ", newlines, closing_id
    if closing_id is None:
        spelled = "".join(f"\\{each}" if each in "/[]" else each for each in closing)
        thought = f"thought[lazy]: /(?s:.*){spelled}/\n"
        block = "thought"
    else:
        thought = "thought: /(?s:.*)/\n"
        block = f"thought {markers.rule(closing)}"
    if markers.thinking == "open":
        return f"{block} NEWLINES? ", thought + newlines, None
    block = f"{markers.rule(markers.think.opening)} {block}"
    return f"({block} NEWLINES?)? ", thought + newlines, None


def _answer(answer: JsonSchemaFormat) -> str:
    if answer.schema is None:
        return json_rule({"type": "object"})
    return json_rule(answer.schema, is_lenient=not answer.strict)


def _tool_grammar(start: str, tools: list[Tool], markers: Markers) -> str:
    """Return the grammar with the rules of all calls, or one with looser values if need be."""
    check_strict(tools)
    problem: str | None = None
    for is_loose in (False, True):
        rules = ToolRules(is_loose=is_loose)
        try:
            lark = start + _call_rules(rules, tools, markers)
            problem = problem_of(lark) or rules.dead_end()
        except UnfitError as exc:
            problem = str(exc)
            continue
        if problem is None:
            return lark
    raise BadRequestError(f"tools cannot be used: {problem}", param="tools")


def _call_rules(rules: ToolRules, tools: list[Tool], markers: Markers) -> str:
    syntax = markers.syntax
    if syntax.name == "qwen_xml":
        return rules.xml(tools)
    if syntax.name == "mistral":
        call_id = f"{markers.rule(CALL_ID)} CALL_ID " if markers.has_call_ids else ""
        lead = f"{call_id}{markers.rule(ARGS)} "
        return rules.named(tools, lead) + ("CALL_ID: /[A-Za-z0-9]{9}/\n" if call_id else "")
    return rules.json(tools, syntax.arguments_key, has_id=syntax.name == "mistral_list")
