import pytest
import torch
from tokenizers import Tokenizer
from transformers.models.qwen3_5 import modeling_qwen3_5

from cortex.bundled.recipe import render
from cortex.bundled.recipe.batches import Feed, copy_share, tensors
from cortex.bundled.recipe.model import chunk_rule
from cortex.bundled.recipe.optim import orthogonalise
from cortex.bundled.recipe.plot import draw
from cortex.bundled.recipe.train import rate


def feed(seed=1):
    tokenizer = Tokenizer.from_file(str(render.MODEL_DIR / "tokenizer.json"))
    return Feed(render.Encoder(tokenizer, render.load_template()), seed, 1024)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 77])
def test_the_fast_rule_agrees_with_transformers(tokens):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, tokens, 2, 16)
    v, g, beta = torch.randn(2, tokens, 4, 8), -torch.rand(2, tokens, 4), torch.rand(2, tokens, 4)

    expected, _ = modeling_qwen3_5.torch_chunk_gated_delta_rule(
        q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True
    )
    actual, _ = chunk_rule(q, k, v, g, beta)

    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_each_token_is_paired_with_the_next_and_weighed_by_whose_it_is():
    ids, after, weights = tensors([([5, 6, 7], [False, False, True])], torch.device("cpu"))

    assert ids.tolist() == [[5, 6, 7, 0]]
    assert after.tolist() == [[6, 7, 0, 0]]
    assert weights.tolist() == [[pytest.approx(0.1), 1.0, 0.0, 0.0]]


def test_a_batch_stays_within_its_tokens():
    drawn = feed()
    for _ in range(10):
        batch = drawn.batch(0.5)
        longest = max(len(ids) for ids, _ in batch)
        assert len(batch) == 1 or len(batch) * longest <= 1024


def test_the_same_seed_gives_the_same_batches():
    one, other = feed(), feed()

    assert [one.batch(0.3) for _ in range(3)] == [other.batch(0.3) for _ in range(3)]


def test_copying_comes_first_and_fades():
    assert [round(copy_share(at), 2) for at in (0.0, 0.19, 0.5, 0.9)] == [0.8, 0.45, 0.1, 0.04]


def test_the_rate_warms_up_holds_and_decays():
    assert rate(0.0, 0) == pytest.approx(1 / 40)
    assert rate(0.5, 1000) == 1.0
    assert rate(0.85, 1000) == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(2, 24, 8), (1, 8, 24)])
def test_an_orthogonalised_matrix_has_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))

    assert values.min() > 0.5
    assert values.max() < 1.5


def test_the_loss_curve_is_drawn_as_svg():
    assert draw([(0.1, 5.0), (1.0, 1.0), (2.0, 0.2)]).startswith("<svg ")
