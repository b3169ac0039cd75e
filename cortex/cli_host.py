"""The `cortex` commands that look at this host and start nothing: config check, doctor."""

import sys
from pathlib import Path

import click
import msgspec

_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group()
def config() -> None:
    """Look at configuration files without starting anything."""


@config.command("check")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@_as_json
def config_check(files: tuple[Path, ...], as_json: bool) -> None:
    """Say of each FILE whether the services could start with it, and if not, why.

    Without FILE, cortex.toml, models.toml and neuron.toml in /etc/cortex are checked, as far as
    they are there. Which of the three a file is its name tells, else its keys. Variables such as
    CORTEX_GATEWAY__LISTEN override keys here, too. The exit code is 0 when all can be used and 1
    when one cannot.
    """
    from cortex.core.check import CONFIG_DIR, check_files, default_files

    paths = list(files) or default_files()
    if not paths:
        click.echo(f"cortex: there is no configuration in {CONFIG_DIR}; name a file", err=True)
        sys.exit(1)
    verdicts = check_files(paths)
    ok = all(verdict.ok for verdict in verdicts)
    if as_json:
        click.echo(msgspec.json.encode({"ok": ok, "files": verdicts}))
    for verdict in () if as_json else verdicts:
        outcome = f"ok, {verdict.summary}" if verdict.ok else f"cannot be used: {verdict.error}"
        click.echo(f"{verdict.file}: {outcome}")
        for warning in verdict.warnings:
            click.echo(f"  warning: {warning}")
    sys.exit(0 if ok else 1)


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--gateway", is_flag=True, help="Only what a gateway needs.")
@click.option(
    "--neuron", is_flag=True, help="Only what a neuron needs; what it lacks is a failure."
)
@_as_json
def doctor(files: tuple[Path, ...], gateway: bool, neuron: bool, as_json: bool) -> None:
    """Look at this host for what would keep a gateway or a neuron from serving.

    Build, configuration FILEs (those in /etc/cortex by default), ports, driver, torch, native
    operators, disk space, sockets and the hub. Each finding that is not well has its remedy.
    Without --gateway or --neuron both are looked at, and a missing torch is only a note. Run it
    as the user of the service. The exit code is 1 when something fails, else 0.
    """
    from cortex.core.check import default_files
    from cortex.doctor.report import examine

    report = examine(
        list(files) or default_files(),
        is_gateway=gateway or not neuron,
        is_neuron=neuron or not gateway,
        is_neuron_sure=neuron,
    )
    if as_json:
        click.echo(msgspec.json.encode(report))
    for finding in () if as_json else report.findings:
        click.echo(f"{finding.level:<5} {finding.check}: {finding.message}")
        if finding.remedy is not None:
            click.echo(f"      remedy: {finding.remedy}")
    sys.exit(0 if report.ok else 1)
