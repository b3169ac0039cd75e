"""A breaker per node: a pure state machine over what became of requests.

It keeps requests away from a node that answers its management routes and fails what it is given.
Time is passed in. Errors that are the request's own fault are no failures; the caller decides.
"""

from dataclasses import dataclass, replace
from typing import Literal

# So many failures in a row open it.
MAX_FAILURES = 3
# How long it stays open the first time, doubled with every trial that fails.
OPEN_S = 2.0
MAX_OPEN_S = 30.0
# A trial that says nothing for so long (a long answer) does not hold up the next one.
TRIAL_S = 10.0

State = Literal["closed", "open", "half_open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Breaker:
    """What is known of how one node's requests end.

    Attributes:
        failures: in a row, while closed.
        trips: how often it opened since the last success.
        until_s: when the next trial may pass, unless closed.
    """

    state: State = "closed"
    failures: int = 0
    trips: int = 0
    until_s: float = 0.0

    def admits(self, now_s: float) -> bool:
        """Whether a request may go to the node."""
        return self.state == "closed" or now_s >= self.until_s

    def wait_s(self, now_s: float) -> float:
        """Return how long it admits nothing, unless something happens."""
        return 0.0 if self.state == "closed" else max(0.0, self.until_s - now_s)


def tried(breaker: Breaker, now_s: float) -> Breaker:
    """Return the state after a request was let through as the trial that decides."""
    return replace(breaker, state="half_open", until_s=now_s + TRIAL_S)


CLOSED = Breaker()


def failed(
    breaker: Breaker, now_s: float, *, trial: bool = False, at_once: bool = False
) -> Breaker:
    """Return the state after a request failed.

    Args:
        trial: it was the trial; requests sent earlier say nothing about the node of today.
        at_once: the failure leaves no doubt (nobody listens), so that one is enough.
    """
    if breaker.state == "closed":
        failures = breaker.failures + 1
        if failures < MAX_FAILURES and not at_once:
            return replace(breaker, failures=failures)
    elif not trial:
        return breaker
    return Breaker(
        state="open",
        trips=breaker.trips + 1,
        until_s=now_s + min(MAX_OPEN_S, OPEN_S * 2**breaker.trips),
    )


def abandoned(breaker: Breaker) -> Breaker:
    """Return the state after a trial that ended without telling anything (its caller left)."""
    return replace(breaker, until_s=0.0) if breaker.state == "half_open" else breaker


def returned(breaker: Breaker) -> Breaker:
    """Return the state after the node came back from being away: a trial may pass at once."""
    return replace(breaker, until_s=0.0) if breaker.state == "open" else breaker
