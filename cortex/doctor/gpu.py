"""Driver, torch and the native operators; what to make of them is pure."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cortex.doctor.findings import Finding, Level
from cortex.doctor.torch_probe import TorchReport
from cortex.neuron.devices import Hardware
from cortex.neuron.kernels.build import KernelBuild

# Importing torch on a cold and busy machine takes tens of seconds.
TORCH_S = 120.0
TORCH_PROBE = (sys.executable, "-m", "cortex.doctor.torch_probe")
PCI = Path("/sys/bus/pci/devices")

_NVIDIA = "0x10de"
_DISPLAY = "0x03"
_BUILD_REMEDY = (
    "build them beside this torch: `pip install --no-build-isolation .` in a source checkout, with "
    "a C++ compiler, and nvcc for CUDA"
)


def count_cards(pci: Path = PCI) -> int:
    """Return how many NVIDIA GPUs are plugged in, whether there is a driver or not."""
    found = 0
    for device in pci.glob("*"):
        try:
            vendor = (device / "vendor").read_text().strip()
            is_display = (device / "class").read_text().startswith(_DISPLAY)
        except OSError:
            continue
        found += vendor == _NVIDIA and is_display
    return found


def judge_driver(hardware: Hardware, num_cards: int) -> list[Finding]:
    """Return what is to be said of the NVIDIA driver."""
    if hardware.devices:
        cards = "; ".join(
            f"{each.index}: {each.name}, {each.vram_total_mb // 1024} GiB, "
            f"compute capability {each.compute_capability}"
            for each in hardware.devices
        )
        driver = f"{hardware.driver_version}, CUDA {hardware.cuda_version}"
        return [Finding(check="driver", level="ok", message=f"{driver}; {cards}")]
    why = hardware.cuda_unavailable_reason or "the driver lists no GPU"
    if num_cards == 0:
        return [Finding(check="driver", level="note", message=f"no NVIDIA GPU here ({why})")]
    return [
        Finding(
            check="driver",
            level="fail",
            message=f"{num_cards} NVIDIA GPUs are plugged in and none can be used: {why}",
            remedy="install the NVIDIA driver of this kernel, or load it (`nvidia-smi` tells), and "
            "see that this user may open /dev/nvidia*",
        )
    ]


def look_for_torch(
    *, command: Sequence[str] = TORCH_PROBE, limit_s: float = TORCH_S
) -> TorchReport | str | None:
    """Return what torch can do, or why it cannot be used; None where it is missing; blocks."""
    if importlib.util.find_spec("torch") is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603  our own program
            command, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"importing it and looking at the devices took more than {limit_s:g} s"
    except OSError as exc:
        return str(exc)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return lines[-1][:300] if lines else f"it ended with {done.returncode}"
    try:
        return msgspec.json.decode(done.stdout, type=TorchReport)
    except msgspec.DecodeError as exc:
        return f"its report cannot be read: {exc}"


def judge_torch(
    torch: TorchReport | str | None, hardware: Hardware, *, is_needed: bool
) -> list[Finding]:
    """Return what is to be said of torch.

    Args:
        is_needed: this host is to be a neuron; a gateway has no use for torch.
    """
    if torch is None:
        level: Level = "fail" if is_needed else "note"
        return [
            Finding(
                check="torch",
                level=level,
                message="not installed: this host can run a gateway and external engines only",
                remedy="for a neuron, install torch into the environment of `cortex` (of a "
                "package: `helexa-neuron-setup`)",
            )
        ]
    if isinstance(torch, str):
        return [
            Finding(
                check="torch",
                level="fail" if is_needed else "warn",
                message=f"cannot be used: {torch}",
                remedy="install torch again into the environment of `cortex`, or by "
                "`helexa-neuron-setup`",
            )
        ]
    built = f"CUDA {torch.cuda_version}" if torch.cuda_version else "CPUs alone"
    found = f"{torch.version}, built for {built}"
    if not hardware.devices:
        return [Finding(check="torch", level="ok", message=found)]
    remedy = None
    if torch.cuda_version is None:
        remedy = "install a CUDA build of torch: with this one the GPUs stay unused"
    elif _major(torch.cuda_version) > _major(hardware.cuda_version or "0"):
        remedy = (
            f"the driver offers CUDA {hardware.cuda_version} only: update it, or install a torch "
            "that is built for that"
        )
    elif torch.cuda_error or not torch.devices:
        found += f"; no GPU can be used: {torch.cuda_error or 'it sees none'}"
        remedy = "see that this user may open /dev/nvidia* and that CUDA_VISIBLE_DEVICES is right"
    level = "ok" if remedy is None else "fail"
    return [Finding(check="torch", level=level, message=found, remedy=remedy)]


def judge_operators(build: KernelBuild | None, torch: TorchReport | str | None) -> list[Finding]:
    """Return what is to be said of the native operators."""
    if torch is None:
        return []
    if build is None:
        return [
            Finding(
                check="operators",
                level="warn",
                message="not built: plain torch serves, several times slower",
                remedy=_BUILD_REMEDY,
            )
        ]
    archs = ", ".join(f"sm_{arch}" for arch in build.cuda_archs) or "CPUs alone"
    cuda = f" with CUDA {build.cuda_version}" if build.cuda_version else ""
    built = f"built for {archs}{cuda}, against torch {build.torch_version}"
    if isinstance(torch, str):
        return [Finding(check="operators", level="note", message=f"{built}; torch is unusable")]
    if not torch.is_native_loaded:
        return [
            Finding(
                check="operators",
                level="warn",
                message=f"{built}; they do not load into torch {torch.version}",
                remedy=_BUILD_REMEDY,
            )
        ]
    unserved = [each for each in torch.devices if not each.is_native]
    if unserved:
        cards = ", ".join(f"{each.index} ({each.name})" for each in unserved)
        return [
            Finding(
                check="operators",
                level="warn",
                message=f"{built}; plain torch, several times slower, serves GPU {cards}",
                remedy="build or install them for this card (CORTEX_CUDA_ARCHS)",
            )
        ]
    return [Finding(check="operators", level="ok", message=built)]


def _major(version: str) -> int:
    return int(version.partition(".")[0])
