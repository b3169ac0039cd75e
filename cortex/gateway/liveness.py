"""Whether a node is there: a pure state machine over signs of life and misses.

Time is passed in. One miss proves nothing, a refused connection proves that nobody listens, and
a node that keeps coming and going is kept out of use until it has stayed for a while.
"""

from dataclasses import dataclass, replace
from typing import Literal

# So much missing makes a node count as down.
MAX_MISSES = 3
# A link that carried nothing, not even a ping, says more than one unanswered question.
SILENCE_MISSES = 2
# A node lost this often within the window flaps, and has to hold before it is used again.
FLAP_LOSSES = 3
FLAP_WINDOW_S = 60.0
HOLD_S = 5.0
MAX_HOLD_S = 40.0

Miss = Literal["late", "silent", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Liveness:
    """What is known of one node's presence.

    Attributes:
        up: it answers.
        misses: how much went missing since its last sign of life.
        losses: when it was lost, within the last FLAP_WINDOW_S.
        hold_until_s: a flapping node is not used before this time.
    """

    up: bool = False
    misses: int = 0
    losses: tuple[float, ...] = ()
    hold_until_s: float = 0.0

    def usable(self, now_s: float) -> bool:
        """Whether it answers and, after coming and going, has stayed long enough."""
        return self.up and now_s >= self.hold_until_s


UNHEARD = Liveness()


def heard(state: Liveness, now_s: float) -> Liveness:
    """Return the state after a sign of life."""
    if state.up:
        return replace(state, misses=0) if state.misses else state
    return replace(state, up=True, misses=0, hold_until_s=now_s + _hold_s(state.losses, now_s))


def missed(state: Liveness, now_s: float, miss: Miss) -> Liveness:
    """Return the state after an answer that was late, a silent link or a refused connection."""
    misses = state.misses + (SILENCE_MISSES if miss == "silent" else 1)
    if miss != "refused" and misses < MAX_MISSES:
        return replace(state, misses=misses)
    if not state.up:
        return replace(state, misses=misses)
    recent = (*(each for each in state.losses if now_s - each < FLAP_WINDOW_S), now_s)
    # Beyond what decides the longest hold, older losses tell nothing.
    return replace(state, up=False, misses=misses, losses=recent[-_MAX_LOSSES:])


def _hold_s(losses: tuple[float, ...], now_s: float) -> float:
    recent = sum(now_s - each < FLAP_WINDOW_S for each in losses)
    if recent < FLAP_LOSSES:
        return 0.0
    return float(min(MAX_HOLD_S, HOLD_S * 2 ** (recent - FLAP_LOSSES)))


_MAX_LOSSES = 8
