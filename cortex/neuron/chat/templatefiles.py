"""Where a checkpoint keeps its chat templates."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cortex.core.errors import CheckpointError
from cortex.neuron.models.gguf_file import GgufValue
from cortex.neuron.models.hf_files import read_json


class _NamedTemplate(msgspec.Struct, kw_only=True, frozen=True):
    name: str
    template: str


class _TemplateConfig(msgspec.Struct, kw_only=True, frozen=True):
    chat_template: str | list[_NamedTemplate] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateTexts:
    """The sources of a checkpoint's templates.

    Attributes:
        default: what is rendered unless another one is meant.
        tool_use: what is rendered for requests with tools; None where `default` is.
    """

    default: str
    tool_use: str | None = None


def _named(texts: Mapping[str, str]) -> TemplateTexts | None:
    default = texts.get("default", next(iter(texts.values()), None))
    tool_use = texts.get("tool_use")
    return None if default is None else TemplateTexts(default=default, tool_use=tool_use)


def templates_in_directory(directory: Path) -> TemplateTexts | None:
    """Return the template texts of a Hugging Face layout directory, or None where it has none.

    chat_template.jinja, with further ones in additional_chat_templates, goes before the
    `chat_template` of tokenizer_config.json and of chat_template.json, each a text or a list of
    named ones.

    Raises:
        CheckpointError: a file is there and cannot be read.
    """
    own_file = directory / "chat_template.jinja"
    if own_file.exists():
        tool_use = directory / "additional_chat_templates" / "tool_use.jinja"
        return TemplateTexts(
            default=_read_text(own_file),
            tool_use=_read_text(tool_use) if tool_use.exists() else None,
        )
    for name in ("tokenizer_config.json", "chat_template.json"):
        config_file = directory / name
        if not config_file.exists():
            continue
        found = read_json(config_file, _TemplateConfig).chat_template
        if isinstance(found, str):
            return TemplateTexts(default=found)
        if found:
            return _named({entry.name: entry.template for entry in found})
    return None


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeError) as exc:
        raise CheckpointError(f"cannot read {path}: {exc}") from exc


def templates_in_gguf(keys: Mapping[str, GgufValue]) -> TemplateTexts | None:
    """Return the template texts in a GGUF file's metadata, or None where it has none."""
    key = "tokenizer.chat_template"
    texts = {"default": keys.get(key), "tool_use": keys.get(f"{key}.tool_use")}
    return _named({name: text for name, text in texts.items() if isinstance(text, str) and text})
