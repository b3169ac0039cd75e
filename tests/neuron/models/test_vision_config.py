import json

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from cortex.core.errors import CheckpointError
from cortex.neuron.models.config import read_hf_config
from cortex.neuron.models.facts import describe
from cortex.neuron.models.source import ModelSource
from cortex.neuron.models.vision_config import ImageRules, ImageSize, VisionConfig
from tests.support import checkpoints

QWEN = VisionConfig(
    depth=27,
    hidden_size=1152,
    intermediate_size=4304,
    num_heads=16,
    patch_size=16,
    merge_size=2,
    temporal_patch_size=2,
    out_hidden_size=5120,
    grid_side=48,
    image_token_id=248056,
)


@pytest.mark.parametrize(
    ("width", "height", "final", "num_tokens"),
    [
        (1920, 1080, (1920, 1088), 2040),
        (1024, 1024, (1024, 1024), 1024),
        # Too small for 65,536 pixels.
        (64, 64, (256, 256), 64),
        (1, 1, (256, 256), 64),
        # Too large for 16,777,216 pixels.
        (10_000, 5000, (5792, 2880), 16_290),
        # Halves round to even.
        (48 * 32 + 16, 320, (48 * 32, 320), 480),
    ],
)
def test_an_image_is_brought_to_whole_tokens_within_the_bounds(width, height, final, num_tokens):
    size = QWEN.final_size(ImageSize(width, height))
    assert (size.width, size.height) == final
    assert QWEN.num_tokens(size) == num_tokens


def test_sizes_are_those_of_transformers():
    rules = QWEN.rules
    for width in (1, 17, 31, 48, 100, 333, 800, 1999, 4000, 9001):
        for height in (1, 16, 47, 49, 250, 640, 1080, 5000):
            if max(width, height) > 200 * min(width, height):
                continue
            want = smart_resize(height, width, 32, rules.min_pixels, rules.max_pixels)
            got = QWEN.final_size(ImageSize(width, height))
            assert (got.height, got.width) == want, (width, height)


def test_an_operators_bound_is_kept_even_below_the_checkpoints_least():
    assert QWEN.num_tokens(QWEN.final_size(ImageSize(4000, 4000), 100 * 1024)) == 100
    assert QWEN.num_tokens(QWEN.final_size(ImageSize(10, 10), 16 * 1024)) == 16


def test_a_strip_is_refused():
    with pytest.raises(ValueError, match="over 200 times"):
        QWEN.final_size(ImageSize(2010, 10))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("eyes")
    checkpoints.qwen3_5_wrapper(directory)
    return directory


@pytest.fixture
def directory(original, tmp_path):
    return checkpoints.copy(original, tmp_path / "m")


def vision_of(directory):
    return read_hf_config(directory).model.vision


def test_the_tower_and_its_tokens_place_are_read(original):
    vision = vision_of(original)
    assert (vision.depth, vision.token_side, vision.grid_side) == (2, 8, 5)
    assert vision.image_token_id == checkpoints.IMAGE_TOKEN_ID
    assert vision.rules == ImageRules()
    assert read_hf_config(original).model.rope.image_sections == (1, 1)


def test_the_rules_of_either_file_are_taken(directory):
    rules = {"size": {"shortest_edge": 64, "longest_edge": 4096}, "image_std": [1, 2, 4]}
    want = ImageRules(min_pixels=64, max_pixels=4096, std=(1.0, 2.0, 4.0))
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": rules}))
    assert vision_of(directory).rules == want
    older = {"min_pixels": 100, "max_pixels": 200, "image_mean": [0.0, 0.1, 0.2]}
    (directory / "preprocessor_config.json").write_text(json.dumps(older))
    assert vision_of(directory).rules == ImageRules(
        min_pixels=100, max_pixels=200, mean=(0.0, 0.1, 0.2)
    )


@pytest.mark.parametrize(
    "rules", [{"min_pixels": 200, "max_pixels": 100}, {"image_std": [0.5, 0.0, 0.5]}]
)
def test_rules_that_no_image_can_meet_are_refused(directory, rules):
    (directory / "preprocessor_config.json").write_text(json.dumps(rules))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: .* cannot be made"):
        vision_of(directory)


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ({"hidden_act": "silu"}, "hidden_act 'silu' is not supported"),
        ({"deepstack_visual_indexes": [1]}, "deepstack"),
        ({"in_channels": 4}, "3 colour channels"),
        ({"num_position_embeddings": 24}, "24 positions does not fit"),
        ({"num_heads": 3}, "3 heads over 32"),
    ],
)
def test_what_the_tower_cannot_do_is_refused_by_name(directory, tower, message):
    config = json.loads((directory / "config.json").read_text())
    checkpoints.rewrite_json(
        directory / "config.json", vision_config={**config["vision_config"], **tower}
    )
    with pytest.raises(CheckpointError, match=message):
        vision_of(directory)


def test_an_image_token_outside_the_vocabulary_is_refused(directory):
    checkpoints.rewrite_json(directory / "config.json", image_token_id=500)
    with pytest.raises(CheckpointError, match="image_token_id 500 is outside the vocabulary"):
        vision_of(directory)


def test_without_the_towers_weights_the_model_reads_text_only(directory):
    checkpoints.rewrite_tensors(
        directory, lambda t: {key: value for key, value in t.items() if "visual" not in key}
    )
    assert vision_of(directory) is None
    facts = describe(ModelSource(kind="hf", path=str(directory)))
    assert (facts.takes_images, facts.num_parameters) == (False, 242_272)


def test_a_tower_in_shards_is_found_by_the_index(tmp_path):
    checkpoints.qwen3_5_wrapper(tmp_path)
    # One file and an index over it.
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    name = "model.visual.patch_embed.proj.weight"
    index = {"weight_map": {name: "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert vision_of(tmp_path) is not None
