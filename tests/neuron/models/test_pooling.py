import pytest
import torch

from cortex.neuron.models.embedding_config import EmbeddingSpec
from cortex.neuron.models.pooling import Pool

STATES = torch.tensor([[1.0, -2.0], [3.0, 0.0], [5.0, 4.0], [-1.0, 6.0]])
VECTORS = {
    "cls": [1.0, -2.0],
    "mean": [2.0, 2.0],
    "max": [5.0, 6.0],
    "mean_sqrt_len": [4.0, 4.0],
    "weighted_mean": [1.8, 3.4],
    "last": [-1.0, 6.0],
}


def spec(pooling, *, is_normalized=False):
    return EmbeddingSpec(
        is_encoder=False, pooling=pooling, is_normalized=is_normalized, dimension=2
    )


@pytest.mark.parametrize("pooling", VECTORS)
def test_a_text_pools_to_the_same_vector_in_one_piece_and_in_several(pooling):
    whole, parts = Pool(spec(pooling)), Pool(spec(pooling))
    whole.add(STATES)
    for each in STATES.split([1, 2, 1]):
        parts.add(each)
    for pool in (whole, parts):
        torch.testing.assert_close(pool.vector(), torch.tensor(VECTORS[pooling]))


def test_a_normalised_vector_has_length_one_and_zeros_stay_zeros():
    pool = Pool(spec("last", is_normalized=True))
    pool.add(torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16))
    torch.testing.assert_close(pool.vector(), torch.tensor([0.6, 0.8]))
    zero = Pool(spec("mean", is_normalized=True))
    zero.add(torch.zeros(2, 2))
    assert zero.vector().tolist() == [0.0, 0.0]
