"""What the native operators beside this module were built with; needs no torch."""

import functools
import importlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBuild:
    """How the native operators were built.

    Attributes:
        cuda_archs: compute capabilities that have machine code, as nvcc spells them: "80", "90a".
            Empty: CPU only.
        cuda_version: nvcc's, "" without CUDA.
        torch_version: whose headers were used.
        flags: of both compilers.
    """

    cuda_archs: tuple[str, ...]
    cuda_version: str
    torch_version: str
    compiler: str
    flags: tuple[str, ...]


def features() -> list[str]:
    """Return what `GET /version` tells of the operators; empty where they are not built."""
    build = describe_build()
    if build is None:
        return []
    cuda = [f"cuda-{build.cuda_version}"] if build.cuda_version else []
    return ["native-gdn", *cuda, *(f"sm_{arch}" for arch in build.cuda_archs)]


@functools.cache
def describe_build() -> KernelBuild | None:
    """Return what the operators were built with; None where they are not built."""
    try:
        info = importlib.import_module("cortex.neuron.kernels._info")
    except ImportError:
        return None
    told = info.describe()
    return KernelBuild(
        cuda_archs=tuple(told["cuda_archs"]),
        cuda_version=told["cuda_version"],
        torch_version=told["torch_version"],
        compiler=told["compiler"],
        flags=tuple(told["flags"]),
    )
