"""The vision tower, and the language model over images and text, against transformers."""

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cortex.core.errors import CheckpointError
from cortex.neuron.models.registry import load_causal_lm
from cortex.neuron.models.source import ModelSource
from tests.support import checkpoints
from tests.support.checkpoints import IMAGE_TOKEN_ID
from tests.support.seeing import Seeing, picture, words

TOLERANCE = 2e-4
# Four layers over a tower amplify rounding.
LOGITS_TOLERANCE = 2e-3


def load(directory, dtype=None):
    return load_causal_lm(
        ModelSource(kind="hf", path=str(directory)),
        device=torch.device("cpu"),
        dtype=dtype,
        progress=lambda done, total: None,
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("eyes")
    oracle = checkpoints.qwen3_5_wrapper(directory)
    checkpoints.write_image_rules(directory, min_pixels=64, max_pixels=4096)
    return directory, oracle


@pytest.fixture(scope="module")
def oracle(original):
    directory, model = original
    return model, Qwen2VLImageProcessorPil.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(original):
    return load(original[0])


def want_tokens(oracle, pixels):
    model, processor = oracle
    inputs = processor([pixels.numpy()], do_resize=False, return_tensors="pt")
    with torch.no_grad():
        return model.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"]
        ).pooler_output[0]


def want_logits(oracle, pieces, *, more=()):
    """Return transformers' logits of a prompt and of tokens decoded after it, one by one."""
    model, processor = oracle
    ids, images = [], []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
        else:
            images.append(piece.numpy())
            ids += [IMAGE_TOKEN_ID] * (piece.shape[0] * piece.shape[1] // 64)
    # The processor prepares images of one size at a time.
    inputs = [processor([each], do_resize=False, return_tensors="pt") for each in images]
    tokens = torch.tensor([ids])
    seen = {}
    if images:
        seen["pixel_values"] = torch.cat([each["pixel_values"] for each in inputs])
        seen["image_grid_thw"] = torch.cat([each["image_grid_thw"] for each in inputs])
    model.model.rope_deltas = None
    with torch.no_grad():
        out = model(
            input_ids=tokens,
            mm_token_type_ids=(tokens == IMAGE_TOKEN_ID).int(),
            use_cache=True,
            **seen,
        )
        logits = [out.logits[0]]
        for token in more:
            out = model(
                input_ids=torch.tensor([[token]]),
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            logits.append(out.logits[0])
    return torch.cat(logits)


def assert_same(got, want):
    assert got.shape == want.shape
    assert want.std() > 0.5
    torch.testing.assert_close(got, want, rtol=0, atol=LOGITS_TOLERANCE)


# The learned positions are a square of 5: grids below, at and above that, square and not.
@pytest.mark.parametrize("size", [(8, 8), (8, 24), (40, 8), (16, 24), (24, 16), (64, 56)])
def test_an_image_becomes_transformers_tokens(model, oracle, size):
    pixels = picture(*size)
    with torch.inference_mode():
        got = model.vision(pixels)
    want = want_tokens(oracle, pixels)
    assert got.shape == (size[0] * size[1] // 64, 64)
    assert want.std() > 0.3
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


PROMPTS = {
    "an image between texts": [*words(9), picture(32, 48), *words(7, 2)],
    "an image at the start": [picture(24, 40), *words(5)],
    "an image at the end": [*words(6), picture(40, 16)],
    "three images": [
        *words(3),
        picture(16, 64),
        *words(4, 2),
        picture(8, 8, 5),
        # As a template does it: one image ends before another one begins.
        *words(2, 4),
        picture(48, 24, 6),
        *words(6, 3),
    ],
    "text alone": words(30),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_with_images_has_transformers_logits(model, oracle, name):
    seeing = Seeing(model)
    sequence = seeing.sequence(PROMPTS[name])
    (got,) = seeing.step((sequence, sequence.num_pending))
    assert_same(got, want_logits(oracle, PROMPTS[name]))


@pytest.mark.parametrize("cuts", [[1, 9], [10, 1, 1, 30], [13, 17, 2], [33, 2]])
def test_prefill_cut_anywhere_in_an_image_and_decode_after_it_have_the_same_logits(
    model, oracle, cuts
):
    pieces = [*words(9), picture(32, 48), *words(3, 2), picture(16, 16, 8), *words(4, 3)]
    more = words(6, 9)
    seeing = Seeing(model)
    sequence = seeing.sequence(pieces)
    got = [seeing.step((sequence, cut))[0] for cut in cuts]
    got += seeing.step((sequence, sequence.num_pending))
    for token in more:
        sequence.token_ids.append(token)
        got += seeing.step((sequence, 1))
    assert_same(torch.cat(got), want_logits(oracle, pieces, more=more))


def test_sequences_with_and_without_images_mix_in_one_step(model, oracle):
    prompts = [
        [*words(4), picture(24, 24), *words(5, 2)],
        words(23, 4),
        [picture(16, 48, 7), *words(12, 5)],
    ]
    seeing = Seeing(model)
    sequences = [seeing.sequence(prompt) for prompt in prompts]
    got = [[] for _ in prompts]
    for counts in [(9, 22, 1), (1, 1, 7), (3, 0, 1)]:
        busy = [(i, count) for i, count in enumerate(counts) if count]
        steps = seeing.step(*[(sequences[i], count) for i, count in busy])
        for (i, _), logits in zip(busy, steps, strict=True):
            got[i].append(logits)
    left = [i for i, sequence in enumerate(sequences) if sequence.num_pending]
    steps = seeing.step(*[(sequences[i], sequences[i].num_pending) for i in left])
    for i, logits in zip(left, steps, strict=True):
        got[i].append(logits)
    for prompt, pieces in zip(prompts, got, strict=True):
        assert_same(torch.cat(pieces), want_logits(oracle, prompt))


def test_an_image_changes_what_follows_and_another_one_changes_it_otherwise(model):
    def last(seed):
        seeing = Seeing(model)
        sequence = seeing.sequence([*words(5), picture(24, 24, seed), *words(3, 2)])
        return seeing.step((sequence, sequence.num_pending))[0][-1]

    assert torch.equal(last(1), last(1))
    assert (last(1) - last(2)).abs().max() > 0.1


def test_a_bfloat16_tower_stays_near_its_float32_twin(original, oracle):
    model = load(original[0], torch.bfloat16)
    pixels = picture(32, 48)
    with torch.inference_mode():
        got = model.vision(pixels)
    want = want_tokens(oracle, pixels)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().mean() / want.abs().mean() < 0.05


def test_the_tower_counts_among_the_loaded_bytes(original, tmp_path):
    checkpoints.qwen3_5_text(tmp_path)
    with_tower, without = load(original[0]), load(tmp_path)
    # Of the two frames' kernels the sum is kept.
    stored = sum(p.numel() for p in original[1].model.visual.parameters())
    assert with_tower.weight_bytes - without.weight_bytes == 4 * (stored - 32 * 3 * 4 * 4)
    assert without.vision is None


def test_a_tower_of_another_width_is_refused(original, tmp_path):
    directory = checkpoints.copy(original[0], tmp_path / "m")
    checkpoints.rewrite_json(
        directory / "config.json", vision_config={"out_hidden_size": 32, "depth": 2}
    )
    with pytest.raises(CheckpointError, match="makes tokens of 32 numbers"):
        load(directory)


def test_a_missing_tensor_of_the_tower_is_named(original, tmp_path):
    directory = checkpoints.copy(original[0], tmp_path / "m")
    name = "model.visual.blocks.1.mlp.linear_fc2.bias"
    checkpoints.rewrite_tensors(
        directory, lambda t: {key: value for key, value in t.items() if key != name}
    )
    with pytest.raises(CheckpointError, match=r"'visual\.blocks\.1\.mlp\.linear_fc2\.bias' is"):
        load(directory)
