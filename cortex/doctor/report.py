"""Put the checks of a host together."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from cortex.core.build import version
from cortex.core.check import CONFIG_DIR, Kind, Verdict, check_files
from cortex.core.config import (
    GatewayConfig,
    NeuronConfig,
    load_gateway_config,
    load_neuron_config,
    parse_address,
    user_cache_dir,
)
from cortex.core.errors import ConfigError
from cortex.doctor.findings import Check, Finding, run_checks
from cortex.doctor.gpu import (
    TORCH_S,
    count_cards,
    judge_driver,
    judge_operators,
    judge_torch,
    look_for_torch,
)
from cortex.doctor.host import check_cache, check_hub, check_sockets, check_state_dir
from cortex.doctor.ports import check_port
from cortex.neuron.discovery import NvmlProbe
from cortex.neuron.kernels.build import describe_build

# A file system, a name server or the driver may not answer at all.
LIMIT_S = 15.0
_DISK = "a file system does not answer: see `df`, and mounts of network file systems"
_DRIVER = "the NVIDIA driver does not answer: see `dmesg`, and reboot this host"


class Report(msgspec.Struct, kw_only=True, frozen=True):
    """All findings; `ok` when none of them is a failure."""

    ok: bool
    findings: list[Finding]


def examine(
    files: Sequence[Path], *, is_gateway: bool, is_neuron: bool, is_neuron_sure: bool
) -> Report:
    """Look at this host.

    Args:
        files: configuration files; where one is not among them, the defaults count.
        is_neuron_sure: whether what a neuron lacks is a failure, or only told.
    """
    verdicts = check_files(files)
    findings = [_about_build(), *_about_files(verdicts)]
    checks: list[Check] = []
    try:
        if is_gateway:
            checks += _gateway_checks(load_gateway_config(_usable(verdicts, "gateway")))
        if is_neuron:
            neuron = load_neuron_config(_usable(verdicts, "neuron"))
            checks += _neuron_checks(neuron, is_sure=is_neuron_sure)
    except ConfigError as exc:
        findings.append(
            Finding(
                check="config",
                level="fail",
                message=exc.message,
                remedy="correct the variable in the environment",
            )
        )
    findings += run_checks(checks)
    return Report(ok=all(each.level != "fail" for each in findings), findings=findings)


def _about_build() -> Finding:
    build = version()
    message = f"cortex {build.package_version} ({build.git_sha}), Python {build.python_version}"
    return Finding(check="build", level="ok", message=message)


def _about_files(verdicts: Sequence[Verdict]) -> list[Finding]:
    if not verdicts:
        message = f"no files in {CONFIG_DIR}: the defaults are looked at"
        return [Finding(check="config", level="note", message=message)]
    findings = []
    for verdict in verdicts:
        if verdict.ok:
            message = f"{verdict.file}: {verdict.summary}"
            findings.append(Finding(check="config", level="ok", message=message))
        else:
            findings.append(
                Finding(
                    check="config",
                    level="fail",
                    message=f"{verdict.file}: {verdict.error}",
                    remedy=f"correct it and try `cortex config check {verdict.file}`",
                )
            )
        findings += [
            Finding(
                check="config",
                level="warn",
                message=f"{verdict.file}: {warning}",
                remedy="correct it, or leave it if it is meant",
            )
            for warning in verdict.warnings
        ]
    return findings


def _usable(verdicts: Sequence[Verdict], kind: Kind) -> Path | None:
    """Return the first file of a kind that can be used."""
    found = (Path(each.file) for each in verdicts if each.ok and each.kind == kind)
    return next(found, None)


def _gateway_checks(config: GatewayConfig) -> list[Check]:
    addresses = {
        "gateway": config.gateway.listen,
        "gateway metrics": config.gateway.metrics_listen,
    }
    commands = frozenset(["serve", "up"])
    return [
        _port_check(name, *parse_address(address, name), commands)
        for name, address in addresses.items()
    ]


def _neuron_checks(config: NeuronConfig, *, is_sure: bool) -> list[Check]:
    torch = config.harness.torch
    state = Path(config.state_dir or user_cache_dir())
    needs_torch = is_sure and "torch" in config.kinds
    return [
        _port_check("neuron", config.host, config.port, frozenset(["neuron", "up"])),
        Check(
            name="driver",
            look=lambda: judge_driver(NvmlProbe().hardware(), count_cards()),
            limit_s=LIMIT_S,
            if_it_hangs=_DRIVER,
        ),
        Check(
            name="torch",
            look=partial(_look_at_torch, is_needed=needs_torch),
            # The probe ends by itself before that.
            limit_s=TORCH_S + LIMIT_S,
            if_it_hangs=_DRIVER,
        ),
        Check(
            name="state",
            look=lambda: [check_state_dir(state)],
            limit_s=LIMIT_S,
            if_it_hangs=_DISK,
        ),
        Check(name="cache", look=lambda: check_cache(torch), limit_s=LIMIT_S, if_it_hangs=_DISK),
        Check(
            name="sockets",
            look=lambda: [check_sockets()],
            limit_s=LIMIT_S,
            if_it_hangs=_DISK,
        ),
        Check(
            name="hub",
            look=lambda: [check_hub(torch)],
            limit_s=LIMIT_S,
            if_it_hangs="see /etc/resolv.conf, or set HF_HUB_OFFLINE=1",
        ),
    ]


def _port_check(name: str, host: str, port: int, commands: frozenset[str]) -> Check:
    return Check(
        name="port",
        look=lambda: [check_port(name, host, port, commands)],
        limit_s=LIMIT_S,
        if_it_hangs=f"the name {host} cannot be looked up: write an address",
    )


def _look_at_torch(*, is_needed: bool) -> list[Finding]:
    hardware = NvmlProbe().hardware()
    torch = look_for_torch()
    return [
        *judge_torch(torch, hardware, is_needed=is_needed),
        *judge_operators(describe_build(), torch),
    ]
