"""Small engines and sequences for the tests of this folder."""

import torch

from cortex.neuron.engine.engine import Engine
from cortex.neuron.engine.protocol import Constraint, Sampling, StepDone, Submit, TokenEvent
from cortex.neuron.engine.runner import Runner
from cortex.neuron.engine.sampler import SamplingState
from cortex.neuron.engine.scheduler import Scheduler
from cortex.neuron.engine.sequence import Sequence
from cortex.neuron.layers.context import Caches
from tests.support.fake_model import VOCAB_SIZE, FakeModel


def make_sequence(
    request_id: int,
    num_prompt: int,
    *,
    max_tokens: int = 100,
    prompt_ids: list[int] | None = None,
) -> Sequence:
    prompt_ids = [1] * num_prompt if prompt_ids is None else prompt_ids
    submit = Submit(request_id=request_id, prompt_ids=prompt_ids, max_tokens=max_tokens)
    sampling = SamplingState(
        Sampling(), prompt_ids=[], vocab_size=VOCAB_SIZE, device=torch.device("cpu")
    )
    return Sequence(submit, max_model_len=10_000, sampling=sampling)


def make_scheduler(
    *,
    num_blocks: int = 100,
    block_size: int = 4,
    num_slots: int = 4,
    max_batched_tokens: int = 16,
    max_waiting: int = 100,
    prefix_cache: bool = False,
    num_snapshots: int | None = None,
) -> Scheduler:
    return Scheduler(
        num_blocks=num_blocks,
        block_size=block_size,
        num_slots=num_slots,
        max_batched_tokens=max_batched_tokens,
        max_waiting=max_waiting,
        prefix_cache=prefix_cache,
        num_snapshots=num_snapshots,
    )


class Clock:
    """Advances by a fixed step each time it is read."""

    def __init__(self, step_s: float = 0.001) -> None:
        self.now_s = 0.0
        self.step_s = step_s

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


class Bench:
    """An engine over a model, the fake one unless told, and everything it has reported.

    With a prefix cache, `num_snapshots` of None stands for a model without a state.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        num_slots: int = 4,
        max_batched_tokens: int = 16,
        max_model_len: int = 128,
        max_waiting: int = 100,
        vocab_size: int = VOCAB_SIZE,
        clock: Clock | None = None,
        prefix_cache: bool = False,
        num_snapshots: int | None = None,
        model: FakeModel | None = None,
    ) -> None:
        has_state = not prefix_cache or num_snapshots is not None
        self.model = model or FakeModel(vocab_size=vocab_size, has_state=has_state)
        self.num_blocks = num_blocks
        self.num_slots = num_slots
        self.caches = Caches.allocate(
            self.model.cache_spec,
            num_blocks=num_blocks,
            block_size=block_size,
            num_slots=num_slots + (num_snapshots or 0),
            dtype=torch.float32,
            device=self.model.device,
        )
        self.scheduler = make_scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            num_slots=num_slots,
            max_batched_tokens=max_batched_tokens,
            max_waiting=max_waiting,
            prefix_cache=prefix_cache,
            num_snapshots=num_snapshots,
        )
        runner = Runner(
            self.model,
            self.caches,
            max_len=max_model_len,
            num_snapshots=num_snapshots or 0,
        )
        self.engine = Engine(
            runner, self.scheduler, max_model_len=max_model_len, clock=clock or Clock()
        )
        self.events: list[TokenEvent] = []

    def submit(
        self,
        request_id: int,
        prompt_ids: list[int],
        max_tokens: int = 8,
        *,
        stop_ids: list[int] | None = None,
        sampling: Sampling | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.engine.submit(
            Submit(
                request_id=request_id,
                prompt_ids=prompt_ids,
                max_tokens=max_tokens,
                stop_ids=stop_ids or [],
                sampling=sampling or Sampling(),
                constraint=constraint,
            )
        )

    def step(self) -> StepDone:
        done = self.engine.step()
        self.events += done.events
        return done

    def run(self, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            self.step()
            if not self.engine.has_work:
                return
        raise AssertionError(f"work is left after {max_steps} steps")

    def tokens(self, request_id: int) -> list[int]:
        return [t for e in self.events if e.request_id == request_id for t in e.token_ids]

    def cached(self, request_id: int) -> int:
        return max(e.cached_tokens for e in self.events if e.request_id == request_id)

    def finishes(self, request_id: int) -> list[str]:
        return [e.finish for e in self.events if e.request_id == request_id and e.finish]

    def error(self, request_id: int) -> str:
        (error,) = [e.error for e in self.events if e.request_id == request_id and e.error]
        return error

    def assert_all_is_free(self) -> None:
        stats = self.engine.report().stats
        assert (stats.free_slots, stats.free_blocks) == (self.num_slots, self.num_blocks)
        assert (stats.num_running, stats.num_waiting) == (0, 0)
