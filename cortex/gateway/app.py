"""Put the gateway together: one fleet, one client, one watch over the nodes, two ASGI apps."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from starlette.types import ASGIApp

from cortex.core.catalogue import Catalogue
from cortex.core.config import GatewayConfig
from cortex.core.notify import Notifier
from cortex.core.web import build_app
from cortex.gateway.auth import Gatekeeper
from cortex.gateway.decisions import Decisions
from cortex.gateway.defrag import Defragmenter
from cortex.gateway.dispatch import Dispatcher
from cortex.gateway.edge import KeyMiddleware, MetricsGuard
from cortex.gateway.fleet import Fleet
from cortex.gateway.handlers import Handlers, metrics_routes
from cortex.gateway.intake import Intake
from cortex.gateway.keeping import Keeper
from cortex.gateway.limiter import Limiter
from cortex.gateway.live import Live
from cortex.gateway.loads import Loads
from cortex.gateway.management import Management
from cortex.gateway.metrics import Metrics
from cortex.gateway.neuron_client import open_client
from cortex.gateway.openapi import document_route
from cortex.gateway.proxy import Proxy
from cortex.gateway.rates import RateBook
from cortex.gateway.reload import Reloader
from cortex.gateway.request_ids import RequestIds
from cortex.gateway.response_store import open_store
from cortex.gateway.responses import ResponsesHandlers
from cortex.gateway.routing import Routing
from cortex.gateway.steward import Steward
from cortex.gateway.watch import Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayApps:
    """The gateway's two listeners' apps, and what they share."""

    api: ASGIApp
    metrics: ASGIApp
    fleet: Fleet
    loads: Loads
    routing: Routing
    reloader: Reloader | None = None


def unix_s() -> float:
    """Return the seconds since 1970."""
    return datetime.now(UTC).timestamp()


@asynccontextmanager
async def open_apps(
    config: GatewayConfig,
    catalogue: Catalogue,
    *,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = unix_s,
    source: Path | None = None,
    notifier: Notifier | None = None,
) -> AsyncIterator[GatewayApps]:
    """Run the gateway's background work for as long as the context is open.

    Args:
        source: the file that `config` was read from, to be read again when it changes.
        notifier: is told when it is read again.
        clock, wall_clock: monotonic seconds, and seconds since 1970.

    On leaving, polls and loads are cancelled; a neuron goes on with a load it has begun.
    """
    live = Live(config, catalogue)
    settings = config.gateway
    fleet = Fleet((), clock)
    gatekeeper = Gatekeeper(config.entitlements)
    live.on_change(lambda: gatekeeper.reload(live.config.entitlements))
    metrics = Metrics(fleet)
    limiter = Limiter(config.limits, metrics, wall_clock=wall_clock, clock=clock)
    live.on_change(lambda: limiter.reload(live.config.limits))
    failure: Exception | None = None
    routing = Routing(live, fleet, RateBook(), clock=clock)
    async with (
        open_store(lambda: live.config.responses, wall_clock, metrics.record_kept) as store,
        open_client(settings.connect_s, config) as client,
        asyncio.TaskGroup() as tasks,
    ):
        live.on_change(lambda: client.show_secret(live.config.fleet_secret))
        watch = Watch(client, fleet, live, tasks=tasks, clock=clock)
        watch.use(config.neurons)
        live.on_change(lambda: watch.use(live.config.neurons))
        reloader: Reloader | None = None
        reloading: asyncio.Task[None] | None = None
        if source is not None:
            reloader = Reloader(live, source, notifier=notifier)
            reloading = tasks.create_task(reloader.run(), name="reload")
        settling = tasks.create_task(limiter.run(), name="limits")
        loads = Loads(
            client,
            fleet,
            metrics,
            live,
            rates=routing.rates,
            poke=watch.poke,
            tasks=tasks,
            clock=clock,
        )
        keeper = Keeper(live, fleet, routing, loads, clock=clock, jitter=random.random)
        live.on_change(keeper.start_over)
        defragmenter = Defragmenter(client, fleet, metrics, live, poke=watch.poke, clock=clock)
        duties = {
            "prefixes": routing.refresh,
            "preload": keeper.look,
            "defragmentation": defragmenter.look,
        }
        steward = Steward(duties, lambda: live.settings.poll_s)
        stewarding = tasks.create_task(steward.run(), name="steward")
        decisions = Decisions()
        intake = Intake(live, fleet)
        dispatcher = Dispatcher(
            live=live,
            fleet=fleet,
            routing=routing,
            loads=loads,
            proxy=Proxy(client, fleet, live),
            client=client,
            metrics=metrics,
            decisions=decisions,
            poke=watch.poke,
            clock=clock,
        )
        handlers = Handlers(
            live=live,
            fleet=fleet,
            routing=routing,
            decisions=decisions,
            dispatcher=dispatcher,
            metrics=metrics,
            intake=intake,
        )
        responses = ResponsesHandlers(
            live=live, dispatcher=dispatcher, intake=intake, store=store, wall_clock=wall_clock
        )
        routes = [*handlers.routes(), *responses.routes(), *Management(fleet).routes()]
        try:
            await watch.first_round()
            yield GatewayApps(
                api=RequestIds(
                    KeyMiddleware(
                        build_app([*routes, document_route(routes)]),
                        gatekeeper,
                        limiter,
                        metrics,
                    )
                ),
                metrics=MetricsGuard(build_app(metrics_routes(metrics)), gatekeeper),
                fleet=fleet,
                loads=loads,
                routing=routing,
                reloader=reloader,
            )
        except Exception as exc:  # noqa: BLE001  carried out of the task group unwrapped
            failure = exc
        finally:
            if reloading is not None:
                reloading.cancel()
            loads.cancel()
            stewarding.cancel()
            watch.cancel()
            await limiter.close()
            settling.cancel()
    if failure is not None:
        raise failure
