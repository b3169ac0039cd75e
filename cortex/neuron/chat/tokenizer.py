"""A checkpoint's tokenizer: text to ids, ids to bytes, and what its special tokens are."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from cortex.core.errors import CheckpointError
from cortex.neuron.chat.segments import SegmentedEncoder
from cortex.neuron.models.gguf_file import GgufValue
from cortex.neuron.models.hf_files import read_json

MAX_TOKENIZER_BYTES = 256 << 20

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+" + _REST
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+" + _REST
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+" + _REST
# Values of tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4
# Names that end a turn or a text wherever they are tokens of their own.
_END_NAMES = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "</s>",
)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: character to byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    stand_ins = {chr(byte): byte for byte in printable}
    return stand_ins | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class ChatTokenizer:
    """Encodes prompts and decodes tokens of one checkpoint.

    Attributes:
        path: a tokenizer.json that holds exactly this tokenizer.
        bos_token, eos_token: their texts, empty where the checkpoint names none.
        eos_ids: every token that ends a turn, sorted.
        special_ids: tokens that never show in text.
        vocab_size: one more than the highest id; a model's own may be larger by padding rows.
        max_token_chars: no token stands for more characters than this.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        path: str,
        bos_token: str = "",
        eos_token: str = "",
        eos_ids: frozenset[int] = frozenset(),
    ) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self.path = path
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.special_ids = frozenset(at for at, token in added.items() if token.special)
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.max_token_chars = max(map(len, vocab), default=1)
        self._tokenizer = tokenizer
        self._segments = SegmentedEncoder(tokenizer)
        self._added = {at: token.content.encode() for at, token in added.items()}
        # None: this tokenizer's tokens are not plain bytes and are decoded in context.
        self._bytes: dict[int, bytes] | None = {} if _is_byte_level(tokenizer) else None
        # An end token that the files forget to name would be dropped from the text unseen.
        usual = {self.token_id(name) for name in _END_NAMES} & self.special_ids
        known = {self.token_id(eos_token)} | usual | eos_ids
        self.eos_ids = tuple(sorted(at for at in known if at is not None))

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Return the ids of `text`; special tokens written in it become their ids."""
        if not add_special:
            return self._segments.encode(text)
        # The batch call lets other threads run meanwhile, as in the segments' encoder.
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=True)
        ids: list[int] = batch[0].ids
        return ids

    def count(self, text: str) -> int:
        """Return how many tokens `text` has."""
        return self._segments.count(text)

    def decode(self, token_ids: list[int], *, keep_special: bool = False) -> str:
        """Return the text of a whole list of ids."""
        if self._bytes is None:
            return self._tokenizer.decode(token_ids, skip_special_tokens=not keep_special)
        hidden = frozenset[int]() if keep_special else self.special_ids
        parts = [self.token_bytes(at) for at in token_ids if at not in hidden]
        return b"".join(parts).decode("utf-8", "replace")

    def token_id(self, text: str) -> int | None:
        """Return the id of the token that is exactly `text`, if there is one."""
        token_id: int | None = self._tokenizer.token_to_id(text)
        return token_id

    def marker_id(self, text: str) -> int | None:
        """Return the id `text` always encodes to (an added token), or None."""
        token_id = self.token_id(text)
        return token_id if token_id is not None and token_id in self._added else None

    def token_bytes(self, token_id: int) -> bytes:
        """Return one token's UTF-8, which may be part of a character; empty for unknown ids."""
        cache = self._bytes
        if cache is None:
            return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()
        known = cache.get(token_id)
        if known is None:
            known = cache[token_id] = self._spell(token_id)
        return known

    @property
    def is_byte_level(self) -> bool:
        """Whether a text is its tokens' bytes one after the other."""
        return self._bytes is not None

    def _spell(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return added
        # Ids past the vocabulary are padding rows of the model's embedding.
        piece = self._tokenizer.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if piece is None:
            return b""
        if all(character in _BYTE_OF for character in piece):
            return bytes(_BYTE_OF[character] for character in piece)
        return piece.encode()


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer.decoder, decoders.ByteLevel)


class _AddedTokenEntry(msgspec.Struct, kw_only=True, frozen=True):
    content: str
    special: bool = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class _TokenizerConfig(msgspec.Struct, kw_only=True, frozen=True):
    """What tokenizer_config.json tells about tokens."""

    bos_token: Any = None
    eos_token: Any = None
    added_tokens_decoder: dict[int, _AddedTokenEntry] = {}


def tokenizer_from_directory(
    directory: Path, *, cache_dir: Path, eos_ids: frozenset[int] = frozenset()
) -> ChatTokenizer:
    """Return the tokenizer of a Hugging Face layout directory.

    Args:
        cache_dir: where a tokenizer.json is written if the directory's own lacks tokens.
        eos_ids: end tokens that other files of the checkpoint name.

    Raises:
        CheckpointError: no tokenizer there, or a damaged one; names it.
    """
    path = directory / "tokenizer.json"
    tokenizer = _read_tokenizer_json(path)
    config_path = directory / "tokenizer_config.json"
    config = (
        read_json(config_path, _TokenizerConfig) if config_path.exists() else _TokenizerConfig()
    )
    missing = [
        AddedToken(
            entry.content,
            special=entry.special,
            normalized=entry.normalized,
            lstrip=entry.lstrip,
            rstrip=entry.rstrip,
            single_word=entry.single_word,
        )
        for at, entry in sorted(config.added_tokens_decoder.items())
        if tokenizer.token_to_id(entry.content) != at
    ]
    if missing:
        tokenizer.add_tokens(missing)
        path = _write_tokenizer(tokenizer, cache_dir, directory.name)
    return ChatTokenizer(
        tokenizer,
        path=str(path),
        bos_token=_token_text(config.bos_token),
        eos_token=_token_text(config.eos_token),
        eos_ids=eos_ids,
    )


def _read_tokenizer_json(path: Path) -> Tokenizer:
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"{path.name} is over {MAX_TOKENIZER_BYTES >> 20} MiB")
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
    except (OSError, UnicodeError) as exc:
        raise CheckpointError(
            f"cannot read {path.name} in {path.parent.name}: {exc.__class__.__name__}; "
            "a checkpoint needs a tokenizer.json"
        ) from exc
    except CheckpointError:
        raise
    except Exception as exc:  # tokenizers raises no other class
        raise CheckpointError(f"{path.name} in {path.parent.name} is damaged: {exc}") from exc
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _token_text(value: Any) -> str:
    """A token in tokenizer_config.json is a string, an object with `content`, or null."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How a GGUF `tokenizer.ggml.pre` splits text before BPE."""

    pattern: str | None = None  # None: GPT-2's own
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False  # where the metadata do not say


_PRE_TOKENIZERS = {
    "default": _PreTokenizer(),
    "gpt-2": _PreTokenizer(),
    "smollm": _PreTokenizer(digits=True),
    "qwen2": _PreTokenizer(pattern=_QWEN2, nfc=True),
    "qwen35": _PreTokenizer(pattern=_QWEN35, nfc=True),
    "llama-bpe": _PreTokenizer(pattern=_LLAMA3, ignore_merges=True, adds_bos=True),
}


def tokenizer_from_gguf(
    keys: Mapping[str, GgufValue],
    *,
    name: str,
    cache_dir: Path,
    eos_ids: frozenset[int] = frozenset(),
) -> ChatTokenizer:
    """Return the tokenizer that a GGUF file's metadata describes.

    Args:
        keys: the file's metadata.
        name: the file's, for messages and for the tokenizer.json written to `cache_dir`.
        eos_ids: every end token that the metadata name.

    Raises:
        CheckpointError: the tokenizer is incomplete or of an unsupported kind; names it.
    """
    tokenizer, tokens = _build_bpe(keys, name)
    return ChatTokenizer(
        tokenizer,
        path=str(_write_tokenizer(tokenizer, cache_dir, name.removesuffix(".gguf"))),
        bos_token=_named_token(keys, "bos_token_id", tokens),
        eos_token=_named_token(keys, "eos_token_id", tokens),
        eos_ids=eos_ids,
    )


def _build_bpe(keys: Mapping[str, GgufValue], name: str) -> tuple[Tokenizer, list[str]]:
    model = keys.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise CheckpointError(
            f"{name} has a tokenizer of type {model!r}; only byte-level BPE ('gpt2') is supported"
        )
    pre_name = str(keys.get("tokenizer.ggml.pre", "default"))
    pre = _PRE_TOKENIZERS.get(pre_name)
    if pre is None:
        supported = ", ".join(_PRE_TOKENIZERS)
        raise CheckpointError(
            f"{name} has the pre-tokenizer {pre_name!r}, which is not supported; known: {supported}"
        )
    tokens = [str(token) for token in _list_key(keys, "tokenizer.ggml.tokens", name)]
    merges = [
        tuple(str(merge).split(" ", 1)) for merge in _list_key(keys, "tokenizer.ggml.merges", name)
    ]
    vocab = {token: at for at, token in enumerate(tokens)}
    try:
        bpe = models.BPE(
            vocab=vocab,
            merges=[(left, right) for left, right in merges],
            ignore_merges=pre.ignore_merges,
        )
    except Exception as exc:  # tokenizers raises no other class
        raise CheckpointError(f"{name} has merges that do not fit its tokens: {exc}") from exc
    tokenizer = Tokenizer(bpe)
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _splitter(pre)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = keys.get("tokenizer.ggml.token_type")
    kinds = kinds if isinstance(kinds, list) else []
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    bos_token = _named_token(keys, "bos_token_id", tokens)
    if bos_token and keys.get("tokenizer.ggml.add_bos_token", pre.adds_bos) is True:
        # Plain texts begin with it; a chat template writes it by itself.
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos_token, "$A"], special_tokens=[(bos_token, vocab[bos_token])]
        )
    return tokenizer, tokens


def _splitter(pre: _PreTokenizer) -> Any:
    if pre.pattern is not None:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre.digits:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def _list_key(keys: Mapping[str, GgufValue], key: str, name: str) -> list[Any]:
    value = keys.get(key)
    if not isinstance(value, list) or not value:
        raise CheckpointError(f"{name} has no {key}")
    return value


def _named_token(keys: Mapping[str, GgufValue], name: str, tokens: list[str]) -> str:
    value = keys.get(f"tokenizer.ggml.{name}")
    return tokens[value] if isinstance(value, int) and 0 <= value < len(tokens) else ""


def _write_tokenizer(tokenizer: Tokenizer, cache_dir: Path, stem: str) -> Path:
    """Write a tokenizer.json named by its content, once; readers never see half of it."""
    text = tokenizer.to_str().encode()
    digest = hashlib.blake2b(text, digest_size=8).hexdigest()
    path = cache_dir / f"{stem}-{digest}.tokenizer.json"
    if path.exists():
        return path
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{id(tokenizer):x}.partial")
        partial.write_bytes(text)
        partial.replace(path)
    except OSError as exc:
        raise CheckpointError(
            f"cannot write the tokenizer of {stem} to the cache directory: {exc}"
        ) from exc
    return path
