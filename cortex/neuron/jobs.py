"""A load in progress: what callers wait on and read, and how long it may still take."""

import asyncio
from collections.abc import Callable

from cortex.core.errors import CortexError
from cortex.core.neuron_api import LoadPhase, LoadProgress

# Below this share of a phase its own speed says little.
MIN_SHARE = 0.02


def seconds_left(
    *,
    elapsed_s: float,
    phase_elapsed_s: float,
    bytes_done: int,
    bytes_total: int,
    last_load_s: float | None,
) -> float | None:
    """Estimate the rest of a load; None while there is nothing to go by.

    The speed of the phase in hand counts most; before it says anything, the time that the
    model's last load took.
    """
    if bytes_total and bytes_done >= MIN_SHARE * bytes_total:
        return phase_elapsed_s * (bytes_total - bytes_done) / bytes_done
    if last_load_s is not None:
        return max(0.0, last_load_s - elapsed_s)
    return None


class Job:
    """One load; every caller of the same model waits on the same job.

    Attributes:
        evicted: models that were ended to make room.
        drained: those of them that had requests in hand.
        load_s: how long it took, once it succeeded.
    """

    def __init__(
        self, model_id: str, *, clock: Callable[[], float], last_load_s: float | None = None
    ) -> None:
        self.model_id = model_id
        self.evicted: list[str] = []
        self.drained: list[str] = []
        self.load_s: float | None = None
        self._clock = clock
        self._started_s = clock()
        self._phase_started_s = self._started_s
        self._phase: LoadPhase = "starting"
        self._bytes_done = 0
        self._bytes_total = 0
        self._last_load_s = last_load_s
        self._done = asyncio.Event()
        self._error: CortexError | None = None

    @property
    def progress(self) -> LoadProgress:
        """Where the load stands now."""
        now_s = self._clock()
        return LoadProgress(
            phase=self._phase,
            bytes_done=self._bytes_done,
            bytes_total=self._bytes_total,
            seconds_left=seconds_left(
                elapsed_s=now_s - self._started_s,
                phase_elapsed_s=now_s - self._phase_started_s,
                bytes_done=self._bytes_done,
                bytes_total=self._bytes_total,
                last_load_s=self._last_load_s,
            ),
        )

    @property
    def is_done(self) -> bool:
        """Whether the load has ended, well or not."""
        return self._done.is_set()

    def advance(self, phase: LoadPhase, bytes_done: int = 0, bytes_total: int = 0) -> None:
        """Record progress."""
        if phase != self._phase:
            self._phase = phase
            self._phase_started_s = self._clock()
        self._bytes_done = bytes_done
        self._bytes_total = bytes_total

    def succeed(self) -> None:
        """End the job well; later calls change nothing."""
        if not self.is_done:
            self.load_s = self._clock() - self._started_s
            self._done.set()

    def fail(self, error: CortexError) -> None:
        """End the job with an error for all who wait; later calls change nothing."""
        if not self.is_done:
            self._error = error
            self._done.set()

    async def wait(self) -> None:
        """Wait for the end; a waiter that leaves does not stop the load.

        Raises:
            CortexError: why the load failed.
        """
        await self._done.wait()
        if self._error is not None:
            raise self._error.with_traceback(None)
