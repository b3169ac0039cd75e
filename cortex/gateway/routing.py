"""Where each request goes, and what is learned from how it went.

The owner of everything that the gateway learns: rates, prefixes, backlogs. The choice itself is
`router.choose_route`, a pure function of the fleet's snapshot and of these.
"""

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Set as AbstractSet

from cortex.gateway.backlog import Backlog
from cortex.gateway.costs import ASSUMED_PROMPT_TOKENS, Demand, Knowledge, Replica, prefill_s
from cortex.gateway.fleet import Fleet, FleetSnapshot
from cortex.gateway.live import Live
from cortex.gateway.metrics import RequestTiming
from cortex.gateway.pictures import has_images, text_bytes
from cortex.gateway.prefixes import MIN_EXPECTED_TOKENS, Chain, Match, PrefixIndex, chain_of
from cortex.gateway.rates import RateBook
from cortex.gateway.roster import nodes_serving, primary
from cortex.gateway.router import Considered, Route, Serve, choose_route, further_placements

BYTES_PER_TOKEN = 4.0
MIN_HASHED_BYTES = 512
MAX_CALIBRATED = 256
_WEIGHT_OF_NEW = 0.1


class Trip:
    """What routing knows of one request.

    Attributes:
        name: the model, alias or virtual model asked for.
        body: OpenAI-dialect JSON.
        session: names the conversation, where the caller says so.

    Attributes:
        has_images: whether only models with eyes will do.
    """

    def __init__(self, name: str, body: bytes, session: str = "") -> None:
        self.name = name
        self.body = body
        self.has_images = has_images(body)
        self.session = session
        self.chain: Chain | None = None
        self.matches: dict[Replica, Match] = {}


class Leg:
    """One try of a request at one replica, from when it is sent to its end."""

    def __init__(
        self, routing: "Routing", replica: Replica, trip: Trip, *, work_s: float, is_alone: bool
    ) -> None:
        self.replica = replica
        self._routing = routing
        self._trip = trip
        self._is_alone = is_alone
        self._sent_s = routing.clock()
        self._work_s = work_s
        self._expected_s = routing.backlog.add(replica, work_s, self._sent_s)
        chain = trip.chain
        self._stamp = -1
        if chain is not None:
            self._stamp = routing.prefixes.add(
                replica, chain, trip.session, ready_s=self._expected_s
            )
        self._first_s: float | None = None
        self._is_open = True

    def first_token(self) -> None:
        """Note that the prompt is through."""
        if self._first_s is None:
            self._first_s = self._routing.clock()
            early_s = self._expected_s - self._first_s
            self._routing.backlog.shorten(self.replica, early_s)
            if early_s > 0 and self._trip.chain is not None:
                self._routing.prefixes.ready(self.replica, self._trip.chain, self._first_s)

    def end(self, timing: RequestTiming | None) -> None:
        """Learn from how it went; None: it came to nothing here. Later calls do nothing."""
        if not self._is_open:
            return
        self._is_open = False
        routing, trip, replica = self._routing, self._trip, self.replica
        now_s = routing.clock()
        if self._first_s is None:
            if timing is not None and timing.prompt_tokens and trip.chain is not None:
                routing.prefixes.ready(replica, trip.chain, now_s)
            # Its prompt is no longer ahead of anybody, whether it was worked off or not.
            routing.backlog.shorten(replica, min(self._work_s, self._expected_s - now_s))
        if self._first_s is None and (timing is None or timing.failed or not timing.prompt_tokens):
            if trip.chain is not None:
                routing.prefixes.retract(replica, trip.chain, self._stamp)
            return
        if timing is None or not timing.prompt_tokens:
            return
        if not trip.has_images:
            routing.calibrate(replica[1], len(trip.body), timing.prompt_tokens)
        match = trip.matches.get(replica)
        if match is not None:
            routing.prefixes.learn(replica, match, timing.prompt_tokens, timing.cached_tokens)
        if self._first_s is not None and self._is_alone:
            uncached = timing.prompt_tokens - timing.cached_tokens
            routing.rates.learn_prefill(*replica, uncached, self._first_s - self._sent_s)
        if not timing.failed:
            routing.rates.learn_service(*replica, now_s - self._sent_s)


class Routing:
    """The owner of what is learned; one for a gateway."""

    def __init__(
        self, live: Live, fleet: Fleet, rates: RateBook, *, clock: Callable[[], float]
    ) -> None:
        self.clock = clock
        self.rates = rates
        self.prefixes = PrefixIndex()
        self.backlog = Backlog()
        self._live = live
        self._fleet = fleet
        self._bytes_per_token: OrderedDict[str, float] = OrderedDict()
        self._resident_s: dict[Replica, float] = {}

    def choose(self, trip: Trip, avoid: AbstractSet[str] = frozenset()) -> Route:
        """Choose where a request goes next."""
        snapshot = self._fleet.snapshot()
        catalogue = self._live.catalogue
        model_id = primary(snapshot, catalogue, trip.name, has_images=trip.has_images)
        return choose_route(
            snapshot,
            catalogue,
            trip.name,
            avoid=avoid,
            demand=self._demand(snapshot, trip, model_id, avoid),
            known=Knowledge(rates=self.rates, queued_s=self.backlog.ahead_s(self.clock())),
            policy=self._live.config.eviction,
        )

    def further(self, model_id: str) -> Considered:
        """Return where a model could be loaded beside where it is."""
        known = Knowledge(rates=self.rates, queued_s=self.backlog.ahead_s(self.clock()))
        return further_placements(
            self._fleet.snapshot(),
            self._live.catalogue,
            model_id,
            known=known,
            policy=self._live.config.eviction,
        )

    def begin(self, trip: Trip, serve: Serve) -> Leg:
        """Note that a request is sent to the replica that was chosen for it."""
        replica = (serve.node, serve.model_id)
        snapshot = self._fleet.snapshot()
        node = snapshot.node(serve.node)
        if node is None:
            # The configuration lost the node this very moment; trying it tells the rest.
            return Leg(self, replica, trip, work_s=0.0, is_alone=False)
        demand = self._demand_of(trip, serve.model_id)
        knowledge = Knowledge(rates=self.rates)
        return Leg(
            self,
            replica,
            trip,
            work_s=prefill_s(node, serve.model_id, demand, knowledge),
            is_alone=snapshot.requests(node, serve.model_id) == 0,
        )

    def calibrate(self, model_id: str, num_bytes: int, num_tokens: int) -> None:
        """Learn how many bytes of a request make a token."""
        old = self._bytes_per_token.get(model_id, BYTES_PER_TOKEN)
        new = num_bytes / num_tokens
        self._bytes_per_token[model_id] = old + _WEIGHT_OF_NEW * (new - old)
        self._bytes_per_token.move_to_end(model_id)
        if len(self._bytes_per_token) > MAX_CALIBRATED:
            self._bytes_per_token.popitem(last=False)

    async def refresh(self) -> None:
        """Forget the prefixes of engines that have ended since the last call."""
        seen: dict[Replica, float] = {}
        for node in self._fleet.snapshot().nodes:
            for model_id, info in node.models.items():
                if node.status(model_id) == "loaded":
                    seen[node.name, model_id] = info.resident_s or 0.0
        for replica, before_s in self._resident_s.items():
            now_s = seen.get(replica)
            if now_s is None or now_s < before_s:
                self.prefixes.drop(replica)
        self._resident_s = seen

    def _demand(
        self, snapshot: FleetSnapshot, trip: Trip, model_id: str, avoid: AbstractSet[str]
    ) -> Demand:
        nodes = nodes_serving(snapshot, model_id, avoid=avoid)
        if len(nodes) > 1 and len(trip.body) >= MIN_HASHED_BYTES:
            # Hashing pays only where there is a choice, and something to be had from a cache.
            if trip.chain is None:
                trip.chain = chain_of(trip.body)
                trip.session = trip.session or trip.chain.cache_key or ""
            replicas = [(node.name, model_id) for node in nodes]
            # Unless a node says otherwise, a prefix counts only where every kind of model can
            # go on from it.
            ends_only = {
                (node.name, model_id)
                for node in nodes
                if node.models[model_id].prefix_match != "block"
            }
            trip.matches = self.prefixes.match(trip.chain, replicas, ends_only, now_s=self.clock())
            if trip.session:
                known = self.prefixes.session(trip.session, trip.chain.num_bytes)
                if known is not None and known[0] in replicas:
                    trip.matches.setdefault(*known)
        return self._demand_of(trip, model_id)

    def _demand_of(self, trip: Trip, model_id: str) -> Demand:
        per_token = self._bytes_per_token.get(model_id, BYTES_PER_TOKEN)
        num_bytes = text_bytes(trip.body, per_token) if trip.has_images else len(trip.body)
        prompt_tokens = int(num_bytes / per_token) or ASSUMED_PROMPT_TOKENS
        cached = {replica: match.tokens(prompt_tokens) for replica, match in trip.matches.items()}
        # A short prompt crowds nobody's cache.
        is_long = prompt_tokens >= MIN_EXPECTED_TOKENS and trip.chain is not None
        return Demand(
            prompt_tokens=prompt_tokens,
            has_images=trip.has_images,
            cached=cached,
            last_used=self.prefixes.last_used if is_long else {},
        )
