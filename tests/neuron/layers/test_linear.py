import pytest
import torch

from cortex.neuron.layers.linear import GatedMlp, Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 3, 700])
def test_a_product_of_any_height_is_exact_for_small_whole_numbers(rows, dtype):
    weight = torch.arange(12, dtype=dtype).view(3, 4)
    linear = Linear(weight, torch.tensor([100.0, 0.0, 0.0], dtype=dtype))
    out = linear(torch.ones(rows, 4, dtype=dtype))
    assert out.dtype == dtype
    assert out.tolist() == [[106.0, 22.0, 38.0]] * rows


def test_an_input_that_is_a_slice_of_wider_rows_is_read_rightly():
    wide = torch.arange(12.0).view(2, 6)
    assert Linear(torch.eye(3))(wide[:, 3:]).tolist() == [[3.0, 4.0, 5.0], [9.0, 10.0, 11.0]]


def test_bytes_count_weight_and_bias():
    assert Linear(torch.zeros(3, 4), torch.zeros(3)).num_bytes == 60


def test_the_feed_forward_block_gates_its_first_half_with_silu():
    gate_up = Linear(torch.tensor([[1.0], [3.0]]))
    mlp = GatedMlp(gate_up, Linear(torch.tensor([[2.0]])))
    assert mlp(torch.tensor([[1.0]])).item() == pytest.approx(2 * 3 * 0.7310586)
