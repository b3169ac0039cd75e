"""One request inside the engine."""

from collections.abc import Sequence as Many

import numpy as np
from numpy.typing import NDArray

from cortex.neuron.engine.cache import NO_SLOT, Snapshot
from cortex.neuron.engine.constraint import ConstraintState
from cortex.neuron.engine.images import SequenceImage, place_tokens, position_shift
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
        images: those of the prompt, in order.
        cached_tokens: prompt tokens that were found in the caches when it was first admitted.
        is_announced: whether an event has told `cached_tokens`.
        is_cacheable: whether it may go on from the prefix cache and leave something to it.
        keys: of its leading blocks, as far as they were needed.
        num_kept_blocks: leading `blocks` that the prefix cache has.
        kept_at: tokens at which its state was last kept, or that it went on from.
        cuts: numbers of tokens at which its state is to be kept, ascending.
        restored: the snapshot that it went on from, until it leaves one of its own.
    """

    __slots__ = (
        "blocks",
        "cached_tokens",
        "constraint",
        "cuts",
        "images",
        "is_announced",
        "is_cacheable",
        "kept_at",
        "keys",
        "max_len",
        "num_computed",
        "num_kept_blocks",
        "num_prompt_tokens",
        "num_tabled_blocks",
        "prompt_places",
        "request_id",
        "restored",
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
        images: Many[SequenceImage] = (),
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
        self.images = images
        self.prompt_places = place_tokens(self.num_prompt_tokens, images) if images else None
        self.cached_tokens: int | None = None
        self.is_announced = False
        self.is_cacheable = True
        self.keys: list[bytes] = []
        self.num_kept_blocks = 0
        self.kept_at = 0
        self.cuts: list[int] = []
        self.restored: Snapshot | None = None

    @property
    def num_pending(self) -> int:
        """Known tokens that are not in the caches yet: 1 in decode, more in prefill."""
        return len(self.token_ids) - self.num_computed

    def places(self, num_tokens: int) -> NDArray[np.int64]:
        """Return (3, num_tokens): time, row and column of the next pending tokens."""
        start, stop = self.num_computed, self.num_computed + num_tokens
        rest = np.arange(max(start, self.num_prompt_tokens), stop)
        places = np.tile(rest + position_shift(self.images), (3, 1))
        if self.prompt_places is None or start >= self.num_prompt_tokens:
            return places
        return np.concatenate((self.prompt_places[:, start:stop], places), axis=1)

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
