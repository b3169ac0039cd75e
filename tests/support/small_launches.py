"""Every CUDA operator once on small inputs, for tools that watch a whole process.

Run as `python -m tests.support.small_launches`. Allocations are not pooled when the process is
started with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that a tool sees where a tensor ends.
"""

import torch

from cortex.neuron.kernels import extension
from tests.support import gdn_cases
from tests.support.gdn_cases import Heads, RuleCase, StepCase

# Head dims of the kernels with vector loads and tensor cores, and of those for any shape.
HEADS = (
    Heads(k_heads=1, v_heads=2, k_dim=128, v_dim=128),
    Heads(k_heads=1, v_heads=2, k_dim=64, v_dim=64),
    Heads(k_heads=1, v_heads=1, k_dim=33, v_dim=7),
)


def main() -> None:
    """Launch them all; a fault of one ends the process."""
    assert extension.serves(torch.device("cuda")), "the operators are not built for this card"
    for heads in HEADS:
        for dtype in (torch.float32, torch.bfloat16):
            launch(heads, dtype)
    torch.cuda.synchronize()
    print("every operator ran")  # noqa: T201  what the caller looks for


def launch(heads: Heads, dtype: torch.dtype) -> None:
    """Launch every operator with one padding row and lengths that are no multiple of a chunk."""
    ops = torch.ops.cortex
    case = RuleCase(
        lengths=(130, 3, 2),
        padding=(2,),
        heads=heads,
        dtype=dtype,
        snapshots_at=((0, 70),),
        max_segment_chunks=1,
    )
    rule = gdn_cases.make_rule(case, "cuda")
    of_rule = (rule.q, rule.k, rule.v, rule.g, rule.beta, rule.states, rule.slots, rule.starts)
    ops.gated_delta_rule_recurrence(*of_rule)
    ops.chunked_gated_delta_rule_recurrence(*of_rule)
    tables = rule.tables
    snapshots = torch.zeros_like(rule.states[:1])
    cuts = (tables.chunks, tables.first_chunks, tables.segments)
    ops.gdn_prefill(rule.qkv, rule.g, rule.beta, rule.states, rule.slots, *cuts, snapshots)
    step = gdn_cases.make_step(
        StepCase(rows=3, tokens=2, padding=(1,), heads=heads, dtype=dtype), "cuda"
    )
    mixed, b, a = (x[:, 0].contiguous() for x in (step.mixed, step.b, step.a))
    ops.causal_conv1d_full(mixed, step.conv_weight, step.windows, step.slots, None)
    ops.causal_conv1d_update(mixed, step.conv_weight, step.windows, step.slots)
    ops.fused_gdn_gating(b, a, step.a_log, step.dt_bias)
    ops.gdn_gated_norm(rule.v, rule.v, step.norm_weight, gdn_cases.NORM_EPS)
    ops.gdn_decode_step(*step.decode_arguments())
    ops.gdn_verify(*step.verify_arguments())


if __name__ == "__main__":
    main()
