"""Images behind an address, from hosts that the operator names and from nowhere else.

A request must not make this host ask what its sender could not: an address is fetched only from
the list, only from the public internet, over a connection to the very address that was looked
up, without redirects elsewhere, and within bounds of bytes and seconds.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Sequence

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from cortex.neuron.chat.images import MIB, ImageData, ImageRef

MAX_URL_CHARS = 4096
MAX_REDIRECTS = 3
# Of all images of a request together, whatever their number.
MAX_FETCHED_BYTES = 64 * MIB
MAX_HEADER_BYTES = 16 << 10
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(text: str) -> bool:
    """Whether an IP address is one of the public internet."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    # These carry an IPv4 address, which may be anybody's.
    if isinstance(address, ipaddress.IPv6Address) and (
        address.ipv4_mapped or address.sixtofour or address.teredo or address in _NAT64
    ):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class ImageFetcher:
    """Fetches the images of requests.

    Args:
        hosts: what may be asked: `name`, `*.name` or either with `:port`; the scheme's own port
            unless one is named.
        max_bytes: of one image.
        limit_s: of all fetches of a request.
        is_allowed: whether an address that was looked up may be connected to.
        resolver: looks names up; the system's by default.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        max_bytes: int,
        limit_s: float,
        is_allowed: Callable[[str], bool] = is_public,
        resolver: Callable[[], AbstractResolver] = ThreadedResolver,
    ) -> None:
        self._hosts = hosts
        self._max_bytes = max_bytes
        self._limit_s = limit_s
        self._is_allowed = is_allowed
        self._resolver = resolver

    async def fetch(self, refs: Sequence[ImageRef]) -> dict[str, ImageData]:
        """Return the data of those images that are elsewhere, by address.

        Raises:
            InvalidImageError: one may not be fetched, or cannot be; names it.
        """
        remote = {ref.url: ref for ref in refs if ref.is_remote}
        # All are looked at before the first byte is asked for.
        urls = {text: self._allowed(ref, text) for text, ref in remote.items()}
        if not urls:
            return {}
        fetched: dict[str, ImageData] = {}
        left = MAX_FETCHED_BYTES
        connector = aiohttp.TCPConnector(
            resolver=_Guarded(self._resolver(), self._is_allowed),
            use_dns_cache=False,
            force_close=True,
        )
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"accept": "image/*", "accept-encoding": "identity"},
            max_field_size=MAX_HEADER_BYTES,
        ) as session:
            current = next(iter(remote.values()))
            try:
                async with asyncio.timeout(self._limit_s):
                    for text, url in urls.items():
                        current = remote[text]
                        most = min(self._max_bytes, left)
                        fetched[text] = await self._get(session, current, url, most)
                        left -= len(fetched[text].data)
            except TimeoutError as exc:
                raise current.error(f"it was not fetched within {self._limit_s:g} s") from exc
            except (aiohttp.ClientError, OSError, ValueError) as exc:
                raise current.error(f"it cannot be fetched: {_cause(exc)}") from exc
        return fetched

    async def _get(
        self, session: aiohttp.ClientSession, ref: ImageRef, url: URL, max_bytes: int
    ) -> ImageData:
        for _ in range(MAX_REDIRECTS + 1):
            async with session.get(url, allow_redirects=False) as reply:
                if reply.status in _REDIRECTS:
                    url = self._redirected(ref, url, reply.headers.get("location", ""))
                    continue
                if reply.status != 200:
                    raise ref.error(f"its host answered {reply.status}")
                if reply.headers.get("content-encoding", "identity") != "identity":
                    raise ref.error("its host sends it compressed")
                data = bytearray()
                async for chunk in reply.content.iter_any():
                    data += chunk
                    if len(data) > max_bytes:
                        raise ref.error(f"it is over {max_bytes / MIB:g} MiB; make it smaller")
                return ImageData(
                    reply.headers.get("content-type", "").partition(";")[0], bytes(data)
                )
        raise ref.error(f"its host redirects more than {MAX_REDIRECTS} times")

    def _redirected(self, ref: ImageRef, url: URL, location: str) -> URL:
        target = self._allowed(ref, str(url.join(URL(location))))
        if target.host != url.host or (url.scheme == "https" and target.scheme != "https"):
            raise ref.error("its host redirects to another one, which is not followed")
        return target

    def _allowed(self, ref: ImageRef, text: str) -> URL:
        """Return an address that may be asked; raises InvalidImageError for any other."""
        try:
            if len(text) > MAX_URL_CHARS:
                raise ValueError(f"it is over {MAX_URL_CHARS} characters")
            url = URL(text)
            host, port = (url.raw_host or "").rstrip("."), url.port
        except ValueError as exc:
            raise ref.error(f"its address cannot be read: {exc}") from exc
        if url.scheme not in ("http", "https") or not host:
            raise ref.error("an image is a data: URI or an http(s) address")
        if url.user is not None or url.password is not None:
            raise ref.error("an address with a user name or password is not fetched")
        default = 443 if url.scheme == "https" else 80
        if not any(_matches(each, host, port, default) for each in self._hosts):
            raise ref.error(
                f"images of {host} are not fetched; send it as a data: URI, or have the operator "
                "list the host in harness.torch.vision.url_hosts"
            )
        if _is_literal(host) and not self._is_allowed(host):
            raise ref.error(f"{host} is no public address")
        return url


class _PrivateAddressError(OSError):
    """A name was looked up and stands for an address that is not public."""


class _Guarded(AbstractResolver):
    """Looks names up, and refuses those with an address that may not be connected to."""

    def __init__(self, inner: AbstractResolver, is_allowed: Callable[[str], bool]) -> None:
        self._inner = inner
        self._is_allowed = is_allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        if not all(self._is_allowed(each["host"]) for each in found):
            raise _PrivateAddressError(f"{host} is no public address")
        return found

    async def close(self) -> None:
        await self._inner.close()


def _matches(pattern: str, host: str, port: int | None, default_port: int) -> bool:
    name, _, named_port = pattern.partition(":")
    if port != (int(named_port) if named_port else default_port):
        return False
    return host.endswith(name[1:]) if name.startswith("*.") else host == name


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _cause(exc: BaseException) -> str:
    inner = getattr(exc, "os_error", None)
    return str(inner if isinstance(inner, _PrivateAddressError) else exc) or type(exc).__name__
