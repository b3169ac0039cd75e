import msgspec
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from cortex.bundled.recipe import render

FOLDER = render.MODEL_DIR
CARD = (FOLDER / "README.md").read_text()
CONFIG = msgspec.json.decode((FOLDER / "config.json").read_bytes())


def weights():
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 12_000_000


def test_the_folder_holds_the_hugging_face_layout():
    assert {path.name for path in FOLDER.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_the_config_is_a_hybrid_with_explicit_layers():
    assert CONFIG["model_type"] == "qwen3_5_text"
    assert CONFIG["architectures"] == ["Qwen3_5ForCausalLM"]
    assert CONFIG["layer_types"] == [
        "linear_attention", "linear_attention", "full_attention",
        "linear_attention", "linear_attention", "full_attention",
    ]  # fmt: skip
    assert CONFIG["linear_num_value_heads"] == 2 * CONFIG["linear_num_key_heads"]


def test_the_weights_are_finite_and_tied():
    tensors = weights()

    assert "lm_head.weight" not in tensors
    assert tensors["model.embed_tokens.weight"].shape == (
        CONFIG["vocab_size"],
        CONFIG["hidden_size"],
    )
    assert all(torch.isfinite(tensor.float()).all() for tensor in tensors.values())
    assert tensors["model.layers.0.linear_attn.A_log"].dtype == torch.float32


def test_every_id_of_the_tokenizer_has_a_row():
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))

    assert tokenizer.get_vocab_size() <= CONFIG["vocab_size"]


def test_generation_ends_at_the_end_of_a_turn():
    generation = msgspec.json.decode((FOLDER / "generation_config.json").read_bytes())
    vocab = Tokenizer.from_file(str(FOLDER / "tokenizer.json")).get_vocab()

    assert generation["eos_token_id"] == [vocab["<|im_end|>"], vocab["<|endoftext|>"]]


def test_the_card_states_the_size_of_the_model():
    total = sum(tensor.numel() for tensor in weights().values())

    assert f"{total:,} parameters" in CARD


@pytest.mark.parametrize("word", ["tokens seen", "seed", "one CPU core", "right call", "honest"])
def test_the_card_states_how_it_was_made_and_measured(word):
    assert word in CARD
