import threading

import pytest

from cortex.doctor.findings import Check, Finding, run_checks


def finding(check: str) -> Finding:
    return Finding(check=check, level="ok", message="fine")


def check(name: str, look: object, limit_s: float = 30) -> Check:
    return Check(name=name, look=look, limit_s=limit_s, if_it_hangs="reboot")  # type: ignore[arg-type]


def test_findings_come_in_the_order_of_the_checks_whichever_ends_first():
    second_is_done = threading.Event()

    def first() -> list[Finding]:
        assert second_is_done.wait(10)
        return [finding("a"), finding("b")]

    def second() -> list[Finding]:
        second_is_done.set()
        return [finding("c")]

    found = run_checks([check("first", first), check("second", second)])
    assert [each.check for each in found] == ["a", "b", "c"]


def test_a_check_that_hangs_is_a_failure_with_its_remedy_and_holds_nothing_up():
    never = threading.Event()
    found = run_checks(
        [check("driver", never.wait, limit_s=0.01), check("x", lambda: [finding("x")])]
    )
    never.set()
    assert found == [
        Finding(check="driver", level="fail", message="no answer within 0.01 s", remedy="reboot"),
        finding("x"),
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_check_that_breaks_is_a_failure_of_its_own():
    (found,) = run_checks([check("disk", lambda: 1 / 0)])
    assert (found.check, found.level, found.message) == ("disk", "fail", "the check itself failed")
