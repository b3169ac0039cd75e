"""An open-loop load: requests leave at a rate, whatever becomes of those before."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

CONNECT_S = 5.0
# Chunks begin with their id; comments and error events are no answer yet.
FIRST = b'data: {"id"'
DONE = b"data: [DONE]"


@dataclass
class Outcome:
    """What became of one request; times in seconds on the loop's clock.

    Attributes:
        first_s: when the answer of a stream began.
        error: None for a whole, proper answer.
    """

    url: str
    stream: bool
    begun_s: float
    first_s: float | None = None
    ended_s: float = 0.0
    error: str | None = None

    @property
    def had_started(self) -> bool:
        """Whether the caller had seen some of the answer."""
        return self.first_s is not None

    @property
    def took_s(self) -> float:
        """From the request to the end of the answer."""
        return self.ended_s - self.begun_s


@dataclass
class Outcomes:
    """What became of all of them."""

    all: list[Outcome] = field(default_factory=list)

    @property
    def failed(self) -> list[Outcome]:
        """Requests without a whole, proper answer."""
        return [each for each in self.all if each.error is not None]

    @property
    def failed_before_the_start(self) -> list[Outcome]:
        """Those of them whose caller had seen nothing of it: another node should have had them."""
        return [each for each in self.failed if not each.had_started]

    def percentile(self, share: float) -> float:
        """Return how long the given share of the good ones took at most."""
        took = sorted(each.took_s for each in self.all if each.error is None)
        return took[min(len(took) - 1, int(share * len(took)))]


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Outcome:
    """Send one chat request and read its answer."""
    loop = asyncio.get_running_loop()
    outcome = Outcome(url, bool(body.get("stream")), loop.time())
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
            tail = b""
            while chunk := await reply.content.readany():
                tail = (tail + chunk)[-4096:]
                if outcome.first_s is None and outcome.stream and FIRST in tail:
                    outcome.first_s = loop.time()
            if reply.status != 200 or (outcome.stream and DONE not in tail):
                outcome.error = f"{reply.status} {tail[-300:]!r}"
    except (aiohttp.ClientError, OSError, TimeoutError) as exc:
        outcome.error = repr(exc)
    outcome.ended_s = loop.time()
    return outcome


async def run_load(
    urls: Sequence[str],
    body: Callable[[int], dict[str, Any]],
    *,
    rate: float,
    seconds: float,
    meanwhile: Callable[[], Any] | None = None,
    limit_s: float = 30.0,
) -> Outcomes:
    """Send `rate` requests a second, to the URLs in turn, and wait for all answers.

    Args:
        body: makes the request of a number.
        meanwhile: awaited beside the load, from its beginning.
        limit_s: how long the answers may take after the last request; a later one is a failure.
    """
    loop = asyncio.get_running_loop()
    outcomes = Outcomes()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
    connector = aiohttp.TCPConnector(limit=0)

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        url, begun_s = urls[number % len(urls)], loop.time()
        try:
            async with asyncio.timeout(seconds + limit_s):
                outcomes.all.append(await ask(session, url, body(number)))
        except TimeoutError:
            late = Outcome(url, False, begun_s, ended_s=loop.time(), error="no answer in time")
            outcomes.all.append(late)

    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        async with asyncio.TaskGroup() as tasks:
            if meanwhile is not None:
                tasks.create_task(meanwhile())
            begun_s = loop.time()
            for number in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, begun_s + number / rate - loop.time()))
                tasks.create_task(one(session, number))
    return outcomes
