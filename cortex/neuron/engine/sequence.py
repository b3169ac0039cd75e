"""One request inside the engine."""

from cortex.neuron.engine.cache import NO_SLOT
from cortex.neuron.engine.constraint import ConstraintState
from cortex.neuron.engine.protocol import FinishReason, Submit
from cortex.neuron.engine.sampler import SamplingState


class Sequence:
    """A prompt, the tokens generated after it, and what it holds of the caches.

    A prefill chunk and a decode step are the same thing here: tokens that are known but not yet
    computed. So a preempted sequence needs nothing but `num_computed = 0` to run again.

    Attributes:
        token_ids: prompt and generated tokens.
        num_computed: leading tokens whose K, V and state are in the caches.
        blocks: KV blocks held, in order.
        slot: state slot held, or NO_SLOT.
        num_tabled_blocks: leading `blocks` the batch builder has written to its block table.
    """

    __slots__ = (
        "blocks",
        "constraint",
        "max_len",
        "num_computed",
        "num_prompt_tokens",
        "num_tabled_blocks",
        "request_id",
        "sampling",
        "slot",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self,
        submit: Submit,
        *,
        max_model_len: int,
        sampling: SamplingState,
        constraint: ConstraintState | None = None,
    ) -> None:
        self.request_id = submit.request_id
        self.token_ids = list(submit.prompt_ids)
        self.num_prompt_tokens = len(submit.prompt_ids)
        self.max_len = min(self.num_prompt_tokens + submit.max_tokens, max_model_len)
        self.stop_ids = frozenset(submit.stop_ids)
        self.sampling = sampling
        self.constraint = constraint
        self.num_computed = 0
        self.blocks: list[int] = []
        self.slot = NO_SLOT
        self.num_tabled_blocks = 0

    @property
    def num_pending(self) -> int:
        """Known tokens that are not in the caches yet: 1 in decode, more in prefill."""
        return len(self.token_ids) - self.num_computed

    def append(self, token_id: int) -> FinishReason | None:
        """Add a sampled token; return why the sequence ends with it, if it does.

        A constraint that the token breaks is left with its `error` set, for the caller to see.
        """
        self.token_ids.append(token_id)
        self.sampling.observe(token_id)
        if token_id in self.stop_ids:
            return "stop"
        if self.constraint is not None:
            self.constraint.accept(token_id)
            if self.constraint.is_complete:
                return "stop"
        if len(self.token_ids) >= self.max_len:
            return "length"
        return None
