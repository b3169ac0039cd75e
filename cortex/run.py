"""Run a gateway, a neuron, or both in this process, until a signal."""

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import msgspec
from starlette.types import ASGIApp

from cortex.core.catalogue import Catalogue
from cortex.core.config import (
    DefaultModel,
    GatewayConfig,
    GatewayListen,
    Harnesses,
    NeuronAddress,
    NeuronConfig,
    TorchHarness,
    parse_address,
    service_environment,
    user_cache_dir,
)
from cortex.core.errors import CortexError, StartupError
from cortex.core.notify import Notifier
from cortex.core.serve import Listener, bind, serve, shutdown_on_signals, told
from cortex.gateway.app import GatewayApps, open_apps
from cortex.guide import guide

OnReady = Callable[[str, str], Awaitable[None]]

BUNDLED_MODEL = "cortex-tiny"
# What ending takes beyond the drains: connections, engine processes.
EXIT_S = 30.0


class UpOptions(msgspec.Struct, kw_only=True, frozen=True):
    """What `cortex up` was asked for."""

    model: str | None
    host: str
    port: int
    metrics_port: int
    neuron_port: int
    model_dirs: list[str]
    num_threads: int


async def run_up(options: UpOptions) -> None:
    """Serve what is at hand on this machine until a signal, and print how to call it.

    Raises:
        ConfigError, StartupError: it cannot start.
        LoadFailedError: the model asked for cannot be loaded.
    """
    gateway = GatewayConfig(
        gateway=GatewayListen(
            listen=f"{options.host}:{options.port}",
            metrics_listen=f"{options.host}:{options.metrics_port}",
        )
    )
    named, models = _named_model(options.model)
    torch = TorchHarness(
        model_dirs=options.model_dirs, models=models, num_threads=options.num_threads
    )
    neuron = NeuronConfig(
        host="127.0.0.1",
        port=options.neuron_port,
        state_dir=str(user_cache_dir()),
        default_models=[DefaultModel(model_id=named)],
        harness=Harnesses(torch=torch),
    )
    await run_both(gateway, neuron, partial(guide, named))


def _named_model(model: str | None) -> tuple[str, dict[str, str]]:
    """Return the id of the model to load and, for a path, where it lies."""
    if model is None:
        return BUNDLED_MODEL, {}
    path = Path(model).expanduser()
    if path.exists():
        return path.name.removesuffix(".gguf"), {
            path.name.removesuffix(".gguf"): str(path.resolve())
        }
    if model.startswith((".", "/", "~")):
        raise StartupError(f"{model}: no such file or directory")
    return model, {}


def _open_neuron(config: NeuronConfig) -> AbstractAsyncContextManager[ASGIApp]:
    """Return the neuron's app, imported here: a gateway goes without the libraries of one.

    Raises:
        StartupError: they are not installed.
    """
    try:
        from cortex.neuron.app import open_app
    except ModuleNotFoundError as exc:
        raise StartupError(
            f"the libraries of a neuron are not installed here ({exc.name} is missing); install "
            "one of the helexa-neuron packages, or cortex with all that it depends on"
        ) from exc
    return open_app(config)


async def run_gateway(config: GatewayConfig, catalogue: Catalogue, source: Path) -> None:
    """Serve the gateway until SIGTERM or SIGINT; SIGHUP has the configuration read again.

    Args:
        source: the file that `config` was read from.

    Raises:
        ConfigError, StartupError: it cannot start.
    """
    limit_s = gateway_exit_s(config)
    shutdown = shutdown_on_signals(limit_s)
    # One that comes before there is anything to reload must not end the process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    api, metrics = _bind_gateway(config)
    notifier = Notifier(service_environment())
    async with (
        told(notifier, shutdown, limit_s),
        open_apps(config, catalogue, source=source, notifier=notifier) as apps,
    ):
        reloader = apps.reloader
        assert reloader is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloader.request)
        await serve(
            _gateway_listeners(apps, api, metrics),
            shutdown=shutdown,
            drain_s=config.gateway.drain_s,
            on_bound=lambda _: notifier.ready(reloader.summary()),
        )


async def run_neuron(config: NeuronConfig) -> None:
    """Serve a neuron until SIGTERM or SIGINT.

    Raises:
        ConfigError, StartupError: it cannot start.
    """
    limit_s = neuron_exit_s(config)
    shutdown = shutdown_on_signals(limit_s)
    bound = bind(config.host, config.port, "neuron")
    notifier = Notifier(service_environment())
    async with told(notifier, shutdown, limit_s), _open_neuron(config) as app:
        listener = Listener(app=app, name="neuron", bound=bound, tls=config)
        await serve(
            [listener],
            shutdown=shutdown,
            drain_s=config.harness.torch.drain_s,
            on_bound=lambda ports: notifier.ready(f"serving on port {ports[0]}"),
        )


async def run_both(gateway: GatewayConfig, neuron: NeuronConfig, on_ready: OnReady) -> None:
    """Serve a gateway over one neuron, both in this process, until SIGTERM or SIGINT.

    Args:
        on_ready: awaited beside the servers, with the base URLs of gateway and neuron, once both
            accept connections; a CortexError it raises ends them.

    Raises:
        ConfigError, StartupError: one of them cannot start.
    """
    shutdown = shutdown_on_signals(gateway.gateway.drain_s + neuron_exit_s(neuron))
    api, metrics = _bind_gateway(gateway)
    inner = bind(neuron.host, neuron.port, "neuron")
    gateway_url, neuron_url = _url(api), _url(inner)
    address = NeuronAddress(name=socket.gethostname(), endpoint=neuron_url)
    config = msgspec.structs.replace(gateway, neurons=[address])
    accepting = asyncio.Event()
    failure: CortexError | None = None

    async def greet() -> None:
        nonlocal failure
        await accepting.wait()
        try:
            await on_ready(gateway_url, neuron_url)
        except CortexError as exc:
            # The servers end the orderly way, then the error is told; one that comes while they
            # end already tells nothing.
            if not shutdown.is_set():
                failure = exc
                shutdown.set()

    async with _open_neuron(neuron) as neuron_app, asyncio.TaskGroup() as tasks:
        # The neuron serves first, so that the gateway's first look at it succeeds.
        listener = Listener(app=neuron_app, name="neuron", bound=inner)
        tasks.create_task(
            serve([listener], shutdown=shutdown, drain_s=config.gateway.drain_s), name="neuron"
        )
        guiding = tasks.create_task(greet(), name="up guide")
        async with open_apps(config, Catalogue()) as apps:
            await serve(
                _gateway_listeners(apps, api, metrics),
                shutdown=shutdown,
                drain_s=config.gateway.drain_s,
                on_bound=lambda _: accepting.set(),
            )
        guiding.cancel()
    if failure is not None:
        raise failure


def gateway_exit_s(config: GatewayConfig) -> float:
    """Return the longest orderly end: requests drain, then connections end."""
    return config.gateway.drain_s + EXIT_S


def neuron_exit_s(config: NeuronConfig) -> float:
    """Return the longest orderly end: requests drain, then each model, then its process ends."""
    external = config.harness.command.models.values()
    stop_s = max((each.stop_timeout_s for each in external), default=0.0)
    return 2 * config.harness.torch.drain_s + stop_s + EXIT_S


def _bind_gateway(config: GatewayConfig) -> tuple[socket.socket, socket.socket]:
    host, port = parse_address(config.gateway.listen, "gateway.listen")
    metrics_host, metrics_port = parse_address(
        config.gateway.metrics_listen, "gateway.metrics_listen"
    )
    api = bind(host, port, "gateway")
    try:
        return api, bind(metrics_host, metrics_port, "gateway metrics")
    except BaseException:
        api.close()
        raise


def _gateway_listeners(
    apps: GatewayApps, api: socket.socket, metrics: socket.socket
) -> list[Listener]:
    return [
        Listener(app=apps.api, name="gateway", bound=api),
        Listener(app=apps.metrics, name="gateway metrics", bound=metrics),
    ]


def _url(bound: socket.socket) -> str:
    """Return how this machine reaches a listening socket."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104  a comparison, not a bind
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
