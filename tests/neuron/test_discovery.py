import threading

import pytest

from cortex.core.neuron_api import Device
from cortex.neuron import discovery
from cortex.neuron.devices import HOST, DeviceMemory, Hardware, Reading
from cortex.neuron.discovery import Monitor, NvmlProbe, describe_host
from tests.support.neuron_fakes import FakeProbe

GIB = 1 << 30
MEMINFO = "MemTotal:       16384 kB\nMemFree:          100 kB\nMemAvailable:    8192 kB\nOdd:\n"


class FakeNvml:
    """NVML with one device, or with an error from `fail_in` on."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    class NVMLError_LibraryNotFound(NVMLError):  # noqa: N801, N818  NVML's own name
        pass

    class NVMLError_LibRmVersionMismatch(NVMLError):  # noqa: N801, N818  NVML's own name
        pass

    def __init__(self, **errors):
        self.errors = errors

    def __getattr__(self, name):
        answers = {
            "nvmlInit": None,
            "nvmlSystemGetCudaDriverVersion_v2": 13010,
            "nvmlSystemGetDriverVersion": "580.65",
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetCudaComputeCapability": (9, 0),
            "nvmlDeviceGetName": "H200",
            "nvmlDeviceGetTemperature": 41,
        }

        def call(*_):
            if name in self.errors:
                raise self.errors[name]
            if name == "nvmlDeviceGetMemoryInfo":
                return type("Memory", (), {"total": 140 * GIB, "used": 40 * GIB, "free": 100 * GIB})
            if name == "nvmlDeviceGetComputeRunningProcesses":
                rows = ((7, 3 * GIB), (8, None), (9, GIB))
                return [
                    type("Process", (), {"pid": pid, "usedGpuMemory": used}) for pid, used in rows
                ]
            if name == "nvmlDeviceGetUtilizationRates":
                return type("Rates", (), {"gpu": 73})
            return answers[name]

        return call


@pytest.fixture
def meminfo(tmp_path):
    path = tmp_path / "meminfo"
    path.write_text(MEMINFO)
    return path


def test_a_gpu_is_described_and_read(meminfo, monkeypatch):
    monkeypatch.setattr(discovery, "_nvml", FakeNvml())
    probe = NvmlProbe(meminfo.parent)
    assert probe.hardware() == Hardware(
        devices=[
            Device(index=0, name="H200", vram_total_mb=143360, compute_capability="9.0"),
        ],
        cuda_version="13.1",
        driver_version="580.65",
    )
    reading = probe.read(())
    assert reading.memory == [
        DeviceMemory(index=HOST, total_bytes=16 << 20, free_bytes=8 << 20),
        DeviceMemory(index=0, total_bytes=140 * GIB, free_bytes=100 * GIB),
    ]
    health = reading.devices[0]
    assert (health.vram_used_mb, health.utilization_pct, health.temp_c) == (40960, 73, 41)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FakeNvml.NVMLError_LibraryNotFound(), "no NVIDIA driver is installed"),
        (FakeNvml.NVMLError_LibRmVersionMismatch(), "reboot this host"),
        (FakeNvml.NVMLError("Unknown Error"), "Unknown Error"),
    ],
)
def test_a_host_without_a_working_driver_has_no_devices_and_says_why(
    meminfo, monkeypatch, error, reason
):
    monkeypatch.setattr(discovery, "_nvml", FakeNvml(nvmlInit=error))
    probe = NvmlProbe(meminfo.parent)
    hardware = probe.hardware()
    assert hardware.devices == []
    assert reason in hardware.cuda_unavailable_reason
    assert [each.index for each in probe.read(()).memory] == [HOST]


def test_a_device_that_tells_no_utilization_is_still_read(meminfo, monkeypatch):
    nvml = FakeNvml(nvmlDeviceGetUtilizationRates=FakeNvml.NVMLError("Not Supported"))
    monkeypatch.setattr(discovery, "_nvml", nvml)
    probe = NvmlProbe(meminfo.parent)
    probe.hardware()
    assert probe.read(()).devices[0].vram_free_mb == 102400


def test_what_a_process_takes_is_read_where_it_is_asked_for_and_told(meminfo, monkeypatch):
    monkeypatch.setattr(discovery, "_nvml", FakeNvml())
    status = meminfo.parent / "7" / "status"
    status.parent.mkdir()
    status.write_text("Name:\tx\nRssAnon:\t2048 kB\nRssFile:\t9999 kB\nRssShmem:\t1024 kB\n")
    probe = NvmlProbe(meminfo.parent)
    probe.hardware()
    assert probe.read({7, 8}).processes == {(HOST, 7): 3 << 20, (0, 7): 3 * GIB}
    assert probe.read(()).processes == {}


def test_what_the_processes_below_one_take_is_counted_with_it(meminfo, monkeypatch):
    monkeypatch.setattr(discovery, "_nvml", FakeNvml())
    # 5 keeps 6, which keeps 7 and 9; 8 is somebody else's.
    for pid, parent in ((5, 1), (6, 5), (7, 6), (9, 6), (8, 1)):
        folder = meminfo.parent / str(pid)
        folder.mkdir()
        (folder / "stat").write_text(f"{pid} (a) b (c)) S {parent} 0 0")
        (folder / "status").write_text("RssAnon:\t1024 kB\n")
    probe = NvmlProbe(meminfo.parent)
    probe.hardware()
    assert probe.read({5}).processes == {(HOST, 5): 4 << 20, (0, 5): 4 * GIB}


def test_a_driver_that_tells_of_no_processes_is_no_fault(meminfo, monkeypatch):
    nvml = FakeNvml(nvmlDeviceGetComputeRunningProcesses=FakeNvml.NVMLError("No Permission"))
    monkeypatch.setattr(discovery, "_nvml", nvml)
    probe = NvmlProbe(meminfo.parent)
    probe.hardware()
    assert probe.read({7}).processes == {}


def test_the_monitor_has_a_reading_once_it_is_started():
    monitor = Monitor(FakeProbe(), read_every_s=60.0)
    monitor.start()
    assert monitor.reading.memory[0].free_bytes == 64 * GIB
    monitor.close()


def test_a_refresh_sees_what_has_changed():
    probe = FakeProbe()
    monitor = Monitor(probe, read_every_s=60.0)
    monitor.start()
    probe.free_gib[HOST] = 1.0
    assert monitor.refresh(10.0).memory[0].free_bytes == GIB
    monitor.close()


def test_the_last_reading_is_kept_when_a_read_fails():
    probe = FakeProbe()
    monitor = Monitor(probe, read_every_s=60.0)
    monitor.start()
    probe.fails = True
    assert monitor.refresh(10.0).memory[0].free_bytes == 64 * GIB
    assert monitor.num_failures == 1
    monitor.close()


def test_a_probe_that_hangs_hangs_nobody_else():
    class Stuck(FakeProbe):
        def __init__(self):
            super().__init__()
            self.hang = threading.Event()
            self.reads = 0

        def read(self, pids):
            self.reads += 1
            if self.reads > 1:
                self.hang.wait(10)
            return super().read(pids)

    probe = Stuck()
    monitor = Monitor(probe, read_every_s=60.0)
    monitor.start()
    assert monitor.refresh(0.01).memory[0].free_bytes == 64 * GIB
    probe.hang.set()
    monitor.close()


def test_discovery_tells_hardware_memory_and_the_operating_system():
    host = DeviceMemory(index=HOST, total_bytes=32 * GIB, free_bytes=GIB)
    found = describe_host(
        Hardware(cuda_version="13.0", driver_version="580"),
        Reading(memory=[host]),
        harnesses=["torch"],
        max_prompt_tokens=4096,
    )
    assert found.memory_total_mb == 32768
    assert (found.cuda_version, found.driver_version) == ("13.0", "580")
    assert (found.harnesses, found.max_prompt_tokens) == (["torch"], 4096)
    assert found.hostname
    assert found.kernel
