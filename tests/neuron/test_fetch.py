"""Images behind an address: from whom they are fetched, and from whom not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver

from cortex.core.errors import InvalidImageError
from cortex.neuron.chat.images import ImageData, ImageRef
from cortex.neuron.fetch import ImageFetcher, is_public

BODY = b"\x89PNG a picture"


class Names(AbstractResolver):
    """Knows every name as one address."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.address = address
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> Any:
        self.asked.append(host)
        found = {"hostname": host, "host": self.address, "port": port}
        return [{**found, "family": 2, "proto": 0, "flags": 0}]

    async def close(self) -> None:
        pass


class Site:
    """A web server whose answers a test scripts by path."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.port = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(f"{request.host.partition(':')[0]}{request.path}")
        assert "cookie" not in request.headers
        assert "authorization" not in request.headers
        match request.path:
            case "/a.png":
                return web.Response(body=BODY, content_type="image/png")
            case "/moved":
                return web.Response(status=302, headers={"location": "/a.png"})
            case "/elsewhere":
                target = f"http://other.example:{self.port}/a.png"
                return web.Response(status=302, headers={"location": target})
            case "/round":
                return web.Response(status=302, headers={"location": "/round"})
            case "/file":
                return web.Response(status=302, headers={"location": "file:///etc/passwd"})
            case "/packed":
                return web.Response(body=BODY, headers={"content-encoding": "gzip"})
            case "/large":
                return web.Response(body=b"x" * 5000)
            case "/slow":
                await asyncio.Event().wait()
        return web.Response(status=404)


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    found = Site()
    app = web.Application()
    app.router.add_get("/{path:.*}", found.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    listener = web.TCPSite(runner, "127.0.0.1", 0)
    await listener.start()
    assert listener._server is not None
    found.port = listener._server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        await runner.cleanup()


def refs(*urls: str) -> list[ImageRef]:
    return [
        ImageRef(name=f"image {at}", param=f"messages[0].content[{at - 1}]", url=url)
        for at, url in enumerate(urls, start=1)
    ]


def fetcher(*hosts: str, names: Names | None = None, **options: Any) -> ImageFetcher:
    """Return one for which the loopback is as good as the internet."""
    settings: dict[str, Any] = {"max_bytes": 4000, "limit_s": 30.0} | options
    settings.setdefault("is_allowed", lambda _: True)
    known = names or Names()
    return ImageFetcher(hosts, resolver=lambda: known, **settings)


async def test_an_image_of_a_listed_host_is_fetched_with_its_type():
    async with site() as there:
        url = f"http://pictures.example:{there.port}/a.png"
        got = await fetcher(f"pictures.example:{there.port}").fetch(refs("data:,x", url, url))
    assert got == {url: ImageData("image/png", BODY)}
    assert there.asked == ["pictures.example/a.png"]


async def test_nothing_is_asked_for_where_nothing_is_elsewhere():
    names = Names()
    assert await fetcher(names=names).fetch(refs("data:image/png;base64,")) == {}
    assert names.asked == []


async def test_a_redirect_within_the_host_is_followed():
    async with site() as there:
        url = f"http://a.b.example:{there.port}/moved"
        got = await fetcher(f"*.example:{there.port}").fetch(refs(url))
    assert got[url].data == BODY
    assert there.asked == ["a.b.example/moved", "a.b.example/a.png"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/elsewhere", "redirects to another one, which is not followed"),
        ("/file", r"a data: URI or an http\(s\) address"),
        ("/round", "redirects more than 3 times"),
        ("/packed", "sends it compressed"),
        ("/large", r"is over 0\.0038147 MiB"),
        ("/gone", "answered 404"),
    ],
)
async def test_what_a_host_answers_has_bounds(path: str, message: str):
    async with site() as there:
        url = f"http://a.example:{there.port}{path}"
        with pytest.raises(InvalidImageError, match=message) as caught:
            await fetcher(f"*.example:{there.port}").fetch(refs("data:,", url))
    assert caught.value.message.startswith("image 2: ")
    assert caught.value.param == "messages[0].content[1]"
    assert all(each.startswith("a.example/") for each in there.asked)


async def test_a_host_that_does_not_answer_in_time_is_told():
    async with site() as there:
        url = f"http://a.example:{there.port}/slow"
        with pytest.raises(InvalidImageError, match=r"not fetched within 0\.05 s"):
            await fetcher(f"a.example:{there.port}", limit_s=0.05).fetch(refs(url))


async def test_a_refused_connection_is_told():
    async with site() as there:
        port = there.port
    with pytest.raises(InvalidImageError, match="cannot be fetched"):
        await fetcher(f"a.example:{port}").fetch(refs(f"http://a.example:{port}/a.png"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://other.example/a.png", "images of other.example are not fetched"),
        ("http://a.example:81/a.png", "are not fetched"),
        ("https://a.example.evil/a.png", "are not fetched"),
        ("https://evil-a.example/a.png", "are not fetched"),
        ("ftp://a.example/a.png", "a data: URI or an http"),
        ("file:///etc/passwd", "a data: URI or an http"),
        ("/etc/passwd", "a data: URI or an http"),
        ("//a.example/x", "a data: URI or an http"),
        ("http://user:pw@a.example/a.png", "user name or password"),
        ("http://a.example:99999/", "cannot be read"),
        ("http://a.example/" + "x" * 5000, "over 4096 characters"),
    ],
)
async def test_no_other_address_is_even_looked_up(url: str, message: str):
    names = Names()
    with pytest.raises(InvalidImageError, match=message):
        await fetcher("a.example", names=names).fetch(refs(url))
    assert names.asked == []


async def test_without_a_list_nothing_is_fetched_and_the_way_out_is_named():
    with pytest.raises(InvalidImageError, match=r"harness\.torch\.vision\.url_hosts"):
        await fetcher().fetch(refs("https://a.example/a.png"))


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1"])
async def test_a_listed_name_that_stands_for_a_private_address_is_refused(address: str):
    names = Names(address)
    with pytest.raises(InvalidImageError, match=r"a\.example is no public address"):
        await fetcher("a.example", names=names, is_allowed=is_public).fetch(
            refs("http://a.example/a.png")
        )
    assert names.asked == ["a.example"]


@pytest.mark.parametrize("host", ["127.0.0.1", "192.168.1.1"])
async def test_a_listed_private_address_is_refused(host: str):
    with pytest.raises(InvalidImageError, match="is no public address"):
        await fetcher(host, is_allowed=is_public).fetch(refs(f"http://{host}/a.png"))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("0.0.0.0", False),
        ("100.64.0.1", False),
        ("172.16.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::ffff:8.8.8.8", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("name.example", False),
    ],
)
def test_public_addresses_are_told_from_others(address: str, expected: bool):
    assert is_public(address) == expected
