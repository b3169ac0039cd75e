"""Take changed configuration files into use while the gateway runs.

The files are looked at every few seconds, and at once on SIGHUP. All of them are read and checked
before anything changes; where one cannot be used, what is in use stays and the reason is kept
for `/health`.
"""

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path

from cortex.core.catalogue import Catalogue, load_catalogue
from cortex.core.config import GatewayConfig, load_gateway_config
from cortex.core.errors import ConfigError
from cortex.core.notify import Notifier
from cortex.gateway.live import ConfigState, Live

# How often the files are looked at. One that changed is read once two looks in a row agree, so
# that a file is not read while it is being written.
CHECK_S = 2.0

# What is bound or opened once, at the start.
_RESTART_KEYS = (
    "gateway.listen",
    "gateway.metrics_listen",
    "gateway.connect_s",
    "gateway.drain_s",
    "responses.store_file",
    "tls_cert",
    "tls_key",
    "tls_ca",
)

_Stamp = tuple[tuple[str, int, int, int] | None, ...]
_logger = logging.getLogger(__name__)


def read_files(path: Path) -> tuple[GatewayConfig, Catalogue]:
    """Read cortex.toml and the catalogue that it names.

    Raises:
        ConfigError: one of them cannot be used.
    """
    config = load_gateway_config(path)
    return config, load_catalogue(Path(config.models_config) if config.models_config else None)


def needing_restart(started: GatewayConfig, now: GatewayConfig) -> tuple[str, ...]:
    """Return the keys whose new values take effect only when the gateway is started again."""
    return tuple(key for key in _RESTART_KEYS if _value(started, key) != _value(now, key))


def _value(config: object, key: str) -> object:
    for part in key.split("."):
        config = getattr(config, part)
    return config


class Reloader:
    """Watches the files that a gateway was started from.

    Args:
        path: cortex.toml; the catalogue is the one it names, or models.toml beside it.
        notifier: is told of every reload.
    """

    def __init__(
        self,
        live: Live,
        path: Path,
        *,
        check_s: float = CHECK_S,
        notifier: Notifier | None = None,
    ) -> None:
        self._live = live
        self._path = path
        self._check_s = check_s
        self._notifier = notifier or Notifier({})
        self._started = live.config
        self._asked = asyncio.Event()

    def request(self) -> None:
        """Have the files read now, whether they changed or not."""
        self._asked.set()

    async def run(self) -> None:
        """Reload whenever the files changed, until cancelled."""
        used = seen = await self._stamp()
        while True:
            try:
                async with asyncio.timeout(self._check_s):
                    await self._asked.wait()
            except TimeoutError:
                before, seen = seen, await self._stamp()
                if seen == used or seen != before:
                    continue
            self._asked.clear()
            # Taken before reading: what changes meanwhile is seen at the next look.
            used = seen = await self._stamp()
            self._notifier.reloading()
            try:
                await self.reload()
            except Exception:  # a task's outermost loop: it goes on, and says so
                _logger.exception("reading the configuration again failed unexpectedly")
                self._live.state = ConfigState(error="see the gateway's log")
            self._notifier.ready(self.summary())

    def summary(self) -> str:
        """Return in a line what is in use, for the service manager."""
        if self._live.state.error is not None:
            return f"the configuration in use stays: {self._live.state.error}"
        neurons, models = len(self._live.config.neurons), len(self._live.catalogue.models)
        return f"serving; {neurons} neurons and {models} models are configured"

    async def reload(self) -> None:
        """Read the files and put them in use, or say why not."""
        try:
            config, catalogue = await asyncio.to_thread(read_files, self._path)
        except ConfigError as exc:
            _logger.error("the configuration in use stays: %s", exc.message)
            self._live.state = ConfigState(
                error=exc.message, restart_for=self._live.state.restart_for
            )
            return
        restart_for = needing_restart(self._started, config)
        self._live.state = ConfigState(restart_for=restart_for)
        if (config, catalogue) == (self._live.config, self._live.catalogue):
            _logger.info("the configuration was read again and is the same")
            return
        self._live.replace(config, catalogue)
        _logger.info(
            "the configuration was read again and is in use",
            extra={"neurons": len(config.neurons), "models": len(catalogue.models)},
        )
        if restart_for:
            _logger.warning(
                "%s: takes effect when the gateway is started again", ", ".join(restart_for)
            )

    async def _stamp(self) -> _Stamp:
        return await asyncio.to_thread(_stamp_of, self._files())

    def _files(self) -> list[Path]:
        named = self._live.config.models_config
        beside = self._path.parent / "models.toml"
        return [self._path, beside] if named is None else [self._path, beside, Path(named)]


def _stamp_of(paths: Iterable[Path]) -> _Stamp:
    """Return what tells one state of the files from another."""
    found: list[tuple[str, int, int, int] | None] = []
    for path in paths:
        try:
            told = path.stat()
        except OSError:
            found.append(None)
        else:
            found.append((str(path), told.st_mtime_ns, told.st_size, told.st_ino))
    return tuple(found)
