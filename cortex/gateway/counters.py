"""Counters that gateways may share: in this process, or on a Redis or Valkey server.

The one module that calls the `limits` library.
"""

import asyncio
import logging
from collections.abc import Callable

from limits.aio.storage import Storage
from limits.errors import StorageError
from limits.storage import storage_from_string
from redis.asyncio import BlockingConnectionPool
from redis.exceptions import RedisError

from cortex.core.errors import ConfigError, LimitsUnavailableError

# A request does not wait longer for the server, and the server is not asked again sooner.
STORAGE_TIMEOUT_S = 0.5
STORAGE_RETRY_S = 2.0
MAX_CONNECTIONS = 32
# How long, and for how many counters, a value of the window before is not asked for again.
SETTLED_KEPT_S = 1.0
MAX_SETTLED = 4096
KEY_PREFIX = "cortex"

_FAULTS = (StorageError, RedisError, OSError, TimeoutError)

_logger = logging.getLogger(__name__)


class Counters:
    """Named counters; a server that fails is left alone for a moment.

    Args:
        url: `memory`, or the URL of a server.
        clock: monotonic seconds.
        on_fault: told of every call that failed or was not made.

    Raises:
        ConfigError: the URL cannot be used.
    """

    def __init__(
        self, url: str, *, clock: Callable[[], float], on_fault: Callable[[], None]
    ) -> None:
        self.url = url
        self._clock = clock
        self._on_fault = on_fault
        self._asked_again_s: float | None = None
        self._settled: dict[str, tuple[int, float]] = {}
        self._pool: BlockingConnectionPool | None = None
        self._storage = self._open(url)

    def _open(self, url: str) -> Storage:
        if url == "memory":
            return _as_async(storage_from_string("async+memory://"))
        # The same protocol under another name.
        scheme, _, place = url.partition("://")
        scheme = scheme.replace("valkey", "redis")
        try:
            self._pool = BlockingConnectionPool.from_url(
                f"{scheme.replace('redis+unix', 'unix')}://{place}",
                max_connections=MAX_CONNECTIONS,
                timeout=STORAGE_TIMEOUT_S,
                socket_timeout=STORAGE_TIMEOUT_S,
                socket_connect_timeout=STORAGE_TIMEOUT_S,
            )
            return _as_async(
                storage_from_string(
                    f"async+{scheme}://{place}",
                    implementation="redispy",
                    wrap_exceptions=True,
                    key_prefix=KEY_PREFIX,
                    connection_pool=self._pool,  # type: ignore[arg-type]  # handed on unread
                )
            )
        except (ValueError, RedisError) as exc:
            # The URL may hold a password, and so may the exception's words.
            raise ConfigError(
                "limits.storage: not a URL of a Redis or Valkey server; write redis://host:6379/0"
            ) from exc

    async def add(self, name: str, amount: int, kept_s: int) -> int:
        """Change a counter and return its new value.

        Args:
            kept_s: how long after its first change it may be forgotten.

        Raises:
            LimitsUnavailableError: the server does not answer.
        """
        if self._pool is None:
            return await self._storage.incr(name, kept_s, amount)
        self._check()
        try:
            async with asyncio.timeout(STORAGE_TIMEOUT_S):
                value = await self._storage.incr(name, kept_s, amount)
        except _FAULTS as exc:
            raise self._failed(exc) from exc
        self._answered()
        return value

    async def read(self, name: str) -> int:
        """Return a counter's value, 0 if there is none.

        Raises:
            LimitsUnavailableError: the server does not answer.
        """
        if self._pool is None:
            return await self._storage.get(name)
        self._check()
        try:
            async with asyncio.timeout(STORAGE_TIMEOUT_S):
                value = await self._storage.get(name)
        except _FAULTS as exc:
            raise self._failed(exc) from exc
        self._answered()
        return value

    async def read_settled(self, name: str) -> int:
        """Return the value of a counter that hardly changes any more, up to a second old.

        Raises:
            LimitsUnavailableError: the server does not answer.
        """
        if self._pool is None:
            return await self._storage.get(name)
        now_s = self._clock()
        known = self._settled.get(name)
        if known is not None and now_s - known[1] < SETTLED_KEPT_S:
            return known[0]
        value = await self.read(name)
        if len(self._settled) >= MAX_SETTLED:
            self._settled.clear()
        self._settled[name] = value, now_s
        return value

    async def close(self) -> None:
        """Close the connections."""
        if self._pool is not None:
            await self._pool.disconnect()

    def _check(self) -> None:
        if self._asked_again_s is not None and self._clock() < self._asked_again_s:
            self._on_fault()
            raise _unavailable()

    def _failed(self, exc: Exception) -> LimitsUnavailableError:
        self._on_fault()
        if self._asked_again_s is None:
            _logger.warning(
                "the server of limits.storage does not answer",
                extra={"cause": type(exc.__cause__ or exc).__name__},
            )
        self._asked_again_s = self._clock() + STORAGE_RETRY_S
        return _unavailable()

    def _answered(self) -> None:
        if self._asked_again_s is not None:
            self._asked_again_s = None
            _logger.info("the server of limits.storage answers again")


def _as_async(storage: object) -> Storage:
    assert isinstance(storage, Storage)
    return storage


def _unavailable() -> LimitsUnavailableError:
    return LimitsUnavailableError(
        "the store of budgets does not answer, and this gateway is set to serve nobody without it; "
        "try again shortly",
        retry_after_s=STORAGE_RETRY_S,
    )
