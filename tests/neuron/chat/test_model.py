"""Loading what the chat layer needs of a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from cortex.core.errors import CheckpointError
from cortex.neuron.chat.model import ChatModel, load_chat_model
from cortex.neuron.models.config import GenerationDefaults
from cortex.neuron.models.source import ModelSource
from tests.neuron.chat.test_tokenizer import smollm2_path
from tests.support.chat_models import write_checkpoint


def load(directory: Path) -> ChatModel:
    source = ModelSource(kind="hf", path=str(directory))
    return load_chat_model(source, model_id="m", cache_dir=directory / "cache")


def change_config(directory: Path, *, text: dict[str, Any], **fields: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    config["text_config"] |= text
    path.write_text(json.dumps(config))


def test_a_directory_gives_tokenizer_template_and_limits(tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path))
    assert model.model_id == "m"
    assert model.max_model_len == 4096
    assert model.tokenizer.eos_ids == (0, 2)
    assert model.template is not None
    assert model.supports_tools
    assert model.defaults == GenerationDefaults()
    assert model.default_max_tokens == 8192


def test_generation_config_gives_sampling_and_ends(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path,
        generation_config={
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "eos_token_id": [2, 9],
            "transformers_version": "5",
        },
    )
    model = load(tmp_path)
    assert model.defaults == GenerationDefaults(
        eos_ids=(2, 9),
        temperature=0.6,
        top_p=0.95,
        top_k=20,
        min_p=0.05,
        repetition_penalty=1.1,
    )
    assert model.tokenizer.eos_ids == (0, 2, 9)


def test_sampling_switched_off_means_greedy(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, generation_config={"do_sample": False, "temperature": 0.7})
    assert load(tmp_path).defaults.temperature == 0.0


def test_ends_in_either_config_count(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    change_config(
        tmp_path, eos_token_id=7, text={"eos_token_id": [8], "max_position_embeddings": 128}
    )
    model = load(tmp_path)
    assert model.tokenizer.eos_ids == (0, 2, 7, 8)
    assert model.max_model_len == 128


def test_a_flat_config_is_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "config.json"
    text = json.loads(path.read_text())["text_config"]
    path.write_text(json.dumps({**text, "model_type": "qwen3_5_text", "eos_token_id": 9}))
    model = load(tmp_path)
    assert model.max_model_len == 4096
    assert model.tokenizer.eos_ids == (0, 2, 9)


def test_a_checkpoint_without_template_loads(tmp_path: Path) -> None:
    assert load(write_checkpoint(tmp_path, template=None)).template is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{"),
        ("config.json", '{"model_type": "mamba"}'),
        ("generation_config.json", "[]"),
        ("chat_template.jinja", "{% if %}"),
        ("tokenizer.json", "oops"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, text: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError):
        load(tmp_path)


def test_smollm2_loads_from_its_gguf_file(tmp_path: Path) -> None:
    source = ModelSource(kind="gguf", path=str(smollm2_path()))
    model = load_chat_model(source, model_id="smollm2", cache_dir=tmp_path)
    assert model.max_model_len == 8192
    assert model.tokenizer.eos_ids == (0, 2)
    assert model.template is not None
    assert not model.supports_tools
    assert not model.template.supports_thinking


def test_a_missing_gguf_file_is_refused(tmp_path: Path) -> None:
    source = ModelSource(kind="gguf", path=str(tmp_path / "none.gguf"))
    with pytest.raises(CheckpointError, match=r"none\.gguf"):
        load_chat_model(source, model_id="m", cache_dir=tmp_path)
