"""Questions that the commands put to a gateway, and what they get for an answer."""

import asyncio
from typing import TypeVar

import aiohttp
import msgspec

from cortex.core.errors import CortexError, UpstreamConnectionError, UpstreamMalformedError
from cortex.core.openai import parse_error

TIMEOUT_S = 10.0
MAX_BODY_BYTES = 16 << 20

T = TypeVar("T")


class InquiryError(Exception):
    """A question to the gateway failed.

    Attributes:
        status: of the answer, None where none came.
        body: of an answer other than 200.
    """

    def __init__(self, message: str, status: int | None = None, body: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.body = body


async def get_body(session: aiohttp.ClientSession, url: str) -> bytes:
    """Return the body of a 200.

    Raises:
        InquiryError: there is no answer, or another one.
    """
    try:
        async with asyncio.timeout(TIMEOUT_S), session.get(url) as response:
            body = b""
            while chunk := await response.content.readany():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise InquiryError(f"{url} answered more than {MAX_BODY_BYTES} bytes")
    except TimeoutError as exc:
        raise InquiryError(f"no answer within {TIMEOUT_S:g} s") from exc
    except (aiohttp.ClientError, OSError, ValueError) as exc:
        raise InquiryError(str(exc)) from exc
    if response.status != 200:
        raise InquiryError(f"{url} answered {response.status}", response.status, body)
    return body


async def inquire(
    endpoint: str, path: str, decoder: "msgspec.json.Decoder[T]", key: str | None = None
) -> T:
    """Ask a gateway one question.

    Raises:
        CortexError: its error, or why there is no answer.
    """
    base = endpoint.rstrip("/")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(headers=headers) as session:
        try:
            body = await get_body(session, base + path)
        except InquiryError as exc:
            raise _error(base, exc) from exc
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise UpstreamMalformedError(f"{base} does not answer as a gateway: {exc}") from exc


def _error(base: str, exc: InquiryError) -> CortexError:
    if exc.status is None:
        return UpstreamConnectionError(f"{base} cannot be reached: {exc}")
    return parse_error(exc.status, exc.body)
