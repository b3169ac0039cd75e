import pytest
from tokenizers import Tokenizer

from cortex.bundled.recipe import data, render
from cortex.bundled.recipe.tokenizer import ADDED, SPECIAL, train_tokenizer

TOKENIZER = Tokenizer.from_file(str(render.MODEL_DIR / "tokenizer.json"))
TEMPLATE = render.load_template()


def decode(ids, *, skip_special_tokens=False):
    return TOKENIZER.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("stage", ["full", "copy"])
def test_every_rendered_dialogue_round_trips(stage):
    for idx in range(300):
        drawn = data.dialogue(11, idx, stage)
        text = render.render(TEMPLATE, drawn.messages, drawn.tools)
        assert decode(TOKENIZER.encode(text).ids) == text


@pytest.mark.parametrize(
    "text", ["naïve Gödel", "日本語 テスト", "🙂👩\u200d🚀", "a\r\n\tb   c", "\x00\x7f", "नमस्ते"]
)
def test_any_text_round_trips(text):
    assert decode(TOKENIZER.encode(text).ids) == text


def test_a_word_has_the_same_tokens_wherever_it_stands():
    word = TOKENIZER.encode("Reykjavik").ids
    for text in ("in Reykjavik", '"Reykjavik"', "\nReykjavik\n", "=Reykjavik>"):
        ids = TOKENIZER.encode(text).ids
        assert any(ids[at : at + len(word)] == word for at in range(len(ids))), text


def test_tool_markup_is_one_ordinary_token_each():
    for text in ("<function=", "<parameter=", "</parameter>", "</function>"):
        assert len(TOKENIZER.encode(text).ids) == 1
        assert decode(TOKENIZER.encode(text).ids, skip_special_tokens=True) == text


def test_turn_marks_are_dropped_and_think_marks_are_kept_in_plain_text():
    ids = TOKENIZER.encode("<think>a</think><tool_call><|im_end|><|endoftext|>").ids

    assert decode(ids, skip_special_tokens=True) == "<think>a</think><tool_call>"


def test_special_tokens_come_first():
    vocab = TOKENIZER.get_vocab()

    assert [vocab[text] for text in (*SPECIAL, *ADDED)] == list(range(9))


def test_the_model_learns_its_own_words_only():
    ids, own = render.Encoder(TOKENIZER, TEMPLATE).encode(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"},
        ],
        None,
    )

    assert decode([token for token, mine in zip(ids, own, strict=True) if mine]) == (
        "Hello!<|im_end|>"
    )


def test_thoughts_are_learned_with_the_mark_that_closes_them():
    ids, own = render.Encoder(TOKENIZER, TEMPLATE).encode(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!", "reasoning_content": "I greet."},
        ],
        None,
    )

    assert decode([token for token, mine in zip(ids, own, strict=True) if mine]) == (
        "I greet.\n</think>\n\nHello!<|im_end|>"
    )


def test_training_keeps_all_bytes_in_the_vocabulary():
    small = train_tokenizer(["hello world, hello there"] * 3, 300)

    assert small.decode(small.encode("übermäßig 🙂").ids) == "übermäßig 🙂"
