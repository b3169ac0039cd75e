"""What a gateway does without being asked, over and over: each duty in a loop of its own."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

_logger = logging.getLogger(__name__)

Duty = Callable[[], Awaitable[None]]


class Steward:
    """Runs duties until cancelled; one that fails is logged and comes around again.

    Args:
        pause_s: how long between two rounds of a duty, asked for every time.
    """

    def __init__(self, duties: Mapping[str, Duty], pause_s: Callable[[], float]) -> None:
        self._duties = duties
        self._pause_s = pause_s

    async def run(self) -> None:
        """Do everything, for ever."""
        async with asyncio.TaskGroup() as tasks:
            for name, duty in self._duties.items():
                tasks.create_task(self._repeat(name, duty), name=f"duty {name}")

    async def _repeat(self, name: str, duty: Duty) -> None:
        while True:
            try:
                await duty()
            except Exception:  # a task's outermost loop: it goes on, and says so
                _logger.exception("the gateway's duty `%s` failed unexpectedly", name)
            await asyncio.sleep(self._pause_s())
