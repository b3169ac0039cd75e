"""What a request would cost at a replica, in seconds: one figure that candidates are ranked by.

Queue wait, prefill of what no cache holds, the load of a cold model and the return of those that
would have to leave for it. Everything here is a function of what it is given.
"""

from collections.abc import Mapping

import msgspec

from cortex.gateway.fleet import FleetSnapshot, NodeView
from cortex.gateway.rates import RateBook

Replica = tuple[str, str]  # (node, model id)

ASSUMED_PROMPT_TOKENS = 512
ASSUMED_SEATS = 8
# A full replica decodes each of its sequences slower; so much of a request's time is lost to
# all the others together.
SHARED_DECODE = 0.25
# A prefill holds up those in hand, each by so much of it. Without this a fleet at its limit sends
# prompts away from their prefixes to save a wait, and works all the more for it.
HELD_UP = 0.25
# A victim that was used just now is likely to be asked for again, one idle for this long half so.
LIKELY_BACK_S = 600.0
NEVER_USED_SHARE = 0.1


class Cost(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """Seconds until the first token, and what others would pay.

    Attributes:
        others_s: how much the prefill holds up the requests in hand, all together.
        victims_s: what the return of those that have to leave would take.
    """

    queue_s: float = 0.0
    prefill_s: float = 0.0
    others_s: float = 0.0
    load_s: float = 0.0
    victims_s: float = 0.0

    @property
    def total_s(self) -> float:
        """What candidates are ranked by."""
        return self.queue_s + self.prefill_s + self.others_s + self.load_s + self.victims_s


class Demand(msgspec.Struct, kw_only=True, frozen=True):
    """What one request asks for.

    Attributes:
        prompt_tokens: how long its prompt is, about.
        has_images: whether only models with eyes will do.
        cached: tokens of it that a replica is known to hold already.
        last_used: when a replica last got a prompt, in no unit. Of equal ones the one unused for
            longest is chosen, so that new prompts do not all crowd the caches of one.
    """

    prompt_tokens: int = ASSUMED_PROMPT_TOKENS
    has_images: bool = False
    cached: Mapping[Replica, int] = {}
    last_used: Mapping[Replica, int] = {}


class Knowledge(msgspec.Struct, kw_only=True, frozen=True):
    """What the gateway has learned, beside the fleet's own snapshot.

    Attributes:
        queued_s: seconds of prefill that requests sent before still have ahead of them.
    """

    rates: RateBook = msgspec.field(default_factory=RateBook)
    queued_s: Mapping[Replica, float] = {}


def warm_cost(
    snapshot: FleetSnapshot, node: NodeView, model_id: str, demand: Demand, known: Knowledge
) -> Cost:
    """Return what a request costs at a replica that is loaded."""
    replica = (node.name, model_id)
    requests = snapshot.requests(node, model_id)
    load = node.loads.get(model_id)
    seats = load.max_in_flight if load is not None and load.max_in_flight else ASSUMED_SEATS
    service_s = known.rates.service_s(node.name, model_id)
    # With every seat taken it waits for one to become free, and so do those before it.
    turns = max(0, requests + 1 - seats) / seats
    shared = SHARED_DECODE * requests / seats
    # A model whose engine is started again is loaded to its callers, who wait for it.
    work_s = prefill_s(node, model_id, demand, known)
    is_recycling = node.models[model_id].progress is not None
    return Cost(
        queue_s=known.queued_s.get(replica, 0.0) + (turns + shared) * service_s,
        load_s=load_s(node, model_id, None, known) if is_recycling else 0.0,
        prefill_s=work_s,
        others_s=HELD_UP * requests * work_s,
    )


def prefill_s(node: NodeView, model_id: str, demand: Demand, known: Knowledge) -> float:
    """Return how long the node works on what its caches do not hold of the prompt."""
    cached = demand.cached.get((node.name, model_id), 0)
    left = max(1, demand.prompt_tokens - cached)
    return left / known.rates.prefill_tok_s(node, model_id)


def load_s(node: NodeView, model_id: str, num_bytes: int | None, known: Knowledge) -> float:
    """Return how long a load takes, or the rest of one that is under way."""
    whole_s = known.rates.load_s(node, model_id, num_bytes)
    info = node.models.get(model_id)
    if info is None or info.progress is None:
        return whole_s
    progress = info.progress
    if progress.seconds_left is not None:
        return progress.seconds_left
    if progress.bytes_total:
        return whole_s * max(0.0, 1 - progress.bytes_done / progress.bytes_total)
    return whole_s


def return_s(node: NodeView, model_id: str, known: Knowledge) -> float:
    """Return what a victim's return would cost, by how likely somebody asks for it again."""
    info = node.models.get(model_id)
    idle_s = info.last_used_s if info is not None else None
    likely = NEVER_USED_SHARE if idle_s is None else LIKELY_BACK_S / (LIKELY_BACK_S + idle_s)
    weights = info.weight_bytes if info is not None else None
    return likely * known.rates.load_s(node, model_id, weights)
