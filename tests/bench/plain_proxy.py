"""A reverse proxy with a policy of one line, to compare routing with: round robin, least loaded."""

import argparse
import asyncio
import itertools
import signal
from collections.abc import Callable

import aiohttp
from aiohttp import web


class Proxy:
    """Sends each request to the node that the policy names and relays the answer."""

    def __init__(self, nodes: list[str], policy: str) -> None:
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
            session: aiohttp.ClientSession = request.app["session"]
            body = await request.read()
            async with session.post(node + request.path, data=body) as reply:
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


async def run(port: int, nodes: list[str], policy: str) -> None:
    """Serve until SIGTERM."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    app = web.Application(client_max_size=1 << 27)
    app.router.add_post("/{path:.*}", Proxy(nodes, policy).relay)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        app["session"] = session
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await ended.wait()
        await runner.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="plain_proxy")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--policy", choices=["round_robin", "least_loaded"], required=True)
    parser.add_argument("nodes", nargs="+")
    options = parser.parse_args()
    asyncio.run(run(options.port, options.nodes, options.policy))
