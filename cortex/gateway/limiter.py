"""Keeps keys within their rates and budgets: reserve before routing, settle at the end.

What a request will spend is not known before it has ended, so an estimate is counted first and
put right afterwards. Settling is a note in a queue that one task works off: it can be taken down
without waiting, from a request that is being cancelled.
"""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from cortex.core.entitlements import LimitsConfig
from cortex.core.errors import (
    ConfigError,
    LimitsUnavailableError,
    QuotaExceededError,
    RateLimitError,
)
from cortex.gateway.auth import Caller
from cortex.gateway.counters import STORAGE_RETRY_S, Counters
from cortex.gateway.metrics import Metrics
from cortex.gateway.windows import Rule, Standing, estimate_tokens

# Notes not yet worked off; beyond that estimates stand until their window is over.
MAX_NOTES = 10_000
# How long the end of the gateway waits for them.
CLOSE_S = 2.0
BUSY_RETRY_S = 1.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """What was counted for one request on one counter."""

    counters: Counters
    rule: Rule
    counter: str
    amount: int
    at_s: float


@dataclass(slots=True, kw_only=True)
class Reservation:
    """What is set aside for one request until it is settled.

    Attributes:
        prompt_tokens, tokens: the estimate, of the prompt alone and with the answer.
        standings: the key's rules with this request counted.
    """

    caller: Caller
    prompt_tokens: int
    tokens: int
    entries: list[_Entry] = field(default_factory=list)
    standings: list[Standing] = field(default_factory=list)
    is_open: bool = True


@dataclass(frozen=True, slots=True)
class _Closing:
    """A note that nothing counts in these any more."""

    counters: Counters


class Limiter:
    """The counters of all keys, which outlive a reload of the configuration.

    Args:
        wall_clock: seconds since 1970, since windows are common to gateways.
        clock: monotonic seconds.

    Raises:
        ConfigError: the storage cannot be used.
    """

    def __init__(
        self,
        config: LimitsConfig,
        metrics: Metrics,
        *,
        wall_clock: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self._metrics = metrics
        self._wall_clock = wall_clock
        self._clock = clock
        self._config = config
        self._counters = self._open(config)
        self._notes: asyncio.Queue[tuple[_Entry, int] | _Closing] = asyncio.Queue(MAX_NOTES)
        self._in_flight: Counter[tuple[str, str]] = Counter()

    def _open(self, config: LimitsConfig) -> Counters:
        return Counters(
            config.storage, clock=self._clock, on_fault=self._metrics.record_limits_fault
        )

    def reload(self, config: LimitsConfig) -> None:
        """Take the settings of a new configuration; only another `storage` starts from nothing."""
        if config.storage != self._config.storage:
            try:
                counters = self._open(config)
            except ConfigError as exc:
                _logger.error("the storage of limits stays as it was: %s", exc.message)
                return
            self._note(_Closing(self._counters))
            self._counters = counters
        self._config = config

    @property
    def logs_usage(self) -> bool:
        """Whether finished requests are logged."""
        return self._config.usage_log

    def begin(self, caller: Caller, body: bytes | None, *, writes: bool = True) -> Reservation:
        """Take a request in hand; it is to be settled however it ends.

        Args:
            body: what the estimate is made from; None for a request that spends no tokens.
            writes: whether the answer has tokens, too.

        Raises:
            RateLimitError: the key has as many requests in hand as it may.
        """
        prompt, answer = (0, 0)
        if body is not None and any(rule.unit == "tokens" for rule in caller.rules):
            prompt, answer = estimate_tokens(
                body, self._config.reserve_output_tokens if writes else 0
            )
        self._enter(caller)
        return Reservation(caller=caller, prompt_tokens=prompt, tokens=prompt + answer)

    async def count(self, reservation: Reservation) -> None:
        """Count a request against its key's rules before anything else is done for it.

        Raises:
            RateLimitError: it would be over a rate.
            QuotaExceededError: it would be over a budget that is not free again by itself.
            LimitsUnavailableError: the store is down and `on_storage_error` says to refuse.
        """
        try:
            for rule in reservation.caller.rules:
                amount = 1 if rule.unit == "requests" else reservation.tokens
                if amount:
                    # More than the whole budget is let through when all of it is free.
                    await self._count(reservation, rule, min(amount, rule.amount))
        except LimitsUnavailableError:
            if self._config.on_storage_error == "refuse":
                self._take_back(reservation)
                raise
        except BaseException:
            self._take_back(reservation)
            raise

    def settle(self, reservation: Reservation, tokens: int) -> None:
        """Put the estimate right, once; `tokens` is what was spent, 0 when nothing was done."""
        if not reservation.is_open:
            return
        reservation.is_open = False
        self._leave(reservation.caller)
        for entry in reservation.entries:
            if entry.rule.unit == "tokens" and tokens != entry.amount:
                self._note((entry, tokens - entry.amount))

    async def standings(self, caller: Caller) -> list[Standing]:
        """Return how far a key's rules are used up.

        Raises:
            LimitsUnavailableError: the store does not answer.
        """
        now_s = self._wall_clock()
        found = []
        for rule in caller.rules:
            current = await self._counters.read(
                rule.counter(caller.account_id, caller.key_id, now_s)
            )
            previous = await self._previous(caller, rule, now_s)
            found.append(Standing(rule=rule, previous=previous, current=current, now_s=now_s))
        return found

    async def run(self) -> None:
        """Work off the notes until cancelled."""
        while True:
            note = await self._notes.get()
            try:
                if isinstance(note, _Closing):
                    await note.counters.close()
                else:
                    await self._put_right(*note)
            finally:
                self._notes.task_done()

    async def close(self) -> None:
        """Work off what is left, for a moment, and close the connections."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._notes.join()
        except TimeoutError:
            _logger.warning("budgets could not be settled", extra={"left": self._notes.qsize()})
        await self._counters.close()

    async def _count(self, reservation: Reservation, rule: Rule, amount: int) -> None:
        caller, now_s = reservation.caller, self._wall_clock()
        entry = _Entry(
            counters=self._counters,
            rule=rule,
            counter=rule.counter(caller.account_id, caller.key_id, now_s),
            amount=amount,
            at_s=now_s,
        )
        # Before the call: one that is cancelled has most likely reached the store.
        reservation.entries.append(entry)
        try:
            current = await self._counters.add(entry.counter, amount, rule.kept_s)
        except LimitsUnavailableError:
            reservation.entries.remove(entry)
            raise
        previous = await self._previous(caller, rule, now_s)
        standing = Standing(rule=rule, previous=previous, current=current, now_s=now_s)
        reservation.standings.append(standing)
        if standing.used > rule.amount:
            before = Standing(rule=rule, previous=previous, current=current - amount, now_s=now_s)
            reservation.standings[-1] = before
            self._metrics.record_refusal(caller.account_id, caller.key_id, rule.name)
            raise _refusal(before, amount, reservation)

    async def _previous(self, caller: Caller, rule: Rule, now_s: float) -> int:
        name = rule.previous_counter(caller.account_id, caller.key_id, now_s)
        return 0 if name is None else await self._counters.read_settled(name)

    def _take_back(self, reservation: Reservation) -> None:
        """Undo a reservation whose request is refused: it counts for nothing, not even once."""
        reservation.is_open = False
        self._leave(reservation.caller)
        for entry in reservation.entries:
            self._note((entry, -entry.amount))

    def _enter(self, caller: Caller) -> None:
        key = (caller.account_id, caller.key_id)
        bound = caller.entry.max_concurrent if caller.entry is not None else None
        if bound is not None and self._in_flight[key] >= bound:
            self._metrics.record_refusal(*key, "max_concurrent")
            raise RateLimitError(
                f"key {caller.key_id} has {bound} requests in hand, as many as it may; wait for "
                "one to end",
                retry_after_s=BUSY_RETRY_S,
            )
        self._in_flight[key] += 1

    def _leave(self, caller: Caller) -> None:
        key = (caller.account_id, caller.key_id)
        self._in_flight[key] -= 1
        if not self._in_flight[key]:
            del self._in_flight[key]

    def _note(self, note: tuple[_Entry, int] | _Closing) -> None:
        try:
            self._notes.put_nowait(note)
        except asyncio.QueueFull:
            # Counted like a call that failed; the estimate stands.
            self._metrics.record_limits_fault()

    async def _put_right(self, entry: _Entry, delta: int) -> None:
        """Change a counter, trying until it can be done or nobody reads it any more."""
        while True:
            try:
                await entry.counters.add(entry.counter, delta, entry.rule.kept_s)
            except LimitsUnavailableError:
                is_read = entry.rule.window_s is None or (
                    self._wall_clock() - entry.at_s < 2 * entry.rule.window_s
                )
                if not is_read:
                    return
                await asyncio.sleep(STORAGE_RETRY_S)
            else:
                return


def _refusal(
    standing: Standing, amount: int, reservation: Reservation
) -> RateLimitError | QuotaExceededError:
    rule, key_id = standing.rule, reservation.caller.key_id
    wait_s = standing.wait_s(amount)
    used = f"{standing.used} of {rule.amount} {rule.unit} of {rule.name} are used"
    asked = "" if rule.unit == "requests" else f" and this request may need {amount}"
    if wait_s is None:
        return QuotaExceededError(
            f"key {key_id}: {used}{asked}; ask whoever runs this URL for more, or lower max_tokens"
        )
    return RateLimitError(
        f"key {key_id}: {used}{asked}; try again in {math.ceil(wait_s)} s",
        retry_after_s=max(1, math.ceil(wait_s)),
    )
