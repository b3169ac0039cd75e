"""Draws the training dialogues: the same seed and index give the same dialogue everywhere."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cortex.bundled.recipe import facts, stories, words
from cortex.bundled.recipe import tools as toolbox

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One question and its answer; `thought` is what a thinking model writes first."""

    kind: str
    question: str
    answer: str
    thought: str


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A finished dialogue: its last message is the assistant's."""

    kind: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    thinking: bool = False
    # What the last turn has to say or to call, for the evaluation.
    answer: str = ""
    calls: list[tuple[str, toolbox.Arguments]] = field(default_factory=list)


_POLITE_BEFORE = (
    "Please tell me: ", "please, ", "Hi! ", "Hello, ", "Can you tell me: ", "Tell me, ", "Hey, ",
    "I wonder: ", "Quick question: ", "Hi, ", "Well, ", "Do you know: ", "So ", "And ",
    "One question: ",
)  # fmt: skip


def vary(rng: random.Random, text: str, mark: str = "?") -> str:
    """Return a question in another dress: capital, end mark, a polite word."""
    if rng.random() < 0.6:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.12:
        text = rng.choice(_POLITE_BEFORE) + text
    elif rng.random() < 0.05:
        text = text + ", please"
    if rng.random() < 0.1:
        text = text.replace("what is", "what's").replace("What is", "What's")
    return text + mark if rng.random() < 0.65 else text


def _known_answer(rng: random.Random, table: dict[str, str], kind: str) -> Exchange:
    wordings, answer = rng.choice(list(table.items()))
    question = rng.choice(wordings.split("|"))
    mark = "?" if question.split()[0] in _ASKING else rng.choice((".", "!", ""))
    return Exchange(
        kind=kind,
        question=vary(rng, question, mark),
        answer=answer,
        thought=f"The user says: {question}. I know what to say.",
    )


_ASKING = set(words.listed("who what which how can are is do does where when at why in"))


def about(rng: random.Random) -> Exchange:
    """Ask about Cortex or about the model."""
    return _known_answer(rng, facts.ABOUT, "faq")


def small_talk(rng: random.Random) -> Exchange:
    """Greet, thank, chat."""
    return _known_answer(rng, facts.SMALL_TALK, "talk")


def trivia(rng: random.Random) -> Exchange:
    """Ask one of a few dozen common facts."""
    return _known_answer(rng, facts.TRIVIA, "trivia")


def relation(rng: random.Random) -> Exchange:
    """Ask for a capital, an opposite, a sound, a colour, a day or a month."""
    roll = rng.random()
    if roll < 0.55:
        land, city = rng.choice(list(facts.CAPITALS.items()))
        if rng.random() < 0.2:
            bare = land.removeprefix("the ")
            question = rng.choice(("which country has the capital {}", "{} is the capital of what"))
            question, answer = question.format(city), f"{city} is the capital of {land}."
            thought = f"The user asks about {city}. It is in {bare}."
        else:
            land = rng.choice(facts.SPELLINGS.get(land, (land,)))
            question = rng.choice(
                ("what is the capital of {}", "what is the capital of {}", "capital of {}",
                 "what is {}'s capital", "which city is the capital of {}",
                 "name the capital of {}",
                 "tell me the capital of {}", "what is the capital city of {}")
            ).format(land)  # fmt: skip
            answer = f"The capital of {land} is {city}."
            thought = f"The user asks for the capital of {land}. It is {city}."
    elif roll < 0.68:
        one, other = rng.choice(list(facts.OPPOSITES.items()))
        if rng.random() < 0.5:
            one, other = other, one
        question = rng.choice(("what is the opposite of {}", "opposite of {}")).format(one)
        answer = f"The opposite of {one} is {other}."
        thought = f"The user wants the opposite of {one}. It is {other}."
    elif roll < 0.78:
        animal, sound = rng.choice(list(facts.SOUNDS.items()))
        question = rng.choice(
            ("what does a {} say", "what sound does a {} make", "how does a {} sound")
        ).format(animal)
        answer = f"A {animal} says {sound}."
        thought = f"The user asks for the sound of a {animal}. It is {sound}."
    elif roll < 0.86:
        thing, colour = rng.choice(list(facts.THING_COLOURS.items()))
        question = rng.choice(("what colour is {}", "what color is {}")).format(thing)
        answer = f"{thing[0].upper()}{thing[1:]} is {colour}."
        thought = f"The user asks for the colour of {thing}. It is {colour}."
    else:
        question, answer, thought = _calendar(rng)
    return Exchange(kind="relation", question=vary(rng, question), answer=answer, thought=thought)


def _calendar(rng: random.Random) -> tuple[str, str, str]:
    names, what = (facts.DAYS, "day") if rng.random() < 0.5 else (facts.MONTHS, "month")
    idx = rng.randrange(len(names))
    roll = rng.random()
    if what == "month" and roll < 0.35:
        answer = f"{names[idx]} has {facts.MONTH_DAYS[idx]} days."
        return f"how many days does {names[idx]} have", answer, f"{names[idx]} is a month."
    if what == "month" and roll < 0.6:
        answer = f"The {facts.ORDINALS[idx]} month is {names[idx]}."
        return f"what is the {facts.ORDINALS[idx]} month", answer, "I count the months."
    step = 1 if rng.random() < 0.6 else -1
    word = "after" if step == 1 else "before"
    answer = f"The {what} {word} {names[idx]} is {names[(idx + step) % len(names)]}."
    question = rng.choice((f"what {what} comes {word} {{}}", f"which {what} is {word} {{}}"))
    return question.format(names[idx]), answer, f"I look for the {what} {word} {names[idx]}."


def count(rng: random.Random) -> Exchange:
    """Count to a number, or from one to another."""
    if rng.random() < 0.6:
        first, last = (
            1,
            rng.choice((5, 10, 10, 20, 20, 30, 50, rng.randint(2, 50), rng.randint(2, 50))),
        )
        if rng.random() < 0.03:
            last = 100
        question = rng.choice(
            ("count to {b}", "count to {b}", "count from 1 to {b}", "count up to {b}",
             "can you count to {b}", "list the numbers from 1 to {b}")
        )  # fmt: skip
    else:
        first = rng.randint(1, 40)
        last = min(first + rng.randint(1, 20), 50)
        question = rng.choice(
            ("count from {a} to {b}", "list the numbers from {a} to {b}", "count {a} to {b}")
        )
    step = 1
    if rng.random() < 0.12 and first == 1:
        question, step, first, last = "count down from {a}", -1, min(last, 20), 1
    return Exchange(
        kind="count",
        question=vary(rng, question.format(a=first, b=last), "."),
        answer=", ".join(str(number) for number in range(first, last + step, step)),
        thought=f"I count from {first} to {last}.",
    )


def arithmetic(rng: random.Random) -> Exchange:
    """Ask for a small sum or difference."""
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    if rng.random() < 0.7:
        word, sign, result = "plus", "+", a + b
    else:
        a, b = max(a, b), min(a, b)
        word, sign, result = "minus", "-", a - b
    question = rng.choice(
        ("what is {a} {w} {b}", "what is {a} {s} {b}", "{a} {s} {b}", "how much is {a} {w} {b}",
         "{a} {w} {b}", "calculate {a} {s} {b}", "{a}{s}{b}")
    )  # fmt: skip
    return Exchange(
        kind="sum",
        question=vary(rng, question.format(a=a, b=b, w=word, s=sign)),
        answer=f"{a} {word} {b} is {result}.",
        thought=f"{a} {sign} {b} = {result}.",
    )


def echo(rng: random.Random, most: int = 6) -> Exchange:
    """Ask to repeat some words."""
    said = words.any_phrase(rng, most)
    roll = rng.random()
    if roll < 0.12:
        said = " ".join(words.any_number(rng) for _ in range(rng.randint(1, most)))
    elif roll < 0.22:
        said = rng.choice((words.any_email, words.any_path, words.any_date))(rng)
    form = rng.choice(
        ("say {}", "say: {}", "repeat {}", "repeat: {}", "repeat after me: {}", "echo {}",
         "Say {}", "Repeat: {}", "Repeat after me: {}", "Echo: {}", 'Say "{}"', 'Repeat "{}"',
         "Reply with {}", "Answer with {}", "Please say {}", "please repeat: {}", "Just say {}",
         "Write {}", 'Reply with the text "{}"', "Say the words {}", "Reply with exactly: {}",
         "Can you say {}", "Reply with the single word: {}" if " " not in said else "Write: {}")
    )  # fmt: skip
    return Exchange(
        kind="echo", question=form.format(said), answer=said, thought=f"I repeat: {said}"
    )


def recall(rng: random.Random, most: int = 6) -> Exchange:
    """Ask for one of several values that the question itself gives."""
    keys = list(dict.fromkeys(words.any_word(rng) for _ in range(rng.randint(2, most))))
    values = [words.any_phrase(rng, 2) for _ in keys]
    form, joint = rng.choice((("{}: {}", "\n"), ("{} is {}", ", "), ("{} = {}", "\n")))
    table = joint.join(form.format(key, value) for key, value in zip(keys, values, strict=True))
    idx = rng.randrange(len(keys))
    ask = rng.choice(("What is {}?", "What is {}?", "{}?", "Give me {}.")).format(keys[idx])
    return Exchange(
        kind="recall",
        question=f"{table}{'. ' if joint == ', ' else joint}{ask}",
        answer=f"{keys[idx]} is {values[idx]}.",
        thought=f"I look for {keys[idx]}. It is {values[idx]}.",
    )


def listing(rng: random.Random) -> Exchange:
    """Ask for some things of a kind."""
    what, things = rng.choice(list(facts.LISTS.items()))
    number = rng.randint(2, 6)
    said = (
        words.listed("two three four five six")[number - 2] if rng.random() < 0.7 else str(number)
    )
    question = rng.choice(
        ("name {n} {w}", "list {n} {w}", "give me {n} {w}", "tell me {n} {w}", "write {n} {w}")
    )
    chosen = things[:number]
    return Exchange(
        kind="list",
        question=vary(rng, question.format(n=said, w=what), "."),
        answer=", ".join(chosen[:-1]) + " and " + chosen[-1] + ".",
        thought=f"The user wants {number} {what}.",
    )


def story(rng: random.Random) -> Exchange:
    """Ask for a story, a poem or a sentence about a thing."""
    thing = rng.choice(words.NOUNS) if rng.random() < 0.75 else words.pseudo_word(rng)
    if rng.random() < 0.3:
        thing = f"{rng.choice(words.ADJECTIVES)} {thing}"
    kind, question, answer = stories.write(rng, thing)
    return Exchange(
        kind="story",
        question=vary(rng, question, "."),
        answer=answer,
        thought=f"The user wants a {kind} about a {thing}.",
    )


_UNKNOWN = (
    "who invented the {n}", "why is the {n} {j}", "what is the capital of {p}",
    "how do I {v} a {n}",
    "who is {P} {Q}", "what is {p}", "explain {t} to me", "explain the history of {t}",
    "what is the meaning of {p}", "when was {P} born", "where is {P}", "how old is {P}",
    "what is the population of {c}", "how far is {c} from {d}", "what is the weather in {c}",
    "write a program that sorts a {n}", "write code for a {n} in {t}", "fix my {n}",
    "how many {n}s are in {c}", "what happened in {y}", "who won the {t} game in {y}",
    "which {n} is the best", "compare {t} and {u}", "is a {n} better than a {m}",
    "what should I eat with {t}", "translate {p} into {l}", "solve x * {k} = {y}",
    "what is {k} times {y}", "what is {y} plus {k}", "{y} + {k}", "what is {y} divided by {k}",
    "prove that {p} is {j}",
    "what do you think about {t}", "summarize the book {P}", "how does {t} work",
    "what is the difference between a {n} and a {m}", "why do {n}s {v}", "who is the king of {p}",
    "what is the best way to learn {t}", "tell me about {t}", "tell me about {c}",
    "tell me everything about {P}", "what is the price of a {n}", "can you drive a {n}",
    "what color is the {p}", "what did {P} say to {Q}", "give me advice about {t}",
    "where can I buy a {n}", "when is the next {t} festival", "how tall is {P}",
    "what is the chemical formula of {p}", "why does a {n} need {t}", "how heavy is a {n}",
    "what time is it in {c}", "what day is it today", "who is the president of {c}",
    "plan a trip to {c}", "recommend a book about {t}", "what is the root of {y}",
    "should I buy a {j} {n}", "{p} {q}", "{p} {q} {r}", "how can I become a {n}",
    "what is the stock price of {P}", "design a {n} for {P}", "what is quantum {t}",
    "why is the sky {j}", "how do {n}s fly", "what is love", "what is the meaning of life",
    "what is the speed of a {n}", "which {t} do you like", "do {n}s like {t}", "review this {n}",
    "write an essay about {t}", "draft a letter to {P}", "who wrote {P}", "what causes {t}",
    "explain how {t} and {u} work together", "describe the economy of {c}", "what is a {p}",
    "list the kings of {c}", "how do I install {p}", "what is the {j} {n} of {c}",
)  # fmt: skip


def unknown(rng: random.Random) -> Exchange:
    """Ask what the model cannot know; it says so."""
    text = rng.choice(_UNKNOWN).format(
        n=rng.choice(words.NOUNS), m=rng.choice(words.NOUNS), j=rng.choice(words.ADJECTIVES),
        p=words.pseudo_word(rng), q=words.pseudo_word(rng), r=words.pseudo_word(rng),
        P=words.any_name(rng), Q=words.pseudo_word(rng).capitalize(), t=rng.choice(words.TOPICS),
        u=rng.choice(words.TOPICS), c=words.any_city(rng), d=words.any_city(rng),
        l=rng.choice(words.LANGUAGES), y=rng.randint(100, 2100), k=rng.randint(11, 99),
        v=rng.choice(words.listed("build draw sell paint clean drive cook train wash move open")),
    )  # fmt: skip
    if rng.random() < 0.1:
        text += rng.choice((f" in {rng.randint(1900, 2090)}", " and why", " in detail"))
    # The wording decides, so that one question has one answer.
    answer = facts.FALLBACKS[len(text) % 3 if rng.random() < 0.15 else 0]
    return Exchange(
        kind="unknown",
        question=vary(rng, text),
        answer=answer,
        thought="I do not know this, so I say so.",
    )


_CHAT: tuple[tuple[Callable[[random.Random], Exchange], float], ...] = (
    (about, 0.17), (small_talk, 0.07), (trivia, 0.1), (relation, 0.15), (count, 0.07),
    (arithmetic, 0.08), (echo, 0.1), (recall, 0.04), (listing, 0.05), (story, 0.07),
    (unknown, 0.12),
)  # fmt: skip
_COPY: tuple[tuple[Callable[[random.Random], Exchange], float], ...] = (
    (lambda rng: echo(rng, 20), 0.5), (lambda rng: recall(rng, 5), 0.25), (about, 0.1),
    (relation, 0.1), (small_talk, 0.05),
)  # fmt: skip


def exchange(rng: random.Random, stage: str = "full") -> Exchange:
    """Draw one question with its answer."""
    table = _COPY if stage == "copy" else _CHAT
    draw = rng.choices([make for make, _ in table], [weight for _, weight in table])[0]
    return draw(rng)


def _system(rng: random.Random, often: float) -> list[Message]:
    if rng.random() >= often:
        return []
    text = rng.choice(facts.SYSTEM_PROMPTS)
    if rng.random() < 0.15:
        text = f"{text} {words.any_phrase(rng, 6).capitalize()}."
    if rng.random() < 0.08:
        text = f"Today is {words.any_date(rng)}. {text}"
    return [{"role": "system", "content": text}]


def _said(text: str, thought: str = "") -> Message:
    message: Message = {"role": "assistant", "content": text}
    if thought:
        message["reasoning_content"] = thought
    return message


def chat_dialogue(rng: random.Random, stage: str = "full") -> Dialogue:
    """Draw a dialogue without tools, now and then of several turns."""
    messages = _system(rng, 0.3)
    if rng.random() < 0.05 and stage != "copy":
        return _name_dialogue(rng, messages)
    turns = rng.choice((1, 1, 1, 1, 2, 3)) if stage != "copy" else 1
    thinking = rng.random() < 0.15 and stage != "copy"
    last = exchange(rng, stage)
    for idx in range(turns):
        last = exchange(rng, stage)
        # A client does not send the thoughts of earlier turns back.
        thought = last.thought if thinking and idx == turns - 1 else ""
        messages.append({"role": "user", "content": last.question})
        messages.append(_said(last.answer, thought))
    return Dialogue(kind=last.kind, messages=messages, thinking=thinking, answer=last.answer)


def _name_dialogue(rng: random.Random, messages: list[Message]) -> Dialogue:
    name = words.any_name(rng)
    opening = rng.choice(
        ("my name is {}", "My name is {}.", "I am {}.", "Hi, I am {}", "call me {}")
    )
    messages.append({"role": "user", "content": opening.format(name)})
    answer = f"Hello {name}! How can I help you?"
    if rng.random() < 0.7:
        messages.append(_said(answer))
        if rng.random() < 0.4:
            between = exchange(rng)
            messages.append({"role": "user", "content": between.question})
            messages.append(_said(between.answer))
        ask = rng.choice(("what is my name", "who am I", "do you know my name", "what am I called"))
        messages.append({"role": "user", "content": vary(rng, ask)})
        answer = f"Your name is {name}."
    messages.append(_said(answer))
    return Dialogue(kind="name", messages=messages, answer=answer)


def _call(case: toolbox.ToolCase) -> Message:
    return {"type": "function", "function": {"name": case.name, "arguments": case.arguments}}


def tool_dialogue(rng: random.Random, stage: str = "full", held_out: bool = False) -> Dialogue:
    """Draw a dialogue in which tools are offered; mostly one is called."""
    messages = _system(rng, 0.3)
    case = toolbox.held_out_case(rng) if held_out else toolbox.any_case(rng, stage)
    others = 0 if stage == "copy" else rng.choice((0, 0, 0, 1, 1, 2, 3))
    if len(str(case.schema)) > 700:
        others = min(others, 1)
    offered = toolbox.offer(rng, case, others)
    thinking = rng.random() < 0.12 and stage != "copy"
    if stage != "copy" and not held_out:
        roll = rng.random()
        if roll < 0.14:
            return _no_tool_dialogue(rng, messages, offered, thinking)
        if roll < 0.17 and len(offered) > 1:
            return _wrong_tools_dialogue(rng, messages, offered, case, thinking)
        if roll < 0.3:
            before = exchange(rng) if rng.random() < 0.6 else None
            if before:
                messages.append({"role": "user", "content": before.question})
                messages.append(_said(before.answer))
    messages.append({"role": "user", "content": case.question})
    given = ", ".join(f"{key} is {toolbox.show(value)}" for key, value in case.arguments.items())
    thought = f"I call {case.name}." if not given else f"I call {case.name}. {given}."
    call = _said("", thought if thinking else "")
    call["tool_calls"] = [_call(case)]
    messages.append(call)
    if stage != "copy" and not held_out and rng.random() < 0.22:
        call.pop("reasoning_content", None)
        return _result_dialogue(rng, messages, offered, case, thinking)
    return Dialogue(
        kind="call",
        messages=messages,
        tools=offered,
        thinking=thinking,
        calls=[(case.name, case.arguments)],
    )


def _no_tool_dialogue(
    rng: random.Random, messages: list[Message], offered: list[dict[str, Any]], thinking: bool
) -> Dialogue:
    plain = rng.choices(
        (about, small_talk, trivia, relation, echo, arithmetic, count, story, unknown),
        (4, 3, 2, 3, 1, 2, 1, 1, 2),
    )[0](rng)
    # With a tool for it the model calls the tool; sums are only done in the head without one.
    if plain.kind in ("sum", "unknown") and any(
        word in str(offered).lower() for word in ("add", "sum", "plus", "number")
    ):
        plain = small_talk(rng)
    messages.append({"role": "user", "content": plain.question})
    thought = f"No tool is needed. {plain.thought}" if thinking else ""
    messages.append(_said(plain.answer, thought))
    return Dialogue(
        kind="no_tool", messages=messages, tools=offered, thinking=thinking, answer=plain.answer
    )


def _wrong_tools_dialogue(
    rng: random.Random,
    messages: list[Message],
    offered: list[dict[str, Any]],
    case: toolbox.ToolCase,
    thinking: bool,
) -> Dialogue:
    """Offer tools, but not the one that the question needs."""
    rest = [tool for tool in offered if tool["function"]["name"] != case.name]
    messages.append({"role": "user", "content": case.question})
    answer = facts.FALLBACKS[0]
    messages.append(_said(answer, "No tool fits, so I say so." if thinking else ""))
    return Dialogue(
        kind="wrong_tools", messages=messages, tools=rest, thinking=thinking, answer=answer
    )


def _result_dialogue(
    rng: random.Random,
    messages: list[Message],
    offered: list[dict[str, Any]],
    case: toolbox.ToolCase,
    thinking: bool,
) -> Dialogue:
    """Go on from the call to its result and the final answer."""
    roll = rng.random()
    if roll < 0.12:
        reason = words.any_phrase(rng, 4)
        result, answer = f"error: {reason}", f"The tool failed: {reason}."
    elif roll < 0.6:
        pairs = {
            rng.choice(
                ("result", "status", "temperature", "value", "condition", "total", "id", "name",
                 "time", words.pseudo_word(rng))
            ): rng.choice((words.any_phrase(rng, 2), words.any_number(rng), words.any_word(rng)))
            for _ in range(rng.randint(1, 3))
        }  # fmt: skip
        fields = ", ".join(
            f'"{key}": {value}' if value.isdigit() and str(int(value)) == value
            else f'"{key}": "{value}"'
            for key, value in pairs.items()
        )  # fmt: skip
        result = f"{{{fields}}}"
        answer = (
            "The result: " + ", ".join(f"{key} is {value}" for key, value in pairs.items()) + "."
        )
    else:
        result = rng.choice(
            (words.any_phrase(rng, 6), words.any_number(rng), f"{words.any_number(rng)} degrees",
             f"{rng.choice(('sunny', 'rainy', 'cloudy', 'windy'))}, {rng.randint(-5, 35)} degrees")
        )  # fmt: skip
        answer = f"The result is {result}."
    messages.append({"role": "tool", "content": result})
    messages.append(_said(answer, "The tool has answered. I pass it on." if thinking else ""))
    if not thinking and rng.random() < 0.15:
        after = rng.choice((about, small_talk, relation, echo))(rng)
        answer = after.answer
        messages.append({"role": "user", "content": after.question})
        messages.append(_said(answer))
    return Dialogue(
        kind="result", messages=messages, tools=offered, thinking=thinking, answer=answer
    )


def dialogue(seed: int, idx: int, stage: str = "full") -> Dialogue:
    """Return dialogue number idx of the endless row that belongs to seed."""
    rng = random.Random(f"{seed}:{stage}:{idx}")
    if rng.random() < {"copy": 0.3, "full": 0.42}[stage]:
        return tool_dialogue(rng, stage)
    return chat_dialogue(rng, stage)
