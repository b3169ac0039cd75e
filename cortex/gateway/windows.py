"""What a key may spend, and how much of it is left: arithmetic over counters, without a clock.

A rate or a rolling budget is a sliding window, estimated from two counters: all of the window that
goes on, and of the one before it the share that still lies within reach. Windows begin at multiples
of their length since 1970, so that gateways with a common clock and store count in the same ones.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal
from urllib.parse import quote

import msgspec

from cortex.core.completions import count_prompts
from cortex.core.entitlements import ApiKey
from cortex.gateway.pictures import text_bytes

MINUTE_S = 60
DAY_S = 86400
# A balance has no end; stores want one.
BALANCE_KEPT_S = 10 * 365 * DAY_S
BYTES_PER_TOKEN = 4
# Names of counters that are kept ready.
MAX_NAMES = 4096

Unit = Literal["requests", "tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One bound on a key.

    Attributes:
        name: the key of the configuration it comes from.
        window_s: over which time it counts; None for a balance, which is spent for good.
    """

    name: str
    unit: Unit
    amount: int
    window_s: int | None

    def counter(self, account_id: str, key_id: str, now_s: float) -> str:
        """Return the name of the counter of the window that goes on."""
        return self._counter(account_id, key_id, self._idx(now_s))

    def previous_counter(self, account_id: str, key_id: str, now_s: float) -> str | None:
        """Return the name of the counter of the window before; None for a balance."""
        if self.window_s is None:
            return None
        return self._counter(account_id, key_id, self._idx(now_s) - 1)

    @property
    def kept_s(self) -> int:
        """How long a counter is of use, counted from its first change."""
        return BALANCE_KEPT_S if self.window_s is None else 2 * self.window_s + MINUTE_S

    def _idx(self, now_s: float) -> int:
        return 0 if self.window_s is None else int(now_s // self.window_s)

    def _counter(self, account_id: str, key_id: str, window_idx: int) -> str:
        return f"{_series(account_id, key_id, self.name, self.window_s)}/{window_idx}"


@lru_cache(maxsize=MAX_NAMES)
def _series(account_id: str, key_id: str, rule: str, window_s: int | None) -> str:
    parts = (account_id, key_id, rule, str(window_s or "balance"))
    return "/".join(quote(part, safe="") for part in parts)


def rules_of(entry: ApiKey) -> tuple[Rule, ...]:
    """Return the bounds of a key."""
    rolling_s = entry.window.seconds if entry.window is not None else None
    found: tuple[tuple[str, Unit, int | None, int | None], ...] = (
        ("requests_per_minute", "requests", entry.requests_per_minute, MINUTE_S),
        ("tokens_per_minute", "tokens", entry.tokens_per_minute, MINUTE_S),
        ("tokens_per_day", "tokens", entry.tokens_per_day, DAY_S),
        ("hard_cap", "tokens", entry.hard_cap, rolling_s),
    )
    return tuple(
        Rule(name=name, unit=unit, amount=amount, window_s=window_s)
        for name, unit, amount, window_s in found
        if amount is not None
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far a rule is used up.

    Attributes:
        previous, current: the two counters; below zero they count as zero.
    """

    rule: Rule
    previous: int
    current: int
    now_s: float

    @property
    def used(self) -> int:
        """What counts against the rule now."""
        return math.floor(self._carried(self._elapsed_s)) + max(0, self.current)

    @property
    def remaining(self) -> int:
        """What is left; never below zero."""
        return max(0, self.rule.amount - self.used)

    @property
    def reset_s(self) -> float:
        """Seconds until the window that goes on ends; 0 for a balance."""
        return 0.0 if self.rule.window_s is None else self.rule.window_s - self._elapsed_s

    def wait_s(self, amount: int) -> float | None:
        """Return in how many seconds `amount` fits, if nothing else is spent; None for never."""
        window_s = self.rule.window_s
        room = self.rule.amount - amount
        if room < 0 or window_s is None:
            return None
        current = max(0, self.current)
        if current <= room:
            # The share of the window before has to shrink to what is left beside this one.
            free_at_s = _shrunk_at_s(max(0, self.previous), room - current, window_s)
            return max(0.0, free_at_s - self._elapsed_s)
        return self.reset_s + _shrunk_at_s(current, room, window_s)

    @property
    def _elapsed_s(self) -> float:
        return 0.0 if self.rule.window_s is None else self.now_s % self.rule.window_s

    def _carried(self, elapsed_s: float) -> float:
        if self.rule.window_s is None:
            return 0.0
        return max(0, self.previous) * (1 - elapsed_s / self.rule.window_s)


def _shrunk_at_s(count: int, room: int, window_s: int) -> float:
    """Return after which part of a window the share of one before it is at most `room`."""
    # What is carried over is rounded down, so that nearly one more has room.
    return 0.0 if count <= room else window_s * (1 - min(1.0, (room + 0.999) / count))


class _Sizes(msgspec.Struct, kw_only=True):
    """The fields that bound an answer, in all dialects; of any type, since nothing relies on it."""

    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    best_of: Any = None
    prompt: msgspec.Raw = msgspec.Raw(b"null")


_sizes_decoder = msgspec.json.Decoder(_Sizes)


def estimate_tokens(body: bytes, reserve_output_tokens: int) -> tuple[int, int]:
    """Return about how many tokens a request's prompt has, and how many to reserve for answers.

    Args:
        reserve_output_tokens: the most for one answer, and the figure where it names no bound.
    """
    try:
        sizes = _sizes_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        sizes = _Sizes()
    bounds = (sizes.max_completion_tokens, sizes.max_tokens, sizes.max_output_tokens)
    asked = next((each for each in bounds if isinstance(each, int) and each > 0), None)
    answer = reserve_output_tokens if asked is None else min(asked, reserve_output_tokens)
    numbers = (each for each in (sizes.n, sizes.best_of) if isinstance(each, int))
    num_answers = max([1, *numbers]) * count_prompts(sizes.prompt)
    return text_bytes(body, BYTES_PER_TOKEN) // BYTES_PER_TOKEN, answer * num_answers


def rate_headers(
    standings: Iterable[Standing], dialect: Literal["openai", "anthropic"]
) -> list[tuple[bytes, bytes]]:
    """Return the headers that tell a caller how far it may go, of each unit the tightest rule."""
    found: list[tuple[str, str]] = []
    tightest: dict[Unit, Standing] = {}
    for each in standings:
        known = tightest.get(each.rule.unit)
        if known is None or each.remaining < known.remaining:
            tightest[each.rule.unit] = each
    for unit, standing in tightest.items():
        limit, remaining = str(standing.rule.amount), str(standing.remaining)
        reset_s = math.ceil(standing.reset_s)
        if dialect == "anthropic":
            ends = datetime.fromtimestamp(math.ceil(standing.now_s) + reset_s, UTC)
            prefix = f"anthropic-ratelimit-{unit}"
            found += [(f"{prefix}-limit", limit), (f"{prefix}-remaining", remaining)]
            found.append((f"{prefix}-reset", ends.strftime("%Y-%m-%dT%H:%M:%SZ")))
        else:
            found += [
                (f"x-ratelimit-limit-{unit}", limit),
                (f"x-ratelimit-remaining-{unit}", remaining),
                (f"x-ratelimit-reset-{unit}", f"{reset_s}s"),
            ]
    return [(name.encode(), value.encode()) for name, value in found]
