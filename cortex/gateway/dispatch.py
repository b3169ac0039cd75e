"""From a request to an answer: route, load if need be, relay.

Another node is tried as long as the caller has not seen a byte of the answer.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from cortex.core.embeddings import TEXT, cannot
from cortex.core.errors import (
    CortexError,
    ModelLoadingError,
    QueueFullError,
    RemoteError,
    ServiceUnavailableError,
    UpstreamConnectionError,
)
from cortex.core.openai import parse_chat_request
from cortex.gateway.auth import ANONYMOUS, Caller
from cortex.gateway.decisions import GOES_ON, LEFT, Decision, Decisions
from cortex.gateway.fleet import Fleet, FleetSnapshot
from cortex.gateway.live import Live
from cortex.gateway.loads import Loads
from cortex.gateway.metrics import Metrics, RequestTiming
from cortex.gateway.neuron_client import NeuronClient, UnreachableError
from cortex.gateway.proxy import Exchange, Proxy, StreamMeter, note_usage, usage_of
from cortex.gateway.queues import Queues
from cortex.gateway.roster import nodes_listing, primary
from cortex.gateway.router import ColdLoad, Refuse, Serve
from cortex.gateway.routing import Leg, Routing, Trip

# Choices of a node and joined loads together, so that a fleet that thrashes ends a request.
MAX_ROUTES = 8
# So many further nodes see a request: one that brings engines down must not bring down all.
MAX_RETRIES = 2
# A node that failed after this long has had its chance; the caller is told instead of made to
# wait the same time again.
RETRY_WITHIN_S = 60.0
# A cold stream gets its first byte this soon, unless the load fails even sooner.
FIRST_BYTE_S = 0.25
LOADING_RETRY_S = 5.0
TOKENIZE_S = 30.0
MAX_TOKENIZE_BYTES = 64 << 20

# What a node answers when it cannot take the request just now but another one may.
_ELSEWHERE = frozenset([429, 502, 503, 504])
# What a node answers when it no longer holds the model: it was evicted since the last reading.
_GONE = frozenset(["model_not_found", "model_not_loaded", "model_unloading"])

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request as it came.

    Attributes:
        name: the model id or alias asked for.
        path: where at the node it goes.
        body: OpenAI-dialect JSON; its bytes are forwarded, but for `model` behind an alias.
        check: raises where the body is no request that our own engine would take.
        capability: what the model has to be made for.
        headers: those that the node is to see.
        caller: whom it is counted for.
        session: names the conversation it belongs to, where the caller says so.
        note: told at the end what it came to, however it ended.
        request_id: by which its decision can be asked for later.
        facts: headers that tell how it went; filled before the first byte of the answer.
    """

    name: str
    path: str
    body: bytes
    check: Callable[[bytes], object] = parse_chat_request
    capability: str = TEXT
    headers: Mapping[str, str] = field(default_factory=dict)
    caller: Caller = ANONYMOUS
    session: str = ""
    note: Callable[[RequestTiming], None] = lambda _: None
    request_id: str = ""
    facts: dict[str, str] = field(default_factory=dict)


class Translator(Protocol):
    """Turns the node's event stream into another dialect's."""

    def feed(self, chunk: bytes) -> bytes:
        """Return what a chunk of the node's stream becomes; often less than an event."""

    def end(self) -> bytes:
        """Return what the stream ends with, after the node's own proper end."""


class _Journey:
    """What has happened to one request so far."""

    def __init__(self, ask: Ask, timing: RequestTiming, decision: Decision, trip: Trip) -> None:
        self.ask = ask
        self.timing = timing
        self.decision = decision
        self.arrival_s = decision.arrival_s
        self.avoid: set[str] = set()
        self.error: CortexError | None = None
        self.queue: str | None = None
        # What the caller was told, and whether it stayed for the end of the answer.
        self.fault: str | None = None
        self.is_over = False
        self.is_checked = False
        self.routes = 0
        self.retries = 0
        self.trip = trip
        self.leg: Leg | None = None
        # A choice that was made to see whether there is anything to wait for.
        self.ready: Serve | None = None

    def first_token(self) -> None:
        """Pass on that the first content token has gone by."""
        if self.leg is not None:
            self.leg.first_token()

    def end_leg(self, timing: RequestTiming | None) -> None:
        """End the try in hand, if there is one."""
        if self.leg is not None:
            self.leg.end(timing)
            self.leg = None

    def body_for(self, model_id: str) -> bytes:
        """Return the body with the node's own name of the model."""
        if model_id == self.ask.name:
            return self.ask.body
        return with_model(self.ask.body, model_id)


_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def with_model(body: bytes, model_id: str) -> bytes:
    """Return a JSON object with `model` replaced and every other value as it was, byte by byte."""
    fields = _fields_decoder.decode(body)
    fields["model"] = msgspec.Raw(msgspec.json.encode(model_id))
    return msgspec.json.encode(fields)


class Dispatcher:
    """Takes requests through routing, loading and relaying, and meters them.

    Args:
        poke: has a node polled at once.
    """

    def __init__(
        self,
        *,
        live: Live,
        fleet: Fleet,
        routing: Routing,
        loads: Loads,
        proxy: Proxy,
        client: NeuronClient,
        metrics: Metrics,
        decisions: Decisions,
        poke: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._live = live
        self._fleet = fleet
        self._routing = routing
        self._loads = loads
        self._proxy = proxy
        self._client = client
        self._metrics = metrics
        self._decisions = decisions
        self._poke = poke
        self._clock = clock
        self._queues = Queues()

    async def stream(
        self, ask: Ask, keepalive: bytes, translator: Translator | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield the node's event stream as it comes, or translated.

        A cold model's stream begins with `keepalive`, so that the caller has a byte at once.

        Raises:
            CortexError: before the first byte as for `whole`; afterwards when the stream breaks.
        """
        journey = self._begin(ask)
        meter = StreamMeter(
            journey.timing, journey.arrival_s, self._clock, on_content=journey.first_token
        )
        exchange: Exchange | None = None
        try:
            self._enter(journey)
            if not await self._is_warm(journey):
                yield keepalive
            exchange = await self._open(journey, meter)
            chunk = exchange.first
            if translator is None:
                while chunk:
                    yield chunk
                    chunk = await exchange.next_chunk()
                journey.is_over = True
                return
            while chunk:
                yield translator.feed(chunk)
                chunk = await exchange.next_chunk()
            journey.is_over = True
            yield translator.end()
        except CortexError as exc:
            journey.timing.failed = True
            journey.fault = exc.message
            raise
        finally:
            if exchange is not None:
                exchange.close()
            self._finish(journey)

    async def whole(self, ask: Ask) -> bytes:
        """Return the node's whole answer.

        Raises:
            ModelLoadingError: the model is not loaded within `cold_wait_s`; its load goes on.
            CortexError: no node could take the request; why the last one could not.
        """
        journey = self._begin(ask)
        try:
            self._enter(journey)
            body = await self._call(journey)
            usage = usage_of(body)
            if usage is not None:
                note_usage(journey.timing, usage)
            journey.is_over = True
        except CortexError as exc:
            journey.timing.failed = True
            journey.fault = exc.message
            raise
        finally:
            self._finish(journey)
        return body

    async def tokenize(self, ask: Ask) -> bytes:
        """Return the answer of a node that knows the model's tokenizer; nothing is loaded.

        Raises:
            CortexError: no node that lists the model answers.
        """
        trip = Trip(ask.name, ask.body)
        model_id = primary(
            self._fleet.snapshot(), self._live.catalogue, ask.name, has_images=trip.has_images
        )
        body = ask.body if model_id == ask.name else with_model(ask.body, model_id)
        error: CortexError | None = None
        for node in nodes_listing(self._fleet.snapshot(), model_id):
            try:
                async with asyncio.timeout(TOKENIZE_S):
                    return await self._client.call(
                        node.name, node.endpoint, ask.path, body, MAX_TOKENIZE_BYTES
                    )
            except TimeoutError:
                error = UpstreamConnectionError(
                    f"node {node.name} did not answer within {TOKENIZE_S:g} s"
                )
            except RemoteError as exc:
                if exc.status not in _ELSEWHERE:
                    raise
                error = exc
            except UpstreamConnectionError as exc:
                self._fleet.record_fault(node.name, at_once=isinstance(exc, UnreachableError))
                self._node_failed(node.name, exc)
                error = exc
        if error is not None:
            raise error
        route = self._routing.choose(trip)
        if isinstance(route, Refuse):
            raise route.error
        raise ServiceUnavailableError(
            f"no node has the tokenizer of model '{ask.name}' yet; it comes with its first load"
        )

    def _begin(self, ask: Ask) -> _Journey:
        # Names that nobody knows are not made into labels: callers could make up any number.
        snapshot = self._fleet.snapshot()
        trip = Trip(ask.name, ask.body, ask.session)
        model_id = primary(snapshot, self._live.catalogue, ask.name, has_images=trip.has_images)
        known = snapshot.lists(model_id) or self._live.catalogue.find(model_id) is not None
        timing = RequestTiming(
            model=model_id if known else "",
            account=ask.caller.account_id,
            key=ask.caller.key_id,
        )
        decision = self._decisions.begin(
            ask.request_id, ask.name, ask.caller.account_id, self._clock()
        )
        return _Journey(ask, timing, decision, trip)

    def _enter(self, journey: _Journey) -> None:
        """Take a place among the model's callers.

        Raises:
            QueueFullError: there is none left.
        """
        model_id = journey.timing.model
        try:
            self._queues.enter(model_id, self._fleet.snapshot, self._live.settings.max_waiting)
        except QueueFullError:
            self._metrics.record_turned_away(model_id)
            raise
        journey.queue = model_id

    def _finish(self, journey: _Journey) -> None:
        if journey.queue is not None:
            self._queues.leave(journey.queue)
        now_s = self._clock()
        journey.timing.duration_s = now_s - journey.arrival_s
        journey.end_leg(journey.timing)
        left = journey.fault is None and not journey.is_over
        journey.decision.ended(journey.timing, LEFT if left else journey.fault, now_s)
        self._metrics.record(journey.timing)
        journey.ask.note(journey.timing)

    async def _is_warm(self, journey: _Journey) -> bool:
        """Whether the request can go on at once, after a short wait for a load to get ready."""
        route = self._route(journey)
        if isinstance(route, Serve):
            journey.ready = route
            return True
        try:
            async with asyncio.timeout(FIRST_BYTE_S):
                await self._load(journey, route)
        except TimeoutError:
            return False
        return True

    async def _open(self, journey: _Journey, meter: StreamMeter) -> Exchange:
        while True:
            route, journey.ready = journey.ready or self._route(journey), None
            if isinstance(route, ColdLoad):
                await self._load(journey, route)
                continue
            self._begin_leg(journey, route)
            try:
                return await self._proxy.open(
                    route,
                    journey.ask.path,
                    journey.body_for(route.model_id),
                    journey.ask.headers,
                    meter,
                )
            except CortexError as exc:
                self._again_or_raise(journey, route, exc)

    async def _call(self, journey: _Journey) -> bytes:
        while True:
            route = self._route(journey)
            if isinstance(route, ColdLoad):
                await self._wait_for_load(journey, route)
                continue
            self._begin_leg(journey, route)
            try:
                return await self._proxy.call(
                    route,
                    journey.ask.path,
                    journey.body_for(route.model_id),
                    journey.ask.headers,
                )
            except CortexError as exc:
                self._again_or_raise(journey, route, exc)

    def _route(self, journey: _Journey) -> Serve | ColdLoad:
        """Choose where to go next.

        Raises:
            CortexError: nowhere is left; the error of the last try, if there was one.
        """
        journey.routes += 1
        route = self._routing.choose(journey.trip, journey.avoid)
        journey.decision.chose(route, self._clock())
        if isinstance(route, Refuse):
            raise journey.error or route.error
        if isinstance(route, Serve) and route.spread is not None:
            self._loads.begin(route.spread)
        if isinstance(route, ColdLoad) and journey.error is not None and _is_busy(journey.error):
            # A full queue is no reason to turn other models out of another node.
            raise journey.error
        if isinstance(route, ColdLoad) and not journey.is_checked:
            # Nothing is loaded, and nobody evicted, for a request that is then refused. What an
            # external engine takes is for the engine to say.
            if not self._is_external(route.model_id):
                journey.ask.check(journey.ask.body)
                self._check_capability(journey.ask, route.model_id)
            journey.is_checked = True
        if journey.routes > MAX_ROUTES:
            raise journey.error or ServiceUnavailableError(
                f"model '{journey.ask.name}' is evicted as fast as it is loaded; the fleet is "
                "short of memory for what is asked of it",
                retry_after_s=LOADING_RETRY_S,
            )
        return route

    def _check_capability(self, ask: Ask, model_id: str) -> None:
        """Raise where every node that knows the model says that it is made for something else."""
        infos = [node.models.get(model_id) for node in self._fleet.snapshot().nodes]
        told = [info.capabilities for info in infos if info is not None and info.capabilities]
        if told and not any(ask.capability in each for each in told):
            raise cannot(ask.name, ask.capability)

    def _is_external(self, model_id: str) -> bool:
        entry = self._live.catalogue.find(model_id)
        if entry is not None and entry.is_external:
            return True
        infos = [node.models.get(model_id) for node in self._fleet.snapshot().nodes]
        return any(info is not None and info.harness == "command" for info in infos)

    def _begin_leg(self, journey: _Journey, serve: Serve) -> None:
        journey.timing.node = serve.node
        journey.timing.model = serve.model_id
        journey.leg = self._routing.begin(journey.trip, serve)
        decision = journey.decision
        decision.sent_s = self._clock()
        journey.ask.facts.update(
            {
                "x-cortex-node": serve.node,
                "x-cortex-queue-ms": f"{1e3 * (decision.queue_s or 0.0):.1f}",
                "x-cortex-load-ms": f"{1e3 * decision.load_s:.1f}",
            }
        )

    async def _load(self, journey: _Journey, cold: ColdLoad) -> None:
        """Start a load or join it, and wait for its end."""
        begun_s = self._clock()
        journey.decision.waits(joined=self._loads.is_loading(cold.model_id))
        outcome = GOES_ON
        try:
            await self._loads.ensure_loaded(cold)
            outcome = "loaded"
        except CortexError as exc:
            outcome = exc.message
            raise
        finally:
            journey.decision.loaded(begun_s, self._clock(), outcome)

    async def _wait_for_load(self, journey: _Journey, cold: ColdLoad) -> None:
        # Further loads, after a try elsewhere failed, do not lengthen the wait.
        limit_s = self._live.settings.cold_wait_s - (self._clock() - journey.arrival_s)
        try:
            async with asyncio.timeout(max(0.0, limit_s)):
                await self._load(journey, cold)
        except TimeoutError as exc:
            raise _still_loading(self._fleet.snapshot(), cold.model_id) from exc

    def _again_or_raise(self, journey: _Journey, serve: Serve, exc: CortexError) -> None:
        """Note a failed try; raise where another one is pointless."""
        journey.end_leg(None)
        journey.decision.came_to(exc.message, self._clock())
        if isinstance(exc, RemoteError) and exc.code in _GONE:
            # It was there at the last reading; now it has to be loaded again, here or elsewhere.
            self._fleet.record_status(serve.node, serve.model_id, "unloaded")
            self._poke(serve.node)
            return
        journey.error = exc
        journey.avoid.add(serve.node)
        if isinstance(exc, UpstreamConnectionError):
            self._node_failed(serve.node, exc)
        elif not isinstance(exc, RemoteError) or exc.status not in _ELSEWHERE:
            raise exc
        journey.retries += 1
        if journey.retries > MAX_RETRIES or self._clock() - journey.arrival_s > RETRY_WITHIN_S:
            raise exc
        journey.decision.retries = journey.retries
        self._metrics.record_retry(serve.model_id, serve.node)

    def _node_failed(self, node: str, exc: UpstreamConnectionError) -> None:
        _logger.warning("a request failed: %s", exc.message, extra={"node": node})
        # Its breaker knows already; whether it is there at all is found out at once.
        self._poke(node)


def _is_busy(exc: CortexError) -> bool:
    return exc.status == 429 or exc.code == "queue_full"


def _still_loading(snapshot: FleetSnapshot, model_id: str) -> ModelLoadingError:
    extras: dict[str, object] = {}
    left_s: float | None = None
    for node in snapshot.nodes:
        info = node.models.get(model_id)
        if info is not None and info.status == "loading":
            extras["node"] = node.name
            if info.progress is not None:
                extras["progress"] = msgspec.to_builtins(info.progress)
                left_s = info.progress.seconds_left
            break
    return ModelLoadingError(
        f"model '{model_id}' is still loading; the load goes on, try again shortly",
        retry_after_s=max(1.0, left_s) if left_s is not None else LOADING_RETRY_S,
        extras=extras,
    )
