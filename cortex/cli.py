"""The `cortex` command. Each subcommand imports its half when it runs."""

import asyncio
import logging
import os
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from cortex import cli_host
from cortex.core import logs
from cortex.core.build import version
from cortex.core.config import GATEWAY_PORT, METRICS_PORT, NEURON_PORT
from cortex.core.errors import CortexError

_CONFIG = click.Path(dir_okay=False, path_type=Path)
_PORT = click.IntRange(0, 65535)
_log_level = click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What to log on stderr.",
)


_endpoint = click.option(
    "-e",
    "--endpoint",
    default=f"http://localhost:{GATEWAY_PORT}",
    show_default=True,
    help="Base URL of a gateway.",
)
_key = click.option(
    "--key",
    envvar="CORTEX_API_KEY",
    help="API key, where the gateway asks for one [CORTEX_API_KEY].",
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def _show_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        from cortex.neuron.kernels.build import features

        build = version()
        dirty = "+local" if build.git_dirty else ""
        click.echo(
            f"cortex {build.package_version} ({build.git_sha}{dirty}), torch {build.torch_version}"
        )
        operators = ", ".join(features()) or "no native operators"
        click.echo(f"built {build.build_timestamp}, Python {build.python_version}, {operators}")
        ctx.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Print what this build is and what it was made with, then exit.",
)
def main() -> None:
    """One OpenAI and Anthropic API over the GPUs you own.

    \b
    On one machine, with nothing to configure:
      cortex up                      serve what is at hand and print how to call it
    On a fleet:
      cortex neuron -c neuron.toml   on every GPU host  (port 13131)
      cortex serve  -c cortex.toml   on the gateway     (port 31313, metrics 31314)
      cortex status                  what is loaded where
      cortex plan MODEL              where a request for it would go, and why
    Before a start:
      cortex config check            whether the files in /etc/cortex can be used
      cortex doctor                  what would keep this host from serving, and the remedy
    """


@main.command()
@click.option(
    "-c",
    "--config",
    type=_CONFIG,
    default=Path("cortex.toml"),
    show_default=True,
    help="The gateway's configuration (docs/configuration.md).",
)
@_log_level
def serve(config: Path, log_level: str) -> None:
    """Run the gateway: one API for all the neurons named in the configuration.

    It lists the models of models.toml (beside the configuration, or where `models_config` says)
    and whatever the neurons report. A request for a model that is not loaded loads it first.
    Both files may change while it runs: they are read again then, and at once on SIGHUP.
    Variables such as CORTEX_GATEWAY__LISTEN override single keys.
    """
    from cortex.gateway.reload import read_files
    from cortex.run import run_gateway

    logs.configure(log_level)
    with _errors_as_messages():
        loaded, catalogue = read_files(config)
        _run(run_gateway(loaded, catalogue, config))


@main.command()
@click.option(
    "-c",
    "--config",
    type=_CONFIG,
    help="The neuron's configuration (docs/configuration.md); without it, the defaults.",
)
@click.option("-p", "--port", type=_PORT, help=f"Listen on this port instead of {NEURON_PORT}.")
@_log_level
def neuron(config: Path | None, port: int | None, log_level: str) -> None:
    """Run the daemon of one GPU host: it finds the GPUs, loads models and serves them.

    Without a configuration it offers the bundled model, installed demo models and any
    Hugging Face repository, and loads them when asked to. Variables such as NEURON_PORT or
    NEURON_HARNESS__TORCH__NUM_THREADS override single keys.
    """
    import msgspec

    from cortex.core.config import load_neuron_config
    from cortex.run import run_neuron

    logs.configure(log_level)
    with _errors_as_messages():
        loaded = load_neuron_config(config)
        if port is not None:
            loaded = msgspec.structs.replace(loaded, port=port)
        _run(run_neuron(loaded))


@main.command()
@click.argument("model", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of the gateway.")
@click.option("--port", type=_PORT, default=GATEWAY_PORT, show_default=True, help="Its API port.")
@click.option(
    "--metrics-port", type=_PORT, default=METRICS_PORT, show_default=True, help="Prometheus."
)
@click.option(
    "--neuron-port",
    type=_PORT,
    default=NEURON_PORT,
    show_default=True,
    help="Port of the neuron, on the loopback address.",
)
@click.option(
    "--model-dir",
    "model_dirs",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Also serve each checkpoint directory and .gguf file in here. May be repeated.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="CPU threads of each engine. More helps only on cores that nothing else uses.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="warning",
    show_default=True,
    help="What to log on stderr.",
)
def up(
    model: str | None,
    host: str,
    port: int,
    metrics_port: int,
    neuron_port: int,
    model_dirs: tuple[Path, ...],
    threads: int,
    log_level: str,
) -> None:
    """Run gateway and neuron on this machine and load MODEL.

    MODEL is a checkpoint directory, a .gguf file, or the id of a Hugging Face repository.
    Without it the small bundled model is loaded, and every other model at hand is listed and
    loaded by its first request. Ends on Ctrl-C or SIGTERM.
    """
    from cortex.run import UpOptions, run_up

    logs.configure(log_level)
    with _errors_as_messages():
        options = UpOptions(
            model=model,
            host=host,
            port=port,
            metrics_port=metrics_port,
            neuron_port=neuron_port,
            model_dirs=[str(each) for each in model_dirs],
            num_threads=threads,
        )
        _run(run_up(options))


@main.command()
@_endpoint
@_key
@_as_json
def status(endpoint: str, key: str | None, as_json: bool) -> None:
    """Show the nodes and models of a fleet.

    The exit code is 0 when all is well, 1 when a node or a resident model cannot serve, and 2
    when the gateway cannot be reached.
    """
    from cortex.gateway.status import fetch_status, print_status

    report = asyncio.run(fetch_status(endpoint, key))
    print_status(report, as_json=as_json)
    sys.exit(report.exit_code)


@main.command()
@click.argument("model")
@_endpoint
@_key
@_as_json
def plan(model: str, endpoint: str, key: str | None, as_json: bool) -> None:
    """Show what a request for MODEL would lead to, without doing it.

    The candidates with their costs in seconds, who would have to leave, and why other nodes are
    out of the question. The exit code is 1 when the gateway refuses to answer or would refuse the
    request.
    """
    from cortex.gateway.explain import fetch_plan, print_plan

    with _errors_as_messages():
        report = asyncio.run(fetch_plan(endpoint, model, key))
    print_plan(report, as_json=as_json)
    sys.exit(int(report.action == "refuse"))


@main.command()
@click.argument("request_id")
@_endpoint
@_key
@_as_json
def why(request_id: str, endpoint: str, key: str | None, as_json: bool) -> None:
    """Show why a recent request went where it went.

    REQUEST_ID is in the `x-request-id` header of every answer. A gateway remembers the last few
    hundred requests that it routed itself.
    """
    from cortex.gateway.explain import fetch_why, print_why

    with _errors_as_messages():
        report = asyncio.run(fetch_why(endpoint, request_id, key))
    print_why(report, as_json=as_json)


_endpoints = click.option(
    "-e",
    "--endpoint",
    "endpoints",
    multiple=True,
    default=[f"http://localhost:{GATEWAY_PORT}"],
    show_default=True,
    help="Base URL of a gateway; name each one, since every gateway knows only for itself.",
)


@main.command()
@click.argument("node")
@_endpoints
@_key
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(min=0),
    default=0,
    help="Wait up to so many seconds until the node has no request in hand.",
)
def drain(node: str, endpoints: tuple[str, ...], key: str | None, wait_s: float) -> None:
    """Send no new requests and loads to NODE; what it has in hand ends in peace.

    It lasts until `cortex undrain` or the gateway's end.
    """
    from cortex.gateway.drain import set_drained

    with _errors_as_messages():
        asyncio.run(set_drained(endpoints, key, node, drained=True, wait_s=wait_s, say=click.echo))


@main.command()
@click.argument("node")
@_endpoints
@_key
def undrain(node: str, endpoints: tuple[str, ...], key: str | None) -> None:
    """Use NODE again after `cortex drain`."""
    from cortex.gateway.drain import set_drained

    with _errors_as_messages():
        asyncio.run(set_drained(endpoints, key, node, drained=False, say=click.echo))


@main.command()
@_endpoint
@_key
@_as_json
def usage(endpoint: str, key: str | None, as_json: bool) -> None:
    """Show what a key may still spend, and what it has spent on each model.

    Limits are as all gateways count them that share a server for it; models as this gateway has
    counted since it started.
    """
    from cortex.gateway.spending import fetch_usage, print_usage

    with _errors_as_messages():
        report = asyncio.run(fetch_usage(endpoint, key))
    print_usage(report, as_json=as_json)


main.add_command(cli_host.config)
main.add_command(cli_host.doctor)


@main.group()
def keys() -> None:
    """Make the keys that callers send; the configuration holds only their hashes."""


@keys.command("new")
@click.argument("account")
@click.option("--id", "key_id", help="What the key is called in metrics and budgets.")
def keys_new(account: str, key_id: str | None) -> None:
    """Print a new key for ACCOUNT, and the entry of cortex.toml that lets it in."""
    from cortex.gateway.auth import new_key, toml_entry

    key = new_key()
    click.echo("# The key itself is shown this once; give it to its owner:", err=True)
    click.echo(key, err=True)
    click.echo("# Append this to cortex.toml:", err=True)
    click.echo(toml_entry(key, account, key_id))


@keys.command("hash")
@click.argument("account")
@click.option("--id", "key_id", help="What the key is called in metrics and budgets.")
def keys_hash(account: str, key_id: str | None) -> None:
    """Read a key from stdin and print the entry of cortex.toml that lets it in."""
    from cortex.gateway.auth import MIN_KEY_CHARACTERS, toml_entry

    prompt = "Key: " if sys.stdin.isatty() else ""
    key = click.prompt(prompt, hide_input=True, prompt_suffix="", err=True).strip()
    if len(key) < MIN_KEY_CHARACTERS:
        click.echo(
            f"cortex: the key has {len(key)} characters; under {MIN_KEY_CHARACTERS} it can be "
            "guessed from its hash (`cortex keys new` makes a long one)",
            err=True,
        )
    click.echo(toml_entry(key, account, key_id))


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run a service to its end, then leave without waiting for worker threads.

    One of them may be busy with a prompt that nobody waits for any more.
    """
    asyncio.run(work)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    """End with one line on stderr and exit code 1 where the cause is known."""
    try:
        yield
    except CortexError as exc:
        _fail(exc)
    except BaseExceptionGroup as group:
        known = _first_known(group)
        if known is None:
            raise
        _fail(known)


def _first_known(group: BaseExceptionGroup[BaseException]) -> CortexError | None:
    for exc in group.exceptions:
        if isinstance(exc, CortexError):
            return exc
        if isinstance(exc, BaseExceptionGroup):
            found = _first_known(exc)
            if found is not None:
                return found
    return None


def _fail(exc: CortexError) -> None:
    click.echo(f"cortex: {exc.message}", err=True)
    sys.exit(1)
