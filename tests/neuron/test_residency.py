import pytest

from cortex.core.errors import EngineDiedError, InsufficientMemoryError, LoadFailedError
from cortex.neuron.residency import (
    Decision,
    Effect,
    Ended,
    EngineLost,
    EngineReady,
    EngineRecycled,
    EvictAsked,
    EvictDropped,
    LoadAsked,
    RecycleAsked,
    RecycleDropped,
    Residency,
    UnloadAsked,
    decide,
    retry_after_s,
)

DEATH = EngineDiedError("killed by SIGKILL")
CAUSE = LoadFailedError("no such tensor")
ALL = ("unloaded", "loading", "loaded", "recovering", "failed", "draining")


def state(status, *, since_s=100.0, error=None, restarts=0):
    return Residency(status=status, since_s=since_s, error=error, restarts=restarts)


@pytest.mark.parametrize(
    ("status", "becomes", "effects"),
    [
        ("unloaded", "loading", (Effect.START,)),
        ("loading", "loading", (Effect.JOIN,)),
        ("loaded", "loaded", (Effect.ALREADY_LOADED,)),
        ("recovering", "recovering", (Effect.JOIN,)),
        ("failed", "loading", (Effect.START,)),
        ("draining", "draining", (Effect.WAIT_FOR_END,)),
    ],
)
def test_a_load_request_meets_every_state(status, becomes, effects):
    decision = decide(state(status), LoadAsked(now_s=1000.0))
    assert (decision.state.status, decision.effects) == (becomes, effects)


@pytest.mark.parametrize(
    ("status", "becomes", "effects"),
    [
        ("unloaded", "unloaded", (Effect.NOT_RESIDENT,)),
        ("loading", "draining", (Effect.ABORT,)),
        ("loaded", "draining", (Effect.DRAIN,)),
        ("recovering", "draining", (Effect.ABORT,)),
        ("failed", "unloaded", ()),
        ("draining", "draining", (Effect.WAIT_FOR_END,)),
    ],
)
def test_an_unload_request_meets_every_state(status, becomes, effects):
    decision = decide(state(status), UnloadAsked(now_s=1000.0))
    assert (decision.state.status, decision.effects) == (becomes, effects)


@pytest.mark.parametrize(
    ("status", "becomes", "effects"),
    [
        ("unloaded", "unloaded", ()),
        ("loading", "loaded", (Effect.OPEN,)),
        ("loaded", "loaded", ()),
        ("recovering", "loaded", (Effect.OPEN,)),
        ("failed", "failed", ()),
        ("draining", "draining", ()),
    ],
)
def test_a_ready_engine_meets_every_state(status, becomes, effects):
    decision = decide(state(status), EngineReady(now_s=1000.0))
    assert (decision.state.status, decision.effects) == (becomes, effects)


@pytest.mark.parametrize(
    ("status", "becomes", "effects"),
    [
        ("unloaded", "unloaded", ()),
        ("loading", "failed", (Effect.FAIL,)),
        ("loaded", "recovering", (Effect.CLOSE, Effect.RESTART)),
        ("recovering", "recovering", (Effect.CLOSE, Effect.RESTART)),
        ("failed", "failed", ()),
        ("draining", "draining", ()),
    ],
)
def test_a_lost_engine_meets_every_state(status, becomes, effects):
    decision = decide(state(status), EngineLost(error=DEATH, now_s=1000.0))
    assert (decision.state.status, decision.effects) == (becomes, effects)


@pytest.mark.parametrize("status", ALL)
def test_only_a_draining_model_ends(status):
    decision = decide(state(status), Ended(now_s=1000.0))
    assert decision.state.status == ("unloaded" if status == "draining" else status)
    assert decision.effects == ()


def test_a_failed_load_is_refused_with_its_cause_until_the_cool_down_is_over():
    failed = decide(state("loading"), EngineLost(error=CAUSE, now_s=10.0)).state
    refused = decide(failed, LoadAsked(now_s=14.9))
    assert refused.effects == (Effect.REFUSE,)
    assert refused.state.error is CAUSE
    assert decide(failed, LoadAsked(now_s=15.0)).effects == (Effect.START,)


def test_the_rest_of_a_cool_down_is_told_and_never_below_a_second():
    failed = state("failed", since_s=10.0, error=CAUSE)
    assert retry_after_s(failed, 12.0) == 3.0
    assert retry_after_s(failed, 14.9) == 1.0


def test_a_load_that_found_no_memory_leaves_the_model_unloaded_and_free_to_retry():
    lost = EngineLost(error=InsufficientMemoryError("too big"), now_s=10.0, blameless=True)
    decision = decide(state("loading"), lost)
    assert (decision.state.status, decision.effects) == ("unloaded", (Effect.FAIL,))
    assert decide(decision.state, LoadAsked(now_s=10.0)).effects == (Effect.START,)


def test_an_engine_that_keeps_dying_is_restarted_three_times_with_growing_pauses():
    current = state("loaded", since_s=0.0)
    pauses = []
    for second in (1.0, 2.0, 3.0):
        decision = decide(current, EngineLost(error=DEATH, now_s=second))
        assert decision.effects == (Effect.CLOSE, Effect.RESTART)
        pauses.append(decision.pause_s)
        current = decide(decision.state, EngineReady(now_s=second)).state
        assert current.status == "loaded"
    assert pauses == [0.0, 2.0, 8.0]
    assert decide(current, EngineLost(error=DEATH, now_s=4.0)) == Decision(
        state=Residency(status="failed", error=DEATH, since_s=4.0),
        effects=(Effect.CLOSE, Effect.FAIL),
    )


def test_a_restart_that_fails_counts_against_the_same_bound():
    current = state("loaded", since_s=0.0)
    for _ in range(3):
        current = decide(current, EngineLost(error=DEATH, now_s=1.0)).state
        assert current.status == "recovering"
    assert decide(current, EngineLost(error=CAUSE, now_s=1.0)).state.status == "failed"


def test_an_engine_that_served_for_a_minute_has_all_its_restarts_again():
    worn = state("loaded", since_s=0.0, restarts=3)
    assert decide(worn, EngineLost(error=DEATH, now_s=59.9)).state.status == "failed"
    decision = decide(worn, EngineLost(error=DEATH, now_s=60.0))
    assert (decision.state.status, decision.state.restarts) == ("recovering", 1)


def test_recovering_tells_why_and_loaded_does_not():
    recovering = decide(state("loaded"), EngineLost(error=DEATH, now_s=100.0)).state
    assert recovering.error is DEATH
    assert decide(recovering, EngineReady(now_s=101.0)).state.error is None


@pytest.mark.parametrize(
    ("status", "becomes", "effects"),
    [
        ("unloaded", "unloaded", (Effect.NOT_RESIDENT,)),
        ("loading", "loading", (Effect.REFUSE,)),
        ("loaded", "draining", (Effect.PAUSE,)),
        ("recovering", "recovering", (Effect.REFUSE,)),
        ("failed", "failed", (Effect.NOT_RESIDENT,)),
        ("draining", "draining", (Effect.WAIT_FOR_END,)),
    ],
)
def test_an_eviction_meets_every_state(status, becomes, effects):
    decision = decide(state(status), EvictAsked(now_s=1000.0))
    assert (decision.state.status, decision.effects) == (becomes, effects)


def test_an_eviction_that_is_dropped_leaves_the_model_loaded():
    leaving = decide(state("loaded", restarts=1), EvictAsked(now_s=200.0)).state
    assert leaving.is_reversible
    back = decide(leaving, EvictDropped(now_s=201.0))
    assert back.effects == (Effect.RESUME,)
    assert back.state == Residency(status="loaded", since_s=201.0, restarts=1)


def test_an_eviction_that_goes_ahead_is_an_unload_that_cannot_be_dropped():
    leaving = decide(state("loaded"), EvictAsked(now_s=200.0)).state
    gone = decide(leaving, UnloadAsked(now_s=201.0))
    assert gone.effects == (Effect.DRAIN,)
    dropped = decide(gone.state, EvictDropped(now_s=202.0))
    assert (dropped.state, dropped.effects) == (gone.state, ())


def test_a_model_that_makes_room_for_one_load_cannot_for_another():
    leaving = decide(state("loaded"), EvictAsked(now_s=200.0)).state
    assert decide(leaving, EvictAsked(now_s=201.0)).effects == (Effect.REFUSE,)


@pytest.mark.parametrize("status", ["unloaded", "loading", "recovering", "failed"])
def test_dropping_what_never_began_changes_nothing(status):
    for event in (EvictDropped(now_s=1.0), RecycleDropped(now_s=1.0), EngineRecycled(now_s=1.0)):
        assert decide(state(status), event) == Decision(state=state(status))


@pytest.mark.parametrize(
    ("status", "effects"),
    [
        ("unloaded", (Effect.NOT_RESIDENT,)),
        ("loading", (Effect.REFUSE,)),
        ("loaded", (Effect.PAUSE,)),
        ("recovering", (Effect.REFUSE,)),
        ("failed", (Effect.NOT_RESIDENT,)),
        ("draining", (Effect.REFUSE,)),
    ],
)
def test_a_recycling_meets_every_state(status, effects):
    decision = decide(state(status), RecycleAsked(now_s=1000.0))
    assert (decision.state.status, decision.effects) == (status, effects)
    assert decision.state.is_recycling == (status == "loaded")


def test_a_recycling_ends_the_engine_once_and_is_loaded_again_when_the_next_serves():
    recycling = decide(state("loaded", restarts=2), RecycleAsked(now_s=200.0)).state
    assert decide(recycling, RecycleAsked(now_s=201.0)).effects == (Effect.JOIN,)
    starting = decide(recycling, EngineRecycled(now_s=202.0))
    assert (starting.state.status, starting.effects) == ("recovering", (Effect.RESTART,))
    assert decide(starting.state, RecycleAsked(now_s=203.0)).effects == (Effect.JOIN,)
    ready = decide(starting.state, EngineReady(now_s=204.0)).state
    # It was no fault of the engine's, so it counts against no bound.
    assert ready == Residency(status="loaded", since_s=204.0, restarts=2)


def test_a_recycling_that_finds_no_pause_is_dropped():
    recycling = decide(state("loaded"), RecycleAsked(now_s=200.0)).state
    dropped = decide(recycling, RecycleDropped(now_s=230.0))
    assert (dropped.state.status, dropped.effects) == ("loaded", (Effect.RESUME,))
    assert not dropped.state.is_recycling


def test_an_engine_that_dies_while_it_is_recycled_is_restarted_like_any_other():
    recycling = decide(state("loaded"), RecycleAsked(now_s=200.0)).state
    for current in (recycling, decide(recycling, EngineRecycled(now_s=201.0)).state):
        lost = decide(current, EngineLost(error=DEATH, now_s=202.0))
        assert lost.effects == (Effect.CLOSE, Effect.RESTART)
        assert not lost.state.is_recycling


def test_a_model_that_makes_room_and_loses_its_engine_leaves_for_good():
    leaving = decide(state("loaded"), EvictAsked(now_s=200.0)).state
    lost = decide(leaving, EngineLost(error=DEATH, now_s=201.0))
    assert (lost.state.status, lost.effects) == ("draining", (Effect.DRAIN,))
    assert decide(lost.state, EvictDropped(now_s=202.0)).state == lost.state
    assert decide(lost.state, Ended(now_s=203.0)).state.status == "unloaded"
