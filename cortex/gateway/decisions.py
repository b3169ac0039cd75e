"""Why a request went where it went: its choices, tries and loads, kept for the last few hundred.

Recorded as the request goes, from what the choices carry along anyway; put into words only when
somebody asks (`GET /why/{request_id}`, `cortex why`).
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from cortex.core.errors import UnknownRequestError
from cortex.gateway.costs import Cost
from cortex.gateway.metrics import RequestTiming
from cortex.gateway.router import ColdLoad, Considered, Refuse, Route

MAX_DECISIONS = 512
# A request makes a bounded number of choices; what came after these is not told.
MAX_STEPS = 16

# What a wait for a load comes to that its caller cut short.
GOES_ON = "the load goes on"
# What a request comes to whose caller did not stay for the end of its answer.
LEFT = "the caller left"

Action = Literal["serve", "load", "refuse"]
State = Literal["in progress", "ok", "failed", "left"]


class CostReport(msgspec.Struct, kw_only=True, frozen=True):
    """A cost in seconds and what it is made of."""

    total_s: float
    queue_s: float
    prefill_s: float
    others_s: float
    load_s: float
    victims_s: float


class OptionReport(msgspec.Struct, kw_only=True, frozen=True):
    """A node that could take the request."""

    node: str
    model: str
    status: str | None
    cost: CostReport
    cached_tokens: int = 0
    victims: list[str] = []
    doubt: str | None = None


class RejectionReport(msgspec.Struct, kw_only=True, frozen=True):
    """A node that could not, and why."""

    node: str
    model: str
    reason: str


class StepReport(msgspec.Struct, kw_only=True, frozen=True):
    """One choice; its option is the first of `options`.

    Attributes:
        load: whether a load was begun for it, or one under way joined.
        outcome: what came of it, None while it goes on.
        further: a node where a further replica was loaded meanwhile.
    """

    at_ms: float
    action: Action
    node: str | None = None
    model: str | None = None
    load: Literal["begun", "joined"] | None = None
    waited_ms: float | None = None
    outcome: str | None = None
    further: str | None = None
    options: list[OptionReport] = []
    rejected: list[RejectionReport] = []


class WhyReport(msgspec.Struct, kw_only=True, frozen=True):
    """`GET /why/{request_id}`.

    Attributes:
        name: what was asked for; `model` is what served it.
        queue_ms: from arrival until a node was sent the request, loads aside.
    """

    request_id: str
    name: str
    state: State
    model: str | None = None
    node: str | None = None
    error: str | None = None
    retries: int = 0
    queue_ms: float | None = None
    load_ms: float = 0.0
    ttft_ms: float | None = None
    duration_ms: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    steps: list[StepReport] = []


@dataclass(slots=True)
class _Step:
    at_s: float
    route: Route
    joined: bool | None = None
    done_s: float | None = None
    outcome: str | None = None


@dataclass(slots=True)
class Decision:
    """What happened to one request; times are on the gateway's clock."""

    request_id: str
    name: str
    account: str
    arrival_s: float
    steps: list[_Step] = field(default_factory=list)
    retries: int = 0
    load_s: float = 0.0
    sent_s: float | None = None
    error: str | None = None
    timing: RequestTiming | None = None

    @property
    def queue_s(self) -> float | None:
        """How long it waited here before it was sent, loads aside; None if it never was."""
        return None if self.sent_s is None else self.sent_s - self.arrival_s - self.load_s

    def chose(self, route: Route, now_s: float) -> None:
        """Note a choice; going on to wait for the same load is none."""
        last = self.steps[-1] if self.steps else None
        if (
            last is not None
            and last.outcome == GOES_ON
            and isinstance(last.route, ColdLoad)
            and isinstance(route, ColdLoad)
            and last.route.model_id == route.model_id
        ):
            last.outcome = None
            return
        if len(self.steps) < MAX_STEPS:
            self.steps.append(_Step(at_s=now_s, route=route))

    def waits(self, *, joined: bool) -> None:
        """Note that the load just chosen is waited for, and whether it was under way."""
        if self.steps and self.steps[-1].joined is None:
            self.steps[-1].joined = joined

    def loaded(self, begun_s: float, now_s: float, outcome: str) -> None:
        """Note the end of a wait for a load."""
        self.load_s += now_s - begun_s
        self.came_to(outcome, now_s)

    def came_to(self, outcome: str, now_s: float) -> None:
        """Note what the last choice came to."""
        if self.steps:
            self.steps[-1].done_s = now_s
            self.steps[-1].outcome = outcome

    def ended(self, timing: RequestTiming, error: str | None, now_s: float) -> None:
        """Note the end of the request."""
        self.timing = timing
        self.error = error
        last = self.steps[-1] if self.steps else None
        if last is not None and last.outcome is None:
            self.came_to(error or ("failed" if timing.failed else "answered"), now_s)

    def report(self) -> WhyReport:
        """Return it in words."""
        timing = self.timing
        state: State = "in progress"
        if timing is not None:
            state = "failed" if timing.failed else "ok"
        if self.error == LEFT:
            state = "left"
        return WhyReport(
            request_id=self.request_id,
            name=self.name,
            state=state,
            model=(timing.model or None) if timing is not None else None,
            node=(timing.node or None) if timing is not None else None,
            error=self.error,
            retries=self.retries,
            queue_ms=_ms(self.queue_s),
            load_ms=_ms(self.load_s) or 0.0,
            ttft_ms=_ms(timing.ttft_s) if timing is not None else None,
            duration_ms=_ms(timing.duration_s) if timing is not None else None,
            prompt_tokens=timing.prompt_tokens if timing is not None else 0,
            cached_tokens=timing.cached_tokens if timing is not None else 0,
            completion_tokens=timing.completion_tokens if timing is not None else 0,
            steps=[self._step(each) for each in self.steps],
        )

    def _step(self, step: _Step) -> StepReport:
        route = step.route
        options, rejected = option_reports(route.considered)
        waited_s = None if step.done_s is None else step.done_s - step.at_s
        at_ms = _ms(step.at_s - self.arrival_s) or 0.0
        if isinstance(route, Refuse):
            return StepReport(
                at_ms=at_ms, action="refuse", outcome=route.error.message, rejected=rejected
            )
        if isinstance(route, ColdLoad):
            return StepReport(
                at_ms=at_ms,
                action="load",
                node=route.plans[0].node,
                model=route.model_id,
                load="joined" if step.joined else "begun",
                waited_ms=_ms(waited_s),
                outcome=step.outcome,
                options=options,
                rejected=rejected,
            )
        return StepReport(
            at_ms=at_ms,
            action="serve",
            node=route.node,
            model=route.model_id,
            waited_ms=_ms(waited_s),
            outcome=step.outcome,
            further=route.spread.plans[0].node if route.spread is not None else None,
            options=options,
            rejected=rejected,
        )


class Decisions:
    """The last requests by their ids, bounded."""

    def __init__(self, max_decisions: int = MAX_DECISIONS) -> None:
        self._max_decisions = max_decisions
        self._decisions: OrderedDict[str, Decision] = OrderedDict()

    def begin(self, request_id: str, name: str, account: str, now_s: float) -> Decision:
        """Return the record of a new request; of two with the same id the later one stays."""
        decision = Decision(request_id, name, account, now_s)
        if request_id:
            self._decisions[request_id] = decision
            self._decisions.move_to_end(request_id)
            if len(self._decisions) > self._max_decisions:
                self._decisions.popitem(last=False)
        return decision

    def find(self, request_id: str, account: str | None) -> Decision:
        """Return the record of a request of that account; None for whoever sees all.

        Raises:
            UnknownRequestError: there is none, or no more.
        """
        decision = self._decisions.get(request_id)
        if decision is None or account not in (None, decision.account):
            raise UnknownRequestError(
                f"request '{request_id[:128]}' is not among the last {self._max_decisions} that "
                "this gateway has routed; its id is in the `x-request-id` header of the answer"
            )
        return decision


def option_reports(considered: Considered) -> tuple[list[OptionReport], list[RejectionReport]]:
    """Return what a choice was made from, in words."""
    options = [
        OptionReport(
            node=each.node,
            model=each.model_id,
            status=each.status,
            cost=_cost(each.cost),
            cached_tokens=each.cached_tokens,
            victims=list(each.victims),
            doubt=each.doubt,
        )
        for each in considered.options
    ]
    rejected = [
        RejectionReport(node=each.node, model=each.model_id, reason=each.reason)
        for each in considered.rejected
    ]
    return options, rejected


def _cost(cost: Cost) -> CostReport:
    return CostReport(
        total_s=round(cost.total_s, 4),
        queue_s=round(cost.queue_s, 4),
        prefill_s=round(cost.prefill_s, 4),
        others_s=round(cost.others_s, 4),
        load_s=round(cost.load_s, 4),
        victims_s=round(cost.victims_s, 4),
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 1)
