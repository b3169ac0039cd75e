"""A task group for context managers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def task_scope() -> AsyncIterator[asyncio.TaskGroup]:
    """Yield a task group; an error of the body comes out as itself and not in a group.

    The body ends or cancels what it started: leaving only waits for it.
    """
    failure: Exception | None = None
    async with asyncio.TaskGroup() as tasks:
        try:
            yield tasks
        except Exception as exc:  # noqa: BLE001  raised again below, outside the group
            failure = exc
    if failure is not None:
        raise failure
