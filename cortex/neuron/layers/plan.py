"""What the layers of a step share: which rows decode, which prefill, and their masks.

A sequence that brings one token decodes: all of those are handled together. A sequence that
brings more prefills: each is handled on its own, since their lengths differ.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cortex.neuron.layers.context import Caches, StepBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """One sequence's chunk of more than one token.

    Attributes:
        start, stop: its rows in the token dimension.
        length: tokens of the sequence after this step.
        blocks: (1, n) int64, the KV blocks that hold them, or an ascending run of blocks.
        mask: (tokens, length) bool, True where attended; None: nothing was cached before.
        slot: its GDN state as a run of one slot, None for padding.
    """

    start: int
    stop: int
    length: int
    blocks: Tensor | slice
    mask: Tensor | None
    slot: slice | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """All sequences of a step that bring one token.

    Attributes:
        rows: (D,) int64 rows in the token dimension, None when they are all rows in order.
        blocks: (D, n) int64, KV blocks; entries past a sequence's own are any valid block. One
            sequence's ascending run of blocks is a slice, whose K and V need no gathering.
        length: tokens of the longest sequence after this step.
        mask: (D, 1, 1, length) bool, True where attended; None when all are equally long.
        state_rows: (R,) int64, those of the D rows that have a slot; None when all do.
        slots: the GDN slots of these rows.
    """

    rows: Tensor | None
    blocks: Tensor | slice
    length: int
    mask: Tensor | None
    state_rows: Tensor | None
    slots: Tensor | slice

    def take(self, x: Tensor) -> Tensor:
        """Return the decoding rows of a step's tensor."""
        return x if self.rows is None else x[self.rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """A step's rows by the way they are handled; see `make_plan`."""

    batch: StepBatch
    decode: Decode | None
    prefills: tuple[Prefill, ...]


def make_plan(batch: StepBatch, caches: Caches) -> StepPlan:
    """Sort a step's sequences into decode and prefill, and clear the state slots of new ones."""
    slots: list[int] = batch.state_slots.tolist()
    fresh = [
        slot
        for slot, context in zip(slots, batch.context_lens, strict=True)
        if context == 0 and slot >= 0
    ]
    if fresh and caches.recurrent_states.shape[0]:
        caches.conv_states[:, fresh] = 0
        caches.recurrent_states[:, fresh] = 0
    decoding = [s for s, count in enumerate(batch.query_lens) if count == 1]
    block_size = caches.keys.shape[2]
    prefills: list[Prefill] = []
    start = 0
    for s, count in enumerate(batch.query_lens):
        if count > 1:
            prefills.append(_prefill(batch, s, start, slots[s], block_size))
        start += count
    return StepPlan(
        batch=batch,
        decode=_decode(batch, decoding, slots, block_size) if decoding else None,
        prefills=tuple(prefills),
    )


def _prefill(batch: StepBatch, s: int, start: int, slot: int, block_size: int) -> Prefill:
    count, context = batch.query_lens[s], batch.context_lens[s]
    length = context + count
    mask = None
    if context:
        mask = torch.ones(count, length, dtype=torch.bool, device=batch.token_ids.device)
        mask = mask.tril(context)
    return Prefill(
        start=start,
        stop=start + count,
        length=length,
        blocks=_run_or_table(batch.block_tables[s : s + 1, : -(-length // block_size)]),
        mask=mask,
        slot=slice(slot, slot + 1) if slot >= 0 else None,
    )


def _decode(batch: StepBatch, decoding: list[int], slots: list[int], block_size: int) -> Decode:
    device = batch.token_ids.device
    rows, blocks = None, batch.block_tables
    if len(decoding) < len(batch.query_lens):
        chosen = torch.tensor(decoding, device=device)
        rows, blocks = batch.query_starts[chosen], blocks[chosen]
    lengths = [batch.context_lens[s] + 1 for s in decoding]
    longest = max(lengths)
    mask = None
    if min(lengths) < longest:
        ends = torch.tensor(lengths, device=device)
        mask = (torch.arange(longest, device=device) < ends[:, None])[:, None, None]
    with_slot = [i for i, s in enumerate(decoding) if slots[s] >= 0]
    all_have = len(with_slot) == len(decoding)
    return Decode(
        rows=rows,
        blocks=_run_or_table(blocks[:, : -(-longest // block_size)].clamp(min=0)),
        length=longest,
        mask=mask,
        state_rows=None if all_have else torch.tensor(with_slot, dtype=torch.long, device=device),
        slots=_run_or_list([slots[decoding[i]] for i in with_slot], device),
    )


def _run_or_table(table: Tensor) -> Tensor | slice:
    """Return the ascending run of a one-row table as a slice; else the table."""
    if table.shape[0] > 1:
        return table
    run = _run_or_list(table[0].tolist(), table.device)
    return run if isinstance(run, slice) else table


def _run_or_list(slots: list[int], device: torch.device) -> Tensor | slice:
    """Return an ascending run as a slice, whose states need no gathering; else a tensor."""
    if slots and slots == list(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return torch.tensor(slots, dtype=torch.long, device=device)
