"""A fleet over hosts of its own: a client, two gateways, three neurons."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.support.hosts import Host, Network, missing
from tests.support.mock_neuron.__main__ import ModelSpec, NodeSpec
from tests.support.mock_neuron.engine import EngineSpec
from tests.support.mock_neuron.script import GIB
from tests.support.processes import READY_S, STOP_S, answers, environment

GATEWAY_PORT, METRICS_PORT, NEURON_PORT = 31313, 31314, 13131

# Ten short answers' worth of work a second take a node a fraction of its time.
ENGINE = EngineSpec(step_s=0.01, max_tokens=8, max_num_seqs=64)
MODELS = [
    ModelSpec(id="warm", status="loaded", engine=ENGINE),
    ModelSpec(id="cold", memory_bytes=2 * GIB, load_bytes_s=float(GIB), engine=ENGINE),
]


class Fleet:
    """Processes on hosts; `settle` brings all of them back to health.

    Attributes:
        client: where requests come from.
        gateways, neurons: hosts by name.
    """

    def __init__(self, network: Network, tmp: Path) -> None:
        self.client, one, two, *nodes = network.hosts
        self.gateways = {"one": one, "two": two}
        self.neurons = dict(zip("abc", nodes, strict=True))
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self._tmp = tmp

    def url(self, gateway: str) -> str:
        """Return a gateway's base URL."""
        return f"http://{self.gateways[gateway].address}:{GATEWAY_PORT}"

    def neuron_url(self, name: str) -> str:
        """Return a neuron's base URL."""
        return f"http://{self.neurons[name].address}:{NEURON_PORT}"

    def kill(self, name: str) -> None:
        """`kill -9` a gateway's or neuron's process."""
        os.kill(self.processes[name].pid, signal.SIGKILL)
        self.processes.pop(name).wait()

    def start(self, name: str) -> None:
        """Start a gateway's or neuron's process; `await_ready` waits for it."""
        if name in self.gateways:
            config = self._config(name)
            command = [sys.executable, "-m", "cortex", "serve", "-c", str(config)]
            self._popen(name, self.gateways[name], command)
            return
        spec = msgspec.json.encode(NodeSpec(models=MODELS)).decode()
        command = [sys.executable, "-m", "tests.support.mock_neuron", "--spec", spec]
        command += ["--host", self.neurons[name].address, "--port", str(NEURON_PORT)]
        self._popen(name, self.neurons[name], command)

    def await_ready(self, name: str) -> None:
        """Wait until a process accepts connections."""
        url = self.url(name) if name in self.gateways else self.neuron_url(name)
        deadline = time.monotonic() + READY_S
        with self.client.inside():
            while not answers(url):
                assert self.processes[name].poll() is None, f"{name} has ended"
                assert time.monotonic() < deadline, f"{name} does not answer"
                time.sleep(0.05)

    def settle(self) -> None:
        """Mend every link and start what is not running."""
        for host in [*self.gateways.values(), *self.neurons.values()]:
            host.mend()
        gone = [
            name
            for name in [*self.neurons, *self.gateways]
            if name not in self.processes or self.processes[name].poll() is not None
        ]
        for name in gone:
            self.start(name)
        for name in gone:
            self.await_ready(name)

    def close(self) -> None:
        """End all processes."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _popen(self, name: str, host: Host, command: list[str]) -> None:
        with Path(self._tmp, f"{name}.log").open("a") as log:
            self.processes[name] = host.popen(
                command, env=environment(self._tmp), stdout=log, stderr=log
            )

    def _config(self, gateway: str) -> Path:
        address = self.gateways[gateway].address
        nodes = "".join(
            f'[[neurons]]\nname = "{name}"\nendpoint = "{self.neuron_url(name)}"\n'
            for name in self.neurons
        )
        path = self._tmp / f"{gateway}.toml"
        path.write_text(
            f'[gateway]\nlisten = "{address}:{GATEWAY_PORT}"\n'
            f'metrics_listen = "{address}:{METRICS_PORT}"\n{nodes}'
        )
        return path


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    """Six hosts on a bridge."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    made = Network(6)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def _running(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(network, tmp_path_factory.mktemp("hosts"))
    try:
        yield fleet
    finally:
        fleet.close()


@pytest.fixture
def fleet(_running: Fleet) -> Fleet:
    """A fleet of mock neurons with everything up, whatever the test before has done to it."""
    _running.settle()
    return _running
