"""Tools as OpenAI clients declare them, and questions that call for them."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cortex.bundled.recipe import words
from cortex.bundled.recipe.known_tools import KNOWN_TOOLS

Value = str | int | float | bool
Arguments = dict[str, Value]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a tool, with the value that the question asks for."""

    name: str
    schema: dict[str, Any]
    value: Value
    required: bool = True


@dataclass(frozen=True, kw_only=True)
class ToolCase:
    """A tool, a question that needs it, and the arguments that the call must carry."""

    name: str
    schema: dict[str, Any]
    question: str
    arguments: Arguments


def _schema(
    rng: random.Random, name: str, description: str, parameters: list[Parameter]
) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for parameter in parameters:
        properties[parameter.name] = dict(parameter.schema)
        if rng.random() < 0.35:
            text = rng.choice(("The {}.", "The {} to use.", "{}", "Which {}.")).format(
                parameter.name.replace("_", " ")
            )
            properties[parameter.name]["description"] = text
    body: dict[str, Any] = {"type": "object", "properties": properties}
    required = [parameter.name for parameter in parameters if parameter.required]
    if required or rng.random() < 0.5:
        body["required"] = required
    if rng.random() < 0.1:
        body["additionalProperties"] = False
    function: dict[str, Any] = {"name": name}
    if description and rng.random() < 0.8:
        function["description"] = description
    function["parameters"] = body
    return {"type": "function", "function": function}


# Makers of values: name, the names a parameter of that kind may have, the JSON schema, the value.
Maker = Callable[[random.Random], Value]


def _integer(rng: random.Random) -> Value:
    return int(words.any_number(rng))


def _decimal(rng: random.Random) -> Value:
    return rng.randint(0, 999) / 10 if rng.random() < 0.6 else rng.randint(0, 200)


_STRING_KINDS: dict[str, tuple[str, Maker]] = {
    "city": ("city location place town destination", words.any_city),
    "name": ("name user person customer author player owner", words.any_name),
    "word": ("word key item label tag title code kind id", words.any_word),
    "phrase": ("query text topic subject message keywords content", words.any_phrase),
    "path": ("path file filename source target", words.any_path),
    "email": ("email to recipient address", words.any_email),
    "date": ("date day start end since until", words.any_date),
    "time": ("time at start_time", words.any_time),
    "colour": ("color colour background", lambda rng: rng.choice(words.COLOURS)),
    "language": ("language lang target_language", lambda rng: rng.choice(words.LANGUAGES)),
}
_INTEGER_NAMES = "count limit number amount size n page days hours seconds year level port quantity"
_NUMBER_NAMES = "price value x y temperature weight width height rate distance latitude"
_BOOLEAN_NAMES = "verbose force recursive public dry_run enabled loud exact urgent"
_ENUM_NAMES = "mode format unit style order priority status size type"
_ENUMS = (
    ("celsius", "fahrenheit"),
    ("low", "medium", "high"),
    ("asc", "desc"),
    ("small", "large"),
    ("json", "csv", "text"),
    ("metric", "imperial"),
    ("fast", "slow"),
    ("open", "closed", "pending"),
)


def any_parameter(rng: random.Random, taken: set[str], required: bool = True) -> Parameter:
    """Return a parameter of any type whose name is not taken, and note its name as taken."""
    roll = rng.random()
    value: Value
    schema: dict[str, Any]
    if roll < 0.6:
        names, make = rng.choice(list(_STRING_KINDS.values()))
        value, schema = make(rng), {"type": "string"}
    elif roll < 0.78:
        names, value, schema = _INTEGER_NAMES, _integer(rng), {"type": "integer"}
    elif roll < 0.85:
        names, value, schema = _NUMBER_NAMES, _decimal(rng), {"type": "number"}
    elif roll < 0.9:
        names, value, schema = _BOOLEAN_NAMES, rng.random() < 0.7, {"type": "boolean"}
    else:
        names = _ENUM_NAMES
        if rng.random() < 0.6:
            choices = list(rng.choice(_ENUMS))
        else:
            choices = list(dict.fromkeys(words.any_word(rng) for _ in range(rng.randint(2, 4))))
        value, schema = rng.choice(choices), {"type": "string", "enum": choices}
    while True:
        name = rng.choice(names.split()) if rng.random() < 0.55 else words.pseudo_word(rng)
        if rng.random() < 0.1:
            name = f"{name}_{rng.choice(('id', 'name', words.pseudo_word(rng)))}"
        if name not in taken:
            taken.add(name)
            return Parameter(name=name, schema=schema, value=value, required=required)
        names = f"{names} {words.pseudo_word(rng)}"


def show(value: Value) -> str:
    """Return a value as a question and a call spell it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _clauses(rng: random.Random, parameters: list[Parameter]) -> str:
    """Return the parameters by name: `with city Oslo and unit celsius`."""
    form = rng.choice(
        ("{p} {v}", "{p} {v}", "{p} = {v}", "{p} set to {v}", "{p}: {v}", "{p} as {v}")
    )
    if rng.random() < 0.15:
        form = '{p} "{v}"'
    shown = [
        form.format(p=p.name.replace("_", " ") if rng.random() < 0.3 else p.name, v=show(p.value))
        for p in parameters
    ]
    return rng.choice((" and ", ", ", " and ")).join(shown)


def explicit_case(rng: random.Random, most: int = 3) -> ToolCase:
    """Return a tool with an invented name that the question names."""
    name = words.pseudo_word(rng, rng.choice((2, 2, 3)))
    if rng.random() < 0.5:
        other = rng.choice(words.VERBS) if rng.random() < 0.5 else words.pseudo_word(rng)
        name = f"{other}_{name}"
    taken: set[str] = set()
    parameters = [any_parameter(rng, taken) for _ in range(rng.randint(1, most))]
    if rng.random() < 0.06:
        parameters = []
    optional = [any_parameter(rng, taken, required=False)] if rng.random() < 0.2 else []
    asked = parameters + [p for p in optional if rng.random() < 0.5]
    if not asked:
        question = rng.choice(("Call {n}", "Use {n}", "Run {n}", "Please run {n} now")).format(
            n=name
        )
    elif len(asked) == 1 and rng.random() < 0.4:
        form = rng.choice(("Call {n} for {v}", "Use {n} on {v}", "Run {n} with {v}", "{n} {v}"))
        question = form.format(n=name, v=show(asked[0].value))
    else:
        form = rng.choice(
            ("Call {n} with {c}", "Use {n} with {c}", "Run {n}: {c}", "Use the tool {n} with {c}",
             "Call {n}, {c}", "I want you to call {n} with {c}", "Use the {n} tool, {c}")
        )  # fmt: skip
        question = form.format(n=name, c=_clauses(rng, asked))
    description = words.any_phrase(rng, 4).capitalize() + "." if rng.random() < 0.5 else ""
    return ToolCase(
        name=name,
        schema=_schema(rng, name, description, parameters + optional),
        question=_finish(rng, question),
        arguments={p.name: p.value for p in asked},
    )


def composed_case(rng: random.Random, nouns: list[str]) -> ToolCase:
    """Return a tool whose name is made of a verb and a noun that the question also uses."""
    verb, noun = rng.choice(words.VERBS), rng.choice(nouns)
    if rng.random() < 0.25:
        noun = f"{noun}_{rng.choice(words.NOUNS + words.TOPICS)}"
    if rng.random() < 0.15:
        noun = words.pseudo_word(rng)
    spoken = noun.replace("_", " ")
    name = f"{verb}_{noun}"
    if rng.random() < 0.1:
        name = verb + "".join(part.capitalize() for part in noun.split("_"))
    elif rng.random() < 0.08:
        name = f"{noun}_{verb}"
    taken: set[str] = set()
    parameters = [any_parameter(rng, taken) for _ in range(rng.choice((1, 1, 1, 2, 2, 3)))]
    optional = [any_parameter(rng, taken, required=False)] if rng.random() < 0.25 else []
    asked = parameters + [p for p in optional if rng.random() < 0.4]
    say = rng.choice((verb, verb, "get", "show", "find", "give me"))
    opening = rng.choice(
        (f"{say} the {spoken}", f"{say} the {spoken}", f"what is the {spoken}", f"{say} {spoken}",
         f"i need the {spoken}", f"can you {say} the {spoken}")
    )  # fmt: skip
    first, rest = asked[0], asked[1:]
    if rng.random() < 0.65:
        question = f"{opening} {rng.choice(('for', 'of', 'in', 'with', 'named', 'called', 'at'))} "
        question += show(first.value)
        if rest:
            question += rng.choice((" with ", ", ", " and ", ", with ")) + _clauses(rng, rest)
    else:
        question = f"{opening} {rng.choice(('with', 'for', 'where', 'by'))} {_clauses(rng, asked)}"
    if rng.random() < 0.7:
        question = question[0].upper() + question[1:]
    description = rng.choice(
        (f"{verb} the {spoken}.", f"{verb} {spoken}", f"{verb}s the {spoken}.")
    ).capitalize()
    return ToolCase(
        name=name,
        schema=_schema(rng, name, description, parameters + optional),
        question=_finish(rng, question),
        arguments={p.name: p.value for p in asked},
    )


_UNIT = ("celsius", "fahrenheit")


def _known_value(rng: random.Random, maker: str) -> tuple[Value, dict[str, Any]]:
    value: Value
    match maker.removesuffix("?"):
        case "unit":
            value, schema = rng.choice(_UNIT), {"type": "string", "enum": list(_UNIT)}
        case "int":
            value, schema = int(words.any_number(rng)), {"type": rng.choice(("integer", "number"))}
        case "small":
            value, schema = rng.randint(1, 20), {"type": "integer"}
        case "bool":
            value, schema = True, {"type": "boolean"}
        case "ticker":
            length = rng.randint(2, 4)
            value = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(length))
            schema = {"type": "string"}
        case "currency":
            value = rng.choice(words.listed("USD EUR GBP JPY CHF NOK SEK dollars euros pounds yen"))
            schema = {"type": "string"}
        case "room":
            value = rng.choice(
                words.listed("kitchen bedroom bathroom hall garage office cellar study")
            )
            schema = {"type": "string"}
        case "topic":
            value, schema = rng.choice(words.TOPICS), {"type": "string"}
        case "command":
            value = rng.choice(("ls", "ls -la", "cat", "rm", "mkdir", "git log", "python", "make"))
            value = f"{value} {words.any_path(rng)}" if rng.random() < 0.7 else value
            schema = {"type": "string"}
        case "url":
            tail = f"/{words.pseudo_word(rng)}" if rng.random() < 0.5 else ""
            value = f"https://{words.pseudo_word(rng)}.{rng.choice(('com', 'org'))}{tail}"
            schema = {"type": "string"}
        case "model":
            value = f"{words.pseudo_word(rng)}-{rng.randint(1, 70)}b"
            schema = {"type": "string"}
        case kind:
            value, schema = _STRING_KINDS[kind][1](rng), {"type": "string"}
    return value, schema


def known_case(rng: random.Random) -> ToolCase:
    """Return a well-known tool such as get_weather, its names drawn from a few."""
    spec = rng.choice(
        (KNOWN_TOOLS[0], KNOWN_TOOLS[2], KNOWN_TOOLS[3], KNOWN_TOOLS[5], *KNOWN_TOOLS, *KNOWN_TOOLS)
    )
    name = spec.names.split()[0] if rng.random() < 0.4 else rng.choice(spec.names.split())
    if rng.random() < 0.1:
        name = words.pseudo_word(rng, 2)
    question = rng.choice(spec.questions)
    parameters: list[Parameter] = []
    asked: Arguments = {}
    shown: list[str] = []
    for idx, (names, maker) in enumerate(spec.slots):
        options = names.split()
        used = f"{{{idx}}}" in question
        value, schema = _known_value(rng, maker)
        shown.append(show(value))
        # An optional parameter that the question leaves out is not always declared.
        if maker.endswith("?") and not used and rng.random() < 0.5:
            continue
        title = options[0] if rng.random() < 0.4 else rng.choice(options)
        if rng.random() < 0.12:
            title = words.pseudo_word(rng)
        if any(title == other.name for other in parameters):
            title = f"{title}_{idx}"
        required = not maker.endswith("?")
        parameters.append(Parameter(name=title, schema=schema, value=value, required=required))
        if used:
            asked[title] = value
    description = rng.choice(spec.description.split("|"))
    schema = _schema(rng, name, description, parameters)
    if name not in spec.names.split():
        schema["function"]["description"] = description
    text = question.format(*shown)
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    return ToolCase(name=name, schema=schema, question=_finish(rng, text), arguments=asked)


_BEFORE = ("Please ", "please ", "Hi! ", "Hello, ", "Can you help me? ", "Hey, ", "Now: ", "OK, ")
_AFTER = (" please", ", please", " now", " for me")


def _finish(rng: random.Random, question: str) -> str:
    """Return the question with a polite word and an end mark, or without."""
    if rng.random() < 0.15:
        question = rng.choice(_BEFORE) + question
    elif rng.random() < 0.08:
        question += rng.choice(_AFTER)
    asks = any(
        question.lower().startswith(word)
        for word in ("what", "how", "who", "where", "is ", "can", "which")
    )
    roll = rng.random()
    if roll < 0.45 and asks:
        return question + "?"
    return question + "." if roll < 0.4 else question


def any_case(rng: random.Random, stage: str = "full") -> ToolCase:
    """Return a tool case; stage `copy` draws mostly tools that the question names."""
    roll = rng.random()
    if stage == "copy":
        return explicit_case(rng, 2) if roll < 0.7 else known_case(rng)
    if roll < 0.25:
        return explicit_case(rng)
    if roll < 0.55:
        return composed_case(rng, words.NOUNS + words.TOPICS)
    return known_case(rng)


def held_out_case(rng: random.Random) -> ToolCase:
    """Return a case whose noun no training sample uses as a tool."""
    return composed_case(rng, words.HELD_OUT_NOUNS)


def offer(rng: random.Random, case: ToolCase, others: int) -> list[dict[str, Any]]:
    """Return the case's tool among others that do not serve its question."""
    offered = [case.schema]
    names = {case.name}
    about = {_about(case)}
    while len(offered) <= others:
        other = any_case(rng)
        if other.name in names or _about(other) in about:
            continue
        names.add(other.name)
        about.add(_about(other))
        offered.append(other.schema)
    rng.shuffle(offered)
    return offered


def _about(case: ToolCase) -> str:
    """Return what a tool does, so that two tools for one thing are not offered together."""
    for spec in KNOWN_TOOLS:
        if case.name in spec.names.split() or case.schema["function"].get(
            "description", "-"
        ) in spec.description.split("|"):
            return spec.names
    return case.name.split("_")[-1]
