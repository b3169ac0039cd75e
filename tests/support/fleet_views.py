"""Snapshots of made-up fleets, for the pure decisions."""

from collections.abc import Mapping
from types import MappingProxyType

from cortex.core.neuron_api import (
    Device,
    DeviceHealth,
    Discovery,
    ModelInfo,
    ModelLoad,
    NeuronHealth,
)
from cortex.gateway.fleet import FleetSnapshot, NodeView

GIB = 1 << 30


def model(name: str, status: str = "loaded", gib: float | None = None, **fields: object):
    """A model as a node lists it, holding so many GiB."""
    held = None if gib is None or status == "unloaded" else int(gib * 1024)
    weights = None if gib is None else int(gib * GIB)
    return ModelInfo(
        id=name,
        harness="torch",
        status=status,
        vram_used_mb=held,
        weight_bytes=weights,
        **fields,  # type: ignore[arg-type]
    )


def view(
    name: str,
    *models: ModelInfo,
    devices: Mapping[int, tuple[float, float]] | None = None,
    device_name: str = "NVIDIA GeForce RTX 4090",
    loads: Mapping[str, ModelLoad] | None = None,
    foreign: Mapping[str, int] | None = None,
) -> NodeView:
    """A healthy node; `devices` are (total, free) GiB by index, by default one of (24, 20)."""
    sizes = {0: (24.0, 20.0)} if devices is None else devices
    return NodeView(
        name=name,
        endpoint=f"http://{name}",
        healthy=True,
        seen=True,
        discovery=Discovery(
            hostname=name,
            devices=[
                Device(index=at, name=device_name, vram_total_mb=int(total * 1024))
                for at, (total, _) in sizes.items()
            ],
            memory_total_mb=16 * 1024,
        ),
        health=NeuronHealth(
            uptime_secs=1,
            devices=[
                DeviceHealth(index=at, vram_used_mb=0, vram_free_mb=int(free * 1024))
                for at, (_, free) in sizes.items()
            ],
        ),
        models={each.id: each for each in models},
        loads=dict(loads or {}),
        foreign=dict(foreign or {}),
    )


def fleet_of(
    *nodes: NodeView, leases: Mapping[tuple[str, str], int] | None = None
) -> FleetSnapshot:
    """A snapshot of nodes in the order of their names."""
    return FleetSnapshot(
        nodes=tuple(sorted(nodes, key=lambda each: each.name)),
        leases=MappingProxyType(dict(leases or {})),
    )
