"""Run ASGI apps on hypercorn: sockets bound first, one shutdown for all, bounded drain."""

import asyncio
import errno
import logging
import os
import signal
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast

from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config
from hypercorn.typing import Framework
from starlette.types import ASGIApp, Receive, Scope, Send

from cortex.core.errors import StartupError
from cortex.core.notify import Notifier
from cortex.core.trust import Trust

BACKLOG = 4096
KEEP_ALIVE_S = 75
KEEP_ALIVE_REQUESTS = 1_000_000
# Where in a request's scope the event lies that tells it to end now, in words.
LAST_CALL = "cortex.last_call"
# And the event that tells that the server has begun to end, for what would go on for ever.
SHUTDOWN = "cortex.shutdown"
LAST_CALL_S = 1.0
# While a service ends, the manager is told this often that it is at it, and to wait so long more.
EXTEND_EVERY_S = 5.0
EXTEND_BY_S = 20.0

_logger = logging.getLogger("cortex.http")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """One app on one address; port 0 takes a free one.

    `bound` is a socket that `bind` made beforehand (host and port are then not used), for a
    caller that must know the port, or that it is free, before it starts anything. With `tls` it
    speaks only HTTPS, and where that names a CA, only to those with a certificate of it.
    """

    app: ASGIApp
    name: str
    host: str = "127.0.0.1"
    port: int = 0
    bound: socket.socket | None = None
    tls: Trust | None = None


async def serve(
    listeners: Sequence[Listener],
    *,
    shutdown: asyncio.Event,
    drain_s: float,
    on_bound: Callable[[list[int]], None] | None = None,
) -> None:
    """Serve until `shutdown` is set, then let open requests end for up to `drain_s`.

    Args:
        on_bound: called once with the bound ports, in the order of `listeners`, when
            connections are accepted.

    Raises:
        StartupError: an address is taken or not available.
    """
    sockets: list[socket.socket] = []
    try:
        sockets.extend(each.bound or bind(each.host, each.port, each.name) for each in listeners)
    except StartupError:
        for bound in sockets:
            bound.close()
        raise
    ports = [bound.getsockname()[1] for bound in sockets]
    last_call = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        calling = tasks.create_task(_call_last(shutdown, last_call, drain_s), name="last call")
        async with asyncio.TaskGroup() as servers:
            for listener, bound in zip(listeners, sockets, strict=True):
                servers.create_task(
                    hypercorn_serve(
                        cast(Framework, _with_events(listener.app, shutdown, last_call)),
                        _config(bound, drain_s, listener.tls),
                        shutdown_trigger=shutdown.wait,
                        mode="asgi",
                    ),
                    name=f"serve {listener.name}",
                )
            if on_bound is not None:
                on_bound(ports)
        calling.cancel()


async def _call_last(shutdown: asyncio.Event, last_call: asyncio.Event, drain_s: float) -> None:
    """Set `last_call` a moment before requests that are still open are cut off."""
    await shutdown.wait()
    await asyncio.sleep(max(drain_s - LAST_CALL_S, drain_s / 2))
    last_call.set()


def _with_events(app: ASGIApp, shutdown: asyncio.Event, last_call: asyncio.Event) -> ASGIApp:
    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        scope[SHUTDOWN] = shutdown
        scope[LAST_CALL] = last_call
        await app(scope, receive, send)

    return called


@asynccontextmanager
async def told(notifier: Notifier, shutdown: asyncio.Event, limit_s: float) -> AsyncIterator[None]:
    """While the context is open, tell the service manager that the service lives, or ends.

    Args:
        limit_s: the longest end, as `shutdown_on_signals` was given it.
    """
    async with asyncio.TaskGroup() as tasks:
        telling = [
            tasks.create_task(feed_watchdog(notifier), name="watchdog"),
            tasks.create_task(_tell_of_end(notifier, shutdown, limit_s), name="end of service"),
        ]
        try:
            yield
        finally:
            for task in telling:
                task.cancel()
            notifier.close()


async def feed_watchdog(notifier: Notifier) -> None:
    """Feed the manager's watchdog from the event loop: a loop that is blocked does not.

    What runs in threads or engines has limits of its own (`stall_s`).
    """
    while notifier.watchdog_s is not None:
        notifier.alive()
        await asyncio.sleep(notifier.watchdog_s / 2)


async def _tell_of_end(notifier: Notifier, shutdown: asyncio.Event, limit_s: float) -> None:
    await shutdown.wait()
    notifier.stopping(f"draining, for {limit_s:.0f} s at most")
    # The process ends itself at `limit_s`, so this does not go on for ever.
    while notifier.is_listened_to:
        notifier.extend(EXTEND_BY_S)
        await asyncio.sleep(EXTEND_EVERY_S)


def bind(host: str, port: int, name: str) -> socket.socket:
    """Return a listening socket.

    Args:
        name: what will listen there, for messages.

    Raises:
        StartupError: the address is taken or not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    where = f"{host}:{port} ({name})"
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        # Listening already: a second process fails here and not later.
        bound.listen(BACKLOG)
    except OSError as exc:
        bound.close()
        if exc.errno == errno.EADDRINUSE:
            raise StartupError(
                f"{where}: the port is in use; stop what listens there or choose another port"
            ) from exc
        raise StartupError(f"{where}: cannot listen: {exc.strerror or exc}") from exc
    except (OverflowError, UnicodeError) as exc:
        bound.close()
        raise StartupError(f"{where}: not a valid address: {exc}") from exc
    return bound


def _config(bound: socket.socket, drain_s: float, tls: Trust | None) -> Config:
    config = Config()
    config.bind = [f"fd://{bound.detach()}"]
    config.backlog = BACKLOG
    config.graceful_timeout = drain_s
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.keep_alive_max_requests = KEEP_ALIVE_REQUESTS
    config.include_server_header = False
    config.accesslog = None
    config.errorlog = _logger
    if tls is not None and tls.tls_cert is not None:
        config.certfile = tls.tls_cert
        config.keyfile = tls.tls_key
        if tls.tls_ca is not None:
            config.ca_certs = tls.tls_ca
            config.verify_mode = ssl.CERT_REQUIRED
    return config


def shutdown_on_signals(limit_s: float) -> asyncio.Event:
    """Return an event that SIGTERM or SIGINT sets; a second signal ends the process at once.

    Args:
        limit_s: how long after the signal the process may still be there; then it is ended,
            since a thread may be stuck in a file system that no longer answers.
    """
    event = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        if event.is_set():
            for each in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(each)
            signal.raise_signal(number)
        _logger.info("received %s, draining", number.name)
        event.set()
        watchdog = threading.Timer(limit_s, _give_up, (limit_s,))
        watchdog.daemon = True
        watchdog.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    return event


def _give_up(limit_s: float) -> None:
    _logger.error("not ended %.0f s after the signal; exiting", limit_s)
    os._exit(1)
