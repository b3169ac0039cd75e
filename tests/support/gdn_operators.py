"""The implementations of the Gated DeltaNet operators, each under one name, called alike."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from cortex.neuron.kernels import extension, gdn_torch
from tests.support import host_cuda

TORCH = "torch"
CPUS = ("cpu-avx512", "cpu-avx2", "cpu-baseline")
CUDA = "cuda"
# The CUDA kernels on the host, and the order in which the threads of a block take their turns.
HOST_CUDA = "host-cuda"
HOST_CUDA_ORDERS = {HOST_CUDA: 0, "host-cuda-reverse": 1, "host-cuda-random": 20}
# The same as Hopper runs them, which has a kernel of its own in gdn_prefill.
HOST_SM90 = "host-cuda-sm90"
HOST_SM90_ORDERS = {HOST_SM90: 0, "host-cuda-sm90-reverse": 1, "host-cuda-sm90-random": 20}
_ON_HOST = {name: (order, 80) for name, order in HOST_CUDA_ORDERS.items()} | {
    name: (order, 90) for name, order in HOST_SM90_ORDERS.items()
}


def implementation(name: str) -> Any:
    """Return a pytest parameter for one of the above; CUDA is marked and skipped without one."""
    if name != CUDA:
        return pytest.param(name, id=name)
    lacking = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.param(name, id=name, marks=[pytest.mark.gpu, lacking])


class Operators:
    """The operators of one implementation, as attributes with the signatures of their schemas."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = torch.device("cuda" if name == CUDA else "cpu")
        # Of the CUDA kernels, wherever they run.
        self.is_cuda = name in {*_ON_HOST, CUDA}
        if name in _ON_HOST:
            host_cuda.load()
        elif name != TORCH:
            assert extension.serves(self.device), f"the operators are not built for {self.device}"

    def __getattr__(self, op: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with self._chosen() as operators:
                return getattr(operators, op)(*args)

        return call

    @contextmanager
    def _chosen(self) -> Iterator[Any]:
        if self.name == TORCH:
            yield gdn_torch
        elif self.name in _ON_HOST:
            order, capability = _ON_HOST[self.name]
            host_cuda.set_fiber_order(order)
            host_cuda.set_capability(capability)
            yield getattr(torch.ops, host_cuda.NAMESPACE)
        elif self.name in CPUS:
            if not torch.ops.cortex.set_cpu_capability(self.name.removeprefix("cpu-")):
                pytest.skip(f"this machine lacks {self.name}")
            try:
                yield torch.ops.cortex
            finally:
                torch.ops.cortex.set_cpu_capability("")
        else:
            yield torch.ops.cortex
