"""A Redis server of the test's own: the real one where it is installed, else a stand-in."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import answers, free_port

ROOT = Path(__file__).parents[2]
START_S = 20
PROGRAM = shutil.which("redis-server") or shutil.which("valkey-server")


class RedisServer:
    """A server on a free port that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.support.fake_redis", str(self._port)]
        if PROGRAM is not None:
            address = ["--port", str(self._port), "--bind", "127.0.0.1"]
            command = [PROGRAM, *address, "--save", "", "--dir", str(self._folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
        deadline = time.monotonic() + START_S
        while not answers(f"http://127.0.0.1:{self._port}"):
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    """Run a server that keeps nothing."""
    server = RedisServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
