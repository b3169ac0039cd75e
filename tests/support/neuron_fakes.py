"""What stands in for devices, checkpoints and clocks in tests of the neuron."""

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from cortex.core.neuron_api import Device, DeviceHealth
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.devices import HOST, DeviceMemory, Hardware, Reading
from cortex.neuron.models.facts import ModelFacts

GIB = 1 << 30


class FakeProbe:
    """A host with as many bytes as a test says, and GPUs if it says so.

    `free_gib[index]` is free memory by device, `HOST` for the host.
    """

    def __init__(self) -> None:
        self.free_gib = {HOST: 64.0}
        self.fails = False
        # What every process takes, by device.
        self.process_bytes: dict[int, int] = {}

    def hardware(self) -> Hardware:
        gpus = sorted(index for index in self.free_gib if index != HOST)
        return Hardware(
            devices=[Device(index=index, name="Fake 9000", vram_total_mb=65536) for index in gpus]
        )

    def read(self, pids: Collection[int]) -> Reading:
        if self.fails:
            raise OSError("the driver is gone")
        memory = [
            DeviceMemory(
                index=index, total_bytes=max(64 * GIB, int(free * GIB)), free_bytes=int(free * GIB)
            )
            for index, free in self.free_gib.items()
        ]
        devices = [
            DeviceHealth(index=index, vram_used_mb=0, vram_free_mb=int(free * 1024))
            for index, free in self.free_gib.items()
            if index != HOST
        ]
        processes = {
            (index, pid): num_bytes
            for index, num_bytes in self.process_bytes.items()
            for pid in pids
        }
        return Reading(devices=devices, memory=memory, processes=processes)


def facts(*, parameters: int = 1000) -> ModelFacts:
    """Return the facts of a model of some size."""
    return ModelFacts(
        family="llama",
        max_position_embeddings=4096,
        vocab_size=1000,
        weight_bytes=2 * parameters,
        num_parameters=parameters,
        kv_elements_per_token=64,
        state_bytes_per_slot_f32=0,
    )


def read_facts(source: object) -> ModelFacts:
    """Return facts as `<model>/parameters` says, or of a tiny model."""
    path = Path(source.path, "parameters")  # type: ignore[attr-defined]
    return facts(parameters=int(path.read_text()) if path.exists() else 1000)


def add_model(model_dir: Path, name: str, *, parameters: int | None = None) -> Path:
    """Make a directory that looks like a checkpoint to a library."""
    path = model_dir / name
    path.mkdir(parents=True)
    (path / "config.json").write_bytes(msgspec.json.encode({"model_type": "llama"}))
    if parameters is not None:
        (path / "parameters").write_text(str(parameters))
    return path


def chat_model(entry: object) -> ChatModel:
    """Return a chat model that cannot chat."""
    return ChatModel(
        model_id=entry.id,  # type: ignore[attr-defined]
        tokenizer=None,  # type: ignore[arg-type]
        template=None,
        max_model_len=100_000,
    )


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until a condition holds that only another process or task can bring about."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)
