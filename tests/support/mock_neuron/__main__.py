"""A mock neuron as a process: `python -m tests.support.mock_neuron --port 0 --spec '{...}'`."""

import argparse
import asyncio
import signal

import msgspec

from tests.support.mock_neuron.app import MockNeuron
from tests.support.mock_neuron.engine import EngineSpec
from tests.support.mock_neuron.script import GIB, MockModel


class ModelSpec(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One model of a mock neuron's process."""

    id: str
    status: str = "unloaded"
    memory_bytes: int = GIB
    load_bytes_s: float | None = None
    engine: EngineSpec = EngineSpec()

    def model(self) -> MockModel:
        """Return the model itself."""
        return MockModel(
            self.id,
            self.status,
            self.memory_bytes,
            engine=self.engine,
            load_bytes_s=self.load_bytes_s,
        )


class NodeSpec(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What a mock neuron's process is started with.

    Attributes:
        time_scale: real seconds for each second of the model.
    """

    models: list[ModelSpec]
    total_bytes: int = 64 * GIB
    num_devices: int = 1
    time_scale: float = 1.0


async def run(spec: NodeSpec, host: str, port: int) -> None:
    """Serve until SIGTERM; the first line of output has the endpoint."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with MockNeuron(
        *(each.model() for each in spec.models),
        host=host,
        port=port,
        total_bytes=spec.total_bytes,
        num_devices=spec.num_devices,
        time_scale=spec.time_scale,
    ) as neuron:
        print(neuron.endpoint, flush=True)  # noqa: T201  whoever started it reads this
        await ended.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="mock_neuron")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--spec", required=True, help="a NodeSpec as JSON")
    options = parser.parse_args()
    asyncio.run(run(msgspec.json.decode(options.spec, type=NodeSpec), options.host, options.port))
