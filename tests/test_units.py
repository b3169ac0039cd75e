"""The systemd units, users and firewall services in rpm/ fit the program."""

import re
import shlex
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from cortex import cli
from cortex.core.config import (
    GATEWAY_PORT,
    METRICS_PORT,
    NEURON_PORT,
    load_gateway_config,
    load_neuron_config,
)
from cortex.run import gateway_exit_s, neuron_exit_s

RPM = Path(__file__).parents[1] / "rpm"
SYSTEMD = Path("/usr/lib/systemd")
SERVICES = ["cortex", "neuron"]

needs_systemd_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def unit(name: str) -> dict[str, list[str]]:
    """The values of each key, in order; a key may stand more than once."""
    found: dict[str, list[str]] = {}
    for line in (RPM / f"{name}.service").read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def one(name: str, key: str) -> str:
    (value,) = unit(name)[key]
    return value


@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_waits_for_readiness_and_starts_again_a_few_times(name: str):
    assert one(name, "Type") == "notify"
    assert one(name, "Restart") == "on-failure"
    assert int(one(name, "WatchdogSec")) >= 30
    # As many starts as the burst allows must fit into the interval, or the limit never acts.
    rounds_s = int(one(name, "RestartSec")) * int(one(name, "StartLimitBurst"))
    assert rounds_s < int(one(name, "StartLimitIntervalSec")) / 2
    assert one(name, "KillMode") == "mixed"


@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_starts_a_command_that_exists_with_options_that_exist(name: str):
    program, command, *arguments = shlex.split(one(name, "ExecStart"))
    assert program == "/usr/bin/cortex"
    # Unknown options are errors here; the file need not be there.
    context = cli.main.commands[command].make_context(command, arguments)
    assert context.params["config"] == Path(f"/etc/cortex/{name}.toml")


def test_the_gateway_is_reloaded_by_the_signal_it_listens_for_and_the_neuron_not_at_all():
    assert one("cortex", "ExecReload") == "/bin/kill -HUP $MAINPID"
    assert "ExecReload" not in unit("neuron")


def test_the_drain_of_the_sample_configurations_ends_before_systemd_kills():
    gateway = load_gateway_config(RPM / "cortex.toml")
    assert gateway_exit_s(gateway) == 50
    assert int(one("cortex", "TimeoutStopSec")) > 50
    neuron = load_neuron_config(RPM / "neuron.toml")
    external = load_neuron_config(RPM / "neuron-external.toml")
    assert (neuron_exit_s(neuron), neuron_exit_s(external)) == (90, 105)
    assert int(one("neuron", "TimeoutStopSec")) > 105


def test_the_neuron_may_open_its_gpus_compile_and_lose_an_engine():
    neuron = unit("neuron")
    assert neuron["DeviceAllow"] == ["char-nvidia* rw", "char-drm rw"]
    assert neuron["DevicePolicy"] == ["closed"]
    assert not {"PrivateDevices", "PrivateUsers", "MemoryDenyWriteExecute"} & set(neuron)
    assert neuron["OOMPolicy"] == ["continue"]
    assert neuron["RuntimeDirectory"] == ["neuron"]
    assert neuron["CacheDirectory"] == ["neuron"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_gives_up_what_the_service_does_not_need(name: str):
    found = unit(name)
    assert found["CapabilityBoundingSet"] == [""]
    assert found["ProtectSystem"] == ["strict"]
    assert found["SystemCallFilter"][0] == "@system-service"
    assert found["StateDirectory"] == [name]
    for key in ("NoNewPrivileges", "PrivateTmp", "ProtectHome", "RestrictNamespaces"):
        assert found[key] == ["yes"], key


@pytest.mark.parametrize("name", SERVICES)
def test_the_user_of_a_unit_is_made(name: str):
    lines = (RPM / f"{name}.sysusers").read_text().splitlines()
    users = [shlex.split(line) for line in lines if line.startswith("u ")]
    assert users == [["u", name, "-", f"Cortex {_role(name)}", f"/var/lib/{name}", "/sbin/nologin"]]
    assert one(name, "User") == name
    groups = [line.split()[2] for line in lines if line.startswith("m ")]
    assert groups == unit(name).get("SupplementaryGroups", [""])[0].split()


def _role(name: str) -> str:
    return "gateway" if name == "cortex" else name


@pytest.mark.parametrize(
    ("file", "ports"),
    [("cortex.xml", [GATEWAY_PORT, METRICS_PORT]), ("helexa-neuron.xml", [NEURON_PORT])],
)
def test_the_firewall_services_open_the_ports_that_are_listened_on(file: str, ports: list[int]):
    service = ET.parse(RPM / file).getroot()
    found = [(port.get("protocol"), int(port.get("port", ""))) for port in service.iter("port")]
    assert found == [("tcp", port) for port in ports]
    assert service.findtext("short")


@needs_systemd_analyze
@pytest.mark.parametrize(("name", "limit"), [("cortex", 2.0), ("neuron", 2.0)])
def test_systemd_rates_the_exposure_of_a_unit_low(name: str, limit: float):
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", RPM / f"{name}.service"],
        capture_output=True,
        text=True,
        check=True,
    )
    rate = re.search(r"Overall exposure level for .*: ([\d.]+)", done.stdout)
    assert rate is not None
    assert float(rate[1]) < limit


@needs_systemd_analyze
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path):
    for program in ("usr/bin/cortex", "bin/kill", "usr/bin/nvidia-modprobe", "usr/bin/nvidia-smi"):
        path = tmp_path / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    shutil.copytree(
        SYSTEMD / "system", tmp_path / SYSTEMD.relative_to("/") / "system", symlinks=True
    )
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    names = [path.name for path in RPM.glob("*.service")]
    for name in names:
        shutil.copy(RPM / name, units)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={tmp_path}", *names],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
