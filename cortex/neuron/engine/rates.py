"""Running rates: tokens per second over the recent busy time."""

import math

_WINDOW_S = 10.0


class RunningRate:
    """Tokens per busy second, older work fading out with a time constant of ten busy seconds."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._busy_s = 0.0

    def add(self, num_tokens: int, busy_s: float) -> None:
        """Count `num_tokens` that took `busy_s`."""
        kept = math.exp(-busy_s / _WINDOW_S)
        self._tokens = self._tokens * kept + num_tokens
        self._busy_s = self._busy_s * kept + busy_s

    @property
    def tok_s(self) -> float:
        """The rate; 0 before any work."""
        return self._tokens / self._busy_s if self._busy_s > 0 else 0.0
