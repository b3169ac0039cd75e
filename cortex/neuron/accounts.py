"""What is counted of each request: its time, its tokens, its end."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cortex.core.errors import CortexError
from cortex.core.openai import Usage
from cortex.neuron.lifecycle import Lifecycle
from cortex.neuron.metrics import Metrics, RequestTiming


class Watch:
    """Times one request; the first token is the first that made a chunk."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started_s = clock()
        self._first_s: float | None = None
        self._last_s = self._started_s

    def token(self) -> None:
        """Note that a token came."""
        self._last_s = self._clock()
        if self._first_s is None:
            self._first_s = self._last_s

    def timing(self, usage: Usage) -> RequestTiming:
        """Return what the request took, at its end."""
        details = usage.prompt_tokens_details
        first_s = self._first_s
        return RequestTiming(
            duration_s=self._clock() - self._started_s,
            ttft_s=None if first_s is None else first_s - self._started_s,
            decode_s=0.0 if first_s is None else self._last_s - first_s,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=0 if details is None else details.cached_tokens or 0,
        )


class Accounts:
    """Counts requests into the metrics, and keeps their models in use.

    Args:
        clock: monotonic seconds.
    """

    def __init__(
        self, lifecycle: Lifecycle, metrics: Metrics, *, clock: Callable[[], float]
    ) -> None:
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._clock = clock

    def watch(self) -> Watch:
        """Return a watch that has just been started."""
        return Watch(self._clock)

    def done(self, model_id: str, watch: Watch, usage: Usage) -> RequestTiming:
        """Count a request that was answered, and return what it took."""
        timing = watch.timing(usage)
        self._metrics.request_ended(model_id, timing)
        return timing

    @contextmanager
    def counted(self, model_id: str) -> Iterator[None]:
        """Count a request that ends in an error inside the context."""
        with self._lifecycle.using(model_id):
            try:
                yield
            except CortexError as exc:
                self._metrics.request_failed(model_id, exc.code)
                raise
            except (asyncio.CancelledError, GeneratorExit):
                self._metrics.request_failed(model_id, "client_left")
                raise
