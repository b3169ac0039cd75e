"""Where chat templates are found."""

import json
from pathlib import Path

import pytest

from cortex.core.errors import CheckpointError
from cortex.neuron.chat.templatefiles import (
    TemplateTexts,
    templates_in_directory,
    templates_in_gguf,
)
from tests.support.chat_models import write_checkpoint


def default_in(directory: Path) -> str:
    texts = templates_in_directory(directory)
    assert texts is not None
    return texts.default


def test_the_template_file_goes_before_the_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, template="from config", template_in_config=True)
    assert default_in(tmp_path) == "from config"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert default_in(tmp_path) == "from file"


def test_a_further_file_is_for_requests_with_tools(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert templates_in_directory(tmp_path) == TemplateTexts(default="plain", tool_use="tools")


def test_of_named_templates_the_default_and_the_one_for_tools_are_taken(tmp_path: Path) -> None:
    named = [
        {"name": "rag", "template": "no"},
        {"name": "default", "template": "yes"},
        {"name": "tool_use", "template": "tools"},
    ]
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": named}))
    assert templates_in_directory(tmp_path) == TemplateTexts(default="yes", tool_use="tools")
    config.write_text(json.dumps({"chat_template": named[:1]}))
    assert templates_in_directory(tmp_path) == TemplateTexts(default="no")


def test_a_processor_s_file_is_read_where_the_tokenizer_s_has_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.json").write_text('{"chat_template": "from the processor"}')
    assert default_in(tmp_path) == "from the processor"


def test_a_checkpoint_may_have_no_template(tmp_path: Path) -> None:
    assert templates_in_directory(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert templates_in_directory(tmp_path) is None
    assert templates_in_gguf({}) is None


def test_a_gguf_file_may_hold_two_templates() -> None:
    key = "tokenizer.chat_template"
    assert templates_in_gguf({key: "x"}) == TemplateTexts(default="x")
    both = {key: "x", f"{key}.tool_use": "y", f"{key}.rag": "z"}
    assert templates_in_gguf(both) == TemplateTexts(default="x", tool_use="y")


def test_a_damaged_template_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 5}')
    with pytest.raises(CheckpointError, match="chat_template"):
        templates_in_directory(tmp_path)


def test_a_template_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"cannot read .*chat_template\.jinja"):
        templates_in_directory(tmp_path)
