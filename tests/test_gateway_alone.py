"""A gateway works where the libraries of a neuron are not installed, as in its package."""

import subprocess
import sys
from pathlib import Path

RPM = Path(__file__).parents[1] / "rpm"
# What the package of the gateway goes without.
LIBRARIES = (
    "gguf",
    "huggingface_hub",
    "jinja2",
    "llguidance",
    "numpy",
    "pynvml",
    "safetensors",
    "tokenizers",
    "torch",
)


def without_libraries(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `cortex` where importing one of them fails."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({LIBRARIES!r}))\n"
        f"from cortex.cli import main; main({list(arguments)!r})"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )


def test_the_gateway_imports_none_of_them():
    code = (
        "import sys, cortex.run, cortex.gateway.reload, cortex.core.check, cortex.gateway.status\n"
        f"print(sorted(set({LIBRARIES!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_files_are_checked_without_them():
    done = without_libraries("config", "check", str(RPM / "cortex.toml"), str(RPM / "neuron.toml"))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 3


def test_a_neuron_says_which_package_it_lacks():
    done = without_libraries("neuron", "--port", "0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "cortex: the libraries of a neuron are not installed here ("
    )
    assert "install one of the helexa-neuron packages" in done.stderr


def test_the_doctor_notes_their_absence_and_fails_only_where_a_neuron_is_wanted():
    files = [str(RPM / "cortex.toml")]
    done = without_libraries("doctor", *files)
    assert "note  libraries: those of a neuron are not installed (" in done.stdout
    assert "fail  libraries" not in done.stdout
    done = without_libraries("doctor", "--neuron", *files)
    assert done.returncode == 1
    assert "fail  libraries: " in done.stdout
    assert "remedy: for a neuron, install one of the helexa-neuron packages" in done.stdout
