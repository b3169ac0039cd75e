"""The request edge, over real sockets."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cortex.core import openai
from cortex.core.decode import decode_body
from cortex.core.errors import (
    BadRequestError,
    CortexError,
    MalformedJsonError,
    MissingModelError,
    QueueFullError,
    StartupError,
)
from cortex.core.serve import Listener, bind, serve
from cortex.core.web import (
    EventStream,
    build_app,
    cancel_on_disconnect,
    json_response,
    read_body,
)

LIMIT = 100


class Body(msgspec.Struct):
    model: str
    count: int = 0


DECODER = msgspec.json.Decoder(Body)


class Scene:
    """What the handlers below were seen doing."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.entered = asyncio.Event()
        self.shutdown = asyncio.Event()

    def routes(self) -> list[Route]:
        return [
            Route("/echo", self.echo, methods=["POST"]),
            Route("/v1/messages", self.refuse, methods=["POST"]),
            Route("/crash", self.crash),
            Route("/stream/{kind}", self.stream),
            Route("/wait", self.wait, methods=["POST"]),
        ]

    async def echo(self, request: Request) -> Response:
        body = decode_body(DECODER, await read_body(request, max_bytes=LIMIT))
        return json_response(body, headers={"x-seen": "yes"})

    async def refuse(self, request: Request) -> Response:
        raise QueueFullError("full", retry_after_s=7)

    async def crash(self, request: Request) -> Response:
        raise RuntimeError("secret detail")

    async def wait(self, request: Request) -> Response:
        await read_body(request, max_bytes=LIMIT)

        async def work() -> str:
            self.entered.set()
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            return "done"

        return json_response(await cancel_on_disconnect(request, work()))

    async def stream(self, request: Request) -> EventStream:
        return EventStream(
            getattr(self, request.path_params["kind"])(),
            keepalive=b": wait\n\n",
            keepalive_s=0.05,
            on_error=openai.error_event,
        )

    async def fine(self) -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        yield b"data: 2\n\n"

    async def early(self) -> AsyncGenerator[bytes, None]:
        raise BadRequestError("no such thing", param="x")
        yield b""

    async def late(self) -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        raise QueueFullError("lost it")

    async def broken(self) -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        raise RuntimeError("secret detail")

    async def slow(self) -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.2)
        yield b"data: 1\n\n"

    async def endless(self) -> AsyncGenerator[bytes, None]:
        try:
            yield b"data: 1\n\n"
            await asyncio.sleep(30)
        finally:
            self.closed.set()


@asynccontextmanager
async def serving(scene: Scene) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    bound = bind("127.0.0.1", 0, "test")
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    listener = Listener(app=build_app(scene.routes()), name="test", bound=bound)
    async with asyncio.TaskGroup() as tasks, aiohttp.ClientSession() as session:
        tasks.create_task(serve([listener], shutdown=scene.shutdown, drain_s=0.5))
        try:
            yield session, url
        finally:
            scene.shutdown.set()


@pytest.fixture
async def scene() -> Scene:
    return Scene()


async def test_a_good_body_is_decoded_and_answered(scene: Scene):
    async with serving(scene) as (session, url):
        async with session.post(f"{url}/echo", data=b'{"model": "a", "count": 2}') as reply:
            assert reply.status == 200
            assert reply.headers["x-seen"] == "yes"
            assert await reply.json() == {"model": "a", "count": 2}


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        (b"{", MalformedJsonError, None),
        (b"\xff\xfe", MalformedJsonError, None),
        (b"", MalformedJsonError, None),
        (b"{}", MissingModelError, "model"),
        (b'{"model": 1}', BadRequestError, "model"),
        (b'{"model": "a", "count": "b"}', BadRequestError, "count"),
    ],
)
def test_a_bad_body_names_the_field(body: bytes, kind: type[CortexError], param: str | None):
    with pytest.raises(kind) as caught:
        decode_body(DECODER, body)
    assert caught.value.param == param


async def test_a_body_over_the_limit_is_a_413_and_the_next_request_is_served(scene: Scene):
    async with serving(scene) as (session, url):
        for size in (LIMIT + 1, LIMIT * 3, LIMIT * 100):
            async with session.post(f"{url}/echo", data=b" " * size) as reply:
                assert reply.status == 413
                assert (await reply.json())["error"]["code"] == "body_too_large"
        async with session.post(f"{url}/echo", data=b'{"model": "a"}') as reply:
            assert reply.status == 200


async def test_an_error_carries_status_retry_after_and_the_paths_dialect(scene: Scene):
    async with serving(scene) as (session, url):
        async with session.post(f"{url}/v1/messages?beta=true") as reply:
            assert reply.status == 529
            assert reply.headers["retry-after"] == "7"
            assert (await reply.json())["error"]["type"] == "overloaded_error"


async def test_an_unexpected_exception_is_a_500_without_its_text(
    scene: Scene, caplog: pytest.LogCaptureFixture
):
    async with serving(scene) as (session, url), session.get(f"{url}/crash") as reply:
        assert reply.status == 500
        assert "secret" not in await reply.text()
    assert "secret detail" in caplog.text


async def test_unknown_paths_and_methods_are_errors_in_the_envelope(scene: Scene):
    async with serving(scene) as (session, url):
        async with session.get(f"{url}/nowhere") as reply:
            assert reply.status == 404
            assert (await reply.json())["error"]["code"] == "route_not_found"
        async with session.get(f"{url}/echo") as reply:
            assert reply.status == 405
            assert "POST" in (await reply.json())["error"]["message"]


async def test_a_stream_is_relayed_whole(scene: Scene):
    async with serving(scene) as (session, url), session.get(f"{url}/stream/fine") as reply:
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert await reply.read() == b"data: 1\n\ndata: 2\n\n"


async def test_an_error_before_the_first_byte_is_a_proper_http_error(scene: Scene):
    async with serving(scene) as (session, url), session.get(f"{url}/stream/early") as reply:
        assert reply.status == 400
        assert (await reply.json())["error"]["param"] == "x"


async def test_an_error_after_the_first_byte_is_an_event_and_the_end(scene: Scene):
    async with serving(scene) as (session, url), session.get(f"{url}/stream/late") as reply:
        assert reply.status == 200
        events = (await reply.read()).split(b"\n\n")
    assert events[0] == b"data: 1"
    assert b'"code":"queue_full"' in events[1]
    assert events[2:] == [b""]


async def test_an_unexpected_exception_in_a_stream_is_an_event_without_its_text(scene: Scene):
    async with serving(scene) as (session, url), session.get(f"{url}/stream/broken") as reply:
        text = await reply.text()
    assert "internal_server_error" in text
    assert "secret" not in text


async def test_silence_is_filled_with_keepalives_from_the_start(scene: Scene):
    async with serving(scene) as (session, url), session.get(f"{url}/stream/slow") as reply:
        body = await reply.read()
    assert body.startswith(b": wait\n\n: wait\n\n")
    assert body.endswith(b"data: 1\n\n")


async def test_a_client_that_leaves_closes_the_generator(scene: Scene):
    async with serving(scene) as (session, url):
        reply = await session.get(f"{url}/stream/endless")
        await reply.content.readline()
        reply.close()
        async with asyncio.timeout(5):
            await scene.closed.wait()


async def test_a_client_that_leaves_cancels_a_plain_request(scene: Scene):
    async with serving(scene) as (session, url):
        asking = asyncio.ensure_future(session.post(f"{url}/wait", data=b"{}"))
        async with asyncio.timeout(5):
            await scene.entered.wait()
            asking.cancel()
            await scene.cancelled.wait()


async def test_a_stream_that_is_still_open_at_the_end_of_the_drain_ends_in_an_error_event(
    scene: Scene,
):
    async with serving(scene) as (session, url):
        async with session.get(f"{url}/stream/endless") as reply:
            await reply.content.readline()
            scene.shutdown.set()
            rest = await reply.content.read()
    assert b'"code":"shutting_down"' in rest


async def test_a_plain_request_that_is_still_open_at_the_end_of_the_drain_gets_a_503(scene: Scene):
    async with serving(scene) as (session, url), asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(answer_of(session, f"{url}/wait"))
        await scene.entered.wait()
        scene.shutdown.set()
    assert asking.result() == (503, "shutting_down")


async def answer_of(session: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with session.post(url, data=b"{}") as reply:
        return reply.status, (await reply.json())["error"]["code"]


@pytest.mark.parametrize("path", ["/echo/", "/echo//?beta=true"])
async def test_a_trailing_slash_is_no_other_route(scene: Scene, path: str):
    async with serving(scene) as (session, url):
        async with session.post(url + path, data=b'{"model": "a"}') as reply:
            assert reply.status == 200


@pytest.mark.parametrize("half", [rb"\ud83d", rb"\udc4b", rb"x\uD83D\u0041"])
def test_half_a_surrogate_pair_is_read_as_the_replacement_character(half: bytes):
    assert "\ufffd" in decode_body(DECODER, b'{"model": "' + half + b'"}').model


def test_a_whole_surrogate_pair_is_the_character_it_stands_for():
    assert decode_body(DECODER, rb'{"model": "\ud83d\udc4b"}').model == "\U0001f44b"


def test_a_taken_port_is_named_with_the_way_out():
    with bind("127.0.0.1", 0, "first") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"127.0.0.1:{port}.*in use"):
            bind("127.0.0.1", port, "second")
