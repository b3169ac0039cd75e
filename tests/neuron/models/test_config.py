import json

import pytest

from cortex.core.errors import CheckpointError
from cortex.neuron.models.config import read_hf_config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
QWEN = {
    **LLAMA,
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


@pytest.fixture
def read(tmp_path):
    def write_and_read(config, generation=None):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return read_hf_config(tmp_path)

    return write_and_read


def test_a_flat_llama_config_takes_the_defaults_it_leaves_out(read):
    model = read(LLAMA).model
    assert model.family == "llama"
    assert (model.num_kv_heads, model.head_dim, model.rope.rotary_dim) == (4, 16, 16)
    assert model.rope.theta == 10_000.0
    assert model.attention_layers == (0, 1)
    assert model.tied_head is None
    assert model.kv_elements_per_token == 256
    assert model.state_elements_per_slot == 0


def test_every_fourth_layer_attends_unless_the_config_says_otherwise(read):
    assert read(QWEN).model.attention_layers == (3, 7)
    assert read({**QWEN, "full_attention_interval": 2}).model.attention_layers == (1, 3, 5, 7)
    types = ["full_attention", *["linear_attention"] * 7]
    assert read({**QWEN, "layer_types": types}).model.attention_layers == (0,)


def test_a_nested_text_config_is_read_and_a_quarter_of_each_head_turns(read):
    model = read(
        {"model_type": "qwen3_5", "text_config": QWEN, "vision_config": {"depth": 1}}
    ).model
    assert model.family == "qwen3_5"
    assert model.rope.rotary_dim == 8
    assert model.gdn is not None
    assert model.gdn.conv_dim == 2 * 16 * 128 + 32 * 128
    assert model.state_elements_per_slot == 6 * (32 * 128 * 128 + 3 * 8192)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}},
        {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
        {"rope_theta": 5e5, "partial_rotary_factor": 0.5, "rope_scaling": {"type": "default"}},
        {"rope_theta": 1, "rope_parameters": {"rope_theta": 500000, "partial_rotary_factor": 0.5}},
    ],
)
def test_rope_settings_are_found_in_their_old_and_new_places(read, rope):
    model = read({**QWEN, **rope}).model
    assert (model.rope.theta, model.rope.rotary_dim) == (500_000.0, 16)


def test_old_rope_scaling_of_llama3_is_read(read):
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rope = read({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling}).model.rope
    assert (rope.kind, rope.factor, rope.original_max_positions) == ("llama3", 32.0, 8192)


@pytest.mark.parametrize(
    ("inner", "outer", "tied"),
    [(True, None, True), (None, True, True), (False, False, False), (True, False, None)],
)
def test_where_the_two_tie_flags_disagree_the_tensor_decides(read, inner, outer, tied):
    text = {**QWEN} if inner is None else {**QWEN, "tie_word_embeddings": inner}
    whole = {"model_type": "qwen3_5", "text_config": text}
    if outer is not None:
        whole["tie_word_embeddings"] = outer
    assert read(whole).model.tied_head is tied


def test_end_tokens_are_the_union_of_all_files_in_order(read):
    text = {**QWEN, "eos_token_id": 44}
    whole = {"model_type": "qwen3_5", "text_config": text, "eos_token_id": 46}
    assert read(whole, {"eos_token_id": [46, 45]}).generation.eos_ids == (46, 44, 45)


def test_generation_defaults_are_the_files_own(read):
    file = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "pad_token_id": 1}
    generation = read(LLAMA, file).generation
    assert (generation.temperature, generation.top_p, generation.top_k) == (0.6, 0.95, 20)


def test_without_a_generation_config_nothing_is_recommended(read):
    generation = read({**LLAMA, "eos_token_id": [1, 2]}).generation
    assert generation.eos_ids == (1, 2)
    assert (generation.temperature, generation.top_p, generation.top_k) == (None, None, None)


def test_do_sample_false_means_greedy(read):
    assert read(LLAMA, {"do_sample": False, "temperature": 0.6}).generation.temperature == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "qwen4_exp"},
            "model_type 'qwen4_exp' is not supported; supported are llama",
        ),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"sliding_window": 4096}, "sliding-window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope scaling 'llama3' lacks its factors"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization 'gptq'"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key/value heads"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": -5}, r"\$.vocab_size"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
        ({"partial_rotary_factor": 0.2}, "3 rotary dimensions do not fit heads of 16"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(read, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read({**LLAMA, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_num_value_heads": 5}, "5 linear value heads cannot share 16 linear key heads"),
        ({"attn_output_gate": False}, "without an output gate"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type 'sigmoid'"),
    ],
)
def test_hybrids_out_of_the_ordinary_are_refused(read, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read({**QWEN, **changes})


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": 7}', "\xff"])
def test_a_malformed_config_is_refused_with_its_path(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_hf_config(tmp_path)


def test_a_malformed_generation_config_is_refused_with_its_path(read):
    with pytest.raises(CheckpointError, match=r"generation_config\.json.*temperature"):
        read(LLAMA, {"temperature": "warm"})
