import re

from cortex.bundled.recipe import data, facts, render, unseen, words
from cortex.bundled.recipe.cases import read_calls, same
from cortex.bundled.recipe.tools import show

TEMPLATE = render.load_template()
DRAWN = [data.dialogue(3, idx) for idx in range(400)]
DRAWN += [data.dialogue(3, idx, "copy") for idx in range(200)]


def test_the_same_seed_and_index_give_the_same_dialogue():
    again = [data.dialogue(3, idx) for idx in range(400)]

    assert again == DRAWN[:400]


def test_another_seed_gives_other_dialogues():
    assert [data.dialogue(4, idx) for idx in range(20)] != DRAWN[:20]


def test_every_kind_of_dialogue_is_drawn():
    assert {item.kind for item in DRAWN} >= {
        "call", "count", "echo", "faq", "list", "name", "no_tool", "recall", "relation", "result",
        "story", "sum", "talk", "trivia", "unknown",
    }  # fmt: skip


def test_every_dialogue_ends_with_the_assistant():
    assert all(item.messages[-1]["role"] == "assistant" for item in DRAWN)


def test_a_call_in_the_data_reads_back_from_its_rendered_text():
    calls = [item for item in DRAWN if item.kind == "call"]

    for item in calls:
        text = render.render(TEMPLATE, item.messages, item.tools)
        (name, arguments) = item.calls[0]
        found = read_calls(text.rpartition("<|im_start|>assistant")[2])
        assert found == [(name, {key: show(value) for key, value in arguments.items()})]
    assert len(calls) > 50


def test_a_call_names_an_offered_tool_and_its_declared_parameters():
    for item in DRAWN:
        offered = {tool["function"]["name"]: tool["function"] for tool in item.tools or []}
        for name, arguments in item.calls:
            assert arguments.keys() <= offered[name]["parameters"]["properties"].keys()
            assert arguments.keys() >= set(offered[name]["parameters"].get("required", []))


def test_a_question_for_a_tool_holds_every_value_of_the_call():
    for item in DRAWN:
        for _, arguments in item.calls:
            question = item.messages[-2]["content"].lower()
            texts = [show(value).lower() for value in arguments.values() if value is not True]
            assert all(text in question for text in texts), question


def test_answers_are_plain_ascii():
    assert all(item.messages[-1]["content"].isascii() for item in DRAWN)


def test_no_question_of_the_faq_has_two_answers():
    wordings = [
        wording
        for table in (facts.ABOUT, facts.SMALL_TALK, facts.TRIVIA)
        for key in table
        for wording in key.split("|")
    ]

    assert len(wordings) == len(set(wordings))


def test_the_evaluation_asks_what_the_training_data_does_not_hold():
    questions = {message["content"] for item in DRAWN for message in item.messages}

    assert questions.isdisjoint(unseen.UNKNOWN)
    assert questions.isdisjoint(question for _, question, _ in unseen.CALLS)
    assert set(words.HELD_OUT_NOUNS).isdisjoint(words.NOUNS + words.TOPICS)


def test_counting_reaches_the_number_asked_for():
    counts = [item for item in DRAWN if item.kind == "count"]

    for item in counts:
        question, answer = item.messages[-2]["content"], item.messages[-1]["content"]
        last = re.findall(r"\d+", question)[-1]
        assert last in (answer.split(", ")[-1], answer.split(", ")[0])


def test_a_broken_call_is_read_as_none():
    assert read_calls("<tool_call>\n<function=a>\n<parameter=b>\n1\n") == [None]


def test_arguments_are_compared_by_value():
    assert same(5, 5.0)
    assert same(True, "true")
    assert not same("Oslo", "oslo")
