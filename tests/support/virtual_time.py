"""An event loop whose clock jumps to the next timer as soon as nothing else is to be done.

Sixty seconds of waiting take milliseconds, over real sockets too, as long as both of their ends
live in the loop: what one end has written the other can read at once. What is handed to a thread is
done on the spot, since this time would not wait for it.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

# How long a loop that has nothing to do looks at its sockets before time moves on. What has been
# written on loopback is there within microseconds.
SETTLE_S = 0.002
QUICK_SETTLE_S = 0.0001
# Of a loop without sockets.
NO_SETTLE_S = 0.0


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Waits for sockets only as long as bytes may still be on their way."""

    def __init__(self, skip: Callable[[float], None], settle_s: float) -> None:
        super().__init__()
        self._skip = skip
        self._settle_s = settle_s

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready; with nothing ready, let `timeout` seconds be past."""
        if timeout is None:
            return super().select(None)
        ready = super().select(min(timeout, self._settle_s) if timeout > 0 else 0)
        if not ready and timeout > 0:
            self._skip(timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop with a clock of its own; `time()` starts at 0."""

    def __init__(self, settle_s: float = SETTLE_S) -> None:
        self._now_s = 0.0
        super().__init__(_Selector(self._advance, settle_s))

    def time(self) -> float:
        """Return virtual seconds."""
        return self._now_s

    def run_in_executor(
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> "asyncio.Future[T]":
        """Call the function here and now."""
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as exc:  # noqa: BLE001  the future is for whoever waits
            done.set_exception(exc)
        return done

    def _advance(self, seconds: float) -> None:
        # A hair more, so that the timer that was waited for is due whatever the rounding.
        self._now_s += seconds + 1e-9


def quick_loop() -> VirtualTimeLoop:
    """Return a loop for many short waits, whose sockets are all served by the loop itself."""
    return VirtualTimeLoop(QUICK_SETTLE_S)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(work)


def now_s() -> float:
    """Return the running loop's time; a clock to hand to what is tested."""
    return asyncio.get_running_loop().time()
