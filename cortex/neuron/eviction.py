"""Making room for a load: its victims all leave, or none does."""

import asyncio
from collections.abc import Callable, Sequence

from cortex.core.errors import ConflictError
from cortex.neuron.memory import Resident
from cortex.neuron.metrics import Metrics
from cortex.neuron.residency import Effect, EvictAsked, EvictDropped, UnloadAsked
from cortex.neuron.resident import Model
from cortex.neuron.roster import Roster

BUSY_RETRY_S = 5.0


class VictimProtectedError(ConflictError):
    """A victim may not be evicted; the message says why and the extras until when."""

    code = "victim_protected"


class VictimBusyError(ConflictError):
    """A victim's requests did not end in time."""

    code = "victim_busy"
    retryable = True


def protection(victim: Resident, status: str, priority: int) -> str | None:
    """Return why a resident may not be evicted for a newcomer of some priority, None if it may."""
    if status != "loaded":
        return f"it is {status}"
    if victim.pinned:
        return "it is pinned"
    if victim.min_resident_left_s > 0:
        return f"its minimum residency ends in {victim.min_resident_left_s:.0f} s"
    if victim.priority > priority:
        return f"its priority {victim.priority} is above {priority}"
    return None


class Eviction:
    """The victims of one load, from the first look at them to their end.

    Args:
        describe: what a refused caller needs to know of a model, None if it holds no memory.
        drain_s: how long requests of victims may go on.
        clock: monotonic seconds.

    Attributes:
        evicted: victims that have left.
        drained: those of them that had requests in hand.
    """

    def __init__(
        self,
        model_id: str,
        priority: int,
        *,
        roster: Roster,
        metrics: Metrics,
        describe: Callable[[Model], Resident | None],
        drain_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.evicted: list[str] = []
        self.drained: list[str] = []
        self._model_id = model_id
        self._priority = priority
        self._roster = roster
        self._metrics = metrics
        self._describe = describe
        self._drain_s = drain_s
        self._clock = clock
        self._victims: list[Model] = []

    def check(self, names: Sequence[str]) -> list[str]:
        """Return the victims that hold memory; who is not here any more needs no end.

        Raises:
            VictimProtectedError: one of them may not be evicted.
        """
        self._victims = []
        for name in dict.fromkeys(names):
            victim = self._roster.get(name)
            resident = None if victim is None else self._describe(victim)
            if victim is None or resident is None or name == self._model_id:
                continue
            status = "being recycled" if victim.state.is_recycling else victim.state.status
            is_leaving = status == "draining" and not victim.state.is_reversible
            why = None if is_leaving else protection(resident, status, self._priority)
            if why is not None:
                raise self._protected(resident, why)
            self._victims.append(victim)
        return [each.id for each in self._victims]

    def begin(self) -> None:
        """Have the victims admit nothing more; no await may lie between `check` and this."""
        for victim in self._victims:
            if Effect.PAUSE in self._roster.apply(victim, EvictAsked(now_s=self._clock())).effects:
                assert victim.admission is not None
                victim.admission.pause()
                if victim.in_flight:
                    self.drained.append(victim.id)

    async def carry_out(self) -> None:
        """Let the victims' requests end, then the victims.

        Raises:
            VictimBusyError: one is still at work after the limit; none was ended.
        """
        try:
            async with asyncio.timeout(self._drain_s):
                for victim in self._victims:
                    if victim.admission is not None:
                        await victim.admission.wait_idle()
        except TimeoutError as exc:
            busy = [each.id for each in self._victims if each.in_flight]
            raise VictimBusyError(
                f"model '{self._model_id}' was not loaded: {', '.join(busy)} still had requests in "
                f"hand after {self._drain_s:g} s; try again later or name other victims",
                retry_after_s=BUSY_RETRY_S,
                extras={"busy": busy},
            ) from exc
        victims, self._victims = self._victims, []
        for victim in victims:
            self._roster.apply(victim, UnloadAsked(now_s=self._clock()))
            victim.wake.set()
        for victim in victims:
            await victim.ended.wait()
            self.evicted.append(victim.id)
            self._metrics.evicted(victim.id)

    def drop(self) -> None:
        """Let victims that were not ended go on as before."""
        for victim in self._victims:
            event = EvictDropped(now_s=self._clock())
            if Effect.RESUME in self._roster.apply(victim, event).effects:
                assert victim.admission is not None
                victim.admission.resume()
        self._victims = []

    def _protected(self, victim: Resident, why: str) -> VictimProtectedError:
        left_s = victim.min_resident_left_s
        return VictimProtectedError(
            f"model '{self._model_id}' was not loaded: '{victim.id}' may not be evicted for it, "
            f"{why}; nothing was unloaded",
            param="evict",
            retry_after_s=left_s if left_s > 0 else None,
            extras={"victim": victim.id, "ends_in_s": left_s},
        )
