import pytest
import torch

from cortex.neuron.kernels import gdn, gdn_reference

SLOTS = [torch.tensor([4, 1]), slice(2, 4)]


def rule_inputs(tokens):
    generator = torch.Generator().manual_seed(tokens)
    q, k = (torch.randn(2, tokens, 2, 8, generator=generator) for _ in range(2))
    v = torch.randn(2, tokens, 4, 6, generator=generator)
    g = -torch.rand(2, tokens, 4, generator=generator)
    beta = torch.rand(2, tokens, 4, generator=generator)
    return gdn.l2_normalise(q), gdn.l2_normalise(k), v, g, beta


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize(
    "name", ["gated_delta_rule_recurrence", "chunked_gated_delta_rule_recurrence"]
)
def test_a_rule_reads_and_writes_its_own_slots_only(name, tokens, slots):
    pool = torch.randn(5, 4, 6, 8, generator=torch.Generator().manual_seed(9))
    before = pool.clone()
    inputs = rule_inputs(tokens)
    want_out, want_state = getattr(gdn_reference, name)(*inputs, before[slots])
    out = getattr(gdn, name)(*inputs, pool=pool, slots=slots)
    torch.testing.assert_close(out, want_out, rtol=0, atol=1e-5)
    torch.testing.assert_close(pool[slots], want_state, rtol=0, atol=1e-5)
    others = torch.ones(5, dtype=torch.bool)
    others[slots] = False
    assert torch.equal(pool[others], before[others])


@pytest.mark.parametrize("slots", SLOTS)
def test_the_convolutions_update_their_own_windows_only(slots):
    pool = torch.arange(5 * 3 * 2, dtype=torch.float32).view(5, 3, 2)
    before = pool.clone()
    weight = torch.ones(2, 4)
    one = torch.full((2, 2), 100.0)
    gdn.causal_conv1d_update(one, weight, pool=pool, slots=slots)
    assert torch.equal(pool[slots][:, 2], one)
    assert torch.equal(pool[slots][:, :2], before[slots][:, 1:])
    gdn.causal_conv1d_full(torch.full((2, 5, 2), 7.0), weight, pool=pool, slots=slots)
    assert torch.equal(pool[slots], torch.full((2, 3, 2), 7.0))
    others = torch.ones(5, dtype=torch.bool)
    others[slots] = False
    assert torch.equal(pool[others], before[others])


def test_windows_keep_the_dtype_of_their_pool():
    pool = torch.zeros(1, 3, 2, dtype=torch.bfloat16)
    x = torch.ones(1, 4, 2, dtype=torch.bfloat16)
    out = gdn.causal_conv1d_full(x, torch.ones(2, 4), pool=pool, slots=slice(0, 1))
    assert out.shape == (1, 4, 2)
    assert torch.equal(pool, torch.ones(1, 3, 2, dtype=torch.bfloat16))
