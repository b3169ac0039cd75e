"""Logits of both families against transformers on tiny random checkpoints, float32."""

import functools

import pytest
import torch

from cortex.neuron.models.registry import load_causal_lm
from cortex.neuron.models.source import detect
from tests.support import checkpoints
from tests.support.stepping import Sequence, Stepper

# The bar is 2e-3. Over eight layers the rounding of transformers' own chunked form makes 6e-4.
TOLERANCE = 1e-3
BAR = 2e-3

VARIANTS = {
    "llama": functools.partial(checkpoints.llama),
    "llama-tied-llama3-rope": functools.partial(
        checkpoints.llama, tie_word_embeddings=True, rope_parameters=checkpoints.LLAMA3_ROPE
    ),
    "llama-linear-rope": functools.partial(
        checkpoints.llama, rope_parameters=checkpoints.LINEAR_ROPE
    ),
    "llama-biases": functools.partial(checkpoints.llama, attention_bias=True, mlp_bias=True),
    "llama-no-groups": functools.partial(checkpoints.llama, num_key_value_heads=4),
    "qwen3_5": functools.partial(checkpoints.qwen3_5_text),
    "qwen3_5-tied": functools.partial(checkpoints.qwen3_5_text, tie_word_embeddings=True),
    "qwen3_5-biases": functools.partial(checkpoints.qwen3_5_text, attention_bias=True),
    "qwen3_5-wrapper": functools.partial(checkpoints.qwen3_5_wrapper),
    "qwen3_5-sharded": functools.partial(checkpoints.qwen3_5_text, shard_bytes=100_000),
    "qwen3_5-bfloat16": functools.partial(checkpoints.qwen3_5_text, dtype=torch.bfloat16),
    "qwen3_5-heads-of-128": functools.partial(
        checkpoints.qwen3_5_text,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_value_heads=6,
    ),
    "qwen3_5-eight-layers": functools.partial(
        checkpoints.qwen3_5_text, num_hidden_layers=8, linear_num_value_heads=6
    ),
}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def load(directory, device, dtype=None):
    source = detect(directory)
    assert source is not None
    return load_causal_lm(
        source, device=torch.device(device), dtype=dtype, progress=lambda done, total: None
    )


@functools.cache
def _oracle(name, root):
    return VARIANTS[name](root / name)


@functools.cache
def _pair(name, root, device):
    return _oracle(name, root), load(root / name, device)


@pytest.fixture(params=DEVICES, scope="module")
def device(request):
    return request.param


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(params=VARIANTS)
def pair(request, root, device):
    return _pair(request.param, root, device)


@pytest.fixture(params=["llama", "qwen3_5"])
def family(request, root, device):
    return _pair(request.param, root, device)


def prompt(length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, checkpoints.VOCAB_SIZE, (length,), generator=generator).tolist()


def want_logits(oracle, tokens):
    with torch.no_grad():
        return oracle(input_ids=torch.tensor([tokens])).logits[0]


def assert_same(got, want, tolerance=TOLERANCE):
    assert got.dtype == torch.float32
    # Flat logits would hide a wrong layer.
    assert want.std() > 0.5
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    best = want.topk(2).values
    clear = best[:, 0] - best[:, 1] > BAR
    assert clear.float().mean() > 0.9
    assert torch.equal(got.argmax(-1)[clear], want.argmax(-1)[clear])


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
def test_prefill_gives_transformers_logits_at_every_position(pair, length):
    oracle, model = pair
    tokens = prompt(length)
    (got,) = Stepper(model).step((Sequence(slot=3), tokens))
    assert_same(got, want_logits(oracle, tokens))


def test_decode_token_by_token_gives_transformers_logits(pair):
    oracle, model = pair
    tokens = prompt(40)
    stepper, sequence = Stepper(model), Sequence(slot=0)
    got = torch.cat([stepper.step((sequence, [token]))[0] for token in tokens])
    assert_same(got, want_logits(oracle, tokens))


@pytest.mark.parametrize("cuts", [[1, 2, 3], [17, 64, 5], [63, 1, 70], [65, 2]])
def test_prefill_in_odd_chunks_gives_transformers_logits(pair, cuts):
    oracle, model = pair
    tokens = prompt(150)
    stepper, sequence = Stepper(model), Sequence(slot=1)
    pieces, start = [], 0
    for size in [*cuts, 150 - sum(cuts)]:
        pieces += stepper.step((sequence, tokens[start : start + size]))
        start += size
    # Eight layers amplify rounding: transformers' own decode differs from its prefill by 5e-4.
    assert_same(torch.cat(pieces), want_logits(oracle, tokens), BAR)


def test_greedy_generation_picks_transformers_tokens(family):
    oracle, model = family
    stepper, sequence = Stepper(model), Sequence(slot=2)
    tokens = prompt(20, seed=5)
    (logits,) = stepper.step((sequence, tokens), last_only=True)
    for _ in range(40):
        want = want_logits(oracle, tokens)[-1]
        best = want.topk(2).values
        if best[0] - best[1] > BAR:
            assert logits[0].argmax() == want.argmax()
        tokens.append(int(want.argmax()))
        (logits,) = stepper.step((sequence, tokens[-1:]), last_only=True)
    assert len(set(tokens[20:])) > 5


def test_blocks_in_a_row_are_read_without_mixing_sequences(family):
    oracle, model = family
    stepper = Stepper(model, in_a_row=True)
    tokens, neighbour, sequence = prompt(60), Sequence(slot=0), Sequence(slot=1)
    stepper.step((neighbour, prompt(40, seed=2)))
    pieces = [stepper.step((sequence, tokens[a:b]))[0] for a, b in ((0, 30), (30, 57), (57, 58))]
    pieces += [stepper.step((neighbour, [7]), (sequence, tokens[58:59]))[1]]
    pieces += stepper.step((sequence, tokens[59:]))
    assert_same(torch.cat(pieces), want_logits(oracle, tokens))


def test_decode_prefill_and_resumed_prefill_mix_in_one_step(family):
    oracle, model = family
    stepper = Stepper(model, num_blocks=128)
    prompts = [prompt(length, seed=length) for length in (90, 33, 7, 50, 1)]
    sequences = [Sequence(slot=slot) for slot in (5, 0, 3, 7, 1)]
    got = [[] for _ in prompts]
    # Tokens that each sequence brings to each step; 0: it sits the step out.
    schedule = [
        (20, 30, 0, 49, 0),
        (1, 1, 5, 1, 0),
        (64, 1, 1, 0, 1),
        (1, 1, 1, 0, 0),
        (4, 0, 0, 0, 0),
    ]
    for step in schedule:
        busy = [i for i, count in enumerate(step) if count]
        work = [
            (sequences[i], prompts[i][sequences[i].length : sequences[i].length + step[i]])
            for i in busy
        ]
        for i, logits in zip(busy, stepper.step(*work), strict=True):
            got[i].append(logits)
    for tokens, pieces in zip(prompts, got, strict=True):
        assert_same(torch.cat(pieces), want_logits(oracle, tokens))


def test_sequences_of_different_lengths_decode_in_one_batch(family):
    oracle, model = family
    stepper = Stepper(model, num_blocks=128)
    prompts = [prompt(length, seed=length) for length in (100, 3, 41, 17)]
    sequences = [Sequence(slot=slot) for slot in (6, 2, 3, 0)]
    for sequence, tokens in zip(sequences, prompts, strict=True):
        stepper.step((sequence, tokens[:-2]))
    for end in (-2, -1):
        work = [(s, [tokens[end]]) for s, tokens in zip(sequences, prompts, strict=True)]
        got = stepper.step(*work)
        for tokens, logits in zip(prompts, got, strict=True):
            assert_same(logits, want_logits(oracle, tokens)[[end]])


@pytest.mark.parametrize("first_chunk", [1, 30])
def test_a_reused_slot_and_reused_blocks_leak_nothing(family, first_chunk):
    oracle, model = family
    stepper = Stepper(model, num_blocks=8)
    old = Sequence(slot=4)
    stepper.step((old, prompt(120, seed=9)))
    stepper.release(old)
    tokens, new = prompt(60), Sequence(slot=4)
    got = stepper.step((new, tokens[:first_chunk])) + stepper.step((new, tokens[first_chunk:]))
    assert_same(torch.cat(got), want_logits(oracle, tokens))


def test_a_padding_slot_disturbs_neither_states_nor_other_rows(root, device):
    oracle, model = _pair("qwen3_5", root, device)
    stepper = Stepper(model)
    real, padding = Sequence(slot=0), Sequence(slot=-1)
    tokens = prompt(20)
    stepper.step((real, tokens[:18]), (padding, [1, 2, 3]))
    before = stepper.caches.recurrent_states[:, 1:].clone()
    got = stepper.step((padding, [4]), (real, tokens[18:19]))[1]
    got = torch.cat((got, stepper.step((real, tokens[19:]), (padding, [5, 6]))[0]))
    assert_same(got, want_logits(oracle, tokens)[18:])
    assert torch.equal(stepper.caches.recurrent_states[:, 1:], before)
    assert before.abs().max() == 0


def test_only_the_wanted_rows_get_logits(family):
    _, model = family
    stepper = Stepper(model)
    logits = stepper.step(
        (Sequence(slot=0), prompt(5)), (Sequence(slot=1), prompt(3)), last_only=True
    )
    assert [x.shape for x in logits] == [(1, checkpoints.VOCAB_SIZE)] * 2


@pytest.mark.parametrize("name", ["qwen3_5-bfloat16", "qwen3_5-heads-of-128"])
def test_a_bfloat16_model_stays_near_its_float32_twin(name, root, device):
    oracle = _oracle(name, root)
    model = load(root / name, device, torch.bfloat16)
    tokens = prompt(70)
    stepper, sequence = Stepper(model), Sequence(slot=0)
    assert stepper.caches.keys.dtype == torch.bfloat16
    (head,) = stepper.step((sequence, tokens[:-1]))
    (tail,) = stepper.step((sequence, tokens[-1:]))
    want = want_logits(oracle, tokens)
    error = (torch.cat((head, tail)) - want).abs().mean() / want.abs().mean()
    assert error < 0.05


def test_loaded_bytes_and_limits_are_stated(root):
    _, model = _pair("qwen3_5", root, "cpu")
    assert model.vocab_size == 500
    assert model.max_position_embeddings == 4096
    assert model.weight_bytes == 4 * 242_272
