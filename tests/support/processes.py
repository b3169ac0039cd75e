"""Real `cortex` processes on loopback for whole-journey tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

READY = "Ctrl-C ends it"
READY_S = 90
STOP_S = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Cortex:
    """A running `cortex` command; its output is kept in `lines`."""

    process: subprocess.Popen[str]
    port: int
    metrics_port: int
    neuron_port: int
    lines: list[str] = field(default_factory=list)
    ready: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def neuron_url(self) -> str:
        return f"http://127.0.0.1:{self.neuron_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def read(self, until: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if until in line:
                self.ready.set()
        self.ready.set()

    def engine_pids(self) -> list[int]:
        """Process ids of the engines below this command."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                if b"cortex.neuron.engine.process" in command and int(parent) == self.process.pid:
                    found.append(int(entry.name))
        return found


def environment(tmp: Path) -> dict[str, str]:
    return {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


@contextlib.contextmanager
def cortex_up(tmp: Path, *arguments: str) -> Iterator[Cortex]:
    """Run `cortex up` on free ports until it says that it is ready; SIGTERM ends it cleanly."""
    ports = [free_port() for _ in range(3)]
    command = [sys.executable, "-m", "cortex", "up", *arguments]
    command += ["--port", str(ports[0]), "--metrics-port", str(ports[1])]
    command += ["--neuron-port", str(ports[2])]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(tmp),
    )
    running = Cortex(process, *ports)
    reader = threading.Thread(target=running.read, args=(READY,), daemon=True)
    reader.start()
    try:
        assert running.ready.wait(READY_S), running.output
        assert READY in running.output, running.output  # it may have ended instead
        yield running
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0, running.output
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join(5)
        assert process.stdout is not None
        process.stdout.close()


@contextlib.contextmanager
def cortex_process(tmp: Path, url: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a `cortex` service until it answers on `url`; SIGTERM ends it cleanly."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cortex", *arguments], env=environment(tmp), start_new_session=True
    )
    try:
        deadline = time.monotonic() + READY_S
        while not answers(url):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_S) == 0
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def answers(url: str) -> bool:
    """Whether anything listens at a URL."""
    host, _, port = url.partition("://")[2].partition("/")[0].partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def run_cortex(
    tmp: Path, *arguments: str, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a `cortex` command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cortex", *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        env=environment(tmp),
        timeout=60,
        check=False,
    )
