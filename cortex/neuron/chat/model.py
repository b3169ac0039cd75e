"""What the chat layer knows of a checkpoint: tokenizer, template, limits, sampling defaults."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from cortex.core.errors import CheckpointError
from cortex.neuron.chat.gguf_metadata import Value, read_gguf_metadata
from cortex.neuron.chat.template import ChatTemplate, template_in_directory, template_in_gguf
from cortex.neuron.chat.tokenizer import (
    ChatTokenizer,
    tokenizer_from_directory,
    tokenizer_from_gguf,
)
from cortex.neuron.models.source import ModelSource

DEFAULT_MAX_TOKENS = 8192
_FALLBACK_MODEL_LEN = 2048

Ids = int | list[int] | None


class GenerationDefaults(msgspec.Struct, kw_only=True, frozen=True):
    """How a checkpoint wants to be sampled; None where it does not say."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatModel:
    """Everything between messages and tokens for one model.

    Attributes:
        template: None where the checkpoint brings none: it cannot chat.
        max_model_len: tokens of prompt and answer together; the engine may allow fewer, see
            `dataclasses.replace`.
        default_max_tokens: length of an answer whose request sets no limit.
    """

    model_id: str
    tokenizer: ChatTokenizer
    template: ChatTemplate | None
    max_model_len: int
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    default_max_tokens: int = DEFAULT_MAX_TOKENS


class _TextConfig(msgspec.Struct, kw_only=True, frozen=True):
    eos_token_id: Ids = None
    max_position_embeddings: int | None = None


class _Config(msgspec.Struct, kw_only=True, frozen=True):
    """Of config.json."""

    eos_token_id: Ids = None
    max_position_embeddings: int | None = None
    text_config: _TextConfig | None = None


class _GenerationConfig(msgspec.Struct, kw_only=True, frozen=True):
    """Of generation_config.json."""

    do_sample: bool | None = None
    eos_token_id: Ids = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def defaults(self) -> GenerationDefaults:
        """Return the sampling part; an explicit `do_sample: false` means greedy."""
        return GenerationDefaults(
            temperature=0.0 if self.do_sample is False else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


def load_chat_model(source: ModelSource, *, model_id: str, cache_dir: Path) -> ChatModel:
    """Read a checkpoint's small files; takes up to seconds, so call it from a thread.

    Args:
        cache_dir: where a tokenizer.json is written for checkpoints that have none as such.

    Raises:
        CheckpointError: a file is missing, damaged or of an unsupported kind; names it.
    """
    path = Path(source.path)
    if source.kind == "gguf":
        return _from_gguf(path, read_gguf_metadata(path), model_id=model_id, cache_dir=cache_dir)
    config = _read(path / "config.json", _Config)
    generation = _read(path / "generation_config.json", _GenerationConfig)
    text_config = config.text_config or _TextConfig()
    named = (generation.eos_token_id, config.eos_token_id, text_config.eos_token_id)
    tokenizer = tokenizer_from_directory(
        path, cache_dir=cache_dir, eos_ids=frozenset[int]().union(*map(_id_set, named))
    )
    max_model_len = text_config.max_position_embeddings or config.max_position_embeddings
    return ChatModel(
        model_id=model_id,
        tokenizer=tokenizer,
        template=_compile(template_in_directory(path), model_id, tokenizer),
        max_model_len=max_model_len or _FALLBACK_MODEL_LEN,
        defaults=generation.defaults(),
    )


def _from_gguf(path: Path, keys: dict[str, Value], *, model_id: str, cache_dir: Path) -> ChatModel:
    tokenizer = tokenizer_from_gguf(keys, name=path.name, cache_dir=cache_dir)
    architecture = keys.get("general.architecture")
    max_model_len = keys.get(f"{architecture}.context_length")
    return ChatModel(
        model_id=model_id,
        tokenizer=tokenizer,
        template=_compile(template_in_gguf(keys), model_id, tokenizer),
        max_model_len=max_model_len if isinstance(max_model_len, int) else _FALLBACK_MODEL_LEN,
        defaults=GenerationDefaults(
            temperature=_number(keys, "general.sampling.temp"),
            top_p=_number(keys, "general.sampling.top_p"),
            min_p=_number(keys, "general.sampling.min_p"),
        ),
    )


def _number(keys: dict[str, Value], key: str) -> float | None:
    value = keys.get(key)
    return float(value) if isinstance(value, int | float) else None


def _compile(template: str | None, model_id: str, tokenizer: ChatTokenizer) -> ChatTemplate | None:
    if template is None:
        return None
    return ChatTemplate(
        template,
        model_id=model_id,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )


_T = TypeVar("_T", _Config, _GenerationConfig)


def _read(path: Path, kind: type[_T]) -> _T:
    """Return a JSON file's known fields; a missing file reads as an empty one."""
    try:
        raw: Any = path.read_bytes() if path.exists() else b"{}"
        return msgspec.json.decode(raw, type=kind)
    except (OSError, msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        raise CheckpointError(f"cannot read {path.name} in {path.parent.name}: {exc}") from exc


def _id_set(ids: Ids) -> frozenset[int]:
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])
