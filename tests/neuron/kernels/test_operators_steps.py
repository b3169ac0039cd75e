"""The fused decode step and the verification of drafts, in every implementation."""

from dataclasses import replace

import pytest
import torch

from tests.support import gdn_cases
from tests.support.gdn_cases import FLOAT32_ERROR, Heads, StepCase, rounded
from tests.support.gdn_operators import (
    CPUS,
    CUDA,
    HOST_CUDA_ORDERS,
    TORCH,
    Operators,
    implementation,
)

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
EVERY = (TORCH, *CPUS, *HOST_CUDA_ORDERS, CUDA)
SMALL = Heads(k_heads=1, v_heads=2, k_dim=64, v_dim=64)

CASES = [
    *gdn_cases.across(
        StepCase(rows=3, tokens=3, heads=Heads(k_heads=2, v_heads=4, k_dim=128, v_dim=128)),
        dtype=(F32, F16, BF16),
        state_dtype=(F32, BF16),
    ),
    *[
        StepCase(rows=2, tokens=2, heads=Heads(k_heads=1, v_heads=group, k_dim=128, v_dim=128))
        for group in (1, 2, 3, 4, 7)
    ],
    *[
        StepCase(rows=2, tokens=2, heads=Heads(k_dim=k_dim, v_dim=v_dim), dtype=dtype)
        for k_dim, v_dim in ((64, 64), (48, 48), (33, 7), (256, 256), (64, 128), (128, 64), (1, 1))
        for dtype in (F32, BF16)
    ],
    *[StepCase(rows=2, tokens=3, heads=SMALL, width=width, dtype=F16) for width in (2, 3, 5, 8)],
    StepCase(rows=5, tokens=2, padding=(0, 3), heads=SMALL),
    StepCase(rows=5, tokens=2, padding=(0, 1, 4), heads=SMALL, dtype=BF16, state_dtype=BF16),
    StepCase(rows=2, padding=(0, 1), heads=SMALL),
    StepCase(rows=3, tokens=3, strided=True, heads=SMALL),
    StepCase(rows=3, tokens=3, strided=True, heads=SMALL, dtype=BF16),
    StepCase(rows=0, heads=SMALL),
]
# Every head of a model.
WIDE = [
    StepCase(rows=2, tokens=1, heads=Heads(k_heads=16, v_heads=v_heads, k_dim=128, v_dim=128))
    for v_heads in (16, 32, 48, 64)
]


def cases_of(*names, cases):
    return [
        pytest.param(case, name, id=f"{case}-{name}", marks=implementation(name).marks)
        for case in cases
        for name in names
    ]


def assert_results(case, out, truth, tokens=slice(None)):
    """Outputs (rows, tokens, v_heads * v_dim) are near the truth's, padding's are zeros."""
    assert out.dtype == case.dtype
    want = truth.out[:, tokens]
    assert out.shape == want.shape
    for row in range(case.rows):
        if row in case.padding:
            assert not out[row].count_nonzero(), f"padding {row}"
            continue
        got, wanted = (x[row].unflatten(-1, (case.heads.v_heads, -1)) for x in (out, want))
        bound = rounded(FLOAT32_ERROR, case.dtype)
        if case.state_dtype == BF16:
            # A state that is rounded after every token.
            bound += gdn_cases.ROUNDING[BF16]
        assert gdn_cases.error(got, wanted, 2) <= bound, f"row {row}"


def assert_pools(case, inputs, before, truth, taken):
    """Each slot holds what its sequence's first `taken` tokens leave, all others are untouched."""
    held = dict(gdn_cases.held_slots(inputs.slots, len(inputs.states)))
    for row, slot in held.items():
        count = taken[row]
        assert torch.equal(inputs.windows[slot].double().cpu(), truth.windows[count, row])
        off = gdn_cases.error(inputs.states[slot], truth.states[count, row])
        bound = rounded(FLOAT32_ERROR, case.state_dtype) * (1 if case.state_dtype == F32 else 2)
        assert off <= (bound if count else 0), f"state of row {row}"
    others = [slot for slot in range(len(inputs.states)) if slot not in held.values()]
    for name, old in before.items():
        assert torch.equal(gdn_cases.bits(getattr(inputs, name))[others].cpu(), old[others]), name
    assert not inputs.arrivals.count_nonzero()


POOLS = ("windows", "states", "ring_inputs", "ring_keys", "ring_deltas", "ring_decays")


def bits_of_pools(inputs):
    return {name: gdn_cases.bits(getattr(inputs, name)).cpu() for name in POOLS}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        *cases_of(*EVERY, cases=CASES),
        *cases_of(TORCH, *CPUS, CUDA, cases=WIDE),
        *cases_of(*HOST_CUDA_ORDERS, CUDA, TORCH, cases=[replace(CASES[-4], no_slot=99)]),
    ],
)
def test_decode_steps_follow_float64(case, name):
    operators = Operators(name)
    inputs, truth = gdn_cases.make_step(case, operators.device), gdn_cases.step_truth(case)
    before = bits_of_pools(inputs)
    outs = [
        operators.gdn_decode_step(*inputs.decode_arguments(token)) for token in range(case.tokens)
    ]
    assert_results(case, torch.stack(outs, 1), truth)
    assert_pools(case, inputs, before, truth, [case.tokens] * case.rows)
    for name_of_ring in POOLS[2:]:
        left = gdn_cases.bits(getattr(inputs, name_of_ring)).cpu()
        assert torch.equal(left, before[name_of_ring])


def fed(case):
    """The rings are as long as what is fed into them."""
    return replace(case, ring=max(case.tokens, 1))


@pytest.mark.parametrize(
    ("case", "name"),
    [
        *cases_of(*EVERY, cases=[fed(case) for case in CASES]),
        *cases_of(TORCH, *CPUS, CUDA, cases=[fed(case) for case in WIDE]),
    ],
)
def test_verifying_follows_float64_and_leaves_the_state(case, name):
    operators = Operators(name)
    inputs, truth = gdn_cases.make_step(case, operators.device), gdn_cases.step_truth(case)
    before = bits_of_pools(inputs)
    out = operators.gdn_verify(*inputs.verify_arguments())
    assert_results(case, out, truth)
    assert_pools(case, inputs, before, truth, [0] * case.rows)
    # Folding all of it gives the state after all of it; a call without drafts is just that.
    inputs.pending.fill_(case.tokens)
    rest = operators.gdn_verify(*inputs.verify_arguments(slice(0, 0)))
    assert rest.shape == (case.rows, 0, inputs.z.shape[-1])
    assert_pools(case, inputs, before, truth, [case.tokens] * case.rows)


ROLLBACK = StepCase(rows=4, tokens=9, ring=3, heads=SMALL, padding=(2,))


@pytest.mark.parametrize(
    ("case", "name"),
    cases_of(
        *EVERY,
        cases=gdn_cases.across(ROLLBACK, dtype=(F32, BF16), state_dtype=(F32, BF16)),
    ),
)
@pytest.mark.parametrize("accepted", [(0, 0, 0, 0), (3, 3, 3, 3), (0, 3, 1, 2), (2, 1, 3, 0)])
def test_rounds_of_drafts_equal_the_tokens_that_were_accepted(accepted, case, name):
    """Each round offers three tokens, right ones as far as they will be accepted."""
    operators = Operators(name)
    inputs, truth = gdn_cases.make_step(case, operators.device), gdn_cases.step_truth(case)
    before = bits_of_pools(inputs)
    offered = (inputs.mixed, inputs.z, inputs.b, inputs.a)
    done = [0] * case.rows
    for turn in range(3):
        takes = [accepted[(row + turn) % 4] for row in range(case.rows)]
        drafts = [torch.zeros_like(x[:, :3]) for x in offered]
        for row in range(case.rows):
            for draft, x in zip(drafts, offered, strict=True):
                draft[row] = x[row].flip(0)[:3]
                draft[row, : takes[row]] = x[row, done[row] : done[row] + takes[row]]
        round_inputs = replace_tokens(inputs, drafts)
        out = operators.gdn_verify(*round_inputs.verify_arguments())
        assert_pools(case, inputs, before, truth, done)
        for row in range(case.rows):
            part = slice(done[row], done[row] + takes[row])
            one = replace(case, rows=1, padding=(0,) if row in case.padding else ())
            of_row = gdn_cases.StepTruth(
                out=truth.out[row : row + 1, part], states=truth.states, windows=truth.windows
            )
            assert_results(one, out[row : row + 1, : takes[row]], of_row)
            done[row] += takes[row]
        inputs.pending.copy_(torch.tensor(takes))
    operators.gdn_verify(*inputs.verify_arguments(slice(0, 0)))
    assert_pools(case, inputs, before, truth, done)


def replace_tokens(inputs, tokens):
    mixed, z, b, a = tokens
    return replace(inputs, mixed=mixed, z=z, b=b, a=a)


@pytest.mark.parametrize("name", [implementation(name) for name in EVERY])
def test_a_decode_step_equals_a_verified_draft(name):
    """Both in one implementation, whose arithmetic is the same, so nearly to the last bit."""
    case = StepCase(rows=3, tokens=2, ring=2, heads=SMALL)
    operators = Operators(name)
    stepped, drafted = (gdn_cases.make_step(case, operators.device) for _ in range(2))
    steps = [operators.gdn_decode_step(*stepped.decode_arguments(t)) for t in range(2)]
    out = operators.gdn_verify(*drafted.verify_arguments())
    drafted.pending.fill_(2)
    operators.gdn_verify(*drafted.verify_arguments(slice(0, 0)))
    assert gdn_cases.error(out, torch.stack(steps, 1).double().cpu(), 2) < 1e-6
    held = stepped.slots
    assert gdn_cases.error(drafted.states[held], stepped.states[held].double().cpu(), 2) < 1e-6
    assert torch.equal(drafted.windows[held], stepped.windows[held])


@pytest.mark.parametrize("name", [implementation(name) for name in EVERY])
@pytest.mark.parametrize(("asked", "taken"), [(-3, 0), (99, 2)])
def test_pending_is_clamped_to_the_ring(asked, taken, name):
    case = StepCase(rows=2, tokens=2, ring=2, heads=SMALL)
    operators = Operators(name)
    inputs, truth = gdn_cases.make_step(case, operators.device), gdn_cases.step_truth(case)
    before = bits_of_pools(inputs)
    operators.gdn_verify(*inputs.verify_arguments())
    inputs.pending.fill_(asked)
    operators.gdn_verify(*inputs.verify_arguments(slice(0, 0)))
    assert_pools(case, inputs, before, truth, [taken] * 2)


@pytest.mark.parametrize("name", [implementation(name) for name in EVERY])
def test_a_slot_is_used_again_from_what_is_put_into_it(name):
    """The second sequence of a slot knows nothing of the first one's drafts."""
    case = StepCase(rows=2, tokens=2, ring=4, heads=SMALL)
    operators = Operators(name)
    inputs, truth = gdn_cases.make_step(case, operators.device), gdn_cases.step_truth(case)
    before = bits_of_pools(inputs)
    states, windows = inputs.states.clone(), inputs.windows.clone()
    operators.gdn_verify(*inputs.verify_arguments())
    operators.gdn_decode_step(*inputs.decode_arguments(1))
    inputs.states.copy_(states)
    inputs.windows.copy_(windows)
    inputs.pending.zero_()
    outs = [operators.gdn_verify(*inputs.verify_arguments(slice(0, 1)))]
    inputs.pending.fill_(1)
    outs.append(operators.gdn_verify(*inputs.verify_arguments(slice(1, 2))))
    assert_results(case, torch.cat(outs, 1), truth)
    assert_pools(case, inputs, before, truth, [1, 1])
