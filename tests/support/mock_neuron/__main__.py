"""A mock neuron as a process: `python -m tests.support.mock_neuron --port 0 --spec '{...}'`."""

import argparse
import asyncio
import secrets
import signal
from contextlib import AsyncExitStack

import msgspec

from tests.support.mock_neuron.app import MockNeuron
from tests.support.mock_neuron.engine import EngineSpec
from tests.support.mock_neuron.script import GIB, MockModel

PACE_S = 0.5


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
        events: whether it has `/events`; without, gateways have to poll.
    """

    models: list[ModelSpec]
    total_bytes: int = 64 * GIB
    num_devices: int = 1
    time_scale: float = 1.0
    events: bool = True

    def neuron(self, host: str, port: int) -> MockNeuron:
        """Return the neuron itself."""
        neuron = MockNeuron(
            *(each.model() for each in self.models),
            host=host,
            port=port,
            total_bytes=self.total_bytes,
            num_devices=self.num_devices,
            time_scale=self.time_scale,
            events=self.events,
        )
        # As after any restart, the ids of the life before are worth nothing.
        neuron.feed.epoch = secrets.token_hex(4)
        neuron.feed.pace_s = PACE_S
        return neuron


async def run(spec: NodeSpec, host: str, port: int, count: int) -> None:
    """Serve `count` neurons of one kind until SIGTERM; each prints its endpoint on a line."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with AsyncExitStack() as stack:
        for _ in range(count):
            neuron = await stack.enter_async_context(spec.neuron(host, port))
            print(neuron.endpoint, flush=True)  # noqa: T201  whoever started it reads this
        await ended.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="mock_neuron")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--count", type=int, default=1, help="more than one need port 0")
    parser.add_argument("--spec", required=True, help="a NodeSpec as JSON")
    options = parser.parse_args()
    spec = msgspec.json.decode(options.spec, type=NodeSpec)
    asyncio.run(run(spec, options.host, options.port, options.count))
