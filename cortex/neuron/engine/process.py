"""The engine process: `python -m cortex.neuron.engine.process --socket PATH`.

Connects to its neuron's Unix socket, loads the model that the first command names, then turns
commands into steps and steps into events until the neuron ends it or is gone.
"""

import argparse
import ctypes
import logging
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from cortex.core.errors import CheckpointError, CortexError
from cortex.core.logs import configure
from cortex.neuron.engine.embedder import Embedder
from cortex.neuron.engine.engine import Engine
from cortex.neuron.engine.link import LinkClosedError, NeuronLink
from cortex.neuron.engine.loader import load_engine
from cortex.neuron.engine.protocol import (
    Cancel,
    Command,
    Embed,
    ImagePixels,
    Loaded,
    LoadFailed,
    LoadModel,
    Progress,
    StepDone,
    Submit,
    TokenEvent,
)
from cortex.neuron.engine.sizing import OutOfDeviceMemoryError

_log = logging.getLogger(__name__)

CONNECT_LIMIT_S = 10.0
EXIT_LOAD_FAILED = 1
EXIT_DEVICE_LOST = 4

_PR_SET_PDEATHSIG = 1

Loader = Callable[..., tuple[Engine | Embedder, Loaded]]


def main(arguments: list[str] | None = None) -> int:
    """Run one engine process; return its exit code: 0 if the neuron wanted the end."""
    parser = argparse.ArgumentParser(prog="cortex-engine", description="One model's engine.")
    parser.add_argument("--socket", required=True, help="the neuron's Unix socket")
    parser.add_argument("--log-level", default="info")
    options = parser.parse_args(arguments)
    configure(options.log_level)
    _die_with_parent()
    # A terminal's Ctrl-C reaches the whole process group; what it means is for the neuron to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    torch.set_num_interop_threads(1)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_LIMIT_S)
        connection.connect(options.socket)
        connection.settimeout(None)
    except OSError as exc:
        _log.error("no neuron at %s: %s", options.socket, exc)
        return EXIT_LOAD_FAILED
    link = NeuronLink(connection)
    try:
        return serve(link)
    except LinkClosedError as exc:
        _log.info("%s", exc)
        return 0
    finally:
        link.close()


def serve(link: NeuronLink, *, loader: Loader = load_engine) -> int:
    """Load what the neuron asks for and serve it; return the exit code.

    Raises:
        LinkClosedError: the neuron wanted the end, or is gone.
    """
    commands = link.receive(wait=True)
    first = commands.pop(0)
    if not isinstance(first, LoadModel):
        message = f"the first command was {type(first).__name__}, not LoadModel"
        link.send(LoadFailed(code="internal", message=message))
        return EXIT_LOAD_FAILED

    def progress(event: Progress) -> None:
        link.check()
        link.send(event)

    try:
        engine, loaded = loader(first, progress=progress)
    except LinkClosedError:
        raise
    except Exception as exc:  # noqa: BLE001  whatever ends a load, the neuron is told
        failure = _describe(exc, first)
        _log.error("loading %s failed: %s", first.source.path, failure.message, exc_info=exc)
        link.send(failure)
        return EXIT_LOAD_FAILED
    link.send(loaded)
    _log.info("serving %s on %s", first.source.path, loaded.device)
    grammars = ThreadPoolExecutor(1, thread_name_prefix="grammars")
    engine.compile_in(grammars, link.wake)
    try:
        return _steps(link, engine, commands)
    finally:
        grammars.shutdown(wait=False, cancel_futures=True)


def _steps(link: NeuronLink, engine: Engine | Embedder, commands: list[Command]) -> int:
    while True:
        for command in commands:
            _apply(link, engine, command)
        engine.admit_ready()
        if engine.has_news:
            # Refusals and freed slots are not kept back for the length of a step.
            link.send(engine.report())
        if engine.has_work:
            link.send(engine.step())
        if engine.is_lost:
            return EXIT_DEVICE_LOST
        commands = link.receive(wait=not engine.has_work)


def _apply(link: NeuronLink, engine: Engine | Embedder, command: Command) -> None:
    if isinstance(command, Cancel):
        engine.cancel(command.request_id)
    elif isinstance(command, Submit):
        engine.submit(command)
    elif isinstance(command, Embed) and isinstance(engine, Embedder):
        engine.embed(command)
    elif isinstance(command, ImagePixels) and isinstance(engine, Engine):
        engine.take_pixels(command)
    elif isinstance(command, Embed):
        event = TokenEvent(
            request_id=command.request_id,
            finish="error",
            error="this model writes text and makes no vectors",
            is_refusal=True,
        )
        done = engine.report()
        link.send(StepDone(events=[*done.events, event], stats=done.stats))
    else:
        _log.error("a second %s is ignored", type(command).__name__)


def _describe(exc: Exception, command: LoadModel) -> LoadFailed:
    """Say in one line why a load failed."""
    if isinstance(exc, CheckpointError):
        return LoadFailed(code="unreadable_checkpoint", message=exc.message)
    if isinstance(exc, OutOfDeviceMemoryError):
        return LoadFailed(code="out_of_memory", message=exc.message)
    if isinstance(exc, CortexError):
        return LoadFailed(code="internal", message=exc.message)
    line = (str(exc) or type(exc).__name__).splitlines()[0]
    # torch's CPU allocator raises a plain RuntimeError.
    if isinstance(exc, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in line:
        message = f"out of memory on {command.device}: {line}"
        return LoadFailed(code="out_of_memory", message=message)
    return LoadFailed(code="internal", message=f"{type(exc).__name__}: {line}")


def _die_with_parent() -> None:
    """Ask the kernel, where it can, to kill this process when the thread that made it ends."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except AttributeError:
        _log.info("no parent-death signal here: the closed socket alone ends this process")


if __name__ == "__main__":
    sys.exit(main())
