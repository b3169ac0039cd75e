"""Who may use a loaded model now, who waits, and who is sent away.

Seats are the sequences a model's engine works on at once. A request takes one `Ticket` for all
the seats it needs; it waits in order of arrival, within bounds of number and time.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cortex.core.errors import CortexError, QueueFullError

MIN_RETRY_S = 1
MAX_RETRY_S = 120


@dataclass(slots=True, kw_only=True, eq=False)
class _Waiter:
    seats: int
    admitted: asyncio.Future[None]


class Ticket:
    """The right to use `seats` seats; give it back with `release`, or use it as a context."""

    def __init__(self, admission: "Admission", seats: int) -> None:
        self._admission = admission
        self.seats = seats
        self._held = True

    def release(self) -> None:
        """Give the seats back; only the first call counts."""
        if self._held:
            self._held = False
            self._admission._free(self.seats)  # noqa: SLF001  the ticket is the owner's other half

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Admission:
    """The seats and the queue of one loaded model.

    Args:
        max_in_flight: seats.
        max_queue_depth: requests that may wait.
        max_wait_s: how long one may wait.
        on_idle: called when the last seat is given back.
    """

    def __init__(
        self,
        model_id: str,
        *,
        max_in_flight: int,
        max_queue_depth: int,
        max_wait_s: float,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        self.model_id = model_id
        self.max_in_flight = max_in_flight
        self.max_queue_depth = max_queue_depth
        self.in_flight = 0
        self.rejected_queue_full = 0
        self.rejected_timeout = 0
        self._max_wait_s = max_wait_s
        self._on_idle = on_idle
        self._is_paused = False
        self._queue: deque[_Waiter] = deque()
        self._closed: CortexError | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def queue_depth(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    async def acquire(self, seats: int = 1) -> Ticket:
        """Return a ticket for `seats` seats (no more than there are), after waiting if need be.

        Raises:
            QueueFullError: too many wait already, or the wait took too long.
            CortexError: what `close` was called with.
        """
        self.check(seats)
        seats = min(seats, self.max_in_flight)
        if self._has_room(seats):
            return self._admit(seats)
        return await self._wait(seats)

    def check(self, seats: int = 1) -> None:
        """Raise what `acquire` would raise at once; cheap enough to ask before any work."""
        if self._closed is not None:
            raise self._closed.with_traceback(None)
        if len(self._queue) >= self.max_queue_depth and not self._has_room(seats):
            self.rejected_queue_full += 1
            raise self._refusal(f"{self.max_queue_depth} requests wait already")

    def _has_room(self, seats: int) -> bool:
        return not (self._is_paused or self._queue) and self.in_flight + min(
            seats, self.max_in_flight
        ) <= (self.max_in_flight)

    async def _wait(self, seats: int) -> Ticket:
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(seats=seats, admitted=admitted)
        self._queue.append(waiter)
        try:
            async with asyncio.timeout(self._max_wait_s):
                await admitted
        except TimeoutError as exc:
            if self._leave(waiter):
                return Ticket(self, seats)
            self.rejected_timeout += 1
            raise self._refusal(f"no seat came free within {self._max_wait_s:g} s") from exc
        except BaseException:
            if self._leave(waiter):
                self._free(seats)
            raise
        return Ticket(self, seats)

    def _leave(self, waiter: _Waiter) -> bool:
        """Take a waiter out of the queue; return True if it holds its seats already."""
        future = waiter.admitted
        if future.done() and not future.cancelled() and future.exception() is None:
            return True
        if waiter in self._queue:
            self._queue.remove(waiter)
            self._seat_waiters()
        return False

    def pause(self) -> None:
        """Give no seats until `resume`; who comes meanwhile waits, within the bounds."""
        self._is_paused = True

    def resume(self) -> None:
        """Give seats again."""
        self._is_paused = False
        self._seat_waiters()

    def close(self, error: CortexError) -> None:
        """Refuse everyone from now on, those who wait included, with `error`."""
        self._closed = error
        while self._queue:
            waiter = self._queue.popleft()
            if not waiter.admitted.done():
                waiter.admitted.set_exception(error)

    async def wait_idle(self) -> None:
        """Wait until no seat is taken."""
        await self._idle.wait()

    def _admit(self, seats: int) -> Ticket:
        self.in_flight += seats
        self._idle.clear()
        return Ticket(self, seats)

    def _free(self, seats: int) -> None:
        self.in_flight -= seats
        self._seat_waiters()
        if self.in_flight == 0:
            self._idle.set()
            self._on_idle()

    def _seat_waiters(self) -> None:
        while self._queue and not self._is_paused:
            waiter = self._queue[0]
            if self.in_flight + waiter.seats > self.max_in_flight:
                return
            self._queue.popleft()
            if not waiter.admitted.done():
                self.in_flight += waiter.seats
                self._idle.clear()
                waiter.admitted.set_result(None)

    def _refusal(self, why: str) -> QueueFullError:
        wait_s = min(max(2 * (self.queue_depth + 1), MIN_RETRY_S), MAX_RETRY_S)
        return QueueFullError(
            f"model '{self.model_id}' is busy: {why}; try again in {wait_s} s",
            retry_after_s=wait_s,
        )
