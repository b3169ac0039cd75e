"""Requests whose grammar is being compiled: a large one takes a second, and tokens must flow."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass

from llguidance import LLMatcher

from cortex.core.errors import QueueFullError
from cortex.neuron.engine.constraint import ConstraintCompiler, ConstraintState, GrammarKey
from cortex.neuron.engine.protocol import Submit

MAX_COMPILING = 256


@dataclass(frozen=True, slots=True)
class Compiled:
    """A request that waits no more: with its state, or with what went wrong."""

    submit: Submit
    state: ConstraintState | None = None
    failure: BaseException | None = None


class CompilingQueue:
    """Holds requests while another thread compiles; all methods are for the engine's own thread.

    Args:
        executor: runs one piece of work at a time.
        wake: called from any thread when a request may have become ready.
    """

    def __init__(
        self, compiler: ConstraintCompiler, executor: Executor, wake: Callable[[], object]
    ) -> None:
        self._compiler = compiler
        self._executor = executor
        self._wake = wake
        self._waiting: dict[int, tuple[Submit, GrammarKey]] = {}
        # Several choices of one request have the same grammar, which is compiled once.
        self._work: dict[GrammarKey, Future[LLMatcher]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._waiting

    def add(self, submit: Submit) -> None:
        """Have a request's grammar compiled.

        Raises:
            QueueFullError: `MAX_COMPILING` requests wait already.
        """
        assert submit.constraint is not None
        if len(self._waiting) >= MAX_COMPILING:
            raise QueueFullError(f"{MAX_COMPILING} grammars are being compiled; retry later")
        key = GrammarKey.of(submit.constraint, submit.stop_ids)
        self._waiting[submit.request_id] = (submit, key)
        if key not in self._work:
            work = self._executor.submit(self._compiler.build, key)
            self._work[key] = work
            work.add_done_callback(lambda _: self._wake())

    def discard(self, request_id: int) -> None:
        """Forget a request; its grammar is not even begun if nobody else wants it."""
        _, key = self._waiting.pop(request_id)
        if all(key != wanted for _, wanted in self._waiting.values()):
            self._work.pop(key).cancel()

    def take_ready(self) -> list[Compiled]:
        """Return the requests that wait no more, in the order they came, and forget them."""
        done = {key: work for key, work in self._work.items() if work.done()}
        ready: list[Compiled] = []
        for request_id, (submit, key) in list(self._waiting.items()):
            if key in done:
                del self._waiting[request_id]
                ready.append(self._compiled(submit, key, done[key]))
        for key in done:
            del self._work[key]
        return ready

    def _compiled(self, submit: Submit, key: GrammarKey, work: Future[LLMatcher]) -> Compiled:
        failure = work.exception()
        if failure is not None:
            return Compiled(submit, failure=failure)
        assert submit.constraint is not None
        self._compiler.remember(key, work.result())
        return Compiled(submit, state=self._compiler.recall(submit.constraint, submit.stop_ids))
