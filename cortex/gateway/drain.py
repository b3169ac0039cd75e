"""What `cortex drain` and `cortex undrain` do: tell gateways, and wait for a node to be idle."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from cortex.core.errors import (
    CortexError,
    RemoteError,
    UpstreamConnectionError,
    UpstreamMalformedError,
)
from cortex.core.openai import parse_error
from cortex.gateway.views import HealthReport, NodeReport

TIMEOUT_S = 10.0
LOOK_AGAIN_S = 0.5

_T = TypeVar("_T")

_node_decoder = msgspec.json.Decoder(NodeReport)
_health_decoder = msgspec.json.Decoder(HealthReport)


class DrainTimeoutError(CortexError):
    """The node was not idle in time; it goes on draining."""

    code = "drain_timeout"


async def set_drained(
    endpoints: Sequence[str],
    key: str | None,
    name: str,
    *,
    drained: bool,
    wait_s: float = 0.0,
    say: Callable[[str], None],
) -> None:
    """Have every gateway send nothing new to a node, or use it again.

    Args:
        wait_s: how long to wait for what the node has in hand; 0: not at all.
        say: told in words what came of it.

    Raises:
        CortexError: a gateway cannot be reached or refuses, or the node is not idle in time.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(headers=headers) as session:
        for endpoint in endpoints:
            base = endpoint.rstrip("/")
            action = "drain" if drained else "undrain"
            body = await _ask(session, "POST", f"{base}/nodes/{quote(name)}/{action}")
            report = _decoded(_node_decoder, body, base)
            doing = "drains" if report.draining else "takes work"
            say(f"{base}: node {name} {doing}, {_count(report)} requests in hand")
        if not drained or wait_s <= 0:
            return
        try:
            async with asyncio.timeout(wait_s):
                await _idle(session, [each.rstrip("/") for each in endpoints], name)
        except TimeoutError as exc:
            raise DrainTimeoutError(
                f"node {name} still has requests in hand after {wait_s:g} s; it goes on draining"
            ) from exc
        say(f"node {name} is idle")


async def _idle(session: aiohttp.ClientSession, bases: Sequence[str], name: str) -> None:
    while True:
        in_hand = [await _in_hand(session, base, name) for base in bases]
        if not any(in_hand):
            return
        await asyncio.sleep(LOOK_AGAIN_S)


async def _in_hand(session: aiohttp.ClientSession, base: str, name: str) -> int:
    health = _decoded(_health_decoder, await _ask(session, "GET", f"{base}/health"), base)
    return sum(_count(node) for node in health.details if node.name == name)


def _count(node: NodeReport) -> int:
    # The node's own count comes later than the gateway's of what it has sent there.
    return max(node.relayed, node.in_flight + node.queue_depth)


async def _ask(session: aiohttp.ClientSession, method: str, url: str) -> bytes:
    try:
        async with asyncio.timeout(TIMEOUT_S), session.request(method, url) as response:
            body = await response.read()
    except TimeoutError as exc:
        raise UpstreamConnectionError(f"{url}: no answer within {TIMEOUT_S:g} s") from exc
    except (aiohttp.ClientError, OSError, ValueError) as exc:
        raise UpstreamConnectionError(f"{url}: {exc}") from exc
    if response.status != 200:
        error = parse_error(response.status, body)
        raise RemoteError(f"{url}: {error.message}", status=error.status, code=error.code)
    return body


def _decoded(decoder: "msgspec.json.Decoder[_T]", body: bytes, base: str) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise UpstreamMalformedError(f"{base}: not a gateway's answer: {exc}") from exc
