"""Hidden states of the BERT family against transformers, and vectors of a real model."""

import pytest
import torch

from cortex.core.errors import CheckpointError
from cortex.neuron.models.facts import describe
from cortex.neuron.models.pooling import Pool
from cortex.neuron.models.registry import load_encoder
from cortex.neuron.models.source import ModelSource
from tests.support import checkpoints
from tests.support import embedding_checkpoints as made

TEXTS = [
    "A man is eating food.",
    "x",
    "Somebody is having a meal.",
    "Ein Mann isst etwas; 食べる. " * 9,
    "",
]


def load(directory, dtype=None):
    return load_encoder(
        ModelSource(kind="hf", path=str(directory)),
        device=torch.device("cpu"),
        dtype=dtype,
        progress=lambda done, total: None,
    )


def states(model, texts):
    with torch.inference_mode():
        return model.encode(texts)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {}),
        ("bert", {"hidden_act": "gelu_new", "type_vocab_size": 1}),
        ("bert", {"hidden_act": "relu", "num_attention_heads": 1}),
        ("roberta", {"max_position_embeddings": 66, "pad_token_id": 1}),
        ("xlm-roberta", {"max_position_embeddings": 66, "type_vocab_size": 1}),
    ],
)
def test_states_are_those_of_transformers_whatever_is_beside_a_text(tmp_path, kind, changes):
    reference = made.encoder(tmp_path, kind, **changes)
    model = load(tmp_path)
    # Token 1 is padding to roberta's own code, which counts positions past it.
    texts = [list(range(2, 2 + count)) for count in (1, 7, 33, 64, 2, 7)]
    for text, found in zip(texts, states(model, texts), strict=True):
        with torch.inference_mode():
            wanted = reference(torch.tensor([text])).last_hidden_state[0]
        assert found.shape == (len(text), 48)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_texts_of_one_length_need_no_padding(tmp_path):
    made.encoder(tmp_path)
    model = load(tmp_path)
    texts = [[5, 6, 7], [8, 9, 10]]
    together, alone = states(model, texts), [states(model, [each])[0] for each in texts]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_an_outer_class_and_its_head_are_left_aside(tmp_path):
    reference = made.encoder(tmp_path)

    def wrapped(tensors):
        found = {f"bert.{name}": tensor for name, tensor in tensors.items()}
        return found | {"cls.predictions.bias": torch.zeros(80)}

    checkpoints.rewrite_tensors(tmp_path, wrapped)
    (found,) = states(load(tmp_path), [[4, 5]])
    wanted = reference(torch.tensor([[4, 5]])).last_hidden_state[0]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_weights_are_counted_as_they_are_stored_and_as_they_are_held(tmp_path):
    made.tiny_encoder(tmp_path)
    facts = describe(ModelSource(kind="hf", path=str(tmp_path)))
    assert (facts.family, facts.max_position_embeddings) == ("bert", 64)
    assert (facts.kv_elements_per_token, facts.state_bytes_per_slot_f32) == (0, 0)
    assert facts.weight_bytes == 4 * facts.num_parameters
    assert load(tmp_path).weight_bytes == facts.weight_bytes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "swish"}, "hidden_act"),
        ({"position_embedding_type": "relative_key"}, "absolute positions"),
        ({"num_attention_heads": 5}, "do not divide"),
        ({"vocab_size": 81}, "has shape"),
        ({"num_hidden_layers": 4}, "is missing"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(tmp_path, changes, words):
    made.encoder(tmp_path)
    checkpoints.rewrite_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path)


@pytest.mark.skipif(made.minilm() is None, reason="its distribution is not installed")
def test_all_minilm_makes_the_vectors_that_transformers_makes():
    import transformers

    path = made.minilm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    reference = transformers.AutoModel.from_pretrained(path).eval()
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    spec = describe(ModelSource(kind="hf", path=str(path))).embedding
    found = []
    for each in states(load(path), ids):
        pool = Pool(spec)
        pool.add(each)
        found.append(pool.vector())
    # The reference pads its batch.
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = reference(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    wanted = (hidden * mask).sum(1) / mask.sum(1)
    wanted = wanted / wanted.norm(dim=1, keepdim=True)
    cosines = (torch.stack(found) * wanted).sum(1)
    assert cosines.min() > 0.9999
    assert all(abs(each.norm() - 1) < 1e-5 for each in found)
    related, apart = found[0] @ found[2], found[0] @ found[1]
    assert related > apart
