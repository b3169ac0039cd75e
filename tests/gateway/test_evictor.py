"""Who has to leave: the plan, and what it never does."""

from hypothesis import given
from hypothesis import strategies as st

from cortex.gateway.evictor import Candidate, Strategy, plan_eviction


def resident(
    name: str,
    size: int = 10,
    *,
    idle: float | None = 1.0,
    busy: int = 0,
    priority: int = 100,
    pinned: bool = False,
    protected: float = 0.0,
) -> Candidate:
    return Candidate(
        id=name,
        memory_bytes=size,
        idle_s=idle,
        in_flight=busy,
        priority=priority,
        pinned=pinned,
        protected_s=protected,
    )


def plan(
    *residents: Candidate,
    needed: int,
    free: int = 0,
    priority: int = 100,
    strategy: Strategy = "lru",
) -> list[str] | None:
    return plan_eviction(
        residents, needed_bytes=needed, free_bytes=free, priority=priority, strategy=strategy
    )


def test_plan_is_empty_when_the_newcomer_fits() -> None:
    assert plan(resident("a"), needed=5, free=5) == []


def test_lru_takes_the_longest_unused_first() -> None:
    residents = [resident("new", idle=1), resident("old", idle=9), resident("mid", idle=5)]
    assert plan(*residents, needed=10) == ["old"]
    assert plan(*residents, needed=20) == ["old", "mid"]


def test_a_model_that_was_never_used_counts_as_longest_unused() -> None:
    assert plan(resident("used", idle=99), resident("never", idle=None), needed=10) == ["never"]


def test_plan_keeps_a_pinned_model_even_when_it_is_the_oldest() -> None:
    residents = [resident("pinned", idle=99, pinned=True), resident("other", idle=1)]
    assert plan(*residents, needed=10) == ["other"]


def test_plan_keeps_a_model_with_requests_in_flight() -> None:
    assert plan(resident("busy", idle=99, busy=1), resident("idle"), needed=10) == ["idle"]
    assert plan(resident("busy", busy=1), needed=10) is None


def test_plan_keeps_a_model_inside_its_minimum_residency() -> None:
    assert plan(resident("young", idle=99, protected=1), resident("x"), needed=10) == ["x"]
    assert plan(resident("young", protected=1), needed=10) is None


def test_a_newcomer_displaces_its_own_priority_but_none_higher() -> None:
    assert plan(resident("equal", priority=100), needed=10, priority=100) == ["equal"]
    assert plan(resident("higher", priority=101), needed=10, priority=100) is None


def test_priority_takes_the_lowest_priority_before_the_oldest() -> None:
    residents = [
        resident("old", idle=9, priority=100),
        resident("low-new", idle=1, priority=10),
        resident("low-old", idle=2, priority=10),
    ]
    assert plan(*residents, needed=20, strategy="priority") == ["low-old", "low-new"]
    assert plan(*residents, needed=10, strategy="lru") == ["old"]


def test_nobody_is_evicted_when_it_would_not_help() -> None:
    assert plan(resident("a"), resident("b"), needed=30) is None


def test_a_victim_that_turns_out_superfluous_stays() -> None:
    residents = [resident("small", 2, idle=9), resident("large", 20, idle=1)]
    assert plan(*residents, needed=20) == ["large"]


def test_victims_of_unknown_size_are_named_one_at_a_time() -> None:
    residents = [resident("a", 0, idle=9), resident("b", 0, idle=5)]
    assert plan(*residents, needed=10) == ["a"]


def test_nothing_to_evict_on_an_empty_node() -> None:
    assert plan(needed=10) is None


@given(
    residents=st.lists(
        st.builds(
            Candidate,
            id=st.uuids().map(str),
            memory_bytes=st.integers(1, 50),
            idle_s=st.none() | st.floats(0, 100),
            in_flight=st.integers(0, 1),
            priority=st.integers(0, 3),
            pinned=st.booleans(),
        ),
        max_size=6,
    ),
    needed=st.integers(0, 120),
    free=st.integers(0, 40),
    strategy=st.sampled_from(["lru", "priority"]),
)
def test_every_plan_is_allowed_sufficient_and_minimal(
    residents: list[Candidate], needed: int, free: int, strategy: Strategy
) -> None:
    victims = plan(*residents, needed=needed, free=free, priority=1, strategy=strategy)
    by_id = {each.id: each for each in residents}
    allowed = [r for r in residents if not r.in_flight and not r.pinned and r.priority <= 1]
    if victims is None:
        assert free + sum(r.memory_bytes for r in allowed) < needed
        return
    chosen = [by_id[name] for name in victims]
    assert all(each in allowed for each in chosen)
    freed = sum(each.memory_bytes for each in chosen)
    assert free + freed >= needed
    assert all(free + freed - each.memory_bytes < needed for each in chosen)
