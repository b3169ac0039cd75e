"""What only a GPU can show: graphs that replay, and what the vendor's tools find."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cortex.neuron.kernels import extension
from tests.support import gdn_cases
from tests.support.gdn_cases import Heads, StepCase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROOT = Path(__file__).parents[3]
TOOL = shutil.which("compute-sanitizer")
CASE = StepCase(
    rows=3,
    tokens=3,
    padding=(1,),
    heads=Heads(k_heads=2, v_heads=4, k_dim=128, v_dim=128),
    dtype=torch.bfloat16,
)


@pytest.fixture(autouse=True)
def _operators():
    assert extension.serves(torch.device("cuda"))


def test_a_captured_decode_step_goes_on_where_it_stopped_when_it_is_replayed():
    direct, captured = (gdn_cases.make_step(CASE, "cuda") for _ in range(2))
    inputs = [x[:, 0].clone() for x in (captured.mixed, captured.z, captured.b, captured.a)]
    rest = captured.decode_arguments()[4:]
    warm = gdn_cases.make_step(CASE, "cuda")
    torch.ops.cortex.gdn_decode_step(*warm.decode_arguments())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.cortex.gdn_decode_step(*inputs, *rest)
    for token in range(CASE.tokens):
        want = torch.ops.cortex.gdn_decode_step(*direct.decode_arguments(token))
        for held, x in zip(
            inputs, (captured.mixed, captured.z, captured.b, captured.a), strict=True
        ):
            held.copy_(x[:, token])
        graph.replay()
        assert torch.equal(out, want)
    assert torch.equal(gdn_cases.bits(captured.states), gdn_cases.bits(direct.states))
    assert torch.equal(gdn_cases.bits(captured.windows), gdn_cases.bits(direct.windows))
    assert not captured.arrivals.count_nonzero()


def test_a_step_runs_in_the_stream_that_is_current():
    """Behind a long wait in another stream the result is not there before that stream is done."""
    want = torch.ops.cortex.gdn_decode_step(*gdn_cases.make_step(CASE, "cuda").decode_arguments())
    inputs = gdn_cases.make_step(CASE, "cuda")
    mixed, *others = inputs.decode_arguments()
    late = torch.zeros_like(mixed)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(mixed)
        got = torch.ops.cortex.gdn_decode_step(late, *others)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not here")
@pytest.mark.parametrize("check", ["memcheck", "racecheck", "synccheck"])
def test_the_sanitizer_finds_nothing(check):
    tool = [TOOL, "--tool", check, "--error-exitcode", "9", "--launch-timeout", "0"]
    done = subprocess.run(
        [*tool, sys.executable, "-m", "tests.support.small_launches"],
        cwd=ROOT,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "every operator ran" in done.stdout
