"""The native sources as text, and the script that has nvcc look at them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for path in sorted((ROOT / "csrc").rglob("*"))
    if path.suffix in {".h", ".cpp", ".cu", ".cuh"}
]
CLEAN = """\
ptxas info    : Compiling entry function '_ZN3gdn11some_kernelIfLi4EEEv7GdnRulei' for 'sm_80'
ptxas info    : Function properties for _ZN3gdn11some_kernelIfLi4EEEv7GdnRulei
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 0 barriers, 184 bytes cmem[0]
"""


def check(tmp_path: Path, nvcc_says: str | None, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run scripts/cuda-check for one architecture with an nvcc that only says something."""
    tools = tmp_path / "bin"
    tools.mkdir()
    if nvcc_says is not None:
        (tools / "said").write_text(nvcc_says)
        (tools / "nvcc").write_text(f"#!/bin/sh\ncat {tools}/said\nexit {code}\n")
        (tools / "nvcc").chmod(0o755)
    cat = shutil.which("cat")
    assert cat is not None
    (tools / "cat").symlink_to(cat)
    (tools / "sh").symlink_to("/bin/sh")
    environment = {key: os.environ[key] for key in os.environ.keys() - {"CUDA_HOME"}}
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "cuda-check", "--verbose", "80"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**environment, "PATH": str(tools)},
    )


def test_kernels_that_keep_to_their_registers_pass(tmp_path):
    done = check(tmp_path, CLEAN)
    assert done.returncode == 0
    assert "96 registers  some_kernel IfLi4E" in done.stdout


def test_a_spill_fails_and_is_named(tmp_path):
    done = check(tmp_path, CLEAN.replace("0 bytes spill loads", "24 bytes spill loads"))
    assert done.returncode == 1
    assert "some_kernel IfLi4EE spills 24 bytes" in done.stderr


def test_an_array_in_local_memory_fails(tmp_path):
    done = check(tmp_path, CLEAN.replace("0 bytes stack frame", "64 bytes stack frame"))
    assert done.returncode == 1
    assert "64 bytes of local memory" in done.stderr


def test_a_wait_that_ptxas_puts_between_products_fails(tmp_path):
    said = "ptxas info    : (C7517) warpgroup.wait is injected in around line 7 by compiler"
    done = check(tmp_path, f"{said}\n{CLEAN}")
    assert done.returncode == 1
    assert "(C7517) warpgroup.wait is injected" in done.stderr


def test_a_source_that_does_not_compile_fails_with_what_nvcc_said(tmp_path):
    done = check(tmp_path, "gdn.cu(1): error: expected a declaration", code=2)
    assert done.returncode == 1
    assert "expected a declaration" in done.stderr


def test_without_nvcc_it_says_so_and_succeeds(tmp_path):
    done = check(tmp_path, None)
    assert done.returncode == 0
    assert "nvcc is not here" in done.stdout


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_native_sources_are_formatted(source: Path):
    done = subprocess.run(
        [Path(sys.executable).with_name("clang-format"), "--dry-run", "-Werror", source],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
