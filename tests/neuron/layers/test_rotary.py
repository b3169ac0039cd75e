import math

import pytest
import torch

from cortex.neuron.layers.rotary import (
    RotaryAngles,
    interleaved_axes,
    inverse_frequencies,
    llama3_frequencies,
)


def test_frequencies_fall_from_one_by_powers_of_theta():
    assert inverse_frequencies(8, 10_000.0).tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])


def test_a_pair_turns_by_its_frequency_times_the_position():
    angles = RotaryAngles(torch.tensor([math.pi / 2]), torch.tensor([0, 1, 2]), torch.float32)
    heads = torch.tensor([[3.0, 4.0]]).expand(3, 1, 2)
    want = torch.tensor([[3.0, 4.0], [-4.0, 3.0], [-3.0, -4.0]])
    torch.testing.assert_close(angles.rotate(heads)[:, 0], want, rtol=0, atol=1e-5)


def test_dimensions_past_the_rotary_ones_pass_through():
    angles = RotaryAngles(torch.tensor([math.pi]), torch.tensor([1]), torch.float32)
    heads = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    want = torch.tensor([[[-1.0, -2.0, 3.0, 4.0]]])
    torch.testing.assert_close(angles.rotate(heads), want, rtol=0, atol=1e-5)


def test_time_row_and_column_alternate_and_time_takes_the_rest():
    assert interleaved_axes(8, (2, 1)).tolist() == [0, 1, 2, 0, 1, 0, 0, 0]


def test_each_pair_turns_by_the_position_of_its_axis():
    frequencies = torch.full((2,), math.pi / 2)
    positions = torch.tensor([[1], [2]])
    angles = RotaryAngles(frequencies, positions, torch.float32, torch.tensor([0, 1]))
    heads = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    # The first pair is (1, 3), a quarter turn; the second (2, 4), half a turn.
    want = torch.tensor([[[-3.0, -2.0, 1.0, -4.0]]])
    torch.testing.assert_close(angles.rotate(heads), want, rtol=0, atol=1e-5)


def test_llama3_scaling_slows_slow_pairs_keeps_fast_ones_and_blends_between():
    turns = torch.tensor([8.0, 2.5, 0.5])  # over the original window of 100 positions
    scaled = llama3_frequencies(
        turns * 2 * math.pi / 100,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=100,
    )
    want = [8.0, 2.5 * (0.5 + 0.5 / 8), 0.5 / 8]
    assert (scaled * 100 / (2 * math.pi)).tolist() == pytest.approx(want)
