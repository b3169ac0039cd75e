"""gdn_prefill's kernel for Hopper, beside the one for any card; that what is wrong in it shows."""

import ctypes

import pytest
import torch

from cortex.neuron.kernels import extension
from tests.support import gdn_cases, host_cuda
from tests.support.gdn_cases import PREFILL_ERROR, Heads, RuleCase
from tests.support.gdn_operators import (
    CUDA,
    HOST_CUDA,
    HOST_SM90,
    HOST_SM90_ORDERS,
    TORCH,
    Operators,
    implementation,
)

BF16, F16 = torch.bfloat16, torch.float16
HEADS = Heads(k_heads=1, v_heads=3, k_dim=128, v_dim=128)
CASE = RuleCase(lengths=(130, 5), heads=HEADS, dtype=BF16)


def prefill(operators, inputs, snapshots=None):
    """Return the outputs; states are updated."""
    tables = inputs.tables
    return operators.gdn_prefill(
        *(inputs.qkv, inputs.g, inputs.beta, inputs.states, inputs.slots),
        *(tables.chunks, tables.first_chunks, tables.segments, snapshots),
    )


def results(operators, case):
    """Return outputs by head, states and snapshots of a case, on the host."""
    inputs = gdn_cases.make_rule(case, operators.device)
    snapshots = inputs.states.new_full((inputs.tables.num_snapshots, *inputs.states.shape[1:]), 9)
    out = prefill(operators, inputs, snapshots if case.snapshots_at else None)
    held = [slot for _, slot in gdn_cases.held_slots(inputs.slots, len(inputs.states))]
    by_head = out.transpose(0, 1).flatten(1)
    return [x.double().cpu() for x in (by_head, inputs.states[held], snapshots)]


def assert_alike(own, common, case):
    """Both round alike, but add in another order."""
    bound = max(PREFILL_ERROR[case.dtype], PREFILL_ERROR[case.state_dtype])
    out, states, snapshots = zip(own, common, strict=True)
    assert gdn_cases.error(*out) <= PREFILL_ERROR[case.dtype]
    assert gdn_cases.error(*states, 2) <= bound
    assert gdn_cases.error(*snapshots, 2) <= bound


@pytest.mark.parametrize(
    "name", [implementation(name) for name in (HOST_CUDA, *HOST_SM90_ORDERS, CUDA)]
)
@pytest.mark.parametrize(("of_values", "of_states"), [(1e5, 1.0), (1e-6, 1e-6), (1e9, 1e9)])
def test_values_and_states_may_be_of_any_size(of_values, of_states, name):
    operators = Operators(name)
    inputs = gdn_cases.make_rule(CASE, operators.device)
    inputs.qkv[:, 2 * HEADS.k_dim :] *= of_values
    inputs.states *= of_states
    plain = Operators(TORCH)
    expected = gdn_cases.make_rule(CASE)
    expected.qkv, expected.states = inputs.qkv.cpu(), inputs.states.cpu().clone()
    want = prefill(plain, expected).double()
    got = prefill(operators, inputs)
    assert gdn_cases.error(got.transpose(0, 1), want.transpose(0, 1)) <= PREFILL_ERROR[BF16]
    held = inputs.slots.tolist()
    want_states = expected.states[held].double()
    assert gdn_cases.error(inputs.states[held], want_states, 2) <= PREFILL_ERROR[BF16]


ALIKE = [
    RuleCase(lengths=(130, 5), heads=HEADS, dtype=BF16, snapshots_at=((0, 70), (1, 5))),
    RuleCase(
        lengths=(200, 3, 65),
        heads=Heads(k_heads=1, v_heads=2, k_dim=64, v_dim=64),
        dtype=F16,
        state_dtype=BF16,
        padding=(1,),
        max_segment_chunks=2,
    ),
]


@pytest.mark.parametrize("case", ALIKE, ids=str)
def test_the_fibers_give_the_same_by_both_scans(case):
    own, common = (results(Operators(name), case) for name in (HOST_SM90, HOST_CUDA))
    assert_alike(own, common, case)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="no Hopper card",
)
@pytest.mark.parametrize(
    "case",
    [
        *ALIKE,
        RuleCase(
            lengths=(4097, 300, 1, 64),
            heads=Heads(k_heads=16, v_heads=48, k_dim=128, v_dim=128),
            dtype=BF16,
            state_dtype=BF16,
            padding=(1,),
            max_segment_chunks=20,
        ),
    ],
    ids=str,
)
def test_a_hopper_card_gives_the_same_by_both_scans(case):
    operators = Operators(CUDA)
    library = ctypes.CDLL(str(extension._LIBRARY))
    own = results(operators, case)
    library.gdn_cuda_allow_sm90(0)
    try:
        common = results(operators, case)
    finally:
        library.gdn_cuda_allow_sm90(1)
    assert_alike(own, common, case)


RELEASE = "        if (lane == 0) mbarrier_arrive(ring.empty + turn.stage);\n"
MISTAKES = {
    # The accumulator is read while its product is under way: shows where products come late.
    "late": (HOST_SM90, "wgmma_wait<1>();\n        wgmma_settle(x);", "wgmma_settle(x);"),
    # A stage is given back while products read it: shows where copies come early.
    "early": (
        "host-cuda-sm90-reverse",
        "        decay_state(rows, ",
        f"{RELEASE}        decay_state(rows, ",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_operand_that_is_used_too_early_or_lost_too_early_is_noticed(mistake, tmp_path):
    name, right, wrong = MISTAKES[mistake]
    text = (host_cuda.CSRC / "gdn_prefill_sm90.cu").read_text()
    assert text.count(right) == text.count(RELEASE) == 1
    if mistake == "early":
        text = text.replace(RELEASE, "")
    mutant = tmp_path / "gdn_prefill_sm90.cu"
    mutant.write_text(text.replace(right, wrong))
    others = [path for path in host_cuda.CSRC.glob("gdn*.cu") if path.name != mutant.name]
    # Beside the library itself, whose objects it shares.
    folder = host_cuda.ROOT / "build" / "host-cuda"
    library = host_cuda.build([mutant, *sorted(others)], f"cortex_{mistake}_mutant", folder)
    torch.ops.load_library(str(library))
    functions = ctypes.CDLL(str(library))
    functions.gdn_host_set_order(HOST_SM90_ORDERS[name])
    functions.gdn_host_set_capability(90)
    case = RuleCase(lengths=(400,), heads=HEADS, dtype=BF16)
    inputs, truth = gdn_cases.make_rule(case), gdn_cases.rule_truth(case, raw=True)
    out = prefill(getattr(torch.ops, f"cortex_{mistake}_mutant"), inputs)
    wanted = truth.out.transpose(0, 1)
    assert not gdn_cases.error(out.transpose(0, 1), wanted) <= PREFILL_ERROR[BF16]
    # The same comparison, without the mistake.
    right_out = prefill(Operators(name), gdn_cases.make_rule(case))
    assert gdn_cases.error(right_out.transpose(0, 1), wanted) <= PREFILL_ERROR[BF16]
