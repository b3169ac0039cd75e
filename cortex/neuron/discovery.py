"""What this host is and how its devices are: NVML and /proc, read off the event loop.

A GPU library can hang with its driver. So one thread of its own reads it; everybody else sees
the last reading.
"""

import logging
import platform
import threading
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

import pynvml

from cortex.core.neuron_api import Device, DeviceHealth, Discovery
from cortex.neuron.devices import HOST, DeviceMemory, Hardware, Reading
from cortex.neuron.families import process_families

READ_EVERY_S = 5.0
FIRST_READ_S = 10.0
MIB = 1 << 20

_logger = logging.getLogger(__name__)
# Its functions have no annotations, and its exceptions are made at run time.
_nvml: Any = pynvml


class Probe(Protocol):
    """Access to a host's devices; every call may block."""

    def hardware(self) -> Hardware:
        """Return what is there; never raises."""

    def read(self, pids: Collection[int]) -> Reading:
        """Return how it is now, and what some processes take; OSError if that cannot be said."""


class NvmlProbe:
    """NVIDIA devices through NVML, and the host's memory through /proc."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._has_nvml = False

    def hardware(self) -> Hardware:
        """Return the GPUs; a host without any, or without a driver, has an empty list."""
        try:
            _nvml.nvmlInit()
        except _nvml.NVMLError as exc:
            return Hardware(cuda_unavailable_reason=_why_not(exc))
        self._has_nvml = True
        try:
            cuda = _nvml.nvmlSystemGetCudaDriverVersion_v2()
            return Hardware(
                devices=[_device(index) for index in range(_nvml.nvmlDeviceGetCount())],
                cuda_version=f"{cuda // 1000}.{cuda % 1000 // 10}",
                driver_version=str(_nvml.nvmlSystemGetDriverVersion()),
            )
        except _nvml.NVMLError as exc:
            self._has_nvml = False
            return Hardware(cuda_unavailable_reason=_why_not(exc))

    def read(self, pids: Collection[int]) -> Reading:
        """Return memory, load and temperature of all devices, the host's memory among them.

        What a process takes is counted with what those below it take.
        """
        memory = [_host_memory(self._proc / "meminfo")]
        families = process_families(self._proc, pids)
        processes: Counter[tuple[int, int]] = Counter()
        for pid, head in families.items():
            held = _anonymous_bytes(self._proc / str(pid) / "status")
            if held is not None:
                processes[HOST, head] += held
        devices = []
        if self._has_nvml:
            try:
                for index in range(_nvml.nvmlDeviceGetCount()):
                    health, device_memory = _read_device(index)
                    devices.append(health)
                    memory.append(device_memory)
                    for pid, num_bytes in _process_bytes(index).items() if pids else ():
                        if pid in families:
                            processes[index, families[pid]] += num_bytes
            except _nvml.NVMLError as exc:
                raise OSError(f"NVML: {exc}") from exc
        return Reading(devices=devices, memory=memory, processes=dict(processes))


def _why_not(exc: Exception) -> str:
    if isinstance(exc, _nvml.NVMLError_LibraryNotFound):
        return "no NVIDIA driver is installed (the NVML library was not found)"
    if isinstance(exc, _nvml.NVMLError_LibRmVersionMismatch):
        return "the NVIDIA driver was updated and not yet loaded; reboot this host"
    return str(exc)


def _device(index: int) -> Device:
    handle = _nvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = _nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Device(
        index=index,
        name=str(_nvml.nvmlDeviceGetName(handle)),
        vram_total_mb=int(_nvml.nvmlDeviceGetMemoryInfo(handle).total) // MIB,
        compute_capability=f"{major}.{minor}",
    )


def _read_device(index: int) -> tuple[DeviceHealth, DeviceMemory]:
    handle = _nvml.nvmlDeviceGetHandleByIndex(index)
    memory = _nvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        utilization = int(_nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        temperature = int(_nvml.nvmlDeviceGetTemperature(handle, _nvml.NVML_TEMPERATURE_GPU))
    except _nvml.NVMLError:
        # Partitioned and some virtual GPUs do not tell; their memory is what matters.
        utilization = temperature = 0
    health = DeviceHealth(
        index=index,
        vram_used_mb=int(memory.used) // MIB,
        vram_free_mb=int(memory.free) // MIB,
        utilization_pct=utilization,
        temp_c=temperature,
    )
    return health, DeviceMemory(
        index=index, total_bytes=int(memory.total), free_bytes=int(memory.free)
    )


def _process_bytes(index: int) -> dict[int, int]:
    """Return what processes take of a GPU, as far as the driver tells."""
    handle = _nvml.nvmlDeviceGetHandleByIndex(index)
    try:
        running = _nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except _nvml.NVMLError:
        return {}
    return {int(each.pid): int(each.usedGpuMemory) for each in running if each.usedGpuMemory}


def _anonymous_bytes(status: Path) -> int | None:
    """Return what a process holds that no file backs; None if it is gone.

    Pages of weights that are mapped from a file go by themselves when memory is short.
    """
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return None
    rows = [line.split() for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(int(row[1]) << 10 for row in rows) if rows else None


def _host_memory(meminfo: Path) -> DeviceMemory:
    values = {}
    for line in meminfo.read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = rest.split()[0] if rest.split() else "0"
    return DeviceMemory(
        index=HOST,
        total_bytes=int(values.get("MemTotal", 0)) << 10,
        free_bytes=int(values.get("MemAvailable", 0)) << 10,
    )


class Monitor:
    """Reads a probe every READ_EVERY_S in a thread of its own and keeps the last reading.

    Attributes:
        pids: processes whose memory is to be read.
    """

    def __init__(self, probe: Probe, *, read_every_s: float = READ_EVERY_S) -> None:
        self.hardware = Hardware()
        self.reading = Reading()
        self.num_failures = 0
        self.pids: frozenset[int] = frozenset()
        self._probe = probe
        self._read_every_s = read_every_s
        self._lock = threading.Condition()
        self._asked = 0
        self._answered = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="device monitor", daemon=True)

    def start(self) -> None:
        """Start the thread and wait for the first reading, at most FIRST_READ_S."""
        self._asked = 1
        self._thread.start()
        self._wait_answered(1, FIRST_READ_S)

    def refresh(self, limit_s: float) -> Reading:
        """Return a reading begun after this call, or the last one if that takes too long; blocks.

        What hangs is the monitor's thread, never the caller's.
        """
        with self._lock:
            self._asked += 1
            number = self._asked
            self._lock.notify_all()
        self._wait_answered(number, limit_s)
        return self.reading

    def close(self) -> None:
        """Let the thread end; a hung one dies with the process."""
        with self._lock:
            self._is_closed = True
            self._lock.notify_all()

    def _wait_answered(self, number: int, limit_s: float) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._answered >= number or self._is_closed, limit_s)

    def _run(self) -> None:
        self._guard(self._read_hardware)
        while True:
            with self._lock:
                number = self._asked
            self._guard(self._read_once)
            with self._lock:
                self._answered = number
                self._lock.notify_all()
                self._lock.wait_for(
                    lambda: self._is_closed or self._asked > self._answered, self._read_every_s
                )
                if self._is_closed:
                    return

    def _read_hardware(self) -> None:
        self.hardware = self._probe.hardware()

    def _read_once(self) -> None:
        self.reading = self._probe.read(self.pids)

    def _guard(self, read: Callable[[], None]) -> None:
        try:
            read()
        except (OSError, ValueError) as exc:
            self.num_failures += 1
            if self.num_failures == 1:
                _logger.warning("devices cannot be read", extra={"cause": str(exc)})


def describe_host(
    hardware: Hardware, reading: Reading, *, harnesses: list[str], max_prompt_tokens: int
) -> Discovery:
    """Return the answer of `GET /discovery`."""
    uname = platform.uname()
    host = next((each for each in reading.memory if each.index == HOST), None)
    return Discovery(
        hostname=uname.node,
        os=_os_name(uname.system),
        kernel=uname.release,
        cuda_version=hardware.cuda_version,
        driver_version=hardware.driver_version,
        devices=hardware.devices,
        harnesses=harnesses,
        cuda_unavailable_reason=hardware.cuda_unavailable_reason,
        max_prompt_tokens=max_prompt_tokens,
        memory_total_mb=0 if host is None else host.total_bytes // MIB,
    )


def _os_name(default: str) -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return default
