"""How long each replica is still busy with prompts that were sent to it, by this gateway's count.

A prompt is expected to take its uncached tokens over the measured rate, one after another. What is
expected runs off with the clock; a first token that comes earlier shortens it.
"""

from cortex.gateway.costs import Replica

# A wrong rate must not keep a replica from being used for longer than this.
MAX_AHEAD_S = 600.0


class Backlog:
    """When each replica will be through with its prompts; replicas that are idle are not kept."""

    def __init__(self) -> None:
        self._free_s: dict[Replica, float] = {}

    def add(self, replica: Replica, work_s: float, now_s: float) -> float:
        """Count a prompt of so many seconds; return when its first token is expected."""
        begin_s = max(now_s, self._free_s.get(replica, now_s))
        done_s = min(begin_s + work_s, now_s + MAX_AHEAD_S)
        self._free_s[replica] = done_s
        return done_s

    def shorten(self, replica: Replica, by_s: float) -> None:
        """Take off what turned out not to be needed."""
        if by_s > 0 and replica in self._free_s:
            self._free_s[replica] -= by_s

    def ahead_s(self, now_s: float) -> dict[Replica, float]:
        """Return for each busy replica how long it takes for what was sent before."""
        idle = [replica for replica, free_s in self._free_s.items() if free_s <= now_s]
        for replica in idle:
            del self._free_s[replica]
        return {replica: free_s - now_s for replica, free_s in self._free_s.items()}
