"""A reverse proxy with a policy of one line, to compare routing with: round robin, least loaded."""

import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import aiohttp
from aiohttp import web

Policy = Literal["round_robin", "least_loaded"]


class PlainProxy:
    """Sends each request to the node that the policy names and relays the answer."""

    def __init__(
        self, session: aiohttp.ClientSession, nodes: Sequence[str], policy: Policy
    ) -> None:
        self._session = session
        self._in_flight = dict.fromkeys(nodes, 0)
        turn = itertools.cycle(nodes)
        self._choose: Callable[[], str] = (
            (lambda: next(turn)) if policy == "round_robin" else self._least_loaded
        )
        self._order = itertools.cycle(range(len(nodes)))

    def _least_loaded(self) -> str:
        # Ties go round, so that an idle fleet is not one busy node.
        nodes = list(self._in_flight)
        start = next(self._order)
        return min(nodes[start:] + nodes[:start], key=self._in_flight.__getitem__)

    async def relay(self, request: web.Request) -> web.StreamResponse:
        """Relay one request."""
        node = self._choose()
        self._in_flight[node] += 1
        try:
            body = await request.read()
            async with self._session.post(node + request.path, data=body) as reply:
                response = web.StreamResponse(
                    status=reply.status, headers={"content-type": reply.content_type}
                )
                await response.prepare(request)
                while chunk := await reply.content.readany():
                    await response.write(chunk)
                await response.write_eof()
                return response
        finally:
            self._in_flight[node] -= 1


@asynccontextmanager
async def plain_proxy(nodes: Sequence[str], policy: Policy, port: int = 0) -> AsyncIterator[str]:
    """Serve a proxy; yields its URL."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        app = web.Application(client_max_size=1 << 27)
        app.router.add_post("/{path:.*}", PlainProxy(session, nodes, policy).relay)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()
