"""What gateways and mock neurons say of themselves, and waiting for it."""

import asyncio
from typing import Any

import aiohttp
import msgspec

from tests.hosts.conftest import Fleet
from tests.support.mock_neuron.faults import FaultCommand

POLL_S = 0.05


async def health(session: aiohttp.ClientSession, fleet: Fleet, gateway: str) -> dict[str, bool]:
    """Return which nodes a gateway holds for healthy."""
    async with session.get(f"{fleet.url(gateway)}/health") as reply:
        return {each["name"]: each["healthy"] for each in (await reply.json())["details"]}


async def until_healthy(
    session: aiohttp.ClientSession, fleet: Fleet, gateway: str, wanted: str, limit_s: float
) -> float:
    """Wait until exactly the nodes named are healthy; return how long that took."""
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    async with asyncio.timeout(limit_s):
        while True:
            seen = await health(session, fleet, gateway)
            if {name for name, is_up in seen.items() if is_up} == set(wanted):
                return loop.time() - begun_s
            await asyncio.sleep(POLL_S)


async def all_healthy(session: aiohttp.ClientSession, fleet: Fleet) -> None:
    """Wait until both gateways see all nodes."""
    for gateway in fleet.gateways:
        await until_healthy(session, fleet, gateway, "abc", 20)


async def stats(session: aiohttp.ClientSession, fleet: Fleet, name: str) -> dict[str, Any]:
    """Return a mock neuron's own figures."""
    async with session.get(f"{fleet.neuron_url(name)}/mock/stats") as reply:
        figures: dict[str, Any] = await reply.json()
        return figures


async def inflict(
    session: aiohttp.ClientSession, fleet: Fleet, name: str, fault: FaultCommand
) -> None:
    """Put a fault in force at a mock neuron."""
    url = f"{fleet.neuron_url(name)}/mock/fault"
    async with session.post(url, data=msgspec.json.encode(fault)) as reply:
        assert reply.status == 200
