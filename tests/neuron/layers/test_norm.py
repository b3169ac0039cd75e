import pytest
import torch

from cortex.neuron.layers.norm import RmsNorm


def test_a_norm_divides_by_the_root_of_the_mean_square_and_weighs():
    norm = RmsNorm(torch.tensor([1.0, 2.0]), 0.0)
    assert norm(torch.tensor([[3.0, 4.0]])).tolist() == [pytest.approx([0.848528, 2.262742])]


def test_each_head_has_its_own_weight():
    norm = RmsNorm(torch.tensor([[1.0, 1.0], [10.0, 10.0]]), 0.0)
    out = norm(torch.tensor([[[2.0, 2.0], [2.0, 2.0]]]))
    assert out.tolist() == [[[1.0, 1.0], [10.0, 10.0]]]


def test_epsilon_keeps_zeros_zero():
    assert RmsNorm(torch.ones(2), 1e-6)(torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


def test_half_precision_stays_so_and_is_computed_in_float32():
    norm = RmsNorm(torch.ones(256), 1e-6)
    out = norm(torch.full((1, 256), 300.0, dtype=torch.float16))
    assert out.dtype == torch.float16
    assert out[0, 0].item() == 1.0
