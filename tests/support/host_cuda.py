"""The CUDA kernels compiled for the host, as torch operators on CPU tensors.

`csrc/gdn*.cu` and the bindings go through the C++ compiler with the fiber shim of `csrc/host` in
place of CUDA, so that the kernels' arithmetic is tested where there is no GPU. Objects and the
library lie under `build/host-cuda/`, named by a hash of what went into them.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
NAMESPACE = "cortex_host_cuda"
_TORCH = Path(torch.__file__).parent
# No fortified longjmp: fibers jump between stacks.
_FLAGS = ("-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE")
_TIMEOUT_S = 300


def load() -> Path:
    """Build what is not built, register `torch.ops.cortex_host_cuda.*`, return the library.

    Raises:
        RuntimeError: the compiler refused, or the library does not load.
    """
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


@functools.cache
def _load() -> Path | str:
    """Return the loaded library, or what went wrong: every test fails, the compiler runs once."""
    try:
        library = build(sorted(CSRC.glob("gdn*.cu")), NAMESPACE, ROOT / "build" / "host-cuda")
        torch.ops.load_library(str(library))
    except (RuntimeError, OSError, subprocess.SubprocessError) as exc:
        return str(exc)
    return library


def set_fiber_order(order: int) -> None:
    """Choose the order in which threads of a block run: 0 by rank, 1 backwards, others a seed."""
    _functions(load()).gdn_host_set_order(ctypes.c_int(order))


def set_capability(capability: int) -> None:
    """Choose the compute capability that the launchers see: 80, or 90 for Hopper's own kernels."""
    _functions(load()).gdn_host_set_capability(ctypes.c_int(capability))


def build(kernels: Iterable[Path], namespace: str, folder: Path) -> Path:
    """Compile some kernels and the bindings into a library of operators of a namespace.

    Args:
        kernels: the .cu sources; what they include is looked up in csrc.
        namespace: of the operators; one library can be loaded for each.
        folder: where objects and library go.

    Raises:
        RuntimeError: the compiler refused; its output is the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = _digest_of_headers()
    includes = [f"-I{CSRC}"]
    objects = [
        _compile(kernel, ["-DGDN_HOST", "-DGDN_SM90A", "-x", "c++", *includes], shared, folder)
        for kernel in kernels
    ]
    bindings = [
        f"-DCORTEX_OPS_NAMESPACE={namespace}",
        "-DCORTEX_HOST_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *includes,
        "-isystem",
        str(_TORCH / "include"),
    ]
    objects.append(_compile(CSRC / "bindings.cpp", bindings, shared + torch.__version__, folder))
    libraries = _TORCH / "lib"
    link = ["-shared", f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"]
    key = _digest(*link, *(each.name for each in objects))
    target = folder / f"{namespace}-{key}.so"
    if not target.exists():
        _run([*map(str, objects), *link], target)
    return target


def _compile(source: Path, flags: list[str], shared: str, folder: Path) -> Path:
    key = _digest(*_FLAGS, *flags, shared, source.read_text())
    target = folder / f"{source.stem}-{key}.o"
    if not target.exists():
        _run([*_FLAGS, *flags, "-c", str(source)], target)
    return target


def _run(arguments: list[str], target: Path) -> None:
    """Run the compiler; the target appears whole or not at all, whoever else builds it."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    command = ["g++", *arguments, "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    partial.rename(target)


def _digest_of_headers() -> str:
    headers = sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")])
    return _digest(*(header.read_text() for header in headers))


def _digest(*parts: str) -> str:
    key = hashlib.sha256()
    for part in parts:
        key.update(part.encode() + b"\0")
    return key.hexdigest()[:16]


@functools.cache
def _functions(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))
