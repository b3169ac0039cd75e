"""Where a cold model would go, and who would have to leave: pure functions of a snapshot.

The neuron, which owns its memory, has the last word: what it says with a refusal is believed over
what is planned here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cortex.core.catalogue import DEFAULT_PRIORITY, Catalogue, CatalogueModel
from cortex.core.config import Eviction
from cortex.core.neuron_api import DeviceHealth, LoadRequest, ModelInfo
from cortex.gateway.costs import Cost, Demand, Knowledge, load_s, prefill_s, return_s
from cortex.gateway.evictor import Candidate, kept_because, plan_eviction
from cortex.gateway.fleet import FleetSnapshot, NodeView

_MIB = 1 << 20
_GIB = 1 << 30
_RESIDENT = frozenset(["loaded", "loading", "recovering", "draining"])
_MOVING = frozenset(["loading", "recovering", "draining"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How one node would take a model.

    Attributes:
        devices: indices of the devices planned for; empty on a host without any.
        needed_bytes: on each of them.
        free_bytes: on the fullest of them.
        unclaimed_bytes: what the node has less what its residents need: unlike free_bytes no
            reading, so that all gateways see the same.
        victims: who would have to leave, in the order of leaving.
        doubt: why it is unlikely to fit just now; the neuron may know better.
    """

    node: str
    status: str | None
    devices: tuple[int, ...]
    needed_bytes: int
    free_bytes: int
    unclaimed_bytes: int
    victims: tuple[str, ...]
    cost: Cost
    doubt: str | None = None


def plan_placement(
    snapshot: FleetSnapshot,
    catalogue: Catalogue,
    node: NodeView,
    model_id: str,
    *,
    demand: Demand,
    known: Knowledge,
    policy: Eviction,
) -> Placement | str:
    """Return how a node would take the model, or why it never could as things are."""
    entry = catalogue.find(model_id)
    refused = _never(node, model_id, entry)
    if refused is not None:
        return refused
    residents = residents_of(snapshot, catalogue, node, model_id, policy)
    rivals = catalogue.rivals(model_id)
    for each in residents:
        if each.pinned and each.id in rivals:
            return f"{each.id}, which excludes it by a group, is pinned here"
    return _Planner(snapshot, catalogue, node, model_id, known, policy, residents).plan(demand)


@dataclass(frozen=True, slots=True)
class _Share:
    """What one device would give; `blocked` says why it is not enough."""

    device: int | None
    free_bytes: int
    victims: tuple[str, ...]
    victims_s: float
    blocked: str | None


class _Planner:
    """One model on one node that may hold it."""

    def __init__(
        self,
        snapshot: FleetSnapshot,
        catalogue: Catalogue,
        node: NodeView,
        model_id: str,
        known: Knowledge,
        policy: Eviction,
        residents: list[Candidate],
    ) -> None:
        self._node = node
        self._model_id = model_id
        self._known = known
        self._policy = policy
        self._residents = residents
        self._rivals = catalogue.rivals(model_id)
        self._entry = catalogue.find(model_id)
        self._priority = priority_in(catalogue, node, model_id)
        info = node.models.get(model_id)
        self._num_devices = max(
            1 if self._entry is None else self._entry.min_devices,
            1 if info is None else info.num_devices,
        )
        self._needed = needed_bytes(snapshot, node, model_id, self._entry)
        self._needed_each = -(-self._needed // self._num_devices)
        self._num_bytes = _weight_bytes(snapshot, node, model_id) or self._needed or None

    def plan(self, demand: Demand) -> Placement:
        """Return the placement on the devices that are cheapest to make room on."""
        info = self._node.models.get(self._model_id)
        if info is not None and self._node.status(self._model_id) == "loading":
            return self._joined(info, demand)
        shares = sorted(
            (self._share(device, free) for device, free in self._devices()),
            key=lambda share: (share.blocked is not None, share.victims_s, -share.free_bytes),
        )
        chosen = shares[: self._num_devices]
        victims = tuple(dict.fromkeys(name for share in chosen for name in share.victims))
        return Placement(
            node=self._node.name,
            status=self._node.status(self._model_id),
            devices=tuple(share.device for share in chosen if share.device is not None),
            needed_bytes=self._needed_each,
            free_bytes=min((share.free_bytes for share in chosen), default=0),
            unclaimed_bytes=self._unclaimed_bytes(),
            victims=victims,
            cost=Cost(
                prefill_s=prefill_s(self._node, self._model_id, demand, self._known),
                load_s=load_s(self._node, self._model_id, self._num_bytes, self._known),
                victims_s=sum(return_s(self._node, each, self._known) for each in victims),
            ),
            doubt=next((share.blocked for share in chosen if share.blocked is not None), None),
        )

    def _joined(self, info: ModelInfo, demand: Demand) -> Placement:
        """Return the placement of a load under way: what it needs it has been promised."""
        left_s = info.progress.seconds_left if info.progress is not None else None
        if left_s is None:
            left_s = load_s(self._node, self._model_id, self._num_bytes, self._known)
        return Placement(
            node=self._node.name,
            status="loading",
            devices=tuple(info.devices),
            needed_bytes=self._needed_each,
            free_bytes=self._needed_each,
            unclaimed_bytes=self._unclaimed_bytes(),
            victims=(),
            cost=Cost(
                prefill_s=prefill_s(self._node, self._model_id, demand, self._known),
                load_s=left_s,
            ),
        )

    def _devices(self) -> Iterator[tuple[int | None, int]]:
        """Yield each device that may be used with its free bytes; None stands for the host."""
        node = self._node
        if not node.devices:
            yield None, self._host_bytes()
            return
        # On which device a load that has only been asked for will be is the neuron's to choose.
        claimed = sum(node.claims.values())
        free = {each.index: max(0, _free_bytes(each) - claimed) for each in _readings(node)}
        devices = node.devices if self._entry is None else self._entry.usable_devices(node.devices)
        for device in devices:
            yield device.index, free.get(device.index, 0)

    def _host_bytes(self) -> int:
        health, discovery = self._node.health, self._node.discovery
        if health is not None and health.host is not None:
            return max(0, health.host.free_bytes - sum(self._node.claims.values()))
        total_mb = discovery.memory_total_mb if discovery is not None else 0
        return max(0, total_mb * _MIB - sum(each.memory_bytes for each in self._residents))

    def _unclaimed_bytes(self) -> int:
        discovery = self._node.discovery
        total_mb = sum(device.vram_total_mb for device in self._node.devices)
        if not self._node.devices and discovery is not None:
            total_mb = discovery.memory_total_mb
        return total_mb * _MIB - sum(each.memory_bytes for each in self._residents)

    def _share(self, device: int | None, free_bytes: int) -> _Share:
        forced: list[str] = []
        others: list[Candidate] = []
        blocked: str | None = None
        for each in self._residents:
            part_bytes = self._part_bytes(each, device)
            if each.id in self._rivals:
                # It goes wherever it sits on this node: the group holds for the whole of it.
                forced.append(each.id)
                free_bytes += part_bytes or 0
                reason = kept_because(each, self._priority)
                blocked = blocked or (
                    f"{each.id} must leave (group) but {reason}" if reason else ""
                )
            elif part_bytes is not None:
                others.append(replace(each, memory_bytes=part_bytes))
        plan = plan_eviction(
            others,
            needed_bytes=self._needed_each,
            free_bytes=free_bytes,
            priority=self._priority,
            strategy=self._policy.strategy,
        )
        if plan is None:
            blocked = self._shortage(others, free_bytes)
        victims = (*forced, *(plan or ()))
        victims_s = sum(return_s(self._node, each, self._known) for each in victims)
        return _Share(device, free_bytes, victims, victims_s, blocked or None)

    def _part_bytes(self, each: Candidate, device: int | None) -> int | None:
        """Return what a resident holds on a device, None where it holds nothing there."""
        info = self._node.models[each.id]
        if device is None or (not info.devices and len(self._node.devices) == 1):
            return each.memory_bytes
        if device not in info.devices:
            return None
        return each.memory_bytes // len(info.devices)

    def _shortage(self, others: list[Candidate], free_bytes: int) -> str:
        kept = [
            f"{each.id} {reason}"
            for each in others
            if (reason := kept_because(each, self._priority)) is not None
        ]
        why = f"; {', '.join(kept)}" if kept else ""
        return (
            f"needs {self._needed_each / _GIB:.1f} GiB, {free_bytes / _GIB:.1f} free "
            f"and not enough can leave{why}"
        )


def load_request(
    catalogue: Catalogue, model_id: str, placement: Placement, policy: Eviction
) -> LoadRequest:
    """Return what the node is asked; who has to leave for lack of memory is not part of it."""
    entry = catalogue.find(model_id)
    if entry is None:
        return LoadRequest(
            model_id=model_id, ttl_s=policy.ttl_s, min_resident_s=policy.min_resident_s
        )
    # The neuron chooses the device itself unless the catalogue asks something of it.
    is_choosy = entry.min_device_vram_mb is not None or entry.min_devices > 1
    least_s = entry.min_resident_s
    return LoadRequest(
        model_id=model_id,
        harness=entry.harness,
        command=entry.command,
        source=entry.source,
        devices=list(placement.devices) if is_choosy and placement.devices else None,
        tensor_parallel=entry.min_devices if entry.min_devices > 1 else None,
        ttl_s=entry.ttl_s if entry.ttl_s is not None else policy.ttl_s,
        min_resident_s=least_s if least_s is not None else policy.min_resident_s,
        pinned=placement.node in entry.pinned_on,
        priority=entry.priority if entry.priority != DEFAULT_PRIORITY else None,
        tool_format=entry.tool_format,
        constrain_tools=entry.constrain_tools,
    )


def residents_of(
    snapshot: FleetSnapshot, catalogue: Catalogue, node: NodeView, newcomer: str, policy: Eviction
) -> list[Candidate]:
    """Return the node's residents but for the newcomer, as the snapshot has them."""
    return [
        resident(snapshot, catalogue, node, info, policy)
        for info in node.models.values()
        if info.id != newcomer and node.status(info.id) in _RESIDENT
    ]


def resident(
    snapshot: FleetSnapshot, catalogue: Catalogue, node: NodeView, info: ModelInfo, policy: Eviction
) -> Candidate:
    """Return one resident with what the catalogue, or else the neuron, says of it."""
    entry = catalogue.find(info.id)
    # A model on its way in has somebody waiting for it, one on its way out needs no eviction.
    is_moving = node.status(info.id) in _MOVING
    # The counters know whose requests they count, so that ours are not held against a model for
    # longer than they last; the listing's own figure is older.
    requests = snapshot.requests(node, info.id)
    if info.id not in node.loads:
        requests = max(info.in_flight, requests)
    return Candidate(
        id=info.id,
        memory_bytes=_held_bytes(info, entry),
        idle_s=info.last_used_s,
        in_flight=requests + is_moving,
        priority=_priority(entry, info),
        pinned=(entry is not None and node.name in entry.pinned_on) or info.pinned,
        protected_s=_protected_s(info, entry, policy),
    )


def priority_in(catalogue: Catalogue, node: NodeView, model_id: str) -> int:
    """Return a model's priority on a node."""
    return _priority(catalogue.find(model_id), node.models.get(model_id))


def _priority(entry: CatalogueModel | None, info: ModelInfo | None) -> int:
    """Return the higher of what the catalogue says and what the model's load told the neuron.

    The one is the operator's word, and the neuron holds others to the other.
    """
    told = info.priority if info is not None and info.status != "unloaded" else None
    if entry is None:
        return DEFAULT_PRIORITY if told is None else told
    return entry.priority if told is None else max(entry.priority, told)


def needed_bytes(
    snapshot: FleetSnapshot, node: NodeView, model_id: str, entry: CatalogueModel | None
) -> int:
    """Return what a model needs: the node's own figure, else what another measured, else a guess.

    The guess is the larger of what is declared and the size of the weights.
    """
    own = node.models.get(model_id)
    if own is not None and own.need_bytes:
        return own.need_bytes
    measured_mb = [
        info.vram_used_mb
        for each in snapshot.nodes
        if (info := each.models.get(model_id)) is not None and info.vram_used_mb
    ]
    if measured_mb:
        return max(measured_mb) * _MIB
    declared = (entry.vram_mb or 0) * _MIB if entry is not None else 0
    return max(declared, (own.weight_bytes or 0) if own is not None else 0)


def _protected_s(info: ModelInfo, entry: CatalogueModel | None, policy: Eviction) -> float:
    """Return how much of a resident's minimum residency is left."""
    told_s = info.evictable_in_s or 0.0
    if info.resident_s is None:
        return told_s
    own_s = entry.min_resident_s if entry is not None else None
    least_s = max(info.min_resident_s, policy.min_resident_s if own_s is None else own_s)
    return max(told_s, least_s - info.resident_s)


def _held_bytes(info: ModelInfo, entry: CatalogueModel | None) -> int:
    """Return what a resident's end gives back; 0 where nobody knows."""
    if info.need_bytes:
        return info.need_bytes
    if info.vram_used_mb:
        return info.vram_used_mb * _MIB
    return info.weight_bytes or ((entry.vram_mb or 0) * _MIB if entry is not None else 0)


def _readings(node: NodeView) -> list[DeviceHealth]:
    return node.health.devices if node.health is not None else []


def _free_bytes(reading: DeviceHealth) -> int:
    return reading.vram_free_mb * _MIB if reading.free_bytes is None else reading.free_bytes


def _weight_bytes(snapshot: FleetSnapshot, node: NodeView, model_id: str) -> int | None:
    """Return the size of the weights, as the node or else any other lists it."""
    for each in (node, *snapshot.nodes):
        info = each.models.get(model_id)
        if info is not None and info.weight_bytes:
            return info.weight_bytes
    return None


def _never(node: NodeView, model_id: str, entry: CatalogueModel | None) -> str | None:
    if entry is None:
        return None if model_id in node.models else "neither it nor the catalogue lists the model"
    if entry.pinned_on and node.name not in entry.pinned_on:
        return f"not among its pinned_on ({', '.join(entry.pinned_on)})"
    if not entry.feasible_on(node.name, node.devices):
        floor = entry.min_device_vram_mb
        size = f" of at least {floor} MiB (min_device_vram_mb)" if floor is not None else ""
        return f"has fewer than {entry.min_devices} device(s){size}"
    return None
