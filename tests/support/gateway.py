"""A whole gateway on free ports, in front of whatever endpoints a test has."""

import asyncio
import io
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from cortex.core.catalogue import Catalogue
from cortex.core.config import (
    Eviction,
    GatewayConfig,
    GatewayListen,
    NeuronAddress,
    ResponsesConfig,
)
from cortex.core.entitlements import ApiKey, Entitlements, LimitsConfig
from cortex.core.serve import Listener, serve
from cortex.core.trust import Trust
from cortex.gateway.app import GatewayApps, open_apps, unix_s
from cortex.gateway.neuron_client import OPEN_FLEET


@dataclass
class RunningGateway:
    """A served gateway and a client session for it."""

    url: str
    metrics_url: str
    apps: GatewayApps
    session: aiohttp.ClientSession

    async def get(self, path: str, **headers: str) -> aiohttp.ClientResponse:
        """GET a path of the API; the body is read."""
        return await self._read(self.session.get(self.url + path, headers=_dashed(headers)))

    async def post(self, path: str, body: object, **headers: str) -> aiohttp.ClientResponse:
        """POST JSON (or bytes) to the API; the body is read."""
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        call = self.session.post(self.url + path, headers=_dashed(headers), data=io.BytesIO(data))
        return await self._read(call)

    async def chat(self, model: str = "m", **fields: object) -> aiohttp.ClientResponse:
        """POST a chat request with one user message."""
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], **fields}
        return await self.post("/v1/chat/completions", body)

    def open_chat(self, model: str = "m", **fields: object) -> Any:
        """Return the context of a streaming chat request, its body unread."""
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        return self.session.post(self.url + "/v1/chat/completions", json={**body, **fields})

    async def metrics(self) -> dict[str, float]:
        """Return every sample of the metrics listener by its line's left side."""
        async with self.session.get(self.metrics_url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    @staticmethod
    async def _read(call: Any) -> aiohttp.ClientResponse:
        async with call as response:
            await response.read()
            read: aiohttp.ClientResponse = response
            return read


def _dashed(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


@asynccontextmanager
async def run_gateway(
    nodes: Mapping[str, str],
    *,
    catalogue: Catalogue | None = None,
    keys: tuple[str, ...] = (),
    entitlements: Entitlements | None = None,
    strategy: Any = "lru",
    clock: Callable[[], float] = time.monotonic,
    eviction: Mapping[str, Any] | None = None,
    trust: Trust = OPEN_FLEET,
    limits: LimitsConfig | None = None,
    wall_clock: Callable[[], float] = unix_s,
    source: Path | None = None,
    responses: ResponsesConfig | None = None,
    **settings: Any,
) -> AsyncIterator[RunningGateway]:
    """Serve a gateway over nodes (name: endpoint); `settings` are those of `[gateway]`.

    Args:
        keys: keys of which one is required; `entitlements` stands for the whole table instead.
        source: a configuration file to be read again when it changes.
        eviction: further keys of `[eviction]`.
    """
    config = GatewayConfig(
        gateway=GatewayListen(**settings),
        eviction=Eviction(strategy=strategy, **(eviction or {})),
        neurons=[NeuronAddress(name=name, endpoint=url) for name, url in nodes.items()],
        entitlements=entitlements
        or Entitlements(
            require_auth=bool(keys), keys=[ApiKey(key=key, account_id="test") for key in keys]
        ),
        limits=limits or LimitsConfig(),
        responses=responses or ResponsesConfig(),
        **msgspec.structs.asdict(trust),
    )
    shutdown = asyncio.Event()
    bound: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
    async with (
        open_apps(
            config, catalogue or Catalogue(), clock=clock, wall_clock=wall_clock, source=source
        ) as apps,
        asyncio.TaskGroup() as tasks,
    ):
        listeners = [
            Listener(app=apps.api, host="127.0.0.1", port=0, name="api"),
            Listener(app=apps.metrics, host="127.0.0.1", port=0, name="metrics"),
        ]
        tasks.create_task(serve(listeners, shutdown=shutdown, drain_s=1, on_bound=bound.set_result))
        api, metrics = await bound
        try:
            async with aiohttp.ClientSession() as session:
                yield RunningGateway(
                    url=f"http://127.0.0.1:{api}",
                    metrics_url=f"http://127.0.0.1:{metrics}",
                    apps=apps,
                    session=session,
                )
        finally:
            shutdown.set()
