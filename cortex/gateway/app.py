"""Put the gateway together: one fleet, one client, one poller, two ASGI apps."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.types import ASGIApp

from cortex.core.catalogue import Catalogue
from cortex.core.config import GatewayConfig
from cortex.core.web import build_app
from cortex.gateway.auth import Gatekeeper
from cortex.gateway.dispatch import Dispatcher
from cortex.gateway.edge import KeyMiddleware, MetricsGuard
from cortex.gateway.fleet import Fleet
from cortex.gateway.handlers import Handlers, metrics_routes
from cortex.gateway.live import Live
from cortex.gateway.loads import Loads
from cortex.gateway.metrics import Metrics
from cortex.gateway.neuron_client import open_client
from cortex.gateway.poller import Poller
from cortex.gateway.proxy import Proxy
from cortex.gateway.rates import RateBook


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayApps:
    """The gateway's two listeners' apps, and what they share."""

    api: ASGIApp
    metrics: ASGIApp
    fleet: Fleet
    loads: Loads


@asynccontextmanager
async def open_apps(
    config: GatewayConfig,
    catalogue: Catalogue,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[GatewayApps]:
    """Run the gateway's background work for as long as the context is open.

    On leaving, polls and loads are cancelled; a neuron goes on with a load it has begun.
    """
    live = Live(config, catalogue)
    settings = config.gateway
    fleet = Fleet((each.name, each.endpoint) for each in config.neurons)
    gatekeeper = Gatekeeper(config.entitlements)
    live.on_change(lambda: gatekeeper.reload(live.config.entitlements))
    failure: Exception | None = None
    rates = RateBook()
    async with open_client(settings.connect_s) as client, asyncio.TaskGroup() as tasks:
        poller = Poller(client, fleet, poll_s=settings.poll_s)
        polling = tasks.create_task(poller.run(), name="poller")
        metrics = Metrics(fleet)
        loads = Loads(
            client,
            fleet,
            metrics,
            live,
            rates=rates,
            poke=poller.poke,
            tasks=tasks,
            clock=clock,
        )
        handlers = Handlers(
            live=live,
            fleet=fleet,
            dispatcher=Dispatcher(
                live=live,
                fleet=fleet,
                loads=loads,
                proxy=Proxy(client, fleet, live),
                client=client,
                metrics=metrics,
                poke=poller.poke,
                clock=clock,
            ),
        )
        try:
            await poller.first_round()
            yield GatewayApps(
                api=KeyMiddleware(build_app(handlers.routes()), gatekeeper),
                metrics=MetricsGuard(build_app(metrics_routes(metrics)), gatekeeper),
                fleet=fleet,
                loads=loads,
            )
        except Exception as exc:  # noqa: BLE001  carried out of the task group unwrapped
            failure = exc
        finally:
            loads.cancel()
            polling.cancel()
    if failure is not None:
        raise failure
