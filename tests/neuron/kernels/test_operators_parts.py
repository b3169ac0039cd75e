"""Convolution, gating and gated norm in every implementation, against float64."""

import math
from dataclasses import dataclass

import pytest
import torch

from cortex.neuron.kernels import gdn_reference as reference
from tests.support import gdn_cases
from tests.support.gdn_cases import FLOAT32_ERROR, rounded
from tests.support.gdn_operators import (
    CPUS,
    CUDA,
    HOST_CUDA_ORDERS,
    TORCH,
    Operators,
    implementation,
)

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TYPES = (F32, F16, BF16)
EVERY = [implementation(name) for name in (TORCH, *CPUS, *HOST_CUDA_ORDERS, CUDA)]
# These take a slot outside the pool for padding; the operators on a CPU refuse it.
LENIENT = [implementation(name) for name in (TORCH, *HOST_CUDA_ORDERS, CUDA)]


@dataclass
class Conv:
    """Inputs of a convolution, and what comes of them in float64."""

    x: torch.Tensor
    weight: torch.Tensor
    windows: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    out: torch.Tensor
    after: torch.Tensor


def convolution(
    lengths, *, device, channels=40, width=4, dtype=F32, padding=(), no_slot=-1, strided=False
):
    generator = torch.Generator().manual_seed(sum(lengths) + channels + width)
    x = torch.randn(sum(lengths), channels, generator=generator).to(dtype)
    weight = torch.randn(channels, width, generator=generator).to(dtype)
    slots, num_slots = gdn_cases.spread(len(lengths), padding, no_slot)
    windows = torch.randn(num_slots, width - 1, channels, generator=generator).to(dtype)
    gdn_cases.poison_others(windows, slots)
    out, after = torch.zeros(x.shape, dtype=torch.float64), windows.double()
    parts = list(zip(x.double().split(lengths), out.split(lengths), strict=True))
    for sequence, slot in gdn_cases.held_slots(slots, num_slots):
        part, to = parts[sequence]
        done, last = reference.causal_conv1d_full(
            part[None], weight.double(), windows[slot : slot + 1].double()
        )
        to.copy_(done[0])
        after[slot] = last[0]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    moved = [each.to(device) for each in (x, weight, windows, slots, starts)]
    if strided:
        moved[0] = gdn_cases.apart(moved[0])
    return Conv(*moved, out, after)


def assert_convolved(conv, out):
    dtype = conv.x.dtype
    assert (out.dtype, out.shape) == (dtype, conv.out.shape)
    if conv.out.numel():
        # Sums near zero are as far off as their terms: measured by the row.
        assert gdn_cases.error(out, conv.out) <= rounded(FLOAT32_ERROR, dtype)
    # Inputs are copied, so windows are exact, and those of others are as they were.
    torch.testing.assert_close(
        conv.windows.cpu(), conv.after.to(dtype), rtol=0, atol=0, equal_nan=True
    )


MIX = (1, 2, 0, 3, 4, 70, 1)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "given",
    [
        {"lengths": MIX},
        {"lengths": MIX, "padding": (0, 5)},
        {"lengths": MIX, "strided": True},
        {"lengths": (5, 6), "width": 2},
        {"lengths": MIX, "width": 3, "channels": 33},
        {"lengths": MIX, "width": 8, "padding": (3,)},
        {"lengths": (3, 2), "width": 5, "channels": 7},
        {"lengths": (70,), "channels": 1},
        {"lengths": (), "channels": 8},
        {"lengths": (0, 0)},
        {"lengths": (4, 1), "padding": (0, 1)},
    ],
    ids=str,
)
def test_causal_conv1d_full_follows_float64(given, dtype, name):
    operators = Operators(name)
    conv = convolution(**given, dtype=dtype, device=operators.device)
    out = operators.causal_conv1d_full(conv.x, conv.weight, conv.windows, conv.slots, conv.starts)
    assert_convolved(conv, out)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_causal_conv1d_full_without_starts_takes_equal_lengths(length, name):
    operators = Operators(name)
    conv = convolution((length,) * 3, device=operators.device, padding=(1,))
    out = operators.causal_conv1d_full(conv.x, conv.weight, conv.windows, conv.slots, None)
    assert_convolved(conv, out)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "given",
    [
        {"lengths": (1,)},
        {"lengths": (1,) * 6, "padding": (0, 4), "channels": 300},
        {"lengths": (1,) * 3, "strided": True},
        *[{"lengths": (1,) * 3, "width": width} for width in range(2, 9)],
        {"lengths": (1,) * 3, "channels": 33},
        {"lengths": ()},
    ],
    ids=str,
)
def test_causal_conv1d_update_follows_float64(given, dtype, name):
    operators = Operators(name)
    conv = convolution(**given, dtype=dtype, device=operators.device)
    out = operators.causal_conv1d_update(conv.x, conv.weight, conv.windows, conv.slots)
    assert_convolved(conv, out)


@pytest.mark.parametrize("name", LENIENT)
@pytest.mark.parametrize("no_slot", [-5, 11, 2**40])
def test_convolutions_take_a_slot_outside_the_pool_for_padding(no_slot, name):
    operators = Operators(name)
    conv = convolution((1,) * 5, device=operators.device, padding=(1, 2), no_slot=no_slot)
    windows = conv.windows.clone()
    out = operators.causal_conv1d_update(conv.x, conv.weight, conv.windows, conv.slots)
    assert_convolved(conv, out)
    conv.windows = windows
    out = operators.causal_conv1d_full(conv.x, conv.weight, windows, conv.slots, conv.starts)
    assert_convolved(conv, out)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("cut", [1, 2, 3, 5, 31, 33])
def test_a_convolution_in_two_parts_equals_one(cut, name):
    operators = Operators(name)
    conv = convolution((40,), device=operators.device, dtype=BF16)
    parts = [
        operators.causal_conv1d_full(x, conv.weight, conv.windows, conv.slots, None)
        for x in (conv.x[:cut], conv.x[cut:])
    ]
    assert_convolved(conv, torch.cat(parts))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads"), [(1, 48), (70, 3), (0, 4), (300, 64)])
def test_fused_gdn_gating_follows_float64(tokens, heads, dtype, name):
    operators = Operators(name)
    generator = torch.Generator().manual_seed(tokens)
    b, a = (3 * torch.randn(tokens, heads, generator=generator).to(dtype) for _ in range(2))
    a_log, dt_bias = (torch.randn(heads, generator=generator) for _ in range(2))
    want = reference.fused_gdn_gating(b, a, a_log.double(), dt_bias.double())
    given = [x.to(operators.device) for x in (b, a, a_log, dt_bias)]
    for strided in (False, True):
        if strided:
            given[:2] = [gdn_cases.apart(x) for x in given[:2]]
        got = operators.fused_gdn_gating(*given)
        for x, wanted in zip(got, want, strict=True):
            assert x.dtype == F32
            # Each value by itself: a decay of 1e-3 matters as much as one of 10.
            torch.testing.assert_close(x.double().cpu(), wanted, rtol=3e-6, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_fused_gdn_gating_survives_extreme_inputs(name):
    operators = Operators(name)
    a = torch.tensor([[-200.0, -90.0, -20.0, 88.0, 89.0, 1000.0]], device=operators.device)
    zeros = torch.zeros(6, device=operators.device)
    beta, g = operators.fused_gdn_gating(a, a, zeros, zeros)
    softplus = [0.0, math.exp(-90), math.log1p(math.exp(-20)), 88.0, 89.0, 1000.0]
    assert g[0].tolist() == pytest.approx([-x for x in softplus], rel=1e-5, abs=1e-37)
    assert beta[0].tolist() == pytest.approx([0, 0, 2.0611537e-9, 1, 1, 1], rel=1e-5, abs=1e-37)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "dim"),
    [(1, 48, 128), (9, 2, 64), (3, 3, 33), (3, 1, 7), (2, 2, 256), (5, 2, 1), (0, 2, 64)],
)
def test_gdn_gated_norm_follows_float64(tokens, heads, dim, dtype, name):
    operators = Operators(name)
    generator = torch.Generator().manual_seed(dim)
    x, gate = (torch.randn(tokens, heads, dim, generator=generator).to(dtype) for _ in range(2))
    weight = 1 + torch.randn(dim, generator=generator)
    want = gdn_cases.gated_norm(x, gate, weight, 1e-6)
    x, gate, weight = (each.to(operators.device) for each in (x, gate, weight))
    for given in (gate, gdn_cases.apart(gate)):
        out = operators.gdn_gated_norm(x, given, weight, 1e-6)
        assert (out.dtype, out.shape) == (dtype, x.shape)
        assert gdn_cases.error(out, want, 2) <= rounded(FLOAT32_ERROR, dtype)


@pytest.mark.parametrize("name", EVERY)
def test_gdn_gated_norm_of_zeros_and_of_tiny_values(name):
    operators = Operators(name)
    x = torch.tensor([[[0.0] * 64], [[1e-5] * 64]], device=operators.device)
    gate, weight = torch.ones_like(x), torch.ones(64, device=operators.device)
    out = operators.gdn_gated_norm(x, gate, weight, 1e-6)
    assert not out[0].count_nonzero()
    silu_of_one = 0.7310586
    scale = 1e-5 / math.sqrt(1e-10 + 1e-6)
    assert out[1].flatten().tolist() == pytest.approx([silu_of_one * scale] * 64, rel=1e-5)
