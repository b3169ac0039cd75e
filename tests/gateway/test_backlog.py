"""How long replicas are busy with prompts, by what was sent."""

from cortex.gateway.backlog import MAX_AHEAD_S, Backlog

A, B = ("a", "m"), ("b", "m")


def test_prompts_wait_for_those_before_them() -> None:
    backlog = Backlog()
    assert backlog.add(A, 2.0, now_s=10.0) == 12.0
    assert backlog.add(A, 3.0, now_s=11.0) == 15.0
    assert backlog.ahead_s(11.0) == {A: 4.0}


def test_the_backlog_runs_off_with_the_clock_and_idle_replicas_are_not_kept() -> None:
    backlog = Backlog()
    backlog.add(A, 2.0, now_s=0.0)
    backlog.add(B, 9.0, now_s=0.0)
    assert backlog.ahead_s(5.0) == {B: 4.0}
    assert backlog.add(A, 1.0, now_s=5.0) == 6.0


def test_a_first_token_that_comes_early_shortens_it() -> None:
    backlog = Backlog()
    expected_s = backlog.add(A, 2.0, now_s=0.0)
    backlog.shorten(A, expected_s - 0.5)
    backlog.shorten(A, -3.0)  # late: nothing is known of the next one
    assert backlog.ahead_s(0.0) == {A: 0.5}


def test_a_wrong_rate_does_not_rule_a_replica_out_for_ever() -> None:
    backlog = Backlog()
    backlog.add(A, 1e9, now_s=0.0)
    assert backlog.ahead_s(0.0) == {A: MAX_AHEAD_S}
