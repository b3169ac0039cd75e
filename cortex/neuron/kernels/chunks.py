"""How a prefill is cut: chunks for the WY form, segments that run side by side, snapshots.

A pure decision on host numbers, made once a step and shared by all its layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_TOKENS = 64
# A segment pays for its own transfer map with about twice the work of its scan, so that short
# ones cost more than the parallelism they bring.
_MIN_SEGMENT_CHUNKS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTables:
    """The cuts of one prefill over S sequences, int32 on the device of the states.

    Attributes:
        chunks: (C, 4): first token, tokens, sequence, index of the snapshot after it or -1.
        first_chunks: (S + 1,): where each sequence's chunks begin.
        segments: (G, 4): sequence, first chunk, end chunk, 1 for a sequence's first segment.
        num_snapshots: states that the prefill emits.
    """

    chunks: Tensor
    first_chunks: Tensor
    segments: Tensor
    num_snapshots: int


def plan_prefill(
    lengths: Sequence[int],
    *,
    snapshots_at: Sequence[tuple[int, int]] = (),
    max_segment_chunks: int | None = None,
    device: torch.device | str = "cpu",
) -> PrefillTables:
    """Cut sequences of the given lengths that lie side by side in one token dimension.

    Args:
        lengths: tokens of each sequence; 0 is allowed.
        snapshots_at: (sequence, tokens): snapshot i is that sequence's state after so many of
            its tokens, at least 1; chunks are cut there.
        max_segment_chunks: the longest segment; None: one segment a sequence.

    Raises:
        ValueError: a snapshot is asked for outside its sequence, or twice at one place.
    """
    snapshots: dict[tuple[int, int], int] = {}
    for i, (sequence, tokens) in enumerate(snapshots_at):
        if not 0 <= sequence < len(lengths) or not 1 <= tokens <= lengths[sequence]:
            raise ValueError(f"no snapshot after {tokens} tokens of sequence {sequence}: {lengths}")
        if (sequence, tokens) in snapshots:
            raise ValueError(f"two snapshots after {tokens} tokens of sequence {sequence}")
        snapshots[sequence, tokens] = i
    chunks: list[tuple[int, int, int, int]] = []
    first_chunks = [0]
    segments: list[tuple[int, int, int, int]] = []
    start = 0
    for sequence, length in enumerate(lengths):
        first = len(chunks)
        cuts = sorted(tokens for s, tokens in snapshots if s == sequence)
        for begin, end in _chunks_of(length, cuts):
            snapshot = snapshots.get((sequence, end), -1)
            chunks.append((start + begin, end - begin, sequence, snapshot))
        step = max_segment_chunks or max(len(chunks) - first, 1)
        segments.extend(
            (sequence, at, min(at + step, len(chunks)), int(at == first))
            for at in range(first, max(len(chunks), first + 1), step)
        )
        first_chunks.append(len(chunks))
        start += length
    return PrefillTables(
        chunks=_table(chunks, device),
        first_chunks=torch.tensor(first_chunks, dtype=torch.int32, device=device),
        segments=_table(segments, device),
        num_snapshots=len(snapshots),
    )


def choose_segment_chunks(
    lengths: Sequence[int], *, num_v_heads: int, num_multiprocessors: int
) -> int | None:
    """Return how long segments should be so that a prefill fills the device; None: do not split.

    Splitting over value tiles comes first and multiplies a head's blocks by up to four.
    """
    blocks = 4 * num_v_heads * sum(length > 0 for length in lengths)
    if not blocks or blocks >= num_multiprocessors:
        return None
    longest = -(-max(lengths) // CHUNK_TOKENS)
    wanted = -(-num_multiprocessors // blocks)
    size = max(-(-longest // wanted), _MIN_SEGMENT_CHUNKS)
    return size if size < longest else None


def _chunks_of(length: int, cuts: list[int]) -> list[tuple[int, int]]:
    """Return the (begin, end) of a sequence's chunks: as long as may be, none across a cut."""
    chunks: list[tuple[int, int]] = []
    begin = 0
    for cut in [*cuts, length]:
        chunks.extend((at, min(at + CHUNK_TOKENS, cut)) for at in range(begin, cut, CHUNK_TOKENS))
        begin = cut
    return chunks


def _table(rows: list[tuple[int, int, int, int]], device: torch.device | str) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 4)
