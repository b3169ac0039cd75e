"""Prompts encoded in pieces: the same ids as in one go, and each piece once."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from cortex.neuron.chat import segments
from cortex.neuron.chat.segments import SegmentedEncoder
from tests.support.chat_models import MARKERS, PROPERTY, SPECIAL, train_tokenizer

TURN = "<|im_start|>user\n" + "the sky is blue " * 40


class Counting:
    """A tokenizer that notes what it was asked to encode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.encoded: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.encoded += texts
        return self._tokenizer.encode_batch_fast(texts, **options)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture
def counting(tokenizer: Tokenizer) -> Counting:
    return Counting(tokenizer)


def encoder_of(counting: Counting) -> SegmentedEncoder:
    return SegmentedEncoder(counting)  # type: ignore[arg-type]


_parts = st.lists(
    st.sampled_from([*SPECIAL, *MARKERS, "user\n", " ", "  \n", "<|im_", "end|>", "'s 12"])
    | st.text(max_size=30)
    | st.just("the sky is blue. " * 60),
    max_size=20,
).map("".join)


@PROPERTY
@given(texts=st.lists(_parts, min_size=1, max_size=3))
def test_pieces_have_the_ids_of_the_whole(tokenizer: Tokenizer, texts: list[str]) -> None:
    encoder = SegmentedEncoder(tokenizer)
    for text in (*texts, *texts, "".join(texts)):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert encoder.encode(text) == ids
        assert encoder.count(text) == len(ids)


def test_of_a_conversation_only_what_is_new_is_encoded(counting: Counting) -> None:
    encoder = encoder_of(counting)
    first = encoder.count(TURN + TURN.replace("blue", "red"))
    assert len(counting.encoded) == 2
    counting.encoded.clear()
    answer = "<|im_start|>assistant\n" + "It is so. " * 80
    assert encoder.count(TURN + TURN.replace("blue", "red") + answer) > first
    assert counting.encoded == [answer]


def test_a_repeated_piece_is_encoded_once(counting: Counting) -> None:
    assert encoder_of(counting).count(TURN * 5) % 5 == 0
    assert counting.encoded == [TURN]


def test_short_turns_go_together(counting: Counting) -> None:
    short = "<|im_start|>user\nHi<|im_end|>\n"
    encoder_of(counting).encode(short * 200)
    assert all(len(piece) >= 512 for piece in counting.encoded[:-1])


def test_the_memory_of_pieces_has_a_bound(
    counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "MAX_CHARS", 3 * len(TURN))
    encoder = encoder_of(counting)
    turns = [TURN.replace("blue", colour) for colour in ("red1", "red2", "red3", "red4", "red5")]
    for turn in turns:
        encoder.encode(turn)
    counting.encoded.clear()
    encoder.encode(turns[-1])
    assert counting.encoded == []
    encoder.encode(turns[0])
    assert counting.encoded == [turns[0]]


def test_a_splitter_that_puts_a_space_before_the_first_word_forbids_cuts() -> None:
    plain = train_tokenizer()
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    counting = Counting(plain)
    text = TURN + TURN
    assert encoder_of(counting).encode(text) == plain.encode(text, add_special_tokens=False).ids
    assert counting.encoded == [text]


@pytest.mark.parametrize(
    "odd",
    [
        AddedToken("x<|im_start|>", special=True, normalized=False),
        AddedToken("x<|im", special=False, normalized=False),
    ],
)
def test_no_cut_is_made_where_another_token_may_begin_earlier(odd: AddedToken) -> None:
    other = train_tokenizer()
    other.add_tokens([odd])
    text = ("the sky is blue " * 40 + "x<|im_start|>") * 3
    encoder = SegmentedEncoder(other)
    assert encoder.encode(text) == other.encode(text, add_special_tokens=False).ids


def test_a_tokenizer_without_splitter_is_encoded_whole() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    words.add_special_tokens(["<s>"])
    counting = Counting(words)
    encoder_of(counting).encode("<s>a" * 500)
    assert counting.encoded == ["<s>a" * 500]
