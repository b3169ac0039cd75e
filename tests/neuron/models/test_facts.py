import subprocess
import sys

import gguf
import pytest
import torch

from cortex.core.errors import CheckpointError
from cortex.neuron.layers.context import CacheSpec
from cortex.neuron.models.facts import ModelFacts, describe
from cortex.neuron.models.registry import load_causal_lm
from cortex.neuron.models.source import ModelSource
from tests.support import checkpoints


def test_a_hybrid_is_described_from_its_headers(tmp_path):
    checkpoints.qwen3_5_text(tmp_path, dtype=torch.bfloat16)
    assert describe(ModelSource(kind="hf", path=str(tmp_path))) == ModelFacts(
        family="qwen3_5",
        max_position_embeddings=4096,
        vocab_size=500,
        # Two bytes a parameter, but four for the 3 x 4 A_log and 3 x 24 norm weights.
        weight_bytes=2 * 242_272 + 2 * 3 * (4 + 24),
        num_parameters=242_272,
        kv_elements_per_token=2 * 1 * 2 * 32,
        state_bytes_per_slot_f32=4 * 3 * (4 * 24 * 16 + 3 * (2 * 32 + 96)),
    )


def test_a_vision_tower_counts(tmp_path):
    model = checkpoints.qwen3_5_wrapper(tmp_path)
    facts = describe(ModelSource(kind="hf", path=str(tmp_path)))
    tower = sum(each.numel() for each in model.model.visual.parameters())
    assert facts.num_parameters == 242_272 + tower
    assert facts.takes_images


def test_a_gguf_file_is_described_and_seen_again_after_a_change(tmp_path):
    model = checkpoints.llama(tmp_path / "hf")
    path = tmp_path / "model.gguf"
    source = ModelSource(kind="gguf", path=str(path))
    checkpoints.write_gguf(model, path, kind=gguf.GGMLQuantizationType.F32)
    facts = describe(source)
    assert (facts.family, facts.weight_bytes) == ("llama", 848_128)
    checkpoints.write_gguf(model, path, kind=gguf.GGMLQuantizationType.Q8_0)
    # 576 numbers of norms in four bytes; of the others each 32 take 34 bytes.
    assert describe(source).weight_bytes == 4 * 576 + (212_032 - 576) // 32 * 34


@pytest.mark.parametrize("make", [checkpoints.llama, checkpoints.qwen3_5_text])
def test_cache_sizes_agree_with_what_the_model_asks_for(tmp_path, make):
    make(tmp_path)
    source = ModelSource(kind="hf", path=str(tmp_path))
    facts = describe(source)
    spec: CacheSpec = load_causal_lm(
        source, device=torch.device("cpu"), dtype=None, progress=lambda done, total: None
    ).cache_spec
    assert facts.kv_elements_per_token * 4 == spec.kv_bytes_per_token(torch.float32)
    assert facts.state_bytes_per_slot_f32 == spec.state_bytes_per_slot(torch.float32)


def test_an_unknown_model_type_is_refused_even_without_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(CheckpointError, match="model_type 'mamba' is not supported"):
        describe(ModelSource(kind="hf", path=str(tmp_path)))


def test_describing_imports_no_torch():
    code = "import cortex.neuron.models.facts, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
