import json

import pytest
import torch
from safetensors.torch import save_file

from cortex.core.errors import CheckpointError
from cortex.neuron.models.registry import load_causal_lm
from cortex.neuron.models.source import ModelSource
from cortex.neuron.models.weights import SafetensorsWeights
from tests.support import checkpoints
from tests.support.stepping import Sequence, Stepper


def quiet(done, total):
    pass


def load(directory, progress=quiet):
    source = ModelSource(kind="hf", path=str(directory))
    return load_causal_lm(source, device=torch.device("cpu"), dtype=None, progress=progress)


def logits_of(directory):
    (logits,) = Stepper(load(directory)).step((Sequence(slot=0), [5, 9, 200, 3]))
    return logits


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("original")
    checkpoints.qwen3_5_text(directory, num_hidden_layers=4)
    return directory


@pytest.fixture
def damaged(original, tmp_path):
    return checkpoints.copy(original, tmp_path / "damaged")


@pytest.fixture
def sharded(tmp_path):
    checkpoints.qwen3_5_text(tmp_path, shard_bytes=100_000)
    return tmp_path


def test_progress_ends_at_the_total_and_never_falls(original):
    seen = []
    load(original, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (969_088, 969_088)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_missing_tensor_is_named(damaged):
    name = "model.layers.1.mlp.down_proj.weight"
    checkpoints.rewrite_tensors(damaged, lambda t: {k: v for k, v in t.items() if k != name})
    with pytest.raises(CheckpointError, match=r"'layers\.1\.mlp\.down_proj\.weight' is missing"):
        load(damaged)


def test_a_wrong_shape_is_named_with_both_shapes(damaged):
    name = "model.layers.0.linear_attn.in_proj_z.weight"
    checkpoints.rewrite_tensors(damaged, lambda t: {**t, name: t[name][:50]})
    message = r"in_proj_z\.weight' has shape \[50, 64\], the configuration asks for \[96, 64\]"
    with pytest.raises(CheckpointError, match=message):
        load(damaged)


def test_a_file_cut_short_names_the_tensor_it_lacks(damaged):
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"tensor 'model\.norm\.weight' is cut short"):
        load(damaged)


@pytest.mark.parametrize("body", [b"", b"\x01", (10**9).to_bytes(8, "little") + b"{}"])
def test_a_file_without_a_whole_header_is_refused(damaged, body):
    (damaged / "model.safetensors").write_bytes(body)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load(damaged)


def test_a_garbled_header_is_refused(damaged):
    (damaged / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"oops")
    with pytest.raises(CheckpointError, match="malformed safetensors header"):
        load(damaged)


def test_a_directory_without_safetensors_is_refused(damaged):
    (damaged / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load(damaged)


def test_a_type_that_cannot_be_computed_with_is_refused_by_name(damaged):
    name = "model.layers.2.mlp.up_proj.weight"
    checkpoints.rewrite_tensors(damaged, lambda t: {**t, name: t[name].to(torch.int8)})
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight' is of type I8"):
        load(damaged)


def test_heads_of_other_kinds_and_vision_towers_are_ignored(original, damaged):
    extra = {"mtp.fc.weight": torch.ones(3), "model.visual.blocks.0.weight": torch.ones(3)}
    checkpoints.rewrite_tensors(damaged, lambda t: {**t, **extra})
    assert torch.equal(logits_of(damaged), logits_of(original))


def test_a_text_only_save_under_the_wrapper_prefix_loads(original, damaged):
    def renamed(tensors):
        return {k.replace("model.", "model.language_model."): v for k, v in tensors.items()}

    checkpoints.rewrite_tensors(damaged, renamed)
    assert torch.equal(logits_of(damaged), logits_of(original))


def test_an_untied_flag_without_a_head_is_a_missing_tensor(damaged):
    checkpoints.rewrite_tensors(
        damaged, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}
    )
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is missing"):
        load(damaged)


def test_without_a_flag_the_missing_head_is_the_embedding(damaged):
    checkpoints.rewrite_json(damaged / "config.json", tie_word_embeddings=None)

    def tied(tensors):
        return {k: v for k, v in tensors.items() if k != "lm_head.weight"}

    checkpoints.rewrite_tensors(damaged, tied)
    silent = logits_of(damaged)
    checkpoints.rewrite_json(damaged / "config.json", tie_word_embeddings=True)
    assert torch.equal(silent, logits_of(damaged))


def test_half_precision_files_are_computed_in_float32(original, damaged):
    checkpoints.rewrite_tensors(damaged, lambda t: {k: v.half() for k, v in t.items()})
    model = load(damaged)
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits_of(damaged), logits_of(original), rtol=0, atol=0.05)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00004-of-00011.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*model-00004-of-00011"):
        load(sharded)


def test_an_index_that_promises_more_than_its_shards_hold_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    shard = "model-00001-of-00011.safetensors"
    data["weight_map"]["model.layers.9.mlp.up_proj.weight"] = shard
    index.write_text(json.dumps(data))
    with pytest.raises(
        CheckpointError, match=rf"layers\.9\.mlp\.up_proj\.weight' is not in {shard}"
    ):
        load(sharded)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_a_shard_outside_the_directory_is_never_opened(sharded, shard):
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(CheckpointError, match="is not a file beside the index"):
        load(sharded)


def test_a_garbled_index_is_refused(sharded):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load(sharded)


def test_fp8_blocks_are_scaled_up_to_their_ragged_edges(tmp_path):
    tensors = {
        "model.embed_tokens.weight": torch.ones(2, 2),
        "model.layers.0.mlp.up_proj.weight": torch.full((130, 200), 2.0).to(torch.float8_e4m3fn),
        "model.layers.0.mlp.up_proj.weight_scale_inv": torch.tensor([[1.0, 10.0], [0.5, 3.0]]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with SafetensorsWeights(tmp_path, quiet) as weights:
        weight = weights.tensor("layers.0.mlp.up_proj.weight", (130, 200))
    corners = [weight[r, c].item() for r, c in ((0, 0), (127, 127), (0, 128), (127, 199))]
    assert corners == [2.0, 2.0, 20.0, 20.0]
    assert [weight[r, c].item() for r, c in ((128, 127), (129, 199))] == [1.0, 6.0]
