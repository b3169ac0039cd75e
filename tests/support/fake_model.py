"""A model whose every logit is read back from the caches, so that cache mistakes show."""

from typing import Any

import torch
from torch import Tensor

from cortex.neuron.layers.context import Caches, CacheSpec, StepBatch

VOCAB_SIZE = 97
_STATE_MODULUS = 65521


def next_token(token_ids: list[int]) -> int:
    """Return what `FakeModel` finds likeliest after some tokens."""
    rolled = 0
    weighted = 0
    for position, token in enumerate(token_ids):
        rolled = (rolled * 31 + token + 1) % _STATE_MODULUS
        weighted = (weighted + (position + 1) * (token + 1)) % 9973
    return (rolled * 7 + weighted) % VOCAB_SIZE


def continuation(prompt_ids: list[int], count: int) -> list[int]:
    """Return the next `count` greedy tokens of `FakeModel`."""
    token_ids = list(prompt_ids)
    for _ in range(count):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt_ids) :]


def _rolled(state: int, token_ids: list[int]) -> int:
    for token in token_ids:
        state = (state * 31 + token + 1) % _STATE_MODULUS
    return state


class FakeModel:
    """Keeps tokens in the keys, positions in the values and a rolling hash in the state.

    Without a state it makes the hash anew from the keys; its tokens are the same.

    Attributes:
        batches: (query_lens, context_lens) of each forward pass.
        fault: raised by the next forward pass, once, if set.
        nan_after: last token that makes a row's logits NaN.
    """

    def __init__(self, *, vocab_size: int = VOCAB_SIZE, has_state: bool = True) -> None:
        self._has_state = has_state
        self.cache_spec = CacheSpec(
            num_kv_layers=1,
            num_kv_heads=1,
            kv_head_dim=1,
            num_gdn_layers=int(has_state),
            gdn_value_heads=1,
            gdn_key_dim=1,
            gdn_value_dim=1,
            conv_dim=1,
            conv_width=2,
        )
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.vocab_size = vocab_size
        self.max_position_embeddings = 512
        self.weight_bytes = 1000
        self.vision: Any = None
        self.batches: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.fault: Exception | None = None
        self.nan_after: int | None = None

    def forward(self, batch: StepBatch, caches: Caches) -> Tensor:
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        self.batches.append((batch.query_lens, batch.context_lens))
        keys = caches.keys.view(-1)
        values = caches.values.view(-1)
        keys[batch.kv_slots] = batch.token_ids.float()
        values[batch.kv_slots] = batch.positions.float()
        likeliest = {}
        for i, query_len in enumerate(batch.query_lens):
            start, end = int(batch.query_starts[i]), int(batch.query_starts[i + 1])
            assert end - start == query_len
            context_len = batch.context_lens[i]
            slot = int(batch.state_slots[i])
            total = context_len + query_len
            block_size = caches.keys.shape[2]
            blocks = batch.block_tables[i]
            index = torch.arange(total)
            flat = blocks[index // block_size] * block_size + index % block_size
            assert (blocks[index // block_size] >= 0).all()
            assert torch.equal(values[flat], index.float()), "positions out of order"
            if self._has_state:
                state = int(caches.recurrent_states[0, slot, 0, 0, 0]) if context_len else 0
                state = _rolled(state, batch.token_ids[start:end].tolist())
                caches.recurrent_states[0, slot, 0, 0, 0] = state
            else:
                state = _rolled(0, keys[flat].long().tolist())
            weighted = int(((index + 1) * (keys[flat].long() + 1)).sum() % 9973)
            likeliest[end - 1] = (state * 7 + weighted) % VOCAB_SIZE
        logits = torch.zeros(len(batch.logit_rows), self.vocab_size)
        for i, row in enumerate(batch.logit_rows.tolist()):
            logits[i] = -(torch.arange(self.vocab_size) - likeliest[row]).abs().float()
            if int(batch.token_ids[row]) == self.nan_after:
                logits[i, 3] = torch.nan
        return logits
