"""The questions of the evaluation, and what counts as right."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cortex.bundled.recipe import data, facts, unseen, words
from cortex.bundled.recipe import tools as toolbox

_HONEST = ("not know", "beyond me", "I am cortex-tiny")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One prompt and what the model should make of it."""

    kind: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    answer: str = ""
    call: tuple[str, dict[str, Any]] | None = None
    thinking: bool = False


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back; `calls` holds names and arguments, None where a call cannot be read."""

    text: str
    calls: list[tuple[str, dict[str, Any]] | None] = field(default_factory=list)
    ended: bool


def tool_cases(number: int, seed: int) -> list[Case]:
    """Return unseen schemas: held-out nouns, invented names, well-known tools, some by hand."""
    rng = random.Random(seed)
    makers: list[tuple[str, Callable[[], toolbox.ToolCase]]] = [
        ("held-out noun", lambda: toolbox.held_out_case(rng)),
        ("invented name", lambda: toolbox.explicit_case(rng)),
        ("well-known tool", lambda: toolbox.known_case(rng)),
    ]
    cases = []
    for idx in range(number):
        kind, make = makers[idx % len(makers)]
        case = make()
        offered = toolbox.offer(rng, case, (0, 0, 1, 2)[idx // 3 % 4])
        asked = [{"role": "user", "content": case.question}]
        cases.append(
            Case(kind=kind, messages=asked, tools=offered, call=(case.name, case.arguments))
        )
    for tool, question, arguments in unseen.CALLS:
        call = (tool["function"]["name"], arguments)
        asked = [{"role": "user", "content": question}]
        cases.append(Case(kind="by hand", messages=asked, tools=[tool], call=call))
    return cases


def chat_cases(seed: int) -> list[Case]:
    """Return the FAQ in its plain and varied wordings, other known kinds, and unknown questions."""
    rng = random.Random(seed)
    cases = []
    for wordings, answer in facts.ABOUT.items():
        for wording in words.listed(wordings, "|")[:2]:
            question = wording[0].upper() + wording[1:] + "?"
            cases.append(_chat("faq", question, answer))
            cases.append(_chat("faq varied", data.vary(rng, wording), answer))
    makers = (data.relation, data.trivia, data.small_talk, data.count, data.arithmetic, data.echo)
    for make in (*makers, data.recall, data.listing):
        for _ in range(25):
            drawn = make(rng)
            cases.append(_chat(drawn.kind, drawn.question, drawn.answer))
    cases += [_chat("unknown", question, "") for question in unseen.UNKNOWN]
    for _ in range(30):
        drawn = rng.choice((data.relation, data.about, data.echo))(rng)
        asked = [{"role": "user", "content": drawn.question}]
        cases.append(Case(kind="thinking", messages=asked, answer=drawn.answer, thinking=True))
    return cases


def _chat(kind: str, question: str, answer: str) -> Case:
    return Case(kind=kind, messages=[{"role": "user", "content": question}], answer=answer)


_CALL = re.compile(r"<tool_call>\n<function=([^>\n]+)>\n(.*?)</function>\n</tool_call>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>\n", re.DOTALL)


def read_calls(text: str) -> list[tuple[str, dict[str, Any]] | None]:
    """Return the calls in a text; None stands for one that is not well formed."""
    calls: list[tuple[str, dict[str, Any]] | None] = []
    for block in re.findall(r"<tool_call>.*?(?:</tool_call>|$)", text, re.DOTALL):
        match = _CALL.fullmatch(block)
        if match is None or _PARAMETER.sub("", match[2]):
            calls.append(None)
        else:
            calls.append((match[1], dict(_PARAMETER.findall(match[2]))))
    return calls


def same(wanted: toolbox.Value, given: object) -> bool:
    """Return whether an argument is the wanted one, in its own type or as text."""
    if isinstance(wanted, int | float) and isinstance(given, int | float):
        return float(wanted) == float(given)
    return toolbox.show(wanted) == str(given)


def judge(case: Case, reply: Reply) -> dict[str, bool]:
    """Return what is right about a reply."""
    marks = {"ended": reply.ended}
    if case.call is None:
        if case.kind == "unknown":
            return marks | {"honest": any(part in reply.text for part in _HONEST)}
        return marks | {"exact": reply.text.strip() == case.answer}
    name, wanted = case.call
    first = reply.calls[0] if len(reply.calls) == 1 else None
    named = first is not None and first[0] == name
    given = first[1] if first and named else {}
    filled = named and given.keys() == wanted.keys()
    filled = filled and all(same(wanted[key], given[key]) for key in wanted)
    return marks | {"well formed": first is not None, "right name": named, "right call": filled}
