"""Sequences that come in parts, resume from a snapshot, or are split into segments."""

import itertools

import pytest
import torch

from cortex.neuron.kernels.chunks import plan_prefill
from tests.support import gdn_cases
from tests.support.gdn_cases import FLOAT32_ERROR, PREFILL_ERROR, Heads, RuleCase
from tests.support.gdn_operators import (
    CPUS,
    CUDA,
    HOST_CUDA,
    HOST_CUDA_ORDERS,
    HOST_SM90,
    HOST_SM90_ORDERS,
    TORCH,
    Operators,
    implementation,
)

BF16, F32 = torch.bfloat16, torch.float32
ONCE = [implementation(name) for name in (TORCH, *CPUS, HOST_CUDA, CUDA)]
EVERY = [implementation(name) for name in (TORCH, *CPUS, *HOST_CUDA_ORDERS, CUDA)]
# Where a prefill's heads are those that Hopper has a kernel of its own for.
PREFILL_ONCE = [*EVERY, implementation(HOST_SM90)]
PREFILL_EVERY = [*EVERY, *[implementation(name) for name in HOST_SM90_ORDERS]]
RULES = ("gated_delta_rule_recurrence", "chunked_gated_delta_rule_recurrence", "gdn_prefill")
CUTS = [1, 3, 31, 63, 64, 65, 97, 127, 128, 129]
HEADS = Heads(k_heads=1, v_heads=2, k_dim=64, v_dim=32)
# Those of the models, which tensor cores serve.
FULL = Heads(k_heads=1, v_heads=1, k_dim=128, v_dim=128)


def run(operators, op, inputs, states, part, *, slots=None, snapshots_at=(), segments=None):
    """Call a rule on some tokens of one sequence; return its outputs and snapshots."""
    slots = inputs.slots if slots is None else slots
    if op != "gdn_prefill":
        each = (x[part] for x in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta))
        return getattr(operators, op)(*each, states, slots, None), None
    length = len(inputs.g[part])
    tables = plan_prefill(
        [length],
        snapshots_at=snapshots_at,
        max_segment_chunks=segments,
        device=operators.device,
    )
    snapshots = states.new_full((tables.num_snapshots, *states.shape[1:]), torch.nan)
    out = operators.gdn_prefill(
        inputs.qkv[part],
        inputs.g[part],
        inputs.beta[part],
        states,
        slots,
        tables.chunks,
        tables.first_chunks,
        tables.segments,
        snapshots if snapshots_at else None,
    )
    return out, snapshots


def assert_near(case, got, truth, out_parts):
    """Outputs of all parts and the state after them are as near the truth as one call's."""
    raw_bound = PREFILL_ERROR[case.dtype]
    out = torch.cat(out_parts)
    for head in range(case.heads.v_heads):
        assert gdn_cases.error(out[None, :, head], truth.out[None, :, head]) <= raw_bound
    bound = raw_bound if case.state_dtype == F32 else PREFILL_ERROR[BF16]
    assert gdn_cases.error(got, truth.states[0]) <= bound


@pytest.mark.parametrize("cut", CUTS)
def test_two_parts_equal_the_whole_on_hopper(cut):
    check_two_parts(BF16, "gdn_prefill", cut, HOST_SM90)


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("op", RULES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_two_parts_equal_the_whole(dtype, op, cut, name):
    check_two_parts(dtype, op, cut, name)


def check_two_parts(dtype, op, cut, name):
    """Compare two calls with the float64 result of one."""
    operators = Operators(name)
    case = RuleCase(lengths=(130,), heads=FULL if dtype == BF16 else HEADS, dtype=dtype)
    inputs = gdn_cases.make_rule(case, operators.device)
    truth = gdn_cases.rule_truth(case, raw=op == "gdn_prefill")
    parts = [slice(0, cut), slice(cut, 130)]
    outs = [run(operators, op, inputs, inputs.states, part)[0] for part in parts]
    assert_near(case, inputs.states[int(inputs.slots[0])], truth, outs)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("op", RULES)
def test_many_parts_equal_the_whole(op, name):
    operators = Operators(name)
    case = RuleCase(lengths=(150,), heads=HEADS)
    inputs = gdn_cases.make_rule(case, operators.device)
    truth = gdn_cases.rule_truth(case, raw=op == "gdn_prefill")
    cuts = [0, 1, 2, 3, 40, 40, 100, 101, 150]
    parts = [slice(*ends) for ends in itertools.pairwise(cuts)]
    outs = [run(operators, op, inputs, inputs.states, part)[0] for part in parts]
    assert_near(case, inputs.states[int(inputs.slots[0])], truth, outs)


@pytest.mark.parametrize("name", PREFILL_ONCE)
@pytest.mark.parametrize("segments", [None, 1])
@pytest.mark.parametrize("state_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("at", [1, 64, 70, 149, 150])
def test_a_sequence_resumed_from_a_snapshot_goes_on_as_it_did(at, state_dtype, segments, name):
    operators = Operators(name)
    case = RuleCase(lengths=(150,), heads=FULL, dtype=BF16, state_dtype=state_dtype)
    inputs = gdn_cases.make_rule(case, operators.device)
    first, again = inputs.states.clone(), inputs.states.clone()
    whole, snapshots = run(
        operators,
        "gdn_prefill",
        inputs,
        first,
        slice(None),
        snapshots_at=((0, at),),
        segments=segments,
    )
    slot = int(inputs.slots[0])
    if at == 150:
        assert torch.equal(snapshots[0], first[slot])
        return
    # In another slot, which nothing but the snapshot has been put into.
    other = inputs.slots - 1
    again[other] = snapshots
    tail, _ = run(operators, "gdn_prefill", inputs, again, slice(at, 150), slots=other)
    bound = 2 * PREFILL_ERROR[BF16]
    want = whole[at:].double().cpu().transpose(0, 1)
    assert gdn_cases.error(tail.transpose(0, 1), want) <= bound
    assert gdn_cases.error(again[int(other[0])], first[slot].double().cpu()) <= bound


@pytest.mark.parametrize("name", PREFILL_EVERY)
@pytest.mark.parametrize("decay", [None, -0.001, -20.0])
def test_segments_change_nothing(decay, name):
    operators = Operators(name)
    case = RuleCase(lengths=(300,), heads=FULL, dtype=BF16, decay=decay)
    inputs = gdn_cases.make_rule(case, operators.device)
    truth = gdn_cases.rule_truth(case, raw=True)
    for segments in (None, 1, 2, 3, 4):
        states = inputs.states.clone()
        out, _ = run(operators, "gdn_prefill", inputs, states, slice(None), segments=segments)
        assert_near(case, states[int(inputs.slots[0])], truth, [out])


@pytest.mark.parametrize("name", EVERY)
def test_equal_lengths_need_no_starts(name):
    operators = Operators(name)
    case = RuleCase(lengths=(5, 5, 5), heads=HEADS, padding=(1,))
    inputs = gdn_cases.make_rule(case, operators.device)
    each = (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta)
    for op in RULES[:2]:
        results = []
        for starts in (None, inputs.starts):
            states = inputs.states.clone()
            out = getattr(operators, op)(*each, states, inputs.slots, starts)
            results.append((gdn_cases.bits(out), gdn_cases.bits(states)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("op", RULES)
def test_the_order_of_sequences_and_slots_is_of_no_account(op, name):
    """Each sequence gives what it gives by itself, wherever its state lies."""
    operators = Operators(name)
    case = RuleCase(lengths=(70, 1, 33), heads=HEADS)
    together = gdn_cases.make_rule(case, operators.device)
    tables = together.tables
    if op == "gdn_prefill":
        out = operators.gdn_prefill(
            together.qkv,
            together.g,
            together.beta,
            together.states,
            together.slots,
            tables.chunks,
            tables.first_chunks,
            tables.segments,
            None,
        )
    else:
        out = getattr(operators, op)(
            *(together.q, together.k, together.v, together.g, together.beta),
            *(together.states, together.slots, together.starts),
        )
    alone = gdn_cases.make_rule(case, operators.device)
    starts = together.starts.tolist()
    for sequence in (2, 0, 1):
        part = slice(starts[sequence], starts[sequence + 1])
        slot = int(alone.slots[sequence])
        moved = torch.full_like(alone.states, torch.nan)
        moved[0] = alone.states[slot]
        only = torch.zeros_like(alone.slots[:1])
        own, _ = run(operators, op, alone, moved, part, slots=only)
        assert gdn_cases.error(own, out[part].double().cpu(), 2) <= FLOAT32_ERROR
        assert gdn_cases.error(moved[0], together.states[slot].double().cpu()) <= FLOAT32_ERROR


@pytest.mark.parametrize("name", EVERY)
def test_the_parts_of_a_mixer_equal_its_fused_step(name):
    """Convolution, gates, rule and norm one after the other, as a prefill has them."""
    operators = Operators(name)
    case = gdn_cases.StepCase(rows=2, heads=HEADS)
    inputs, truth = gdn_cases.make_step(case, operators.device), gdn_cases.step_truth(case)
    mixed, z, b, a = (x[:, 0] for x in (inputs.mixed, inputs.z, inputs.b, inputs.a))
    qkv = operators.causal_conv1d_full(
        mixed, inputs.conv_weight, inputs.windows, inputs.slots, None
    )
    beta, g = operators.fused_gdn_gating(b, a, inputs.a_log, inputs.dt_bias)
    tables = plan_prefill([1, 1], device=operators.device)
    core = operators.gdn_prefill(
        *(qkv, g, beta, inputs.states, inputs.slots),
        *(tables.chunks, tables.first_chunks, tables.segments, None),
    )
    gate = z.unflatten(-1, core.shape[1:])
    out = operators.gdn_gated_norm(core, gate, inputs.norm_weight, gdn_cases.NORM_EPS)
    assert gdn_cases.error(out.flatten(1), truth.out[:, 0]) <= FLOAT32_ERROR
    held = inputs.slots.tolist()
    assert gdn_cases.error(inputs.states[held], truth.states[1], 2) <= FLOAT32_ERROR
