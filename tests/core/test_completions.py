"""Requests for text completions: what is accepted, and what is refused in which words."""

from typing import Any

import msgspec
import pytest

from cortex.core.completions import count_prompts, parse_completion_request
from cortex.core.errors import BadRequestError, UnsupportedFieldError


def body(prompt: Any, **fields: Any) -> bytes:
    return msgspec.json.encode({"model": "m", "prompt": prompt, **fields})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a text", ["a text"]),
        ("", [""]),
        (["one", "two"], ["one", "two"]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_a_prompt_comes_in_four_forms(prompt: Any, prompts: list[Any]) -> None:
    request = parse_completion_request(body(prompt))
    assert request.prompts == prompts
    assert request.num_choices == len(prompts)
    assert count_prompts(msgspec.Raw(msgspec.json.encode(prompt))) == len(prompts)


def test_answers_are_counted_over_prompts_and_with_those_that_best_of_drops() -> None:
    request = parse_completion_request(body(["a", "b", "c"], n=2, best_of=4))
    assert (request.num_returned, request.num_made, request.num_choices) == (2, 4, 12)
    assert parse_completion_request(body("a", n=3)).num_choices == 3


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": None}, "prompt", "null"),
        ({"prompt": []}, "prompt", "at least one"),
        ({"prompt": ["a", 5]}, "prompt", "list of texts"),
        ({"prompt": ["a"] * 129}, "prompt", "129 prompts, 128 at most"),
        ({"prompt": ["a"] * 100, "n": 2}, "prompt", "200 answers"),
        ({"prompt": [0] * ((1 << 21) + 1)}, "prompt", "length <= 2097152"),
        ({"prompt": [[0] * ((1 << 21) + 1)]}, "prompt[0]", "length <= 2097152"),
        ({"prompt": [[1], [True]]}, "prompt[1][0]", "int"),
        ({"n": 3, "best_of": 2}, "best_of", "best_of is 2 and n 3"),
        ({"best_of": 9}, "best_of", "<= 8"),
        ({"logprobs": True}, "logprobs", "int"),
        ({"logprobs": 21}, "logprobs", "<= 20"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"temperature": 3}, "temperature", "<= 2"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse_completion_request(body(**{"prompt": "a", **fields}))
    assert caught.value.param == param
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"echo": True, "logprobs": 0}, "echo"),
        ({"stream": True, "n": 1, "best_of": 2}, "best_of"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        parse_completion_request(body("a", **fields))
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param in caught.value.message


def test_fields_without_effect_and_unknown_ones_are_accepted() -> None:
    request = parse_completion_request(
        body("a", suffix="", echo=False, logprobs=None, user="u", best_of=1, x_new=[1])
    )
    assert (request.suffix, request.num_choices, request.stops) == ("", 1, ())


@pytest.mark.parametrize("raw", [b"", b"null", b"5", b'{"a":1}', b"[]", b'["a', b"[1,2]", b' "a"'])
def test_what_is_no_list_of_prompts_counts_as_one(raw: bytes) -> None:
    assert count_prompts(msgspec.Raw(raw)) == 1


def test_white_space_in_a_list_of_prompts_does_not_matter() -> None:
    assert count_prompts(msgspec.Raw(b' [\n "a" , "b" ] ')) == 2
    assert count_prompts(msgspec.Raw(b"[ [1], [2], [3] ]")) == 3
