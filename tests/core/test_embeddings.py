import msgspec
import pytest

from cortex.core.embeddings import (
    EMBEDDINGS,
    TEXT,
    EmbeddingList,
    EmbeddingUsage,
    EmbeddingVector,
    cannot,
    parse_embedding_request,
)
from cortex.core.errors import BadRequestError


def parse(given, **fields):
    return parse_embedding_request(msgspec.json.encode({"model": "m", "input": given, **fields}))


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ("  ", ["  "]),
    ],
)
def test_the_four_forms_of_input_are_told_apart(given, inputs):
    assert parse(given).inputs == inputs


def test_an_error_names_a_text_by_its_index_where_there_are_several():
    assert parse("a").place(0) == "input"
    assert parse([1, 2]).place(0) == "input"
    assert parse(["a"]).place(0) == "input[0]"
    assert parse([[1], [2]]).place(1) == "input[1]"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([], "input"),
        ("", "input"),
        (["a", 1], "input"),
        ([1, [2]], "input"),
        ([1, "a"], "input"),
        (["a"] * 2049, "input"),
        ([[]], "input[0]"),
        (["a", "b", ""], "input[2]"),
        (None, "input"),
        ({}, "input"),
        ([1.5], "input[0]"),
        ("a" * ((1 << 20) + 1), "input"),
        ([[1] * ((1 << 17) + 1)], "input[0]"),
    ],
)
def test_what_is_no_input_is_refused_by_name(given, param):
    with pytest.raises(BadRequestError) as caught:
        parse(given)
    assert caught.value.param == param


def test_as_many_texts_as_allowed_and_unknown_fields_are_accepted():
    assert len(parse(["a"] * 2048, x_new=1, user="u", dimensions=None).inputs) == 2048


@pytest.mark.parametrize(
    ("field", "value"), [("encoding_format", "int8"), ("dimensions", 0), ("dimensions", 1 << 17)]
)
def test_other_fields_have_bounds(field, value):
    with pytest.raises(BadRequestError) as caught:
        parse("a", **{field: value})
    assert caught.value.param == field


def test_an_answer_has_numbers_or_their_base64():
    answer = EmbeddingList(
        data=[
            EmbeddingVector(index=0, embedding=[0.5]),
            EmbeddingVector(index=1, embedding=b"\x00\x00\x00\x3f"),
        ],
        model="m",
        usage=EmbeddingUsage(prompt_tokens=3, total_tokens=3),
    )
    assert msgspec.json.decode(msgspec.json.encode(answer)) == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.5]},
            {"object": "embedding", "index": 1, "embedding": "AAAAPw=="},
        ],
        "model": "m",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }


def test_a_model_says_what_it_is_not_made_for_and_where_to_go():
    assert "choose one whose capabilities" in cannot("m", EMBEDDINGS).message
    assert "ask /v1/embeddings" in cannot("m", TEXT).message
    assert (cannot("m", TEXT).status, cannot("m", TEXT).code) == (400, "model_capability")
