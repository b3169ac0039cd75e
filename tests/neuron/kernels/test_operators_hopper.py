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
    """Return outputs, states and snapshots of a case, as float64 on the host."""
    inputs = gdn_cases.make_rule(case, operators.device)
    snapshots = inputs.states.new_full((inputs.tables.num_snapshots, *inputs.states.shape[1:]), 9)
    out = prefill(operators, inputs, snapshots if case.snapshots_at else None)
    states = inputs.states[inputs.slots]
    return [x.double().cpu() for x in (out.transpose(0, 1), states, snapshots)]


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


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="no Hopper card",
)
@pytest.mark.parametrize(
    "case",
    [
        RuleCase(lengths=(130, 5), heads=HEADS, dtype=BF16, snapshots_at=((0, 70),)),
        RuleCase(lengths=(1000,), heads=Heads(k_heads=2, v_heads=4), dtype=F16),
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
def test_a_hopper_card_gives_what_any_card_gives(case):
    operators = Operators(CUDA)
    library = ctypes.CDLL(str(extension._LIBRARY))
    own = results(operators, case)
    library.gdn_cuda_allow_sm90(0)
    try:
        common = results(operators, case)
    finally:
        library.gdn_cuda_allow_sm90(1)
    # Both round alike, but add in another order.
    for got, want in zip(own, common, strict=True):
        assert gdn_cases.error(got, want, 2) <= PREFILL_ERROR[case.dtype]


RELEASE = "        if (lane == 0) mbarrier_arrive(ring.empty + turn.stage);\n"
MISTAKES = {
    # The accumulator is read while its product is under way: shows where products come late.
    "late": (HOST_SM90, "wgmma_wait<1>();\n        wgmma_settle(x);", "wgmma_settle(x);"),
    # A stage is given back while products read it: shows where copies come early.
    "early": (
        "host-cuda-sm90-reverse",
        "        const float whole =",
        f"{RELEASE}        const float whole =",
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
