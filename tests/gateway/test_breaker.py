"""The breaker of a node: closed, open, half open."""

from cortex.gateway.breaker import CLOSED, Breaker, abandoned, failed, returned, tried


def opened_at(now_s: float) -> Breaker:
    return failed(CLOSED, now_s, at_once=True)


def test_it_opens_at_the_third_failure_in_a_row():
    once = failed(CLOSED, 10)
    twice = failed(once, 10)
    assert (once.state, twice.state, failed(twice, 10).state) == ("closed", "closed", "open")


def test_a_failure_that_leaves_no_doubt_opens_it_at_once():
    assert opened_at(10).state == "open"


def test_an_open_one_admits_nothing_until_its_time_has_passed():
    breaker = opened_at(10)
    assert [breaker.admits(now_s) for now_s in (10, 11.9, 12)] == [False, False, True]
    assert breaker.wait_s(11.5) == 0.5


def test_one_trial_passes_at_a_time():
    breaker = tried(opened_at(10), 12)
    assert breaker.state == "half_open"
    assert not breaker.admits(12)


def test_a_trial_that_says_nothing_for_long_lets_another_one_pass():
    breaker = tried(opened_at(10), 12)
    assert [breaker.admits(now_s) for now_s in (21.9, 22)] == [False, True]


def test_a_trial_whose_caller_left_makes_room_for_the_next():
    breaker = abandoned(tried(opened_at(10), 12))
    assert breaker.admits(12)
    assert abandoned(CLOSED) == CLOSED


def test_a_failed_trial_opens_it_for_twice_as_long_up_to_a_bound():
    breaker = opened_at(0)
    waits = []
    for _ in range(6):
        waits.append(breaker.wait_s(0))
        breaker = failed(tried(breaker, 0), 0, trial=True)
    assert waits == [2, 4, 8, 16, 30, 30]


def test_failures_of_requests_that_were_sent_earlier_do_not_keep_it_open():
    breaker = opened_at(10)
    assert failed(breaker, 11) == breaker


def test_a_node_that_came_back_is_tried_at_once():
    breaker = returned(opened_at(10))
    assert breaker.admits(10)
    assert breaker.state == "open"
    assert returned(CLOSED) == CLOSED
