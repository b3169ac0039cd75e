"""The arithmetic of rates and budgets."""

import msgspec
import pytest

from cortex.core.entitlements import ApiKey, Window
from cortex.gateway.windows import Rule, Standing, estimate_tokens, rate_headers, rules_of
from tests.support.pictures import image_block, png

# 2024-10-04T00:00:00Z, the first second of a minute and of a day.
MIDNIGHT_S = 1_728_000_000.0


def rule(amount: int = 10, window_s: int | None = 60, name: str = "tokens_per_minute") -> Rule:
    unit = "requests" if name.startswith("requests") else "tokens"
    return Rule(name=name, unit=unit, amount=amount, window_s=window_s)


def standing(previous: int, current: int, at_s: float, of: Rule | None = None) -> Standing:
    return Standing(rule=of or rule(), previous=previous, current=current, now_s=MIDNIGHT_S + at_s)


def test_the_limits_of_a_key_become_rules():
    entry = ApiKey(
        account_id="a",
        key="k",
        requests_per_minute=1,
        tokens_per_minute=2,
        tokens_per_day=3,
        hard_cap=4,
        window=Window(kind="rolling", seconds=3600),
    )
    assert [(each.name, each.unit, each.amount, each.window_s) for each in rules_of(entry)] == [
        ("requests_per_minute", "requests", 1, 60),
        ("tokens_per_minute", "tokens", 2, 60),
        ("tokens_per_day", "tokens", 3, 86400),
        ("hard_cap", "tokens", 4, 3600),
    ]


def test_a_hard_cap_without_a_window_is_a_balance():
    (only,) = rules_of(ApiKey(account_id="a", key="k", hard_cap=4))
    assert only.window_s is None
    assert rules_of(ApiKey(account_id="a", key="k")) == ()


def test_counters_are_named_by_account_key_rule_and_window():
    name = rule().counter("a/b", "k", MIDNIGHT_S + 61)
    assert name == "a%2Fb/k/tokens_per_minute/60/28800001"
    assert rule().previous_counter("a/b", "k", MIDNIGHT_S + 61) == (
        "a%2Fb/k/tokens_per_minute/60/28800000"
    )
    balance = rule(window_s=None, name="hard_cap")
    assert balance.counter("a", "k", MIDNIGHT_S) == "a/k/hard_cap/balance/0"
    assert balance.previous_counter("a", "k", MIDNIGHT_S) is None


@pytest.mark.parametrize(
    ("previous", "current", "at_s", "used"),
    [
        (0, 4, 0, 4),
        (8, 0, 0, 8),
        (8, 0, 30, 4),
        (8, 3, 30, 7),
        (8, 3, 59.9, 3),
        (5, 0, 30, 2),
        (-3, -2, 0, 0),
    ],
)
def test_the_window_before_counts_by_the_share_that_is_still_within_reach(
    previous: int, current: int, at_s: float, used: int
):
    assert standing(previous, current, at_s).used == used


@pytest.mark.parametrize(
    ("previous", "current", "at_s", "amount", "wait_s"),
    [
        (0, 0, 0, 10, 0),
        (0, 6, 0, 4, 0),
        (10, 0, 0, 5, 24),  # 10 shrinks to under 6 after two fifths of a minute
        (10, 0, 20, 5, 4),
        (0, 10, 0, 10, 114),  # gone with nine tenths of the next window
        (0, 10, 50, 5, 34),
        (0, 6, 0, 11, None),
    ],
)
def test_the_wait_is_until_the_amount_fits(
    previous: int, current: int, at_s: float, amount: int, wait_s: float | None
):
    found = standing(previous, current, at_s).wait_s(amount)
    if wait_s is None:
        assert found is None
    else:
        assert found == pytest.approx(wait_s, abs=0.1)


@pytest.mark.parametrize("previous", [0, 3, 10])
@pytest.mark.parametrize("current", [0, 7, 10])
@pytest.mark.parametrize("amount", [1, 4, 10])
def test_after_the_wait_the_amount_does_fit(previous: int, current: int, amount: int):
    first = standing(previous, current, 13)
    wait_s = first.wait_s(amount)
    assert wait_s is not None
    at_s = 13 + wait_s
    later = (
        standing(previous, current + amount, at_s) if at_s < 60 else standing(current, amount, at_s)
    )
    assert later.used <= 10


def test_a_balance_never_comes_back():
    balance = rule(window_s=None, name="hard_cap")
    assert standing(0, 10, 0, balance).wait_s(1) is None
    assert standing(0, 10, 0, balance).remaining == 0


@pytest.mark.parametrize(
    ("body", "estimate"),
    [
        (b'{"max_tokens":100}', (4, 100)),
        (b'{"max_completion_tokens":5,"max_tokens":100}', (11, 5)),
        (b'{"max_output_tokens":7}', (5, 7)),
        (b'{"max_tokens":99999}', (5, 4096)),
        (b'{"max_tokens":10,"n":3}', (5, 30)),
        (b'{"max_tokens":"x","n":null}', (6, 4096)),
        (b'{"max_tokens":10,"prompt":["a","b"],"n":2,"best_of":3}', (13, 60)),
        (b'{"max_tokens":10,"prompt":[1,2,3],"best_of":null}', (12, 10)),
        (b"not json", (2, 4096)),
    ],
)
def test_a_request_is_estimated_from_its_length_and_its_own_bound(
    body: bytes, estimate: tuple[int, int]
):
    assert estimate_tokens(body, 4096) == estimate


def test_an_image_is_estimated_by_its_tokens_and_not_by_its_bytes():
    content = [{"type": "text", "text": "hi"}, image_block(png(300, 300))]
    body = msgspec.json.encode({"messages": [{"role": "user", "content": content}]})
    assert len(body) > 300_000
    prompt, answer = estimate_tokens(body, 4096)
    assert 2000 < prompt < 2100
    assert answer == 4096


def test_headers_tell_the_tightest_rule_of_each_unit_in_each_dialect():
    standings = [
        standing(0, 1, 20, rule(5, name="requests_per_minute")),
        standing(0, 60, 20, rule(100)),
        standing(0, 970, 20, rule(1000, 86400, "tokens_per_day")),
    ]
    assert rate_headers(standings, "openai") == [
        (b"x-ratelimit-limit-requests", b"5"),
        (b"x-ratelimit-remaining-requests", b"4"),
        (b"x-ratelimit-reset-requests", b"40s"),
        (b"x-ratelimit-limit-tokens", b"1000"),
        (b"x-ratelimit-remaining-tokens", b"30"),
        (b"x-ratelimit-reset-tokens", b"86380s"),
    ]
    assert rate_headers(standings[:1], "anthropic") == [
        (b"anthropic-ratelimit-requests-limit", b"5"),
        (b"anthropic-ratelimit-requests-remaining", b"4"),
        (b"anthropic-ratelimit-requests-reset", b"2024-10-04T00:01:00Z"),
    ]
