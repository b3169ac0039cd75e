"""The memory of this host's devices: who was promised what, and what the devices say.

A model's need is an estimate until it was seen: what an engine takes is measured while it lives,
and the next placement on a device of that kind reckons with it.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from cortex.neuron.devices import HOST, DeviceMemory, Reading
from cortex.neuron.discovery import Monitor
from cortex.neuron.memory import (
    GIB,
    Claim,
    Placement,
    Resident,
    Shortage,
    Wish,
    free_bytes,
    insufficient,
    place,
    unaccounted_bytes,
)
from cortex.neuron.peaks import PeakKey, Peaks

# How often what engines take is looked at.
MEASURE_S = 5.0
# Memory of a GPU in use beyond the claims, or claimed beyond its use, that is worth a warning.
DRIFT_BYTES = 2 << 30
# A device gives a dead process's memory back a moment later.
MEMORY_RETURN_S = 3.0
MEMORY_RETRY_S = 0.2
MEMORY_READ_S = 2.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Holder:
    """Who has taken a claim: what is measured, and as what it is remembered."""

    pid: int
    key: PeakKey
    cache_bytes: int


class Ledger:
    """The one owner of claims. A claim stands from the choice of a device to the engine's end.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, monitor: Monitor, peaks: Peaks, *, clock: Callable[[], float]) -> None:
        self._monitor = monitor
        self._peaks = peaks
        self._clock = clock
        self._claims: dict[str, Claim] = {}
        self._wishes: dict[str, Wish] = {}
        self._holders: dict[str, _Holder] = {}
        self._drifting: set[int] = set()
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="ledger")

    async def run(self) -> None:
        """Measure what engines take, and compare the devices with the claims, from time to time."""
        while True:
            await asyncio.sleep(MEASURE_S)
            if self.measure(self._monitor.reading):
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._threads, self._peaks.save)

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def measure(self, reading: Reading) -> bool:
        """Take note of a reading; return whether something was learned that is worth a save."""
        is_new = False
        for model_id, holder in self._holders.items():
            claim = self._claims[model_id]
            found = [reading.processes.get((device, holder.pid)) for device in claim.devices]
            seen = max((each for each in found if each is not None), default=None)
            if seen is None:
                continue
            self._claims[model_id] = replace(
                claim, num_bytes=max(claim.num_bytes, seen), seen_bytes=seen
            )
            is_new |= self._peaks.note(holder.key, seen - holder.cache_bytes)
        for device, num_bytes in self.drift(reading).items():
            self._warn(device, num_bytes)
        return is_new

    def drift(self, reading: Reading) -> dict[int, int]:
        """Return, by GPU, the memory in use beyond the claims; the host's belongs to many."""
        found = {
            each.index: unaccounted_bytes(each, self.claims())
            for each in reading.memory
            if each.index != HOST
        }
        return {index: value for index, value in found.items() if value is not None}

    def _warn(self, device: int, num_bytes: int) -> None:
        """Tell once that reading and claims have come apart."""
        if abs(num_bytes) <= DRIFT_BYTES:
            self._drifting.discard(device)
        elif device not in self._drifting:
            self._drifting.add(device)
            _logger.warning(
                "a device's memory and what models hold there differ; loads get the smaller rest",
                extra={"device": device, "unaccounted_gib": round(num_bytes / GIB, 1)},
            )

    def claim(self, model_id: str) -> Claim | None:
        """Return what a model is promised or holds."""
        return self._claims.get(model_id)

    def claims(self) -> list[Claim]:
        """Return all claims."""
        return list(self._claims.values())

    def free_bytes(self, memory: DeviceMemory) -> int:
        """Return what a load could still take of a device as it was read."""
        return free_bytes(memory, self.claims())

    async def read(self) -> Reading:
        """Return a fresh reading of the devices, or the last one if they do not answer."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._monitor.refresh, MEMORY_READ_S)

    def hold(
        self,
        wish: Wish,
        reading: Reading,
        residents: Sequence[Resident],
        leaving: Collection[str] = (),
    ) -> Placement:
        """Choose a device for a model and promise it the memory there.

        Args:
            leaving: models that will make room for this one, and for nobody else.

        Raises:
            InsufficientMemoryError: it fits nowhere, and nothing is promised.
        """
        claims = [each for each in self.claims() if each.model_id != wish.model_id]
        wish = self.informed(wish, reading)
        placement = place(wish, reading.memory, claims, residents, leaving)
        self._wishes[wish.model_id] = wish
        self._claims[wish.model_id] = Claim(
            model_id=wish.model_id,
            device=placement.device,
            num_bytes=placement.num_bytes,
            more_devices=placement.more_devices,
        )
        return placement

    def informed(self, wish: Wish, reading: Reading) -> Wish:
        """Return a wish with what was learned of the model on devices such as these."""
        learned = {
            each.index: self._peaks.base_bytes(self._key(wish, each.index))
            for each in reading.memory
        }
        return replace(wish, learned={index: value for index, value in learned.items() if value})

    def need_bytes(self, wish: Wish) -> int | None:
        """Return what a load would ask of the devices of this host, None without a reading."""
        reading = self._monitor.reading
        gpus = [each.index for each in reading.memory if each.index != HOST]
        candidates = gpus or [each.index for each in reading.memory]
        informed = self.informed(wish, reading)
        return min((informed.need_bytes(index) for index in candidates), default=None)

    async def settle(self, model_id: str, residents: Callable[[], Sequence[Resident]]) -> None:
        """Wait until the memory that victims gave back is there.

        Raises:
            InsufficientMemoryError: it is not; others hold it who never told.
        """
        claim = self._claims[model_id]
        deadline_s = self._clock() + MEMORY_RETURN_S
        while True:
            reading = await self.read()
            others = [each for each in self.claims() if each.model_id != model_id]
            free = {
                each.index: free_bytes(each, others)
                for each in reading.memory
                if each.index in claim.devices
            }
            short = [
                Shortage(device=index, needed_bytes=claim.num_bytes, free_bytes=free.get(index, 0))
                for index in claim.devices
                if free.get(index, 0) < claim.num_bytes
            ]
            if not short:
                return
            if self._clock() >= deadline_s:
                raise insufficient(model_id, short, residents())
            await asyncio.sleep(MEMORY_RETRY_S)

    def take(self, model_id: str, *, weight_bytes: int, cache_bytes: int, pid: int | None) -> None:
        """Note that a model's engine has taken its memory.

        Args:
            pid: its process, None if it cannot be measured.
        """
        claim, wish = self._claims[model_id], self._wishes[model_id]
        beside = wish.need_bytes(claim.device) - wish.cache_bytes(claim.device)
        num_bytes = max(claim.num_bytes, beside + cache_bytes, weight_bytes + cache_bytes)
        self._claims[model_id] = replace(claim, num_bytes=num_bytes, is_taken=True)
        if pid is not None:
            key = self._key(wish, claim.device)
            self._holders[model_id] = _Holder(pid=pid, key=key, cache_bytes=cache_bytes)
            self._watch()

    def give_back(self, model_id: str) -> None:
        """Note that a model's engine is gone; its memory stays promised to the next one."""
        self._claims[model_id] = replace(self._claims[model_id], is_taken=False, seen_bytes=None)
        self._holders.pop(model_id, None)
        self._watch()

    def release(self, model_id: str) -> None:
        """Note that a model is promised nothing any more."""
        for each in (self._claims, self._wishes, self._holders):
            each.pop(model_id, None)
        self._watch()

    def _watch(self) -> None:
        self._monitor.pids = frozenset(each.pid for each in self._holders.values())

    def _key(self, wish: Wish, device: int) -> PeakKey:
        names = {each.index: each.name for each in self._monitor.hardware.devices}
        return PeakKey(
            model_id=wish.model_id,
            dtype=wish.dtype,
            max_model_len=wish.max_model_len,
            device="cpu" if device == HOST else names.get(device, "gpu"),
        )
