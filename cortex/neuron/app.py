"""Puts the neuron together: everything it owns is started and ended here."""

import asyncio
import logging
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from starlette.types import ASGIApp

from cortex.core.config import (
    NeuronConfig,
    TorchHarness,
    child_environment,
    foreign_environment,
    user_cache_dir,
)
from cortex.core.errors import StartupError
from cortex.neuron.accounts import Accounts
from cortex.neuron.activation import Activator
from cortex.neuron.chat.images import ImageLimits
from cortex.neuron.chat.model import ChatModel, load_chat_model
from cortex.neuron.command.harness import CommandHarness
from cortex.neuron.discovery import Monitor, NvmlProbe, Probe
from cortex.neuron.embeddings import Embeddings
from cortex.neuron.events import EventHub
from cortex.neuron.fetch import ImageFetcher
from cortex.neuron.guard import FleetGuard
from cortex.neuron.handlers import Handlers
from cortex.neuron.harness import Harness
from cortex.neuron.hub import Hub
from cortex.neuron.inference import Inference
from cortex.neuron.library import DEMO_DISTRIBUTIONS, Entry, Library
from cortex.neuron.lifecycle import Lifecycle
from cortex.neuron.metrics import Metrics
from cortex.neuron.native import NativeHarness
from cortex.neuron.peaks import Peaks
from cortex.neuron.relay import Relay
from cortex.neuron.scope import task_scope
from cortex.neuron.scratch import ScratchFolder, sweep
from cortex.neuron.views import Views

ENGINE_COMMAND = (sys.executable, "-m", "cortex.neuron.engine.process")
# How often new checkpoints in the model directories are looked for and described.
RESCAN_S = 30.0
REPUBLISH_S = 1.0

_logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_app(
    config: NeuronConfig,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
    probe: Probe | None = None,
) -> AsyncIterator[ASGIApp]:
    """Yield the neuron's app with its background work running; drain and unload on the way out.

    Args:
        engine_command: the program that becomes an engine process.
        probe: access to the devices; NVML and /proc by default.
    """
    clock = time.monotonic
    await asyncio.to_thread(sweep)
    torch = config.harness.torch
    monitor = Monitor(probe or NvmlProbe())
    await asyncio.to_thread(monitor.start)
    library = Library(
        model_dirs=[Path(each) for each in torch.model_dirs],
        models={name: Path(each) for name, each in torch.models.items()},
        demos=DEMO_DISTRIBUTIONS if torch.demo_models else (),
        clock=clock,
    )
    await asyncio.to_thread(library.scan)
    peaks = Peaks(Path(config.state_dir or user_cache_dir()) / "memory_peaks.json")
    await asyncio.to_thread(peaks.load)
    metrics = Metrics()
    hub = Hub(cache_dir=torch.hf_cache)
    state_dir = Path(config.state_dir or user_cache_dir())
    cache_dir, scratch = _cache_dir(state_dir / "tokenizers")
    open_chat = partial(_open_chat, cache_dir=cache_dir, config=torch)
    harness = NativeHarness(
        config=torch,
        library=library,
        hub=hub,
        engine_command=engine_command,
        environment=child_environment({"OMP_NUM_THREADS": str(torch.num_threads)}),
        open_chat=open_chat,
        clock=clock,
    )
    command = config.harness.command
    # What the configuration names goes before what lies in a directory.
    harnesses: list[Harness] = []
    if command.models or command.allow_remote_commands:
        harnesses.append(
            CommandHarness(
                command,
                environment=foreign_environment(),
                log_dir=state_dir / "engines",
                clock=clock,
            )
        )
    if "torch" in config.kinds:
        harnesses.append(harness)
    lifecycle = Lifecycle(
        config=torch,
        harnesses=harnesses,
        monitor=monitor,
        peaks=peaks,
        metrics=metrics,
        clock=clock,
        on_change=lambda model_id: events.changed(model_id),
    )
    accounts = Accounts(lifecycle, metrics, clock=clock)
    inference = Inference(
        lifecycle,
        accounts,
        open_chat=open_chat,
        fetcher=ImageFetcher(
            torch.vision.url_hosts,
            max_bytes=torch.vision.max_image_mb << 20,
            limit_s=torch.vision.fetch_s,
        ),
        wall_clock=_unix_s,
    )
    embeddings = Embeddings(accounts)
    # A thread of its own: the loop waits at its end for those of its default executor.
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="library")
    activator = Activator(lifecycle, config.default_models)
    views = Views(
        lifecycle=lifecycle,
        monitor=monitor,
        activation=lambda: activator.state,
        max_model_len=torch.max_model_len,
        clock=clock,
    )
    metrics.show(views.gauges)
    events = EventHub(views, clock=clock)
    handlers = Handlers(
        lifecycle=lifecycle,
        inference=inference,
        embeddings=embeddings,
        relay=Relay(accounts, limits=command, clock=clock),
        views=views,
        events=events,
        metrics=metrics,
        max_body_bytes=config.max_body_mb << 20,
    )
    try:
        async with lifecycle.run(), task_scope() as tasks:
            background = [
                tasks.create_task(activator.run(), name="default models"),
                tasks.create_task(_keep_library(library, reader), name="library"),
                tasks.create_task(_keep_publishing(events), name="events"),
            ]
            try:
                yield _guarded(handlers.app(), config.fleet_secret, views)
            finally:
                for task in background:
                    task.cancel()
    finally:
        inference.close()
        embeddings.close()
        harness.close()
        hub.close()
        monitor.close()
        reader.shutdown(wait=False, cancel_futures=True)
        if scratch is not None:
            scratch.close()


def _guarded(app: ASGIApp, secret: str | None, views: Views) -> ASGIApp:
    if secret is None:
        return app
    return FleetGuard(app, secret, status=lambda: views.health().status)


def _open_chat(entry: Entry, *, cache_dir: Path, config: TorchHarness) -> ChatModel:
    vision = config.vision
    chat = load_chat_model(
        entry.source,
        model_id=entry.id,
        cache_dir=cache_dir,
        image_limits=ImageLimits(
            max_images=vision.max_images,
            max_bytes=vision.max_image_mb << 20,
            max_pixels=vision.max_megapixels * 1_000_000,
            max_tokens=vision.max_image_tokens,
            max_total_tokens=vision.max_total_tokens,
        ),
    )
    return replace(
        chat,
        default_max_tokens=config.default_max_tokens,
        constrain_tools=config.constrain_tools,
    )


def _cache_dir(wanted: Path) -> tuple[Path, ScratchFolder | None]:
    """Return where tokenizers are kept: `wanted`, or else a folder for this run alone.

    Raises:
        StartupError: nothing can be written anywhere.
    """
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=wanted).close()
    except OSError as exc:
        _logger.warning(
            "state_dir cannot be written; what is kept there is made again at each start",
            extra={"cause": str(exc)},
        )
        try:
            scratch = ScratchFolder()
        except OSError as nowhere:
            raise StartupError(
                f"neither state_dir ({wanted.parent}) nor the temporary directory can be written: "
                f"{nowhere}; make one of them writable"
            ) from nowhere
        return scratch.path, scratch
    return wanted, None


async def _keep_library(library: Library, reader: Executor) -> None:
    """Describe what was found, and look again from time to time."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            await loop.run_in_executor(reader, library.describe_all)
            await asyncio.sleep(RESCAN_S)
            await loop.run_in_executor(reader, library.scan)
        except Exception:  # the outermost loop of a background task
            _logger.exception("the model directories could not be read; trying again later")
            await asyncio.sleep(RESCAN_S)


async def _keep_publishing(events: EventHub) -> None:
    while True:
        try:
            await events.run()
        except Exception:  # the outermost loop of a background task
            _logger.exception("events could not be published; trying again")
            await asyncio.sleep(REPUBLISH_S)


def _unix_s() -> float:
    return datetime.now(UTC).timestamp()
