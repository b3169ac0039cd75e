"""Who has to leave so that a newcomer fits: a pure choice over the residents of one node."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Strategy = Literal["lru", "priority"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A resident of the node, with what the catalogue says of it.

    Attributes:
        memory_bytes: what its end gives back; 0 where nobody knows.
        idle_s: seconds since its last use, None when it was never used.
        protected_s: how much of its minimum residency is left.
    """

    id: str
    memory_bytes: int
    idle_s: float | None
    in_flight: int
    priority: int
    pinned: bool
    protected_s: float = 0.0


def kept_because(each: Candidate, priority: int) -> str | None:
    """Return why a resident may not make room for a newcomer of that priority, None if it may."""
    if each.pinned:
        return "is pinned here"
    if each.in_flight:
        return f"has {each.in_flight} requests in hand"
    if each.protected_s > 0:
        return f"has {each.protected_s:.0f} s of its minimum residency left"
    if each.priority > priority:
        return f"has priority {each.priority}, above {priority}"
    return None


def plan_eviction(
    residents: Sequence[Candidate],
    *,
    needed_bytes: int,
    free_bytes: int,
    priority: int,
    strategy: Strategy,
) -> list[str] | None:
    """Return the models to evict, the first to go first, or None when no plan makes room.

    Never one with requests in flight, never a pinned one, never one inside its minimum residency,
    never one of a higher priority than the newcomer's. `lru` takes the longest unused first (never
    used counts as longest), `priority` the lowest priority and among equals the longest unused. No
    more than needed: what turns out superfluous is kept, the most worth keeping first. While sizes
    are unknown one victim is named at a time, and the next try tells whether it was enough.
    """
    missing = needed_bytes - free_bytes
    if missing <= 0:
        return []
    order = sorted(
        (each for each in residents if kept_because(each, priority) is None),
        key=lambda each: (_class(each, strategy), -_idle(each), each.id),
    )
    victims: list[Candidate] = []
    freed = 0
    for each in order:
        if freed >= missing:
            break
        victims.append(each)
        if each.memory_bytes == 0:
            return [victim.id for victim in victims]
        freed += each.memory_bytes
    if freed < missing:
        return None
    for each in reversed(victims[:-1]):
        if freed - each.memory_bytes >= missing:
            freed -= each.memory_bytes
            victims.remove(each)
    return [victim.id for victim in victims]


def _class(each: Candidate, strategy: Strategy) -> int:
    return each.priority if strategy == "priority" else 0


def _idle(each: Candidate) -> float:
    return float("inf") if each.idle_s is None else each.idle_s
