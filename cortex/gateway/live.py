"""The configuration in use: one owner, replaced as a whole while the gateway runs."""

from collections.abc import Callable
from dataclasses import dataclass

from cortex.core.catalogue import Catalogue
from cortex.core.config import GatewayConfig, GatewayListen


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigState:
    """How the last look at the files went.

    Attributes:
        error: why they could not be used, so that an earlier state of them is in use.
        restart_for: keys whose values take effect only when the gateway is started again.
    """

    error: str | None = None
    restart_for: tuple[str, ...] = ()


class Live:
    """The configuration and the catalogue of this moment.

    Whoever acts on them reads them here when it acts and keeps no copy, or is told by
    `on_change`.
    """

    def __init__(self, config: GatewayConfig, catalogue: Catalogue) -> None:
        self.config = config
        self.catalogue = catalogue
        self.state = ConfigState()
        self._calls: list[Callable[[], None]] = []

    @property
    def settings(self) -> GatewayListen:
        """The `[gateway]` table."""
        return self.config.gateway

    def on_change(self, call: Callable[[], None]) -> None:
        """Have `call` called after every replacement."""
        self._calls.append(call)

    def replace(self, config: GatewayConfig, catalogue: Catalogue) -> None:
        """Put another configuration in use, in one step, and tell everyone concerned."""
        self.config = config
        self.catalogue = catalogue
        for call in self._calls:
            call()
