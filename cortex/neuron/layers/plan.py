"""What the layers of a step share: which rows decode, which prefill, and their masks.

A sequence that brings one token decodes: all of those are handled together, and their rows come
first. A sequence that brings more prefills: attention handles each on its own, since their lengths
differ.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cortex.neuron.kernels.chunks import PrefillTables, choose_segment_chunks, plan_prefill
from cortex.neuron.layers.context import Caches, StepBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """One sequence's chunk of more than one token.

    Attributes:
        start, stop: its rows in the token dimension.
        length: tokens of the sequence after this step.
        blocks: (1, n) int64, the KV blocks that hold them, or an ascending run of blocks.
        mask: (tokens, length) bool, True where attended; None: nothing was cached before.
    """

    start: int
    stop: int
    length: int
    blocks: Tensor | slice
    mask: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """All sequences of a step that bring one token, D of them.

    Attributes:
        blocks: (D, n) int64, KV blocks; entries past a sequence's own are any valid block. One
            sequence's ascending run of blocks is a slice, whose K and V need no gathering.
        length: tokens of the longest sequence after this step.
        mask: (D, 1, 1, length) bool, True where attended; None when all are equally long.
    """

    blocks: Tensor | slice
    length: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GdnPlan:
    """What the Gated DeltaNet layers need to know of a step.

    Attributes:
        decode_slots: (D,) int64, state slots of the decoding sequences; -1 is padding.
        prefill_slots: (P,) int64, of the others.
        prefill_starts: (P + 1,) int64, where those begin among the rows that prefill.
        tables: how they are cut; None when nothing prefills.
    """

    decode_slots: Tensor
    prefill_slots: Tensor
    prefill_starts: Tensor
    tables: PrefillTables | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """A step's rows by the way they are handled; see `make_plan`.

    Attributes:
        num_decode: how many rows decode, the first ones.
        gdn: None for a model without Gated DeltaNet layers.
    """

    batch: StepBatch
    num_decode: int
    decode: Decode | None
    prefills: tuple[Prefill, ...]
    gdn: GdnPlan | None


def make_plan(batch: StepBatch, caches: Caches) -> StepPlan:
    """Tell a step's decoding sequences from the others, and clear the state slots of new ones."""
    num_decode = sum(count == 1 for count in batch.query_lens)
    assert all(count == 1 for count in batch.query_lens[:num_decode]), "single tokens come first"
    block_size = caches.keys.shape[2]
    prefills: list[Prefill] = []
    start = num_decode
    for s in range(num_decode, len(batch.query_lens)):
        prefills.append(_prefill(batch, s, start, block_size))
        start = prefills[-1].stop
    return StepPlan(
        batch=batch,
        num_decode=num_decode,
        decode=_decode(batch, num_decode, block_size) if num_decode else None,
        prefills=tuple(prefills),
        gdn=_gdn(batch, num_decode, caches) if caches.recurrent_states.shape[0] else None,
    )


def _prefill(batch: StepBatch, s: int, start: int, block_size: int) -> Prefill:
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
    )


def _decode(batch: StepBatch, num_decode: int, block_size: int) -> Decode:
    lengths = [context + 1 for context in batch.context_lens[:num_decode]]
    longest = max(lengths)
    mask = None
    if min(lengths) < longest:
        device = batch.token_ids.device
        ends = torch.tensor(lengths, device=device)
        mask = (torch.arange(longest, device=device) < ends[:, None])[:, None, None]
    blocks = batch.block_tables[:num_decode, : -(-longest // block_size)]
    return Decode(blocks=_run_or_table(blocks.clamp(min=0)), length=longest, mask=mask)


def _gdn(batch: StepBatch, num_decode: int, caches: Caches) -> GdnPlan:
    states = caches.recurrent_states
    if batch.fresh_slots:
        fresh = list(batch.fresh_slots)
        caches.conv_states[:, fresh] = 0
        states[:, fresh] = 0
    lengths = batch.query_lens[num_decode:]
    segment_chunks = None
    if lengths and states.device.type == "cuda":
        segment_chunks = choose_segment_chunks(
            lengths,
            num_v_heads=states.shape[2],
            num_multiprocessors=torch.cuda.get_device_properties(
                states.device
            ).multi_processor_count,
        )
    return GdnPlan(
        decode_slots=batch.state_slots[:num_decode],
        prefill_slots=batch.state_slots[num_decode:],
        prefill_starts=batch.query_starts[num_decode:] - num_decode,
        tables=plan_prefill(lengths, max_segment_chunks=segment_chunks, device=states.device)
        if lengths
        else None,
    )


def _run_or_table(table: Tensor) -> Tensor | slice:
    """Return the ascending run of a one-row table as a slice; else the table.

    On a device the table stays: reading it would wait for the work before it.
    """
    if table.shape[0] > 1 or table.device.type != "cpu":
        return table
    blocks: list[int] = table[0].tolist()
    first = blocks[0]
    return slice(first, first + len(blocks)) if _is_run(blocks) else table


def _is_run(numbers: list[int]) -> bool:
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))
