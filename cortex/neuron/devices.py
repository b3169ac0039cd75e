"""Data about the devices of this host, shared by who reads them and who plans with them."""

from dataclasses import dataclass, field

from cortex.core.neuron_api import Device, DeviceHealth

HOST = -1  # the device index of host memory


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """A reading of one device; `index` HOST is the host's own memory."""

    index: int
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What does not change while the process lives."""

    devices: list[Device] = field(default_factory=list)
    cuda_version: str | None = None
    driver_version: str | None = None
    cuda_unavailable_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The state of all devices at one moment.

    Attributes:
        processes: bytes by device index and process id, of processes that were asked for.
    """

    devices: list[DeviceHealth] = field(default_factory=list)
    memory: list[DeviceMemory] = field(default_factory=list)
    processes: dict[tuple[int, int], int] = field(default_factory=dict)
