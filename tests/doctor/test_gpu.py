import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from cortex.core.neuron_api import Device
from cortex.doctor.gpu import (
    count_cards,
    judge_driver,
    judge_operators,
    judge_torch,
    look_for_torch,
)
from cortex.doctor.torch_probe import TorchDevice, TorchReport
from cortex.neuron.devices import Hardware
from cortex.neuron.kernels.build import KernelBuild

NO_GPU = Hardware(cuda_unavailable_reason="no NVIDIA driver is installed")
H100 = Hardware(
    devices=[Device(index=0, name="NVIDIA H100", vram_total_mb=81920, compute_capability="9.0")],
    cuda_version="12.8",
    driver_version="570.1",
)
SEEN = TorchDevice(index=0, name="NVIDIA H100", is_native=True)
CUDA_TORCH = TorchReport(
    version="2.11.0", cuda_version="12.8", devices=[SEEN], is_native_loaded=True
)
CPU_TORCH = TorchReport(version="2.11.0+cpu", is_native_loaded=True)
BUILD = KernelBuild(
    cuda_archs=("90a",), cuda_version="12.8", torch_version="2.11.0", compiler="g++", flags=()
)


def test_a_driver_with_its_cards_is_told():
    (found,) = judge_driver(H100, 1)
    assert (found.level, found.remedy) == ("ok", None)
    assert found.message == "570.1, CUDA 12.8; 0: NVIDIA H100, 80 GiB, compute capability 9.0"


def test_no_driver_is_a_note_without_a_card_and_a_failure_with_one():
    (found,) = judge_driver(NO_GPU, 0)
    assert (found.level, found.remedy) == ("note", None)
    (found,) = judge_driver(NO_GPU, 2)
    assert found.level == "fail"
    assert found.message.startswith("2 NVIDIA GPUs are plugged in and none can be used: no NVIDIA")
    assert found.remedy is not None


def test_cards_are_counted_without_a_driver(tmp_path: Path):
    for name, vendor, kind in (
        ("gpu", "0x10de", "0x030200"),
        ("its-sound", "0x10de", "0x040300"),
        ("other", "0x1002", "0x030000"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    (tmp_path / "gone").mkdir()
    assert count_cards(tmp_path) == 1


@pytest.mark.parametrize(("is_needed", "level"), [(True, "fail"), (False, "note")])
def test_a_missing_torch_fails_a_neuron_and_not_a_gateway(is_needed: bool, level: str):
    (found,) = judge_torch(None, NO_GPU, is_needed=is_needed)
    assert found.level == level
    assert judge_operators(BUILD, None) == []


@pytest.mark.parametrize(
    ("torch", "hardware", "level", "remedy"),
    [
        (CPU_TORCH, NO_GPU, "ok", None),
        (CUDA_TORCH, H100, "ok", None),
        (CPU_TORCH, H100, "fail", "install a CUDA build of torch"),
        (
            msgspec.structs.replace(CUDA_TORCH, cuda_version="13.0"),
            H100,
            "fail",
            "the driver offers CUDA 12.8 only",
        ),
        (
            msgspec.structs.replace(CUDA_TORCH, devices=[], cuda_error="no permission"),
            H100,
            "fail",
            "see that this user may open /dev/nvidia*",
        ),
        ("ImportError: libcudart.so.12", H100, "fail", "install torch again"),
    ],
)
def test_torch_must_fit_the_driver_and_see_the_cards(
    torch: TorchReport | str, hardware: Hardware, level: str, remedy: str | None
):
    (found,) = judge_torch(torch, hardware, is_needed=True)
    assert found.level == level
    assert (found.remedy or "").startswith(remedy or "")
    assert (found.remedy is None) == (remedy is None)


@pytest.mark.parametrize(
    ("build", "torch", "level", "words"),
    [
        (BUILD, CUDA_TORCH, "ok", "built for sm_90a with CUDA 12.8, against torch 2.11.0"),
        (None, CUDA_TORCH, "warn", "not built"),
        (
            BUILD,
            msgspec.structs.replace(
                CUDA_TORCH, devices=[msgspec.structs.replace(SEEN, is_native=False)]
            ),
            "warn",
            "several times slower, serves GPU 0 (NVIDIA H100)",
        ),
        (
            BUILD,
            msgspec.structs.replace(CUDA_TORCH, is_native_loaded=False),
            "warn",
            "they do not load into torch 2.11.0",
        ),
    ],
)
def test_operators_that_do_not_serve_a_card_are_a_warning(
    build: KernelBuild | None, torch: TorchReport, level: str, words: str
):
    (found,) = judge_operators(build, torch)
    assert found.level == level
    assert words in found.message
    assert (found.remedy is None) == (level == "ok")


def test_the_report_of_another_process_is_taken_over():
    report = msgspec.json.encode(CUDA_TORCH).decode()
    assert look_for_torch(command=["echo", report]) == CUDA_TORCH


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([sys.executable, "-c", "raise ImportError('libcudart.so.12')"], "libcudart.so.12"),
        (["sleep", "60"], "took more than 0.3 s"),
        (["echo", "no report"], "its report cannot be read"),
        (["/nonexistent"], "No such file"),
        ([sys.executable, "-c", "import os; os._exit(9)"], "it ended with 9"),
    ],
)
def test_a_torch_that_breaks_is_told_in_a_line(command: list[str], words: str):
    found = look_for_torch(command=command, limit_s=0.3 if "sleep" in command else 60)
    assert isinstance(found, str)
    assert words in found


def test_the_doctor_itself_does_not_import_torch():
    code = "import cortex.doctor.neuron, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
