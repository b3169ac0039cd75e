"""What packages are made from: locks, man pages, completions, the command that sets torch up.

The packages themselves are built and installed by scripts/test-packages.
"""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import click
import pytest

from cortex.cli import main as cortex

ROOT = Path(__file__).parents[1]
RPM = ROOT / "rpm"
SETUP = RPM / "helexa_neuron_setup.py"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(path: Path) -> dict[str, str]:
    found = re.findall(r"^([a-zA-Z0-9._-]+)==([^ \n]+)", path.read_text(), re.MULTILINE)
    return {name.lower(): version for name, version in found}


def test_the_locks_have_the_versions_that_the_tests_run_with():
    tested = pins(ROOT / "constraints.txt")
    # The last two are not installed for the tests.
    locked = {**pins(RPM / "libraries.lock"), **pins(RPM / "torch.lock")}
    assert set(locked) - set(tested) == {"async-timeout", "pip"}
    differing = {name for name in set(locked) & set(tested) if locked[name] != tested[name]}
    assert differing == set(), "run scripts/lock --packages"
    assert (RPM / "torch.txt").read_text() == f"torch=={tested['torch']}\n"


def test_every_locked_file_has_a_hash_and_torch_is_in_neither_lock():
    for name in ("libraries.lock", "torch.lock"):
        text = (RPM / name).read_text()
        entries = re.split(r"\n(?=[a-z])", text)
        assert not [entry for entry in entries if "==" in entry and "--hash=sha256:" not in entry]
        assert "\ntorch==" not in text


def test_what_the_project_depends_on_is_locked():
    project = (ROOT / "pyproject.toml").read_text()
    listed = project.partition("\ndependencies = [")[2].partition("]")[0]
    names = set(re.findall(r'"([a-z0-9-]+)[>=]', listed)) - {"torch"}
    assert names <= set(pins(RPM / "libraries.lock")), "run scripts/lock --packages"
    gateway = [line for line in (RPM / "gateway.in").read_text().split("\n") if "#" not in line]
    assert set(filter(None, gateway)) - names == {"async-timeout"}


def test_the_flavours_are_those_that_the_build_knows():
    def table(path: Path, name: str) -> dict:
        (found,) = (
            node.value
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
        )
        return ast.literal_eval(found)

    compiled = table(ROOT / "setup.py", "_FLAVOURS")
    packaged = table(ROOT / "scripts/packages", "FLAVOURS")
    assert {
        name: re.findall(r"sm_(\w+)", archs) for name, (_, archs) in packaged.items()
    } == compiled


def test_every_command_gets_a_man_page_and_every_shell_a_completion(tmp_path: Path):
    subprocess.run(
        [sys.executable, RPM / "manual.py", tmp_path / "man", tmp_path / "completions"],
        check=True,
        cwd=ROOT,
    )
    pages = {path.stem for path in (tmp_path / "man").iterdir()}
    assert {"cortex", *(f"cortex-{name}" for name in cortex.commands)} <= pages
    assert {"cortex-config-check", "cortex-keys-new"} <= pages
    drain = (tmp_path / "man/cortex-drain.1").read_text()
    assert drain.startswith(".TH CORTEX-DRAIN 1 ")
    assert "\\-\\-wait" in drain
    assert "what it has in hand ends in peace" in drain
    assert {path.name for path in (tmp_path / "completions").iterdir()} == {
        "cortex.bash",
        "cortex.fish",
        "cortex.zsh",
    }


@pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed")
def test_man_pages_are_formatted_without_a_warning(tmp_path: Path):
    page = load(RPM / "manual.py").page
    for name, command in cortex.commands.items():
        context = click.Context(
            command, info_name=name, parent=click.Context(cortex, info_name="cortex")
        )
        path = tmp_path / f"{name}.1"
        path.write_text(page(command, context))
        done = subprocess.run(
            ["man", "--warnings", "--local-file", path], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), name


class House:
    """A lock of two small libraries, their wheels, and a root to set them up in."""

    def __init__(self, tmp: Path) -> None:
        self.share, self.root, self.wheels = tmp / "share", tmp / "root", tmp / "wheels"
        self.share.mkdir()
        self.wheels.mkdir()
        self.offer("needed", "1.0", "")
        self.offer("torch", "2.0", _TORCH, requires="needed")
        self.lock()
        (self.share / "torch.txt").write_text("torch==2.0\n")
        self._bring_pip()

    def offer(self, name: str, version: str, text: str, *, requires: str = "") -> None:
        """Put a wheel of one module into the wheelhouse."""
        info = f"{name}-{version}.dist-info"
        needs = f"Requires-Dist: {requires}\n" if requires else ""
        with zipfile.ZipFile(self.wheels / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", text)
            wheel.writestr(
                f"{info}/METADATA",
                f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")

    def lock(self) -> None:
        """Write the lock for what the wheelhouse has."""
        module = load(SETUP)
        sha256 = module._sha256(self.wheels / "needed-1.0-py3-none-any.whl")
        (self.share / "torch.lock").write_text(f"needed==1.0 \\\n    --hash=sha256:{sha256}\n")

    def _bring_pip(self) -> None:
        # The pip of the tests, as the wheel that the package brings it in.
        import pip

        source = Path(pip.__file__).parent
        with zipfile.ZipFile(self.share / "pip-0-py3-none-any.whl", "w") as wheel:
            for path in source.rglob("*"):
                if path.suffix != ".pyc" and path.is_file():
                    wheel.write(path, path.relative_to(source.parent))

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, SETUP, "--share", self.share, "--root", self.root, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )


_TORCH = """
class cuda_version: pass
class version: cuda = None
__version__ = "2.0"
def zeros(count):
    return __import__("numpy_of_torch") if count < 0 else _Zeros()
class _Zeros:
    def sum(self):
        import needed
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"))


def test_torch_is_set_up_from_a_wheelhouse_and_replaced_only_by_one_that_works(house: House):
    done = house.run("--check")
    assert done.returncode == 1
    assert "nothing is installed in" in done.stderr
    done = house.run("--wheelhouse", house.wheels)
    assert done.returncode == 0, done.stderr
    assert "torch 2.0 (CPUs alone) is in " in done.stdout
    env = house.root / "env"
    assert (env / "installed.txt").read_text().split() == ["needed==1.0", "torch==2.0"]
    assert house.run("--check").stdout == "torch 2.0 works\n"

    before = env.resolve()
    house.offer("torch", "2.1", "import nothing_of_this_name", requires="needed")
    (house.share / "torch.txt").write_text("torch==2.1\n")
    assert "by another lock" in house.run("--check").stderr
    done = house.run("--wheelhouse", house.wheels)
    assert done.returncode == 1
    assert "does not work, so it is not used: ModuleNotFoundError" in done.stderr
    assert env.resolve() == before
    assert [path.name for path in house.root.glob("env-*")] == [before.name]


def test_what_differs_from_the_lock_or_the_sums_is_refused(house: House):
    (house.share / "torch.txt").write_text("torch==2.0\n")
    house.offer("needed", "1.0", "changed = True")
    done = house.run("--wheelhouse", house.wheels)
    assert done.returncode == 1
    assert "pip failed, see above; what was in use before still is" in done.stderr
    house.lock()
    (house.wheels / "SHA256SUMS").write_text(f"{'0' * 64}  needed-1.0-py3-none-any.whl\n")
    done = house.run("--wheelhouse", house.wheels)
    assert done.returncode == 1
    assert "needed-1.0-py3-none-any.whl is missing or damaged" in done.stderr
    (house.wheels / "SHA256SUMS").unlink()
    assert "is no folder" in house.run("--wheelhouse", house.wheels / "none").stderr
