"""The CUDA kernels on the host: that what is wrong in them shows."""

import re

import pytest
import torch

from tests.support import gdn_cases, host_cuda
from tests.support.gdn_cases import Heads, RuleCase
from tests.support.gdn_operators import HOST_CUDA, HOST_CUDA_ORDERS, Operators

MUTANT = "cortex_mutant"
CASE = RuleCase(lengths=(70,), heads=Heads(k_heads=1, v_heads=1, k_dim=64, v_dim=16))


def chunked_error(operators):
    inputs, truth = gdn_cases.make_rule(CASE), gdn_cases.rule_truth(CASE)
    each = (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta)
    out = operators.chunked_gated_delta_rule_recurrence(*each, inputs.states, inputs.slots, None)
    return gdn_cases.error(out.transpose(0, 1), truth.out.transpose(0, 1))


def test_a_missing_barrier_is_noticed(tmp_path):
    text, count = re.subn(
        r"(solve\(\);\s+)__syncthreads\(\);", r"\1", (host_cuda.CSRC / "gdn.cu").read_text()
    )
    assert count == 1, "the chunked kernel has a barrier between its solution and its outputs"
    mutant = tmp_path / "gdn.cu"
    mutant.write_text(text)
    others = [path for path in host_cuda.CSRC.glob("gdn*.cu") if path.name != "gdn.cu"]
    library = host_cuda.build([mutant, *sorted(others)], MUTANT, tmp_path)
    torch.ops.load_library(str(library))
    errors = []
    for order in HOST_CUDA_ORDERS.values():
        host_cuda.set_fiber_order(order)
        errors.append(chunked_error(getattr(torch.ops, MUTANT)))
    assert not all(error <= gdn_cases.FLOAT32_ERROR for error in errors)
    # The same comparison, with the barrier there.
    assert chunked_error(Operators(HOST_CUDA)) <= gdn_cases.FLOAT32_ERROR


def test_what_the_compiler_refuses_is_an_error_with_its_words(tmp_path):
    broken = tmp_path / "broken.cu"
    broken.write_text("int f() { return undeclared; }\n")
    with pytest.raises(RuntimeError, match=r"(?s)^g\+\+ .*undeclared"):
        host_cuda.build([broken], MUTANT, tmp_path)
    assert not list(tmp_path.glob("*.o"))
    assert not list(tmp_path.glob("*.so"))


def test_a_library_is_built_once_for_its_sources(tmp_path):
    source = tmp_path / "gdn.cu"
    source.write_text("int gdn_answer() { return 1; }\n")
    first = host_cuda.build([source], MUTANT, tmp_path)
    built = first.stat().st_mtime_ns
    assert host_cuda.build([source], MUTANT, tmp_path) == first
    assert first.stat().st_mtime_ns == built
    source.write_text("int gdn_answer() { return 2; }\n")
    assert host_cuda.build([source], MUTANT, tmp_path) != first
    assert not list(tmp_path.glob("*.part"))
    assert all(re.fullmatch(r".+-[0-9a-f]{16}", path.stem) for path in tmp_path.glob("*.so"))
