"""A reverse proxy that writes down what a client sends, reduced to a transcript.

Run by hand before a gateway; the client is pointed at the proxy's port, and Ctrl-C ends it:

    python -m tests.support.client_recorder --upstream http://127.0.0.1:31313 --port 31400 \
        --client pi --package @mariozechner/pi-coding-agent --version 0.73.1 \
        --settings "models.json with openai-completions" --prompt "Read the file notes.txt" pi.json
"""

import argparse
import asyncio
from pathlib import Path

import aiohttp
import msgspec
from aiohttp import web

from tests.support.transcripts import Exchange, Transcript, reduced, write

MAX_BODY_BYTES = 1 << 27
_HOP_HEADERS = frozenset({"host", "connection", "content-length", "transfer-encoding"})


class Recorder:
    """Relays to one gateway and keeps the requests."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        upstream: str,
        transcript: Transcript,
        prompts: tuple[str, ...],
        out: Path,
    ) -> None:
        self._session = session
        self._upstream = upstream
        self._transcript = transcript
        self._prompts = prompts
        self._out = out
        self._seen: list[Exchange] = []

    async def relay(self, request: web.Request) -> web.StreamResponse:
        """Note one request and relay it."""
        body = await request.read()
        exchange = Exchange(
            method=request.method,
            path=request.raw_path,
            headers=dict(request.headers),
            body=msgspec.json.decode(body) if body else None,
        )
        self._seen.append(exchange)
        self._transcript.requests = reduced(self._seen, self._prompts)
        write(self._out, self._transcript)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP_HEADERS}
        async with self._session.request(
            request.method, self._upstream + request.raw_path, data=body, headers=headers
        ) as reply:
            response = web.StreamResponse(
                status=reply.status, headers={"content-type": reply.headers["content-type"]}
            )
            await response.prepare(request)
            while chunk := await reply.content.readany():
                await response.write(chunk)
            await response.write_eof()
            return response


async def record(options: argparse.Namespace) -> None:
    """Serve until the process is interrupted."""
    transcript = Transcript(
        client=options.client,
        package=options.package,
        version=options.version,
        settings=options.settings,
        requests=[],
    )
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        recorder = Recorder(
            session, options.upstream, transcript, tuple(options.prompt), options.out
        )
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", recorder.relay)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", options.port).start()
        await asyncio.Event().wait()


def main() -> None:
    """Read the command line and record."""
    parser = argparse.ArgumentParser(description="record what a client sends")
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--client", required=True)
    parser.add_argument("--package", required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--settings", default="")
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("out", type=Path)
    asyncio.run(record(parser.parse_args()))


if __name__ == "__main__":
    main()
