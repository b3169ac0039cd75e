"""A host with as little memory as a test wants, for real engines to have no room on."""

from collections.abc import Collection

from cortex.neuron.devices import HOST, DeviceMemory, Hardware, Reading
from tests.support.neuron_fakes import FakeProbe


class SmallHost(FakeProbe):
    """A host without GPUs that claims to have `total_bytes`, whatever the machine has."""

    def __init__(self, total_bytes: int) -> None:
        super().__init__()
        self.total_bytes = total_bytes

    def hardware(self) -> Hardware:
        """Return that there is no GPU."""
        return Hardware()

    def read(self, pids: Collection[int]) -> Reading:
        """Return memory of which nobody but the neuron's own models takes any."""
        memory = DeviceMemory(index=HOST, total_bytes=self.total_bytes, free_bytes=self.total_bytes)
        return Reading(memory=[memory])
