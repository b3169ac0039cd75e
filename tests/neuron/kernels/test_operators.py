"""The delta rule over whole sequences, in every implementation, against float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support import gdn_cases
from tests.support.gdn_cases import FLOAT32_ERROR, PREFILL_ERROR, Heads, RuleCase, rounded
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

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
RULES = ("gated_delta_rule_recurrence", "chunked_gated_delta_rule_recurrence")
PREFILL = "gdn_prefill"
FAST = (TORCH, *CPUS, CUDA)

FULL = Heads(k_heads=1, v_heads=2, k_dim=128, v_dim=128)
SMALL = Heads(k_heads=1, v_heads=2, k_dim=64, v_dim=64)
MIX = (1, 64, 0, 130, 7, 65)

CASES = [
    *[RuleCase(lengths=(n,), heads=SMALL) for n in (1, 2, 63, 64, 65, 127)],
    RuleCase(lengths=(1000,), heads=FULL, dtype=BF16),
    RuleCase(lengths=(4097,), heads=SMALL),
    RuleCase(lengths=MIX),
    RuleCase(lengths=MIX, padding=(1, 4), dtype=BF16, state_dtype=BF16),
    *gdn_cases.across(
        RuleCase(lengths=(66, 5), heads=FULL), dtype=(F32, F16, BF16), state_dtype=(F32, BF16)
    ),
    *[
        RuleCase(lengths=(3, 66), heads=Heads(k_heads=16, v_heads=v_heads, k_dim=128, v_dim=128))
        for v_heads in (16, 32, 48, 64)
    ],
    *[
        RuleCase(lengths=(1, 70), heads=Heads(k_dim=k_dim, v_dim=v_dim), dtype=dtype)
        for k_dim, v_dim in ((48, 48), (33, 7), (256, 256), (64, 128), (128, 64), (1, 1))
        for dtype in (F32, BF16)
    ],
    *gdn_cases.across(
        RuleCase(lengths=(200,), heads=FULL), dtype=(F32, F16, BF16), decay=(-20.0, -100.0)
    ),
    *gdn_cases.across(RuleCase(lengths=(200,), alike=True, heads=FULL), dtype=(F32, F16, BF16)),
    *gdn_cases.across(RuleCase(lengths=(66, 3), strided=True), dtype=(F32, F16, BF16)),
    RuleCase(lengths=()),
    RuleCase(lengths=(0, 0)),
    RuleCase(lengths=(3, 2), padding=(0, 1)),
]
# Rows of states that the fibers pass in a test, at most: some 0.5 s.
MAX_HOST_WORK = 80_000
MAX_HOPPER_WORK = 160_000
TINY = Heads(k_heads=1, v_heads=2, k_dim=64, v_dim=16)
HOST_CASES = [
    RuleCase(lengths=(1, 65, 0, 7), padding=(3,), heads=TINY),
    RuleCase(lengths=(66,), heads=TINY, dtype=BF16),
    RuleCase(lengths=(66,), heads=Heads(k_heads=1, v_heads=1, k_dim=128, v_dim=128), dtype=BF16),
    RuleCase(lengths=(3, 66), heads=Heads(k_heads=1, v_heads=1, k_dim=128, v_dim=128), dtype=F16),
    RuleCase(lengths=(5, 4), padding=(0,), no_slot=99, heads=TINY, dtype=F16, state_dtype=BF16),
    RuleCase(lengths=(66,), heads=Heads(k_heads=1, v_heads=1, k_dim=33, v_dim=7)),
    RuleCase(lengths=(3,), heads=Heads(k_heads=1, v_heads=1, k_dim=256, v_dim=40), dtype=BF16),
    RuleCase(lengths=(65,), heads=TINY, decay=-20.0),
    RuleCase(lengths=(65,), heads=TINY, decay=-100.0, dtype=BF16),
    RuleCase(lengths=(65,), heads=TINY, alike=True),
    RuleCase(lengths=(9, 4), heads=TINY, strided=True, dtype=BF16),
    RuleCase(lengths=()),
    RuleCase(lengths=(0, 0)),
    RuleCase(lengths=(3, 2), padding=(0, 1), heads=TINY),
]


def matrix(cases, host_cases):
    """Return every case with every implementation, the fibers in one order and without large ones.

    Host cases are for the fibers alone, in several orders.
    """
    pairs = [(case, name) for case in cases for name in (*FAST, HOST_CUDA)]
    pairs = [
        (case, name)
        for case, name in pairs
        if name != HOST_CUDA
        or sum(case.lengths) * case.heads.v_heads * case.heads.v_dim <= MAX_HOST_WORK
    ]
    pairs += [(case, name) for case in host_cases for name in HOST_CUDA_ORDERS]
    return [
        pytest.param(case, name, id=f"{case}-{name}", marks=implementation(name).marks)
        for case, name in pairs
    ]


def on_hopper(cases, host_cases):
    """Return the cases that Hopper has a kernel of its own for, with the fibers running it."""
    pairs = [(case, HOST_SM90) for case in cases]
    pairs += [(case, name) for case in host_cases for name in HOST_SM90_ORDERS]
    return [
        pytest.param(case, name, id=f"{case}-{name}")
        for case, name in pairs
        if case.dtype != F32
        and case.heads.k_dim == case.heads.v_dim
        and case.heads.k_dim in {64, 128}
        and sum(case.lengths) * case.heads.v_heads * case.heads.v_dim <= MAX_HOPPER_WORK
    ]


def by_sequence(out: Tensor, case: RuleCase):
    """Yield (sequence, its outputs by head)."""
    for sequence, part in enumerate(out.split(case.lengths)):
        yield sequence, part.transpose(0, 1)


def call(operators: Operators, op: str, inputs: gdn_cases.RuleInputs, *, snapshots=None):
    """Call a rule, or the prefill, on what it takes."""
    if op == PREFILL:
        tables = inputs.tables
        return operators.gdn_prefill(
            inputs.qkv,
            inputs.g,
            inputs.beta,
            inputs.states,
            inputs.slots,
            tables.chunks,
            tables.first_chunks,
            tables.segments,
            snapshots,
        )
    return getattr(operators, op)(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.g,
        inputs.beta,
        inputs.states,
        inputs.slots,
        inputs.starts,
    )


def bounds(op: str, case: RuleCase) -> tuple[float, float]:
    """How far outputs and states may be from the truth."""
    if op == PREFILL:
        bound = PREFILL_ERROR[case.dtype]
        return bound, bound if case.state_dtype == F32 else max(bound, PREFILL_ERROR[BF16])
    return rounded(FLOAT32_ERROR, case.dtype), rounded(FLOAT32_ERROR, case.state_dtype)


def check(operators: Operators, op: str, case: RuleCase) -> None:
    """Compare outputs, states and snapshots; nothing else may have changed."""
    inputs = gdn_cases.make_rule(case, operators.device)
    truth = gdn_cases.rule_truth(case, raw=op == PREFILL)
    before = gdn_cases.bits(inputs.states).cpu()
    snapshots = inputs.states.new_full((inputs.tables.num_snapshots, *inputs.states.shape[1:]), 9)
    out = call(operators, op, inputs, snapshots=snapshots if case.snapshots_at else None)

    out_bound, state_bound = bounds(op, case)
    assert (out.dtype, out.shape) == (case.dtype, truth.out.shape)
    wanted = dict(by_sequence(truth.out, case))
    for sequence, got in by_sequence(out, case):
        if sequence in case.padding:
            assert not got.count_nonzero(), f"padding {sequence}"
        else:
            assert gdn_cases.error(got, wanted[sequence]) <= out_bound, f"sequence {sequence}"
    after = gdn_cases.bits(inputs.states).cpu()
    changed = set()
    for sequence, slot in gdn_cases.held_slots(inputs.slots, len(inputs.states)):
        if case.lengths[sequence]:
            changed.add(slot)
            off = gdn_cases.error(inputs.states[slot], truth.states[sequence])
            assert off <= state_bound, f"state of sequence {sequence}"
    kept = [slot for slot in range(len(after)) if slot not in changed]
    assert torch.equal(after[kept], before[kept])
    assert gdn_cases.error(snapshots, truth.snapshots, 2) <= state_bound


@pytest.mark.parametrize(("case", "name"), matrix(CASES, HOST_CASES))
@pytest.mark.parametrize("op", RULES)
def test_the_rules_follow_float64(op, case, name):
    check(Operators(name), op, case)


PREFILL_CASES = [
    *CASES,
    RuleCase(lengths=(300, 0, 65), heads=FULL, dtype=BF16, max_segment_chunks=1),
    RuleCase(lengths=(700, 130), heads=FULL, dtype=BF16, max_segment_chunks=3, padding=(1,)),
    RuleCase(lengths=(300,), heads=FULL, max_segment_chunks=2, decay=-20.0, dtype=BF16),
    RuleCase(
        lengths=(200, 70),
        heads=FULL,
        dtype=BF16,
        snapshots_at=((1, 70), (0, 1), (0, 100), (0, 64)),
    ),
    RuleCase(
        lengths=(300, 70),
        heads=FULL,
        max_segment_chunks=2,
        state_dtype=BF16,
        dtype=BF16,
        snapshots_at=((0, 100), (0, 300), (1, 5)),
    ),
]
HOST_PREFILL_CASES = [
    *HOST_CASES,
    RuleCase(lengths=(140,), heads=replace(TINY, v_heads=1), max_segment_chunks=1),
    RuleCase(
        lengths=(200,),
        heads=Heads(k_heads=1, v_heads=1, k_dim=128, v_dim=128),
        dtype=BF16,
        max_segment_chunks=2,
        snapshots_at=((0, 100), (0, 200)),
    ),
]


# Three and more value heads get two warpgroups a block on the fibers' four multiprocessors.
WIDE = Heads(k_heads=1, v_heads=3, k_dim=128, v_dim=128)
HOPPER_CASES = [
    *HOST_PREFILL_CASES,
    RuleCase(lengths=(1, 65, 0, 7), padding=(3,), heads=SMALL, dtype=BF16, state_dtype=BF16),
    RuleCase(lengths=(5, 4), padding=(0,), no_slot=99, heads=SMALL, dtype=F16, state_dtype=BF16),
    RuleCase(lengths=(70, 3), heads=WIDE, padding=(1,), dtype=F16, strided=True),
    RuleCase(lengths=(400,), heads=WIDE, dtype=BF16),
    RuleCase(
        lengths=(200, 70),
        heads=SMALL,
        dtype=BF16,
        state_dtype=BF16,
        max_segment_chunks=2,
        snapshots_at=((1, 70), (0, 1), (0, 100), (0, 64)),
    ),
]


@pytest.mark.parametrize(
    ("case", "name"),
    [*matrix(PREFILL_CASES, HOST_PREFILL_CASES), *on_hopper(PREFILL_CASES, HOPPER_CASES)],
)
def test_prefills_follow_float64(case, name):
    check(Operators(name), PREFILL, case)
