"""The native operators as torch sees them: schemas, fake tensors, torch.compile."""

import pytest
import torch

from cortex.neuron.kernels import extension
from tests.support import gdn_cases
from tests.support.gdn_cases import Heads, RuleCase, StepCase
from tests.support.gdn_operators import CUDA, implementation

HEADS = Heads(k_heads=1, v_heads=2, k_dim=16, v_dim=8)
DEVICES = [pytest.param("cpu", id="cpu"), implementation(CUDA)]


@pytest.fixture(autouse=True)
def operators():
    assert extension.is_loaded()


def calls(device, dtype):
    """Arguments of each operator; the pools hold no NaN, which equals nothing."""
    rule = gdn_cases.make_rule(
        RuleCase(lengths=(3, 2), heads=HEADS, dtype=dtype, snapshots_at=((0, 3),)), device
    )
    step = gdn_cases.make_step(StepCase(rows=2, heads=HEADS, dtype=dtype), device)
    for given in (rule, step):
        for name, value in vars(given).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                setattr(given, name, value.nan_to_num())
    of_rule = (rule.q, rule.k, rule.v, rule.g, rule.beta, rule.states, rule.slots, rule.starts)
    mixed, b, a = (x[:, 0] for x in (step.mixed, step.b, step.a))
    tables = rule.tables
    return {
        "gated_delta_rule_recurrence": of_rule,
        "chunked_gated_delta_rule_recurrence": of_rule,
        "causal_conv1d_full": (mixed, step.conv_weight, step.windows, step.slots, None),
        "causal_conv1d_update": (mixed, step.conv_weight, step.windows, step.slots),
        "fused_gdn_gating": (b, a, step.a_log, step.dt_bias),
        "gdn_gated_norm": (rule.v, rule.v, step.norm_weight, 1e-6),
        "gdn_decode_step": step.decode_arguments(),
        "gdn_verify": step.verify_arguments(),
        "gdn_prefill": (
            *(rule.qkv, rule.g, rule.beta, rule.states, rule.slots),
            *(tables.chunks, tables.first_chunks, tables.segments),
            torch.zeros_like(rule.states[:1]),
        ),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", sorted(calls("cpu", torch.float32)))
def test_opcheck_finds_nothing(op, dtype, device):
    """Neither in what is changed in place, nor in what fake tensors say, nor under autograd."""
    torch.library.opcheck(getattr(torch.ops.cortex, op).default, calls(device, dtype)[op])


# torch's own compiler uses what torch calls deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_decode_step_compiles_whole(device, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def layer(inputs, token):
        mixed, *others = inputs.decode_arguments(token)
        return torch.ops.cortex.gdn_decode_step(mixed * 0.5, *others) + 1.0

    case = StepCase(rows=3, tokens=2, heads=HEADS, padding=(1,))
    plain, compiled = (gdn_cases.make_step(case, device) for _ in range(2))
    compiled_layer = torch.compile(layer, fullgraph=True)
    for token in range(case.tokens):
        want, got = layer(plain, token), compiled_layer(compiled, token)
        torch.testing.assert_close(got, want)
    for name in ("states", "windows"):
        torch.testing.assert_close(
            getattr(compiled, name), getattr(plain, name), rtol=0, atol=0, equal_nan=True
        )
