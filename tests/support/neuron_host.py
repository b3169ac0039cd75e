"""A lifecycle over fake engines, devices and checkpoints, without HTTP."""

import os
import time
from contextlib import asynccontextmanager

from cortex.core.config import TorchHarness
from cortex.core.neuron_api import LoadRequest
from cortex.neuron.discovery import Monitor
from cortex.neuron.engine.protocol import Submit
from cortex.neuron.hub import Hub
from cortex.neuron.library import Library
from cortex.neuron.lifecycle import Lifecycle
from cortex.neuron.metrics import Metrics
from cortex.neuron.native import NativeHarness
from cortex.neuron.peaks import Peaks
from tests.support.fake_engine import COMMAND
from tests.support.neuron_fakes import FakeProbe, chat_model, eventually, read_facts


class Clock:
    """The real clock, and a jump ahead where a test wants one."""

    def __init__(self):
        self.ahead_s = 0.0

    def __call__(self):
        return time.monotonic() + self.ahead_s


class Host:
    """A lifecycle over fakes, and what a test wants to turn."""

    def __init__(self, lifecycle, library, probe, clock):
        self.lifecycle = lifecycle
        self.library = library
        self.probe = probe
        self.clock = clock

    async def load(self, model_id, **options):
        job = await self.lifecycle.load(LoadRequest(model_id=model_id, **options))
        await job.wait()
        return job

    def status(self, model_id):
        model = self.lifecycle.model(model_id)
        return "unloaded" if model is None else model.state.status

    async def until(self, model_id, status):
        await eventually(lambda: self.status(model_id) == status)

    def stream(self, model_id, *prompt_ids):
        serving = self.lifecycle.serving(model_id)
        return serving.engine.submit(
            [Submit(request_id=0, prompt_ids=list(prompt_ids), max_tokens=100_000)]
        )


def no_network(repo_id, **options):
    raise ConnectionError("no route to the hub")


@asynccontextmanager
async def host(
    tmp_path, *, config=None, snapshot=no_network, command=COMMAND, open_chat=chat_model
):
    model_dir = tmp_path / "models"
    model_dir.mkdir(exist_ok=True)
    clock, probe = Clock(), FakeProbe()
    monitor = Monitor(probe, read_every_s=60.0)
    monitor.start()
    config = config or TorchHarness(drain_s=10.0)
    library = Library(
        model_dirs=[model_dir], clock=clock, bundled=None, demos=(), read_facts=read_facts
    )
    harness = NativeHarness(
        config=config,
        library=library,
        hub=Hub(cache_dir=None, snapshot=snapshot),
        engine_command=command,
        open_chat=chat_model,
        clock=clock,
    )
    lifecycle = Lifecycle(
        config=config,
        harnesses=[harness],
        monitor=monitor,
        peaks=Peaks(tmp_path / "state" / "memory_peaks.json"),
        metrics=Metrics(),
        clock=clock,
    )
    try:
        async with lifecycle.run():
            yield Host(lifecycle, library, probe, clock)
    finally:
        harness.close()
        monitor.close()


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def tokens_of(generation):
    return [each async for _, event in generation for each in event.token_ids]
