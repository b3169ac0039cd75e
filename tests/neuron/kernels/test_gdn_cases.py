"""The measures that the operators' tests rest on."""

import math

import pytest
import torch

from tests.support import gdn_cases
from tests.support.gdn_cases import Heads, RuleCase, StepCase
from tests.support.gdn_operators import TORCH, Operators

HEADS = Heads(k_heads=1, v_heads=2, k_dim=8, v_dim=4)


def test_the_error_is_that_of_the_worst_part():
    want = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    got = torch.tensor([[3.0, 4.5], [0.0, 1.2]])
    assert gdn_cases.error(got, want) == pytest.approx(0.2)
    assert gdn_cases.error(want.float(), want) == 0


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("want", [0.0, 1.0])
def test_no_bound_allows_what_is_not_finite(want, wrong):
    wanted = torch.full((2, 2), want, dtype=torch.float64)
    got = wanted.float()
    got[1, 1] = wrong
    assert not gdn_cases.error(got, wanted) <= 1e30


def test_what_should_be_zeros_is_infinitely_off():
    zeros = torch.zeros(1, 2, dtype=torch.float64)
    assert gdn_cases.error(torch.tensor([[0.0, 1e-30]]), zeros) == math.inf
    assert gdn_cases.error(zeros.float(), zeros) == 0


def test_a_slot_that_is_not_its_own_shows_in_the_results():
    inputs = gdn_cases.make_rule(RuleCase(lengths=(3,), heads=HEADS))
    each = (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta)
    out = Operators(TORCH).gated_delta_rule_recurrence(*each, inputs.states, inputs.slots - 1, None)
    assert bool(out.isnan().all())


@pytest.mark.parametrize("rows", range(1, 12))
def test_slots_differ_and_lie_in_the_pool(rows):
    slots, num_slots = gdn_cases.spread(rows, (), -1)
    assert len(set(slots.tolist())) == rows
    assert all(0 <= slot < num_slots for slot in slots.tolist())


def test_tokens_lie_apart_with_nan_between():
    x = torch.arange(24.0).view(2, 3, 4)
    for token_dims in (1, 2):
        moved = gdn_cases.apart(x, token_dims)
        assert torch.equal(moved, x)
        assert moved.stride()[-1] == 1
        assert not moved.is_contiguous()
        assert moved.untyped_storage().size() > x.untyped_storage().size()


def test_a_case_draws_the_same_inputs_every_time():
    case = RuleCase(lengths=(3, 2), heads=HEADS)
    first, again = gdn_cases.make_rule(case), gdn_cases.make_rule(case)
    first.states.zero_()
    assert torch.equal(first.q, again.q)
    assert bool(again.states.isnan().any())


def test_the_truth_of_a_step_is_that_of_its_parts():
    """Written out once more, token by token and head by head."""
    case = StepCase(rows=2, tokens=3, heads=HEADS, padding=(1,))
    inputs, truth = gdn_cases.make_step(case), gdn_cases.step_truth(case)
    slot = int(inputs.slots[0])
    state, window = inputs.states[slot].double(), inputs.windows[slot].double()
    for t in range(case.tokens):
        taps = torch.cat((window, inputs.mixed[0, t].double()[None]))
        window = taps[1:]
        sums = (taps * inputs.conv_weight.double().t()).sum(0)
        q, k, v = HEADS.split(sums * torch.sigmoid(sums))
        q = q[0] / math.sqrt(float((q * q).sum()) + 1e-6) / math.sqrt(HEADS.k_dim)
        k = k[0] / math.sqrt(float((k * k).sum()) + 1e-6)
        for head in range(HEADS.v_heads):
            x = float(inputs.a[0, t, head] + inputs.dt_bias[head].double())
            g = -math.exp(float(inputs.a_log[head])) * math.log1p(math.exp(x))
            beta = 1 / (1 + math.exp(-float(inputs.b[0, t, head])))
            decayed = math.exp(g) * state[head]
            state[head] = decayed + torch.outer(beta * (v[head] - decayed @ k), k)
            o = state[head] @ q
            o = o / math.sqrt(float((o * o).mean()) + gdn_cases.NORM_EPS)
            z = inputs.z[0, t].view(HEADS.v_heads, -1)[head].double()
            want = o * inputs.norm_weight.double() * z * torch.sigmoid(z)
            got = truth.out[0, t].view(HEADS.v_heads, -1)[head]
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(truth.states[t + 1, 0], state, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(truth.windows[t + 1, 0], window, rtol=0, atol=0)
    assert not truth.out[1].count_nonzero()
