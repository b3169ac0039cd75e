"""What the native operators beside this module were built with; needs no torch."""

import functools
import importlib

import msgspec


class KernelBuild(msgspec.Struct, frozen=True, kw_only=True):
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
    return msgspec.convert(info.describe(), KernelBuild)
