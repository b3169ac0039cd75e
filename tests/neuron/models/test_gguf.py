import copy

import gguf
import numpy as np
import pytest
import torch

from cortex.core.errors import CheckpointError
from cortex.neuron.models.config import GenerationDefaults
from cortex.neuron.models.facts import describe
from cortex.neuron.models.gguf_config import read_gguf_config
from cortex.neuron.models.gguf_file import read_gguf
from cortex.neuron.models.gguf_weights import GgufWeights
from cortex.neuron.models.registry import load_causal_lm
from cortex.neuron.models.source import ModelSource
from tests.support import checkpoints
from tests.support.stepping import Sequence, Stepper

Kind = gguf.GGMLQuantizationType
TOKENS = [5, 9, 200, 3, 77, 410, 33, 60, 8, 9]


def quiet(done, total):
    pass


def load(kind, path, progress=quiet):
    source = ModelSource(kind=kind, path=str(path))
    return load_causal_lm(source, device=torch.device("cpu"), dtype=None, progress=progress)


def logits_of(model):
    (logits,) = Stepper(model).step((Sequence(slot=0), TOKENS))
    return logits


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A llama checkpoint as safetensors, and transformers' model of it."""
    directory = tmp_path_factory.mktemp("twin")
    return directory, checkpoints.llama(directory)


def test_float32_gguf_gives_exactly_the_logits_of_its_safetensors_twin(twin, tmp_path):
    directory, model = twin
    path = tmp_path / "model.gguf"
    checkpoints.write_gguf(model, path, kind=Kind.F32)
    torch.testing.assert_close(
        logits_of(load("gguf", path)), logits_of(load("hf", directory)), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q4_0])
def test_each_quantisation_gives_the_logits_of_its_dequantised_twin(twin, tmp_path, kind):
    model = copy.deepcopy(twin[1])
    path = tmp_path / "model.gguf"
    checkpoints.write_gguf(model, path, kind=kind)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            rounded = gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
            parameter.copy_(torch.from_numpy(rounded))
    want = model(input_ids=torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits_of(load("gguf", path)), want, rtol=0, atol=5e-4)
    unrounded = twin[1](input_ids=torch.tensor([TOKENS])).logits[0]
    assert (want - unrounded).abs().max() > 2e-3


def test_a_gguf_without_an_output_tensor_is_tied_and_biases_are_found(tmp_path):
    model = checkpoints.llama(tmp_path / "hf", tie_word_embeddings=True, attention_bias=True)
    path = tmp_path / "model.gguf"
    checkpoints.write_gguf(model, path, kind=Kind.F32)
    file = read_gguf(path)
    assert read_gguf_config(file).model.tied_head is None
    weights = GgufWeights(file, read_gguf_config(file).model, quiet)
    bias = weights.tensor("layers.0.self_attn.q_proj.bias", (64,))
    assert torch.equal(bias, model.model.layers[0].self_attn.q_proj.bias)
    torch.testing.assert_close(
        logits_of(load("gguf", path)), logits_of(load("hf", tmp_path / "hf")), rtol=0, atol=1e-5
    )


def test_q6_k_blocks_have_the_written_out_values(tmp_path):
    # 210 bytes: 128 of low nibbles, 64 of high bit pairs, 16 scales, one float16.
    block = bytes([0x21] * 128 + [0xE4] * 64 + [1] * 8 + [2] * 8) + np.float16(0.5).tobytes()
    row = _values(tmp_path, Kind.Q6_K, block)
    want = [0.5 * (q - 32) for q in (1, 17, 34, 50)]
    assert [row[i] for i in (0, 32, 64, 96)] == want
    assert [row[i] for i in (128, 160, 192, 255)] == [2 * value for value in want]


def test_q4_k_blocks_have_the_written_out_values(tmp_path):
    # 144 bytes: two float16, 12 of packed 6-bit scales and minima, 128 of nibbles.
    head = np.array([0.5, 0.25], dtype=np.float16).tobytes()
    block = head + bytes([2] * 4 + [3] * 4 + [0x42] * 4 + [0x51] * 128)
    row = _values(tmp_path, Kind.Q4_K, block)
    assert [row[i] for i in (0, 31, 32, 63)] == [0.25, 0.25, 4.25, 4.25]
    assert [row[i] for i in (128, 160, 255)] == [0.0, 4.0, 4.0]


def _values(tmp_path, kind, block):
    path = tmp_path / "blocks.gguf"
    raw = np.frombuffer(block * 3, dtype=np.uint8).reshape(3, -1)
    checkpoints.write_raw_gguf(path, "llama", {"token_embd.weight": (raw, kind)}, **_FIELDS)
    file = read_gguf(path)
    weights = GgufWeights(file, read_gguf_config(file).model, quiet)
    return weights.tensor("embed_tokens.weight", (3, 256))[2].tolist()


_FIELDS = {
    "llama__block_count": 1,
    "llama__context_length": 64,
    "llama__embedding_length": 256,
    "llama__feed_forward_length": 256,
    "llama__attention__head_count": 4,
}


def test_progress_ends_at_the_total(twin, tmp_path):
    path = tmp_path / "model.gguf"
    checkpoints.write_gguf(twin[1], path, kind=Kind.F32)
    seen = []
    load("gguf", path, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (848_128, 848_128)


def test_metadata_become_the_configuration(twin, tmp_path):
    path = tmp_path / "model.gguf"
    checkpoints.write_gguf(
        twin[1],
        path,
        kind=Kind.F32,
        tokenizer__ggml__eot_token_id=7,
        general__sampling__temp=0.5,
        general__sampling__top_p=0.75,
        llama__rope__scaling__type="linear",
        llama__rope__scaling__factor=4.0,
    )
    config = read_gguf_config(read_gguf(path))
    assert config.generation == GenerationDefaults(eos_ids=(2, 7), temperature=0.5, top_p=0.75)
    assert (config.model.vocab_size, config.model.num_kv_heads) == (500, 2)
    assert (config.model.rope.kind, config.model.rope.factor) == ("linear", 4.0)


def test_frequency_divisors_in_the_file_slow_the_rotation(twin, tmp_path):
    path = tmp_path / "model.gguf"
    raw = np.array([1.0, 1.0, 2.0, 4.0], dtype=np.float32)
    fields = {**_FIELDS, "llama__attention__key_length": 8}
    embedding = np.zeros((2, 256), dtype=np.float32)
    tensors = {"token_embd.weight": (embedding, Kind.F32), "rope_freqs.weight": (raw, Kind.F32)}
    checkpoints.write_raw_gguf(path, "llama", tensors, **fields)
    rope = read_gguf_config(read_gguf(path)).model.rope
    assert rope.freq_factors == (1.0, 1.0, 2.0, 4.0)


def test_another_architecture_is_refused_by_name(tmp_path):
    path = tmp_path / "model.gguf"
    tensors = {"token_embd.weight": (np.zeros((2, 32), dtype=np.float32), Kind.F32)}
    checkpoints.write_raw_gguf(path, "gemma3", tensors)
    with pytest.raises(CheckpointError, match="GGUF architecture 'gemma3' is not supported"):
        load("gguf", path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama__block_count": None}, r"metadata 'llama\.block_count' is missing"),
        ({"llama__block_count": 0}, r"metadata 'llama\.block_count' is 0"),
        ({"llama__block_count": 9}, r"tensor 'blk\.4\.attn_norm\.weight' is missing"),
        ({"llama__expert_count": 8}, "mixture-of-experts"),
        ({"llama__rope__scaling__type": "yarn"}, "rope scaling 'yarn'"),
        ({"llama__feed_forward_length": 64}, r"'blk\.0\.ffn_gate\.weight' has shape \[128, 64\]"),
    ],
)
def test_a_file_that_contradicts_itself_or_asks_too_much_is_refused(
    twin, tmp_path, metadata, message
):
    path = tmp_path / "model.gguf"
    checkpoints.write_gguf(twin[1], path, kind=Kind.F32, **metadata)
    with pytest.raises(CheckpointError, match=message):
        load("gguf", path)


def test_a_quantisation_that_is_not_read_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    raw = np.zeros((3, 84), dtype=np.uint8)
    checkpoints.write_raw_gguf(path, "llama", {"token_embd.weight": (raw, Kind.Q2_K)}, **_FIELDS)
    with pytest.raises(CheckpointError, match=r"'token_embd\.weight' is quantised as Q2_K"):
        load("gguf", path)


@pytest.mark.parametrize("keep", [0, 3, 200, 0.5, 0.99])
def test_a_file_cut_short_is_refused(twin, tmp_path, keep):
    path = tmp_path / "model.gguf"
    checkpoints.write_gguf(twin[1], path, kind=Kind.F32)
    body = path.read_bytes()
    path.write_bytes(body[: keep if isinstance(keep, int) else int(keep * len(body))])
    source = ModelSource(kind="gguf", path=str(path))
    with pytest.raises(CheckpointError, match=r"model\.gguf is not a complete GGUF file"):
        describe(source)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    source = ModelSource(kind="gguf", path=str(tmp_path / "none.gguf"))
    with pytest.raises(CheckpointError, match=r"cannot read .*none\.gguf"):
        describe(source)
    with pytest.raises(CheckpointError, match=r"cannot read .*none\.gguf"):
        load("gguf", source.path)
