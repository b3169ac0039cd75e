"""The memory of this host's devices: who was promised what, and what the devices say."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from cortex.neuron.devices import DeviceMemory, Reading
from cortex.neuron.discovery import Monitor
from cortex.neuron.memory import (
    Claim,
    Placement,
    Resident,
    Shortage,
    Wish,
    free_bytes,
    insufficient,
    place,
)

# A device gives a dead process's memory back a moment later.
MEMORY_RETURN_S = 3.0
MEMORY_RETRY_S = 0.2
MEMORY_READ_S = 2.0


class Ledger:
    """The one owner of claims. A claim stands from the choice of a device to the engine's end.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, monitor: Monitor, *, clock: Callable[[], float]) -> None:
        self._monitor = monitor
        self._clock = clock
        self._claims: dict[str, Claim] = {}
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="ledger")

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

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
        placement = place(wish, reading.memory, claims, residents, leaving)
        self._claims[wish.model_id] = Claim(
            model_id=wish.model_id, device=placement.device, num_bytes=placement.num_bytes
        )
        return placement

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
            device = next((each for each in reading.memory if each.index == claim.device), None)
            free = 0 if device is None else free_bytes(device, others)
            if free >= claim.num_bytes:
                return
            if self._clock() >= deadline_s:
                short = Shortage(device=claim.device, needed_bytes=claim.num_bytes, free_bytes=free)
                raise insufficient(model_id, [short], residents())
            await asyncio.sleep(MEMORY_RETRY_S)

    def take(self, model_id: str, num_bytes: int) -> None:
        """Note that a model's engine has taken its memory, which is at least what it says."""
        claim = self._claims[model_id]
        self._claims[model_id] = Claim(
            model_id=model_id,
            device=claim.device,
            num_bytes=max(claim.num_bytes, num_bytes),
            is_taken=True,
        )

    def give_back(self, model_id: str) -> None:
        """Note that a model's engine is gone; its memory stays promised to the next one."""
        claim = self._claims[model_id]
        self._claims[model_id] = Claim(
            model_id=model_id, device=claim.device, num_bytes=claim.num_bytes
        )

    def release(self, model_id: str) -> None:
        """Note that a model is promised nothing any more."""
        self._claims.pop(model_id, None)
