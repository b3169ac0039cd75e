"""Put the checks of a host together."""

from collections.abc import Sequence
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
)
from cortex.core.errors import ConfigError
from cortex.doctor.findings import Check, Finding, run_checks
from cortex.doctor.ports import port_check


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
            of_neuron = _neuron_checks(neuron, is_sure=is_neuron_sure)
            if isinstance(of_neuron, Finding):
                findings.append(of_neuron)
            else:
                checks += of_neuron
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
        port_check(name, *parse_address(address, name), commands)
        for name, address in addresses.items()
    ]


def _neuron_checks(config: NeuronConfig, *, is_sure: bool) -> list[Check] | Finding:
    """Return the checks of a neuron, or what is to be said where its libraries are missing."""
    try:
        from cortex.doctor.neuron import neuron_checks
    except ModuleNotFoundError as exc:
        return Finding(
            check="libraries",
            level="fail" if is_sure else "note",
            message=f"those of a neuron are not installed ({exc.name} is missing): this host can "
            "run a gateway only",
            remedy="for a neuron, install one of the helexa-neuron packages",
        )
    return neuron_checks(config, is_sure=is_sure)
