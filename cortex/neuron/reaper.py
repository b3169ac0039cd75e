"""Unloads models that nobody has used for as long as they may idle."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from cortex.core.errors import ModelNotFoundError
from cortex.neuron.resident import Model

CHECK_S = 1.0

_logger = logging.getLogger(__name__)


def expired(models: Iterable[Model], now_s: float) -> list[str]:
    """Return the models whose idleness is over their limit."""
    return [each.id for each in models if each.unload_in_s(now_s) == 0.0]


async def reap(
    models: Callable[[], Iterable[Model]],
    unload: Callable[[str], Awaitable[None]],
    clock: Callable[[], float],
    tasks: asyncio.TaskGroup,
) -> None:
    """Look for expired models from time to time; each is unloaded in a task of its own."""

    async def unload_idle(model_id: str) -> None:
        try:
            await unload(model_id)
        except ModelNotFoundError:
            return

    while True:
        await asyncio.sleep(CHECK_S)
        for model_id in expired(models(), clock()):
            _logger.info("unloading an idle model", extra={"model": model_id})
            tasks.create_task(unload_idle(model_id), name=f"idle {model_id}")
