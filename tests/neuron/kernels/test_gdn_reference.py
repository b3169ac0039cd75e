import numpy as np
import pytest
import torch
from torch import Tensor

from cortex.neuron.kernels import gdn_reference as reference

RULES = [reference.gated_delta_rule_recurrence, reference.chunked_gated_delta_rule_recurrence]


def inputs(tokens, *, batch=1, k_heads=2, v_heads=4, k_dim=16, v_dim=24, dtype=torch.float32):
    """Return q, k, v, g, beta, state of plausible size, with a state that is not zero."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q = reference.l2_normalise(draw(batch, tokens, k_heads, k_dim)) * k_dim**-0.5
    k = reference.l2_normalise(draw(batch, tokens, k_heads, k_dim))
    v = draw(batch, tokens, v_heads, v_dim)
    g = -draw(batch, tokens, v_heads).abs()
    beta = draw(batch, tokens, v_heads).sigmoid()
    return q, k, v, g, beta, draw(batch, v_heads, v_dim, k_dim)


def by_definition(q, k, v, g, beta, state):
    """The rule as the paper writes it, in float64: one head and one token at a time."""
    q, k, v, g, beta, state = (x.double().numpy() for x in (q, k, v, g, beta, state))
    out, state = np.zeros_like(v), state.copy()
    group = v.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(v.shape[:3]):
        key, query = k[b, t, h // group], q[b, t, h // group]
        decayed = np.exp(g[b, t, h]) * state[b, h]
        delta = beta[b, t, h] * (v[b, t, h] - decayed @ key)
        state[b, h] = decayed + np.outer(delta, key)
        out[b, t, h] = state[b, h] @ query
    return torch.from_numpy(out), torch.from_numpy(state)


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 1000])
def test_both_rules_follow_the_definition(rule, tokens):
    given = inputs(tokens, batch=2 if tokens < 100 else 1)
    want_out, want_state = by_definition(*given)
    out, state = rule(*given)
    assert_close(out, want_out, 2e-5)
    assert_close(state, want_state, 2e-5)


@pytest.mark.parametrize("rule", RULES)
def test_both_rules_are_exact_in_float64(rule):
    given = inputs(130, dtype=torch.float64)
    want_out, want_state = by_definition(*given)
    out, state = rule(*given)
    assert out.dtype == torch.float64
    assert_close(out, want_out, 1e-12)
    assert_close(state, want_state, 1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_decay_of_twenty_a_token_leaves_no_nan(rule):
    q, k, v, _, beta, state = inputs(200)
    g = torch.full_like(beta, -20.0)
    g[:, ::7] = -100.0
    out, last = rule(q, k, v, g, beta, state)
    want_out, want_state = by_definition(q, k, v, g, beta, state)
    assert_close(out, want_out, 1e-5)
    assert_close(last, want_state, 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_equal_keys_that_overwrite_one_another_stay_exact(rule):
    q, k, v, g, _, state = inputs(128)
    k = (k[:, :1] + 0.01 * k).contiguous()
    k = reference.l2_normalise(k)
    beta = torch.full_like(g, 0.99)
    out, last = rule(q, k, v, 0.001 * g, beta, state)
    want_out, want_state = by_definition(q, k, v, 0.001 * g, beta, state)
    assert_close(out, want_out, 1e-4)
    assert_close(last, want_state, 1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cut", [1, 63, 64, 100])
def test_a_split_sequence_equals_one_call(rule, cut):
    q, k, v, g, beta, state = inputs(150)
    whole_out, whole_state = rule(q, k, v, g, beta, state)
    head = [x[:, :cut] for x in (q, k, v, g, beta)]
    tail = [x[:, cut:] for x in (q, k, v, g, beta)]
    first_out, between = rule(*head, state)
    second_out, last = rule(*tail, between)
    assert_close(torch.cat((first_out, second_out), 1), whole_out, 2e-5)
    assert_close(last, whole_state, 2e-5)


@pytest.mark.parametrize("rule", RULES)
def test_no_tokens_leave_the_state_as_it_is(rule):
    q, k, v, g, beta, state = inputs(1)
    out, last = rule(*(x[:, :0] for x in (q, k, v, g, beta)), state)
    assert out.shape == (1, 0, 4, 24)
    assert torch.equal(last, state)


def test_the_rules_leave_their_arguments_alone():
    for rule in RULES:
        given = inputs(70)
        copies = [x.clone() for x in given]
        rule(*given)
        assert all(torch.equal(x, copy) for x, copy in zip(given, copies, strict=True))


def test_the_in_place_form_gives_the_same_and_changes_the_state():
    given = inputs(5, batch=3)
    want_out, want_state = reference.gated_delta_rule_recurrence(*given)
    out = reference.gated_delta_rule_recurrence_(*given)
    assert_close(out, want_out, 1e-6)
    assert_close(given[-1], want_state, 1e-6)


def test_gradients_of_both_rules_agree():
    gradients = []
    for rule in RULES:
        given = [x.requires_grad_() for x in inputs(70, dtype=torch.float64)]
        out, state = rule(*given)
        (out.square().sum() + state.square().sum()).backward()
        gradients.append([x.grad for x in given])
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        assert_close(one, other, 1e-9)


def test_the_convolution_weighs_the_oldest_input_by_the_first_tap():
    x = torch.tensor([[[1.0], [2.0], [3.0]]])
    weight = torch.tensor([[1000.0, 100.0, 10.0, 1.0]])
    window = torch.tensor([[[7.0], [8.0], [9.0]]])
    out, last = reference.causal_conv1d_full(x, weight, window)
    # SiLU of numbers this large is the number itself.
    assert out.flatten().tolist() == [7891.0, 8912.0, 9123.0]
    assert last.flatten().tolist() == [1.0, 2.0, 3.0]


def test_the_convolution_applies_silu():
    out, _ = reference.causal_conv1d_update(
        torch.tensor([[-1.0]]), torch.tensor([[0.0, 1.0]]), torch.zeros(1, 1, 1)
    )
    assert out.item() == pytest.approx(-0.26894143)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 65])
def test_convolving_token_by_token_equals_one_call(tokens):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, tokens, 6, generator=generator)
    weight = torch.randn(6, 4, generator=generator)
    window = torch.randn(2, 3, 6, generator=generator)
    want, want_window = reference.causal_conv1d_full(x, weight, window)
    for t in range(tokens):
        out, window = reference.causal_conv1d_update(x[:, t], weight, window)
        assert_close(out, want[:, t], 1e-6)
    assert torch.equal(window, want_window)


def test_gating_gives_the_written_out_values():
    beta, g = reference.fused_gdn_gating(
        torch.tensor([0.0, 2.0]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([0.0, 0.6931472]),
        torch.tensor([0.0, -1.0]),
    )
    assert beta.tolist() == pytest.approx([0.5, 0.880797])
    assert g.tolist() == pytest.approx([-0.6931472, -1.3862944])


def test_gating_survives_extreme_inputs():
    a = torch.tensor([-200.0, 200.0, 1000.0])
    _, g = reference.fused_gdn_gating(torch.zeros(3), a, torch.zeros(3), torch.zeros(3))
    assert g.tolist() == [0.0, -200.0, -1000.0]


def test_gating_of_half_precision_inputs_is_float32():
    b = torch.tensor([0.1], dtype=torch.bfloat16)
    beta, g = reference.fused_gdn_gating(b, b, torch.zeros(1), torch.zeros(1))
    assert (beta.dtype, g.dtype) == (torch.float32, torch.float32)
