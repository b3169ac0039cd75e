"""Build hook: compiles the native operators and records which commit a build came from.

The operators are one library on torch's stable ABI: `csrc/*.cpp` by the C++ compiler and, where
nvcc is found, `csrc/*.cu` by nvcc in the same step. torch's own CUDAExtension is not used: it
refuses a torch without CUDA, on which the library must build as well.

Environment:
    CORTEX_CUDA            1: fail without nvcc; 0: CPU only; unset: CUDA if nvcc is found and torch
                           is a CUDA build
    CORTEX_CUDA_ARCHS      flavours (ampere ada hopper blackwell), numbers (80 90a), "all", or
                           "native", this machine's cards; unset: native, or all if there are none
    CORTEX_REQUIRE_KERNELS 1: fail where torch or a C++ compiler is missing, instead of installing
                           without operators; 0: do without them in any case
    MAX_JOBS               compilers at a time
"""

import concurrent.futures
import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

_ROOT = Path(__file__).parent
_CSRC = _ROOT / "csrc"
# The oldest torch the library runs with, 2.11, as torch's headers spell it.
_TORCH_TARGET = "0x020b000000000000"
_FLAVOURS = {
    "ampere": ["80", "86"],
    "ada": ["89"],
    "hopper": ["90a"],
    "blackwell": ["100", "120"],
}
_NVCC_FLAGS = (_CSRC / "nvcc.flags").read_text().split()
# Python hands its own -g on, which makes the library ten times larger.
_CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]


def _git(*args: str) -> str:
    try:
        done = subprocess.run(
            ["git", *args], cwd=_ROOT, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _record_build() -> None:
    record = _ROOT / "cortex/core/build_info.json"
    if not (_ROOT / ".git").exists() and record.exists():
        return  # an export of a commit brings its own
    sha = _git("rev-parse", "HEAD")
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    built = (
        datetime.datetime.fromtimestamp(int(epoch), datetime.UTC)
        if epoch
        else datetime.datetime.now(datetime.UTC)
    )
    info = {
        "git_sha_long": sha or "unknown",
        "git_dirty": bool(sha and _git("status", "--porcelain", "--untracked-files=no")),
        "build_timestamp": built.isoformat(timespec="seconds"),
    }
    record.write_text(json.dumps(info) + "\n")


def _say(text: str) -> None:
    print(f"cortex: {text}", file=sys.stderr)


def _stop(text: str) -> None:
    raise SystemExit(f"cortex: {text}")


def _import_torch():
    """Return torch, or None. An isolated build hides the environment that it will be used in."""
    try:
        import torch
    except ImportError:
        sys.path.append(sysconfig.get_path("purelib"))
        try:
            import torch
        except ImportError:
            return None
    return torch


class _Nvcc:
    """The CUDA compiler.

    Attributes:
        command: nvcc, behind ccache where that is found.
        root: the toolkit's folder. The nvcc on PATH may be a wrapper elsewhere, so nvcc is asked.
        version: such as "13.0".
    """

    def __init__(self, path: str) -> None:
        ccache = shutil.which("ccache")
        self.command = [ccache, path] if ccache else [path]
        dry = subprocess.run(
            [path, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull],
            capture_output=True,
            text=True,
            check=False,
        ).stderr
        top = re.search(r"^#\$ TOP=(.*)$", dry, re.MULTILINE)
        self.root = Path(top[1] if top else Path(path).resolve().parents[1]).resolve()
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
        release = re.search(r"release ([\d.]+)", shown.stdout)
        self.version = release[1] if release else "unknown"

    def compile_all(self, sources: list[Path], folder: Path, archs: list[str]) -> list[str]:
        """Return the object files of some sources, compiled side by side."""
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        if not archs[-1].endswith("a"):  # cards to come translate the newest one's PTX
            codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        flags = [*_NVCC_FLAGS, *codes]
        if "90a" in archs:
            flags.append("-DGDN_SM90A")
        folder.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with concurrent.futures.ThreadPoolExecutor(max_workers=jobs) as pool:
            return list(pool.map(lambda source: self._compile(source, folder, flags), sources))

    def _compile(self, source: Path, folder: Path, flags: list[str]) -> str:
        # The name tells flags and sources apart: an object of other archs is never taken for this.
        key = hashlib.sha256(" ".join(flags).encode())
        for header in [source, *sorted(_CSRC.rglob("*.h")), *sorted(_CSRC.rglob("*.cuh"))]:
            key.update(header.read_bytes())
        target = folder / f"{source.stem}-{key.hexdigest()[:12]}.o"
        if not target.exists():
            partial = target.with_suffix(".part.o")
            command = [*self.command, *flags, "-c", str(source), "-o", str(partial)]
            _say(shlex.join(command))
            subprocess.run(command, check=True)
            partial.rename(target)
        return str(target)


def _find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    found = shutil.which("nvcc")
    places += [Path(found)] if found else []
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(place) for place in places if place.exists()), None)


def _native_archs() -> list[str]:
    try:
        shown = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    numbers = {line.strip().replace(".", "") for line in shown.stdout.splitlines() if line.strip()}
    return ["90a" if number == "90" else number for number in sorted(numbers, key=int)]


def _archs() -> list[str]:
    every = [arch for archs in _FLAVOURS.values() for arch in archs]
    archs: list[str] = []
    for word in os.environ.get("CORTEX_CUDA_ARCHS", "").split() or ["auto"]:
        if word in {"native", "auto"}:
            native = _native_archs()
            if not native and word == "native":
                _stop("CORTEX_CUDA_ARCHS=native, and nvidia-smi names no card here")
            archs += native or every
        elif word == "all":
            archs += every
        elif re.fullmatch(r"\d{2,3}[af]?", word):
            archs.append(word)
        elif word in _FLAVOURS:
            archs += _FLAVOURS[word]
        else:
            _stop(f"CORTEX_CUDA_ARCHS: {word!r} is no flavour ({', '.join(_FLAVOURS)}) or number")
    return sorted(set(archs), key=lambda arch: (int(arch.rstrip("af")), arch))


def _wanted_nvcc(torch) -> _Nvcc | None:
    wish = os.environ.get("CORTEX_CUDA", "")
    if wish == "0":
        return None
    path = _find_nvcc()
    if path is None:
        if wish == "1":
            _stop("CORTEX_CUDA=1, and no nvcc is found; install the CUDA toolkit or set CUDA_HOME")
        return None
    if wish != "1" and torch.version.cuda is None:
        _say("this torch has no CUDA, so only the CPU operators are built (CORTEX_CUDA=1 insists)")
        return None
    return _Nvcc(path)


def _extensions(torch) -> list[Extension]:
    from torch.utils.cpp_extension import CppExtension, include_paths

    nvcc = _wanted_nvcc(torch)
    archs = _archs() if nvcc else []
    # Both were asked of the environment once; the build below reads them off its extension.
    operators = CppExtension(
        "cortex.neuron.kernels._C",
        [str(path.relative_to(_ROOT)) for path in _operator_sources()],
        include_dirs=["csrc"],
        define_macros=[
            ("TORCH_TARGET_VERSION", _TORCH_TARGET),
            ("Py_LIMITED_API", "0x030b0000"),
            *([("CORTEX_WITH_CUDA", None)] if nvcc else []),
        ],
        extra_compile_args={"cxx": _CXX_FLAGS},
        py_limited_api=True,
        depends=[str(path.relative_to(_ROOT)) for path in sorted(_CSRC.rglob("*.h"))],
    )
    operators.nvcc = nvcc
    operators.archs = archs
    info = Extension(
        "cortex.neuron.kernels._info",
        ["csrc/info.cpp"],
        include_dirs=_pybind11_includes(include_paths()),
        define_macros=[
            ("CORTEX_BUILD_ARCHS", json.dumps(" ".join(archs))),
            ("CORTEX_BUILD_CUDA", json.dumps(nvcc.version if nvcc else "")),
            ("CORTEX_BUILD_TORCH", json.dumps(torch.__version__)),
            (
                "CORTEX_BUILD_FLAGS",
                json.dumps(" ".join([*_CXX_FLAGS, *(_NVCC_FLAGS if nvcc else [])])),
            ),
        ],
        extra_compile_args={"cxx": ["-std=c++17", "-O1", "-g0", "-fvisibility=hidden"]},
        language="c++",
    )
    info.nvcc = None
    return [operators, info]


def _operator_sources() -> list[Path]:
    sources = [path for path in _CSRC.glob("*.cpp") if path.name != "info.cpp"]
    return sorted([*sources, *_CSRC.glob("cpu/*.cpp")])


def _lacking_compiler() -> str:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    return "" if shutil.which(compiler) else f"the C++ compiler {compiler!r}"


def _pybind11_includes(of_torch: list[str]) -> list[str]:
    try:
        import pybind11
    except ImportError:
        return of_torch  # torch brings a copy of the headers
    return [pybind11.get_include()]


def _build_command():
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """torch's build, with the objects of nvcc linked in."""

        def build_extension(self, ext) -> None:
            if ext.nvcc is not None:
                folder = Path(self.build_temp).resolve() / "cuda"
                ext.extra_objects = ext.nvcc.compile_all(
                    sorted(_CSRC.glob("*.cu")), folder, ext.archs
                )
                # A toolkit keeps its libraries in lib64, or in targets/ when it is for several.
                root = ext.nvcc.root
                ext.library_dirs += [
                    str(path) for path in (root / "lib64", root / "lib") if path.exists()
                ]
                ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
            super().build_extension(ext)

    return Build


def _native_parts() -> dict:
    if os.environ.get("CORTEX_REQUIRE_KERNELS") == "0":
        return {}
    torch = _import_torch()
    lacking = "torch" if torch is None else _lacking_compiler()
    if lacking:
        text = (
            f"{lacking} is not installed, so the native operators are not built and plain torch "
            "operators will serve; install it, then: pip install --no-build-isolation ."
        )
        if os.environ.get("CORTEX_REQUIRE_KERNELS") == "1":
            _stop(text)
        _say(text)
        return {}
    return {"ext_modules": _extensions(torch), "cmdclass": {"build_ext": _build_command()}}


# Asked for its metadata alone, setup.py need not import torch.
_BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}

_record_build()
setup(**(_native_parts() if _BUILDS & set(sys.argv) else {}))
