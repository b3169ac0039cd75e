"""What the chat layer knows of a checkpoint: tokenizer, template, limits, sampling defaults."""

from dataclasses import dataclass, field
from pathlib import Path

from cortex.neuron.chat.template import ChatTemplate, template_in_directory, template_in_gguf
from cortex.neuron.chat.tokenizer import (
    ChatTokenizer,
    tokenizer_from_directory,
    tokenizer_from_gguf,
)
from cortex.neuron.models.config import GenerationDefaults
from cortex.neuron.models.facts import read_config
from cortex.neuron.models.gguf_file import read_gguf
from cortex.neuron.models.source import ModelSource

DEFAULT_MAX_TOKENS = 8192


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


def load_chat_model(source: ModelSource, *, model_id: str, cache_dir: Path) -> ChatModel:
    """Read a checkpoint's small files; takes up to seconds, so call it from a thread.

    Args:
        cache_dir: where a tokenizer.json is written for checkpoints that have none as such.

    Raises:
        CheckpointError: a file is missing, damaged or of an unsupported kind; names it.
    """
    path = Path(source.path)
    config = read_config(source)
    eos_ids = frozenset(config.generation.eos_ids)
    if source.kind == "gguf":
        keys = read_gguf(path).metadata
        tokenizer = tokenizer_from_gguf(keys, name=path.name, cache_dir=cache_dir, eos_ids=eos_ids)
        template = template_in_gguf(keys)
    else:
        tokenizer = tokenizer_from_directory(path, cache_dir=cache_dir, eos_ids=eos_ids)
        template = template_in_directory(path)
    return ChatModel(
        model_id=model_id,
        tokenizer=tokenizer,
        template=_compile(template, model_id, tokenizer),
        max_model_len=config.model.max_position_embeddings,
        defaults=config.generation,
    )


def _compile(template: str | None, model_id: str, tokenizer: ChatTokenizer) -> ChatTemplate | None:
    if template is None:
        return None
    return ChatTemplate(
        template,
        model_id=model_id,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )
