"""External engines over the fake server, for tests."""

import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from cortex.core.command import CommandModel
from cortex.core.config import CommandHarness, child_environment
from cortex.neuron.command.engine import CommandEngine
from cortex.neuron.scope import task_scope
from tests.support.fake_server import COMMAND


def spec(directory: Path, **fields: Any) -> CommandModel:
    """Return the configuration of a model that a fake server in `directory` serves."""
    directory.mkdir(parents=True, exist_ok=True)
    table = {"vram_mb": 100, "stop_timeout_s": 5, **fields}
    table.setdefault("command", [*COMMAND, str(directory), "--port", "{port}"])
    return msgspec.convert(table, CommandModel)


@asynccontextmanager
async def engine(
    directory: Path,
    *,
    devices: tuple[int, ...] = (),
    harness: CommandHarness | None = None,
    max_model_len: int | None = None,
    **fields: Any,
) -> AsyncIterator[CommandEngine]:
    """Yield an engine that has been started and not been waited for; it is killed at the end."""
    it = CommandEngine(
        "m",
        spec(directory, **fields),
        harness=harness or CommandHarness(),
        devices=devices,
        environment=child_environment({"PYTHONPATH": ":".join(filter(None, sys.path))}),
        log_dir=directory / "logs",
        clock=time.monotonic,
        max_model_len=max_model_len,
    )
    async with task_scope() as tasks:
        await it.start(tasks)
        try:
            yield it
        finally:
            await it.kill()


async def load(it: CommandEngine, timeout_s: float = 30.0) -> Any:
    """Wait until an engine can serve."""
    return await it.load(on_progress=lambda _: None, timeout_s=timeout_s)
