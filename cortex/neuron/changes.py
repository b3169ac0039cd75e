"""What has changed on this host since it was last told: a comparison of views, no clock, no I/O."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from cortex.core.neuron_api import (
    DeviceHealth,
    EventName,
    ModelInfo,
    ModelLoad,
    ModelRemoved,
    NeuronHealth,
    NeuronSnapshot,
)

# Progress of a load, counters and devices are told at most this often.
PACE_S = 0.5
# Ages and counts of a resident model (last use, residency) move all the time; whoever plans with
# them hears of them this often.
REFRESH_S = 2.0
# Memory of a device that comes or goes is told in steps of this size.
MEMORY_STEP_BYTES = 256 << 20


class Change(NamedTuple):
    """One event that is to be sent."""

    name: EventName
    data: NeuronSnapshot | ModelInfo | ModelRemoved | list[ModelLoad] | NeuronHealth


class Changes:
    """What subscribers have been told, and what is new beside it."""

    def __init__(self) -> None:
        self._models: dict[str, ModelInfo] = {}
        self._told: dict[str, tuple[ModelInfo, float]] = {}
        self._loads: dict[str, ModelLoad] = {}
        self._loads_s = float("-inf")
        self._node: object = None

    @property
    def ids(self) -> set[str]:
        """The models that were told."""
        return set(self._models)

    def of_models(self, infos: Mapping[str, ModelInfo | None], now_s: float) -> list[Change]:
        """Return what is new of some models; None stands for one that is gone."""
        found: list[Change] = []
        for model_id, info in infos.items():
            if info is None:
                if self._models.pop(model_id, None) is not None:
                    self._told.pop(model_id, None)
                    found.append(Change("model_removed", ModelRemoved(id=model_id)))
                continue
            lasting = _lasting(info)
            is_new = self._models.get(model_id) != lasting
            if is_new or self._is_due(info, now_s):
                self._models[model_id] = lasting
                self._told[model_id] = (info, now_s)
                found.append(Change("model", info))
        return found

    def of_loads(self, loads: Iterable[ModelLoad], now_s: float) -> list[Change]:
        """Return the counters that moved, unless some were told a moment ago."""
        if now_s - self._loads_s < PACE_S:
            return []
        current = {each.id: each for each in loads}
        moved = [
            each
            for each in current.values()
            if each.id not in self._loads or _counters(self._loads[each.id]) != _counters(each)
        ]
        self._loads = current
        if not moved:
            return []
        self._loads_s = now_s
        return [Change("load", moved)]

    def of_node(self, health: NeuronHealth) -> list[Change]:
        """Return the host's health if its status, default models, cycles or memory moved."""
        key = (
            health.status,
            health.activation,
            health.cycles,
            [_step(each) for each in health.devices],
            None if health.host is None else health.host.free_bytes // MEMORY_STEP_BYTES,
        )
        if key == self._node:
            return []
        self._node = key
        return [Change("node", health)]

    def _is_due(self, info: ModelInfo, now_s: float) -> bool:
        told, told_s = self._told[info.id]
        if info.progress != told.progress:
            return now_s - told_s >= PACE_S
        return info != told and now_s - told_s >= REFRESH_S


def _lasting(info: ModelInfo) -> ModelInfo:
    """Return a model without what moves all the time."""
    return msgspec.structs.replace(
        info,
        in_flight=0,
        last_used_s=None,
        progress=None,
        resident_s=None,
        idle_unload_in_s=None,
        evictable_in_s=None,
    )


def _counters(load: ModelLoad) -> ModelLoad:
    return msgspec.structs.replace(load, last_used_s=None)


def _step(device: DeviceHealth) -> tuple[int, int]:
    return device.index, (device.free_bytes or 0) // MEMORY_STEP_BYTES
