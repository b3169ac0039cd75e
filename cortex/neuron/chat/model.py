"""What the chat layer knows of a checkpoint: tokenizer, template, limits, sampling defaults."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from cortex.core.neuron_api import LoadRequest, ToolFormat
from cortex.neuron.chat.formats import SYNTAXES, CallSyntax
from cortex.neuron.chat.images import ImageLimits, ImageReader
from cortex.neuron.chat.template import ChatTemplate
from cortex.neuron.chat.templatefiles import (
    TemplateTexts,
    templates_in_directory,
    templates_in_gguf,
)
from cortex.neuron.chat.tokenizer import (
    ChatTokenizer,
    tokenizer_from_directory,
    tokenizer_from_gguf,
)
from cortex.neuron.models.config import GenerationDefaults
from cortex.neuron.models.embedding_config import EmbeddingSpec, read_embedding_spec
from cortex.neuron.models.encoder_config import read_encoder_config
from cortex.neuron.models.facts import bounded, read_config
from cortex.neuron.models.gguf_file import read_gguf
from cortex.neuron.models.source import ModelSource

DEFAULT_MAX_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatModel:
    """Everything between messages and tokens for one model.

    Attributes:
        template: None where the checkpoint brings none: it cannot chat.
        tool_template: the one for requests with tools, where the checkpoint has such.
        tool_format: how it writes calls; None takes what its template tells.
        constrain_tools: calls that a request leaves to the model are held to the tools, too.
        max_model_len: tokens of prompt and answer together; the engine may allow fewer, see
            `dataclasses.replace`.
        default_max_tokens: length of an answer whose request sets no limit.
        images: None where the model reads text only.
        embedding: how it makes vectors; None where it is made to write.
    """

    model_id: str
    tokenizer: ChatTokenizer
    template: ChatTemplate | None
    tool_template: ChatTemplate | None = None
    tool_format: ToolFormat | None = None
    constrain_tools: bool = True
    max_model_len: int
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    default_max_tokens: int = DEFAULT_MAX_TOKENS
    images: ImageReader | None = None
    embedding: EmbeddingSpec | None = None

    def asked(self, request: LoadRequest) -> "ChatModel":
        """Return the model with what a load request sets; what it leaves out stays."""
        constrain = request.constrain_tools
        return replace(
            self,
            tool_format=request.tool_format or self.tool_format,
            constrain_tools=self.constrain_tools if constrain is None else constrain,
        )

    def like(self, other: "ChatModel") -> "ChatModel":
        """Return the model with what load requests set of another one."""
        return replace(self, tool_format=other.tool_format, constrain_tools=other.constrain_tools)

    def template_for(self, *, has_tools: bool) -> ChatTemplate | None:
        """Return the template of a request with or without tools."""
        return self.tool_template if has_tools and self.tool_template else self.template

    @property
    def call_syntax(self) -> CallSyntax | None:
        """How it writes calls; None where nobody says."""
        template = self.template_for(has_tools=True)
        if self.tool_format is not None:
            return SYNTAXES[self.tool_format]
        known = None if template is None else template.tool_format
        return None if known is None else SYNTAXES[known]

    @property
    def supports_tools(self) -> bool:
        """Whether requests may offer tools."""
        template = self.template_for(has_tools=True)
        return template is not None and template.takes_tools and self.call_syntax is not None


def load_chat_model(
    source: ModelSource,
    *,
    model_id: str,
    cache_dir: Path,
    image_limits: ImageLimits | None = None,
) -> ChatModel:
    """Read a checkpoint's small files; takes up to seconds, so call it from a thread.

    Args:
        cache_dir: where a tokenizer.json is written for checkpoints that have none as such.
        image_limits: of requests to a model with eyes.

    Raises:
        CheckpointError: a file is missing, damaged or of an unsupported kind; names it.
    """
    path = Path(source.path)
    embedding = read_embedding_spec(source)
    if embedding is not None:
        return _embedding_model(source, embedding, model_id, cache_dir)
    config = read_config(source)
    eos_ids = frozenset(config.generation.eos_ids)
    if source.kind == "gguf":
        keys = read_gguf(path).metadata
        tokenizer = tokenizer_from_gguf(keys, name=path.name, cache_dir=cache_dir, eos_ids=eos_ids)
        templates = templates_in_gguf(keys)
    else:
        tokenizer = tokenizer_from_directory(path, cache_dir=cache_dir, eos_ids=eos_ids)
        templates = templates_in_directory(path)
    texts = templates or TemplateTexts(default="")
    vision = config.model.vision
    compiled = partial(_compile, model_id=model_id, tokenizer=tokenizer, takes_images=bool(vision))
    return ChatModel(
        model_id=model_id,
        tokenizer=tokenizer,
        template=compiled(texts.default) if templates else None,
        tool_template=compiled(texts.tool_use) if texts.tool_use else None,
        max_model_len=config.model.max_position_embeddings,
        defaults=config.generation,
        images=None if vision is None else ImageReader(vision, image_limits or ImageLimits()),
    )


def _embedding_model(
    source: ModelSource, spec: EmbeddingSpec, model_id: str, cache_dir: Path
) -> ChatModel:
    path = Path(source.path)
    if spec.is_encoder:
        longest = read_encoder_config(path).max_tokens
    else:
        longest = read_config(source).model.max_position_embeddings
    return ChatModel(
        model_id=model_id,
        tokenizer=tokenizer_from_directory(path, cache_dir=cache_dir),
        template=None,
        max_model_len=bounded(longest, spec),
        embedding=spec,
    )


def _compile(
    text: str, *, model_id: str, tokenizer: ChatTokenizer, takes_images: bool
) -> ChatTemplate:
    return ChatTemplate(
        text,
        model_id=model_id,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        takes_images=takes_images,
    )
