"""Whether a model fits, and where: pure arithmetic over readings and claims.

A claim is memory promised to a model. Until its engine has taken it, a reading of the device
does not show it, so it is subtracted; afterwards the reading is the truth.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from cortex.core.catalogue import DEFAULT_PRIORITY
from cortex.core.errors import (
    BadRequestError,
    InsufficientMemoryError,
    ServiceUnavailableError,
    UnsupportedFieldError,
)
from cortex.neuron.devices import HOST, DeviceMemory
from cortex.neuron.models.facts import ModelFacts

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# A context must hold at least this much before a model is worth loading.
MIN_KV_TOKENS = 4096
# What a process costs before its first weight: the libraries, and on a GPU the context.
HOST_PROCESS_BYTES = 400 << 20
GPU_PROCESS_BYTES = 900 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Memory promised to a model; `is_taken` once a reading shows it.

    Attributes:
        num_bytes: on each of its devices.
        seen_bytes: what its engine was last seen to hold there, None if it was not measured.
        more_devices: where a model spans several, those besides `device`.
    """

    model_id: str
    device: int
    num_bytes: int
    is_taken: bool = False
    seen_bytes: int | None = None
    more_devices: tuple[int, ...] = ()

    @property
    def returned_bytes(self) -> int:
        """What its device shows as free once it is gone: a claim may be more than was touched."""
        if not self.is_taken:
            return 0
        return self.num_bytes if self.seen_bytes is None else min(self.num_bytes, self.seen_bytes)

    @property
    def devices(self) -> tuple[int, ...]:
        """All of its devices."""
        return (self.device, *self.more_devices)


class Resident(msgspec.Struct, kw_only=True, frozen=True):
    """A model in memory, as a refused caller needs to know it to choose a victim."""

    id: str
    device: int
    bytes: int
    in_flight: int
    last_used_s: float | None
    priority: int = DEFAULT_PRIORITY
    pinned: bool = False
    min_resident_left_s: float = 0.0


class Shortage(msgspec.Struct, kw_only=True, frozen=True):
    """What a load would need of one device, and what it could have."""

    device: int
    needed_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a model goes and what it is promised on each of these devices."""

    device: int
    num_bytes: int
    more_devices: tuple[int, ...] = ()

    @property
    def gpus(self) -> tuple[int, ...]:
        """The GPUs among them; none for the host."""
        return () if self.device == HOST else (self.device, *self.more_devices)

    @property
    def engine_device(self) -> str:
        """The device's name for the engine."""
        return "cpu" if self.device == HOST else f"cuda:{self.device}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a load asks of memory.

    Attributes:
        gpu_bytes: what it needs on each GPU.
        host_bytes: what it needs on the CPU.
        gpu_cache_bytes, host_cache_bytes: the part of it that is cache.
        devices: None leaves the choice to the neuron; empty means the CPU.
        dtype, max_model_len: how it is loaded, by which its learned peaks are kept.
        learned: by device, what it took beside its cache when it was there before.
        num_devices: how many GPUs it spans.
    """

    model_id: str
    gpu_bytes: int
    host_bytes: int
    gpu_cache_bytes: int = 0
    host_cache_bytes: int = 0
    devices: Sequence[int] | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    learned: Mapping[int, int] = field(default_factory=dict)

    def cache_bytes(self, device: int) -> int:
        """Return the cache it wants on a device."""
        return self.host_cache_bytes if device == HOST else self.gpu_cache_bytes

    num_devices: int = 1

    def need_bytes(self, device: int) -> int:
        """Return what it needs on a device: the estimate, or what was learned if that is more."""
        estimate = self.host_bytes if device == HOST else self.gpu_bytes
        learned = self.learned.get(device, 0)
        return max(estimate, learned + self.cache_bytes(device)) if learned else estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What decides how much memory a checkpoint needs.

    Attributes:
        cache_bytes: None asks for the least that is useful.
    """

    facts: ModelFacts
    dtype: Dtype
    max_model_len: int | None
    max_num_seqs: int
    cache_bytes: int | None


def need_bytes(size: Size, *, on_gpu: bool) -> int:
    """Return what a model needs on a device: weights, cache, states and the process itself."""
    weights = size.facts.num_parameters * _item_bytes(size.dtype, on_gpu=on_gpu)
    process = GPU_PROCESS_BYTES if on_gpu else HOST_PROCESS_BYTES
    return weights + cache_bytes(size, on_gpu=on_gpu) + process


def cache_bytes(size: Size, *, on_gpu: bool) -> int:
    """Return the part of it that is cache: KV blocks and states."""
    item = _item_bytes(size.dtype, on_gpu=on_gpu)
    facts = size.facts
    context = min(size.max_model_len or facts.max_position_embeddings, MIN_KV_TOKENS)
    kv = context * facts.kv_elements_per_token * item
    if kv and size.cache_bytes:
        kv = size.cache_bytes
    return kv + size.max_num_seqs * facts.state_bytes_per_slot_f32


def place(
    wish: Wish,
    memory: Sequence[DeviceMemory],
    claims: Sequence[Claim],
    residents: Sequence[Resident] = (),
    leaving: Collection[str] = (),
) -> Placement:
    """Choose the device with the most free memory that the model fits on, or as many as it spans.

    Without GPUs, or with `devices` empty, that is the host.

    Args:
        memory: readings of all devices, the host's among them.
        residents: who could be evicted, told to the caller when there is no room.
        leaving: models whose memory will be given back for this one.

    Raises:
        InsufficientMemoryError: it fits nowhere it may go.
        BadRequestError: a device does not exist, or there are not enough.
        UnsupportedFieldError: more devices are named than it spans.
        ServiceUnavailableError: there is no reading to plan with.
    """
    candidates = _candidates(wish, memory)
    if not candidates:
        raise ServiceUnavailableError(
            "the memory of this host's devices cannot be read; its log says why"
        )
    shortages = [
        Shortage(
            device=each.index,
            needed_bytes=wish.need_bytes(each.index),
            free_bytes=free_bytes(each, claims, leaving),
        )
        for each in candidates
    ]
    best = _emptiest(shortages, wish.num_devices)
    if best[-1].free_bytes < best[-1].needed_bytes:
        raise insufficient(wish.model_id, shortages, residents, leaving, wish.num_devices)
    first, *more = sorted(each.device for each in best)
    return Placement(device=first, num_bytes=best[-1].needed_bytes, more_devices=tuple(more))


def insufficient(
    model_id: str,
    shortages: Sequence[Shortage],
    residents: Sequence[Resident],
    leaving: Collection[str] = (),
    num_devices: int = 1,
) -> InsufficientMemoryError:
    """Return the error that tells a caller what is missing and who could make room.

    Its extras have the figures of every device, and by themselves those of the emptiest: of as
    many as the model spans, the fullest of these.
    """
    best = _emptiest(shortages, num_devices)[-1]
    where = "of host memory" if best.device == HOST else f"on GPU {best.device}"
    without = f" even without {', '.join(sorted(leaving))}" if leaving else ""
    return InsufficientMemoryError(
        f"model '{model_id}' needs {best.needed_bytes / GIB:.1f} GiB {where}, "
        f"{best.free_bytes / GIB:.1f} GiB are free{without}; unload a model, or lower "
        "max_model_len or cache_mb",
        extras={
            "device": best.device,
            "needed_bytes": best.needed_bytes,
            "free_bytes": best.free_bytes,
            "devices": [msgspec.to_builtins(each) for each in shortages],
            "residents": [msgspec.to_builtins(each) for each in residents],
        },
    )


def _emptiest(shortages: Sequence[Shortage], num_devices: int) -> list[Shortage]:
    return sorted(shortages, key=lambda each: (-each.free_bytes, each.device))[:num_devices]


def free_bytes(device: DeviceMemory, claims: Sequence[Claim], leaving: Collection[str] = ()) -> int:
    """Return what a load could take: the smaller of what the reading and the claims leave.

    The reading shows what others take, the claims what is promised or not touched yet.

    Args:
        leaving: models whose memory counts as free.
    """
    here = [each for each in claims if device.index in each.devices]
    staying = [each for each in here if each.model_id not in leaving]
    returned = sum(each.returned_bytes for each in here if each.model_id in leaving)
    promised = sum(each.num_bytes for each in staying if not each.is_taken)
    by_reading = device.free_bytes + returned - promised
    by_claims = device.total_bytes - sum(each.num_bytes for each in staying)
    return max(0, min(by_reading, by_claims))


def unaccounted_bytes(device: DeviceMemory, claims: Sequence[Claim]) -> int | None:
    """Return what is in use of a device beyond the claims on it (negative: less than they say).

    None while a claim is not taken yet: the reading may show some of it or nothing.
    """
    here = [each for each in claims if device.index in each.devices]
    if not all(each.is_taken for each in here):
        return None
    used = device.total_bytes - device.free_bytes
    return used - sum(each.num_bytes for each in here)


def _candidates(wish: Wish, memory: Sequence[DeviceMemory]) -> list[DeviceMemory]:
    gpus = {each.index: each for each in memory if each.index != HOST}
    host = [each for each in memory if each.index == HOST]
    if wish.devices is not None:
        if not wish.devices:
            return host
        if len(wish.devices) > wish.num_devices:
            spans = "one device" if wish.num_devices == 1 else f"{wish.num_devices} devices"
            raise UnsupportedFieldError(
                f"model '{wish.model_id}' runs on {spans}; name no more in devices",
                param="devices",
            )
        missing = [index for index in wish.devices if index not in gpus]
        if missing:
            known = ", ".join(map(str, sorted(gpus))) or "none"
            raise BadRequestError(
                f"there is no GPU {missing[0]} on this host (there are: {known})", param="devices"
            )
        gpus = {index: gpus[index] for index in wish.devices}
    if memory and wish.num_devices > max(1, len(gpus)):
        raise BadRequestError(
            f"model '{wish.model_id}' needs {wish.num_devices} GPUs, there are {len(gpus)}",
            param="devices",
        )
    return list(gpus.values()) or host


def _item_bytes(dtype: Dtype, *, on_gpu: bool) -> int:
    if dtype == "auto":
        return 2 if on_gpu else 4
    return 4 if dtype == "float32" else 2
