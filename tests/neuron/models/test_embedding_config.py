import json

import pytest

from cortex.core.errors import CheckpointError
from cortex.neuron.models.embedding_config import EmbeddingSpec, read_embedding_spec
from cortex.neuron.models.facts import describe
from cortex.neuron.models.source import ModelSource
from tests.support import checkpoints
from tests.support import embedding_checkpoints as made


def read(directory):
    return read_embedding_spec(ModelSource(kind="hf", path=str(directory)))


def write_config(directory, **fields):
    directory.joinpath("config.json").write_text(json.dumps({"hidden_size": 8, **fields}))


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "mean_sqrt_len", "last"])
def test_the_files_of_sentence_transformers_say_how_vectors_are_made(tmp_path, pooling):
    write_config(tmp_path, model_type="bert")
    made.write_modules(tmp_path, pooling, normalize=False, max_tokens=256, lower_case=True)
    assert read(tmp_path) == EmbeddingSpec(
        is_encoder=True,
        pooling=pooling,
        is_normalized=False,
        dimension=8,
        max_tokens=256,
        is_lowercased=True,
    )


def test_a_decoder_with_such_files_makes_vectors_and_one_without_writes(tmp_path):
    write_config(tmp_path, model_type="llama")
    assert read(tmp_path) is None
    made.write_modules(tmp_path, "last")
    found = read(tmp_path)
    assert (found.is_encoder, found.pooling, found.is_normalized) == (False, "last", True)


def test_the_newer_form_of_the_pooling_file_is_read(tmp_path):
    write_config(tmp_path, model_type="bert")
    made.write_modules(tmp_path)
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"embedding_dimension": 8, "pooling_mode": "lasttoken"}))
    assert read(tmp_path).pooling == "last"
    pooling.write_text(json.dumps({"pooling_mode": ["weightedmean"]}))
    assert read(tmp_path).pooling == "weighted_mean"


@pytest.mark.parametrize(
    ("config", "allowed", "refused"),
    [
        ({}, [8], [1, 7, 9]),
        ({"is_matryoshka": True}, [1, 4, 8], [9]),
        ({"is_matryoshka": True, "matryoshka_dimensions": [2, 4]}, [2, 4, 8], [1, 3, 9]),
        ({"matryoshka_dimensions": [2, 4]}, [2, 4, 8], [1, 3, 9]),
    ],
)
def test_vectors_may_be_cut_down_as_the_model_says(tmp_path, config, allowed, refused):
    write_config(tmp_path, model_type="bert", **config)
    made.write_modules(tmp_path)
    spec = read(tmp_path)
    assert all(spec.allows(each) for each in allowed)
    assert not any(spec.allows(each) for each in refused)


def test_an_encoder_that_does_not_say_how_it_pools_is_refused(tmp_path):
    write_config(tmp_path, model_type="bert")
    with pytest.raises(CheckpointError, match=r"modules\.json is missing"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda at: (at / "modules.json").write_text("[]"), "empty list"),
        (lambda at: (at / "modules.json").write_text("{"), "modules.json"),
        (lambda at: (at / "1_Pooling" / "config.json").unlink(), "cannot read"),
        (lambda at: (at / "1_Pooling" / "config.json").write_text("{}"), "names none"),
        (
            lambda at: (at / "1_Pooling" / "config.json").write_text('{"pooling_mode": "attn"}'),
            "'attn' is not supported",
        ),
        (
            lambda at: checkpoints.rewrite_json(
                at / "1_Pooling" / "config.json", pooling_mode_cls_token=True
            ),
            "names cls, mean",
        ),
        (
            lambda at: (at / "modules.json").write_text(
                (at / "modules.json").read_text().replace("Normalize", "Dense")
            ),
            "Transformer, Pooling, Dense",
        ),
        (
            lambda at: (at / "modules.json").write_text(
                (at / "modules.json").read_text().replace("1_Pooling", "../1_Pooling")
            ),
            "not a directory beside",
        ),
        (
            lambda at: (at / "modules.json").write_text(
                (at / "modules.json").read_text().replace('"path": ""', '"path": "0_Transformer"')
            ),
            "lies in '0_Transformer'",
        ),
    ],
)
def test_files_that_ask_for_something_else_are_refused_by_name(tmp_path, damage, words):
    write_config(tmp_path, model_type="bert")
    made.write_modules(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path)


def test_the_author_s_bound_on_tokens_holds_and_is_not_over_the_model_s_own(tmp_path):
    made.tiny_decoder(tmp_path, max_tokens=100)
    source = ModelSource(kind="hf", path=str(tmp_path))
    assert describe(source).max_position_embeddings == 100
    made.write_modules(tmp_path, "last", max_tokens=1 << 20)
    assert describe(source).max_position_embeddings == 2048
