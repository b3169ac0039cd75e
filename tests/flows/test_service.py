"""`cortex serve` and `cortex neuron` as services: what their manager hears, and when."""

import contextlib
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import STOP_S, answers, environment, free_port
from tests.support.service_manager import ServiceManager


@contextlib.contextmanager
def service(
    tmp: Path, manager: ServiceManager, *arguments: str, **more: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a `cortex` service under a manager; nobody waits for it to be ready."""
    told = manager.environment(**more)
    process = subprocess.Popen(
        [sys.executable, "-m", "cortex", *arguments], env=environment(tmp) | told
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def ends_well(process: subprocess.Popen[bytes], manager: ServiceManager) -> None:
    process.send_signal(signal.SIGTERM)
    manager.until(lambda message: "STOPPING" in message)
    assert manager.messages[-1]["STATUS"].startswith("draining, for ")
    assert process.wait(STOP_S) == 0
    assert {"EXTEND_TIMEOUT_USEC": "20000000"} in manager.read()


@pytest.mark.parametrize("abstract", [False, True])
def test_a_gateway_tells_when_it_can_be_used_reloads_and_ends(tmp_path: Path, abstract: bool):
    port = free_port()
    config = tmp_path / "cortex.toml"
    listen = f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:0"\n'
    config.write_text(listen)
    with ServiceManager(abstract=abstract) as manager:
        with service(
            tmp_path, manager, "serve", "-c", str(config), WATCHDOG_USEC="200000"
        ) as gateway:
            manager.until(lambda message: "READY" in message)
            assert answers(f"http://127.0.0.1:{port}")
            status = "serving; 0 neurons and 0 models are configured"
            assert manager.messages[-1]["STATUS"] == status
            seen = len(manager.messages)
            manager.until(lambda message: message == {"WATCHDOG": "1"})
            manager.until(lambda message: message == {"WATCHDOG": "1"})
            assert {"WATCHDOG": "1"} in manager.messages[seen:]

            config.write_text(listen + 'sped = "fast"\n')
            gateway.send_signal(signal.SIGHUP)
            manager.until(lambda message: "RELOADING" in message)
            assert manager.messages[-1]["MONOTONIC_USEC"].isdigit()
            manager.until(lambda message: "READY" in message)
            assert "the configuration in use stays: " in manager.messages[-1]["STATUS"]
            assert "sped" in manager.messages[-1]["STATUS"]
            ends_well(gateway, manager)


# prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN): what MemoryDenyWriteExecute of the unit asks for.
DENY_WRITE_EXECUTE = """
import ctypes, os, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):
    sys.exit(77)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_a_gateway_runs_where_memory_cannot_be_both_written_and_executed(tmp_path: Path):
    port = free_port()
    config = tmp_path / "cortex.toml"
    config.write_text(
        f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:0"\n'
        '[limits]\nstorage = "redis://127.0.0.1:9/0"\n'
    )
    command = [sys.executable, "-c", DENY_WRITE_EXECUTE, "-m", "cortex", "serve", "-c", str(config)]
    with subprocess.Popen(command, env=environment(tmp_path)) as gateway:
        try:
            while not answers(f"http://127.0.0.1:{port}"):
                if gateway.poll() == 77:
                    pytest.skip("this kernel has no PR_SET_MDWE")
                assert gateway.poll() is None
                time.sleep(0.05)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as answer:
                assert answer.status == 200
            gateway.terminate()
            assert gateway.wait(STOP_S) == 0
        finally:
            gateway.kill()


def test_a_gateway_that_cannot_start_is_never_ready(tmp_path: Path):
    with ServiceManager() as manager:
        with service(tmp_path, manager, "serve", "-c", str(tmp_path / "gone.toml")) as gateway:
            assert gateway.wait(STOP_S) == 1
            assert manager.read() == []


def test_a_neuron_tells_when_it_can_be_used_and_keeps_its_sockets_in_the_runtime_directory(
    tmp_path: Path,
):
    port = free_port()
    config = tmp_path / "neuron.toml"
    config.write_text(
        f'host = "127.0.0.1"\nport = {port}\n[[default_models]]\nmodel_id = "cortex-tiny"\n'
    )
    with ServiceManager() as manager:
        run, state = Path(manager.address).parent / "run", tmp_path / "state"
        run.mkdir()
        with service(
            tmp_path,
            manager,
            *("neuron", "-c", str(config)),
            RUNTIME_DIRECTORY=str(run),
            STATE_DIRECTORY=str(state),
        ) as neuron:
            manager.until(lambda message: "READY" in message)
            assert answers(f"http://127.0.0.1:{port}")
            assert manager.messages == [{"READY": "1", "STATUS": f"serving on port {port}"}]
            while not list(run.glob("cortex-neuron-*/engine.sock")):
                assert neuron.poll() is None
                time.sleep(0.05)
            ends_well(neuron, manager)
        assert list(run.iterdir()) == []
        assert (state / "tokenizers").is_dir()
