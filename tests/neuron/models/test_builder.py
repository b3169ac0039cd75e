import math

import pytest
import torch

from cortex.neuron.models.builder import rope_frequencies
from cortex.neuron.models.config import RopeConfig

CPU = torch.device("cpu")


def test_plain_frequencies_are_powers_of_theta():
    rope = RopeConfig(rotary_dim=4, theta=100.0)
    assert rope_frequencies(rope, CPU).tolist() == pytest.approx([1.0, 0.1])


def test_linear_scaling_divides_every_frequency():
    rope = RopeConfig(rotary_dim=4, theta=100.0, kind="linear", factor=4.0)
    assert rope_frequencies(rope, CPU).tolist() == pytest.approx([0.25, 0.025])


def test_stored_divisors_divide_each_their_own_frequency():
    rope = RopeConfig(rotary_dim=4, theta=100.0, freq_factors=(2.0, 5.0))
    assert rope_frequencies(rope, CPU).tolist() == pytest.approx([0.5, 0.02])


def test_llama3_scaling_slows_only_what_turns_slower_than_its_window():
    window = round(2 * math.pi * 10)
    rope = RopeConfig(
        rotary_dim=4,
        theta=1e6,
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=window,
    )
    # Ten turns in the window are kept, a hundredth of a turn is slowed eightfold.
    assert rope_frequencies(rope, CPU).tolist() == pytest.approx([1.0, 0.001 / 8])
