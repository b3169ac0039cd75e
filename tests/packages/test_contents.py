"""What is in the packages, without installing them."""

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.packages.conftest import Built

ROOT = Path(__file__).parents[2]
ARCHS = {
    "ampere": ["sm_80", "sm_86"],
    "ada": ["sm_89"],
    "hopper": ["sm_90a"],
    "blackwell": ["sm_100", "sm_120"],
}


def query(package: Path, *arguments: str) -> list[str]:
    done = subprocess.run(
        ["rpm", "-qp", *arguments, str(package)], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_the_gateway_comes_without_the_libraries_of_a_neuron(built: Built):
    files = query(built.package("cortex"), "-l")
    site = re.compile(r"/usr/lib64/cortex/lib/python3\.\d+/site-packages/([^/]+)")
    brought = {found[1] for path in files if (found := site.match(path))}
    assert {"aiohttp", "cortex", "msgspec", "starlette"} <= brought
    assert not {"torch", "numpy", "tokenizers", "huggingface_hub", "safetensors"} & brought
    assert not [path for path in files if path.endswith(("_C.abi3.so", "model.safetensors"))]


def test_no_package_has_torch(built: Built):
    for package in built.first.glob("*.rpm"):
        assert not [path for path in query(package, "-l") if "/site-packages/torch/" in path]


def test_each_flavour_is_the_neuron_and_excludes_the_others(built: Built):
    for flavour in built.flavours:
        package = built.package(f"helexa-neuron-{flavour}")
        (version,) = query(package, "--qf", "%{VERSION}-%{RELEASE}")
        assert f"helexa-neuron = {version}" in query(package, "--provides")
        assert query(package, "--conflicts") == ["helexa-neuron"]
        assert f"helexa-neuron-common = {version}" in query(package, "--requires")


def test_each_flavour_has_machine_code_for_its_own_cards_alone(built: Built, tmp_path: Path):
    cuobjdump = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin/cuobjdump"
    for flavour in built.flavours:
        folder = tmp_path / flavour
        folder.mkdir()
        package = built.package(f"helexa-neuron-{flavour}")
        subprocess.run(f"rpm2cpio {package} | cpio -id --quiet", shell=True, check=True, cwd=folder)
        (library,) = folder.rglob("_C.abi3.so")
        listed = subprocess.run(
            [cuobjdump, "--list-elf", library], capture_output=True, text=True, check=True
        ).stdout
        assert sorted(set(re.findall(r"sm_\w+?(?=\.)", listed))) == sorted(ARCHS[flavour])


def test_every_bundled_library_has_the_text_of_its_licence(built: Built):
    for name in ("cortex", "helexa-neuron-common"):
        package = built.package(name)
        files = query(package, "-l")
        bundled = {
            found[1]
            for line in query(package, "--provides")
            if (found := re.match(r"bundled\(python3dist\((.*)\)\)", line))
        }
        with_text = {
            re.sub(r"[-_.]+", "-", path.split("/")[5]).lower()
            for path in files
            if path.startswith(f"/usr/share/licenses/{name}/") and path.count("/") > 5
        }
        assert bundled == with_text


def test_rpmlint_reports_no_error(built: Built):
    packages = [str(each) for each in built.first.glob("*.rpm") if not each.name.startswith("host")]
    done = subprocess.run(
        ["rpmlint", "--config", str(ROOT / "rpm/rpmlint.toml"), *packages],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not re.findall(r"^.*: E: .*$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r" 0 errors", done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize("page", ["cortex", "cortex-serve", "cortex-config-check"])
def test_commands_have_man_pages(built: Built, page: str):
    assert f"/usr/share/man/man1/{page}.1.gz" in query(built.package("cortex"), "-l")
