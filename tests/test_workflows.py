"""The workflows are sound, and what they call is there."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".gitea/workflows").glob("*.yml"))


def read(name: str) -> dict[str, Any]:
    found = yaml.safe_load((ROOT / ".gitea/workflows" / name).read_text())
    # YAML 1.1 reads the key `on` as true.
    found["on"] = found.pop(True)
    return found


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in read(name)["jobs"].values() for step in job["steps"]]


def commands(name: str) -> str:
    return "\n".join(step["run"] for step in steps(name) if "run" in step)


def test_both_workflows_are_there():
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "release.yml"]


@pytest.mark.parametrize("name", [path.name for path in WORKFLOWS])
def test_every_step_says_what_it_does(name: str):
    for step in steps(name):
        assert ("run" in step) != ("uses" in step), step
        assert "uses" in step or step["name"]


@pytest.mark.parametrize("name", [path.name for path in WORKFLOWS])
def test_every_script_that_a_workflow_calls_can_be_run(name: str):
    called = set(re.findall(r"\./(scripts/[\w-]+)", commands(name)))
    assert called
    for script in called:
        path = ROOT / script
        assert path.stat().st_mode & 0o111, script
    named = set(re.findall(r"(?<!\S)(?:tests|rpm)/[\w./-]+", commands(name)))
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("name", [path.name for path in WORKFLOWS])
def test_the_shell_of_every_step_can_be_parsed(name: str):
    for step in steps(name):
        if "run" in step:
            text = re.sub(r"\$\{\{.*?\}\}", "value", step["run"])
            done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), step


def test_every_push_is_checked_compiled_for_all_cards_and_packaged():
    assert read("ci.yml")["on"]["push"]["branches"] == ["main"]
    assert {"./scripts/test", "./scripts/cuda-check all", "./scripts/test-packages all"} <= {
        line.strip() for line in commands("ci.yml").splitlines()
    }


def test_a_tag_of_a_version_is_packaged_stamped_and_published():
    assert read("release.yml")["on"] == {"push": {"tags": ["v*"]}}
    told = commands("release.yml")
    assert "./scripts/publish-copr" in told
    assert "--source" in told
    assert told.count('--version "$(./scripts/release-version "$GITHUB_REF_NAME")"') == 2


def release_version(tag: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts/release-version", tag], capture_output=True, text=True, check=False
    )


def test_a_tag_stands_for_the_version_of_the_project_or_a_pre_release_of_it():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert release_version(f"v{version[1]}rc2").stdout == f"{version[1]}rc2\n"
    other = release_version("v9.9.9")
    assert other.returncode == 1
    assert "v9.9.9 is not of version" in other.stderr
    assert "is no version" in release_version("latest").stderr


def test_without_an_account_nothing_is_published():
    done = subprocess.run(
        [ROOT / "scripts/publish-copr", "43", "some.src.rpm"],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing is published" in done.stdout
