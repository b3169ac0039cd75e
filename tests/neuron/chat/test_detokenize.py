"""Ids to text, piece by piece."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from cortex.neuron.chat.detokenize import TextStream
from cortex.neuron.chat.tokenizer import ChatTokenizer
from tests.support.chat_models import PROPERTY, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def fallback_tokenizer(directory: Path) -> ChatTokenizer:
    """One in the manner of SentencePiece: a space mark, and bytes as tokens of their own."""
    vocab = {"<unk>": 0, "</s>": 1, "▁Hello": 2, "▁wor": 3, "ld": 4}
    vocab |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    return ChatTokenizer(tokenizer, path=str(path), eos_token="</s>")


def stream(tokenizer: ChatTokenizer, pieces: list[list[int]]) -> list[str]:
    text = TextStream(tokenizer)
    return [text.feed(piece) for piece in pieces] + [text.flush()]


def test_a_character_waits_for_its_last_byte(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode("é!")
    assert stream(tokenizer, [[at] for at in ids]) == ["", "é", "!", ""]


def test_an_unfinished_character_shows_as_replacement_at_the_end(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode("a🎉")[:-1]
    assert "".join(stream(tokenizer, [ids])) == "a\ufffd"


def test_special_tokens_are_dropped_and_markers_shown(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode("<think>a<|im_end|></tool_call>")
    assert stream(tokenizer, [ids]) == ["<think>a</tool_call>", ""]


def test_padding_rows_are_dropped(tokenizer: ChatTokenizer) -> None:
    ids = [*tokenizer.encode("a"), 99_999, *tokenizer.encode("b")]
    assert stream(tokenizer, [ids]) == ["ab", ""]


@PROPERTY
@given(st.data())
def test_the_cut_of_a_token_stream_does_not_matter(
    tokenizer: ChatTokenizer, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    whole = "".join(stream(tokenizer, [ids]))
    cut = data.draw(st.integers(0, len(ids)))
    assert "".join(stream(tokenizer, [ids[:cut], ids[cut:]])) == whole
    assert "".join(stream(tokenizer, [[at] for at in ids])) == whole
    assert whole == tokenizer.decode(ids)


@PROPERTY
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_comes_back_token_by_token(tokenizer: ChatTokenizer, text: str) -> None:
    ids = [at for at in tokenizer.encode(text) if at not in tokenizer.special_ids]
    assert "".join(stream(tokenizer, [[at] for at in ids])) == tokenizer.decode(ids)


def test_tokens_that_are_not_bytes_are_decoded_in_context(tmp_path: Path) -> None:
    tokenizer = fallback_tokenizer(tmp_path)
    assert not tokenizer.is_byte_level
    # "é" is the bytes C3 A9.
    ids = [2, 3, 4, 5 + 0xC3, 5 + 0xA9, 1]
    assert stream(tokenizer, [[at] for at in ids]) == ["Hello", " wor", "ld", "", "é", "", ""]


def test_bytes_that_never_make_a_character_are_not_held_for_ever(tmp_path: Path) -> None:
    tokenizer = fallback_tokenizer(tmp_path)
    pieces = stream(tokenizer, [[5 + 0xC3]] * 20)
    assert pieces[7] == "\ufffd" * 8
    assert "".join(pieces) == "\ufffd" * 20
