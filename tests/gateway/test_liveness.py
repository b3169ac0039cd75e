"""Whether a node is there: misses, refusals, flapping."""

from cortex.gateway.liveness import Liveness, heard, missed

UP = heard(Liveness(), 0)


def flapped(times: int, *, every_s: float = 1) -> Liveness:
    state = UP
    for number in range(times):
        state = missed(heard(state, number * every_s), number * every_s, "refused")
    return state


def test_a_node_is_down_until_it_was_heard():
    assert not Liveness().usable(0)
    assert UP.usable(0)


def test_the_third_late_answer_in_a_row_makes_it_down():
    once = missed(UP, 1, "late")
    twice = missed(once, 2, "late")
    assert [state.up for state in (once, twice, missed(twice, 3, "late"))] == [True, True, False]


def test_a_sign_of_life_starts_the_count_again():
    state = missed(missed(UP, 1, "late"), 2, "late")
    assert missed(heard(state, 3), 4, "late") == Liveness(up=True, misses=1)


def test_a_silent_link_and_one_unanswered_question_make_it_down():
    silent = missed(UP, 1, "silent")
    assert silent.up
    assert not missed(silent, 2, "late").up


def test_a_refused_connection_makes_it_down_at_once():
    assert missed(UP, 1, "refused") == Liveness(up=False, misses=1, losses=(1,))


def test_a_node_that_comes_back_is_used_at_once():
    assert heard(flapped(1), 1).usable(1)
    assert heard(flapped(2), 2).usable(2)


def test_a_node_that_flaps_has_to_stay_for_a_while_longer_each_time():
    holds = [heard(flapped(times), 10).hold_until_s - 10 for times in (3, 4, 5, 6, 7)]
    assert holds == [5, 10, 20, 40, 40]
    assert not heard(flapped(3), 10).usable(14.9)
    assert heard(flapped(3), 10).usable(15)


def test_losses_long_ago_are_forgiven():
    assert heard(flapped(5), 100).usable(100)
    assert heard(flapped(10, every_s=30), 300).usable(300)


def test_misses_while_it_is_down_are_no_further_losses():
    state = missed(missed(flapped(1), 5, "refused"), 6, "silent")
    assert state.losses == (0,)
