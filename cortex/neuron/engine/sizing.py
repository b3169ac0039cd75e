"""How large the caches of a model are made: a decision from byte counts alone."""

from dataclasses import dataclass

import torch

from cortex.core.errors import CortexError
from cortex.neuron.engine.cache import blocks_for
from cortex.neuron.layers.context import CacheSpec

GIB = 1 << 30

# The rest stays for activations, for what others on the host take, and for fragmentation.
USABLE_FRACTION = 0.8
# KV cache of an engine on a CPU unless cache_bytes asks for another.
CPU_CACHE_BYTES = 512 << 20
# Kept states may take no more of what is usable: what runs has the first claim.
MAX_SNAPSHOT_FRACTION = 1 / 8


class OutOfDeviceMemoryError(CortexError):
    """Weights or caches do not fit the device; the message has needed and free bytes."""

    status = 409
    code = "out_of_memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """Sizes of the caches, and what they let a sequence reach.

    Attributes:
        cache_bytes: KV blocks, state slots and snapshots together.
        num_snapshots: states that the prefix cache may keep.
    """

    num_blocks: int
    num_slots: int
    max_model_len: int
    cache_bytes: int
    num_snapshots: int = 0


def plan_caches(
    spec: CacheSpec,
    *,
    dtype: torch.dtype,
    block_size: int,
    max_num_seqs: int,
    max_len: int,
    free_bytes: int,
    kv_limit_bytes: int | None,
    asked_bytes: int | None,
    snapshot_bytes: int = 0,
    max_snapshots: int = 0,
) -> CachePlan:
    """Choose the number of KV blocks and state slots.

    Never more blocks than `max_num_seqs` sequences of `max_len` need; fewer slots than asked
    where the states alone would take over half of what is usable. Snapshots of the state come
    last: they shrink where memory is short, down to none.

    Args:
        max_len: longest sequence wanted, at most the checkpoint's own.
        free_bytes: free memory of the device, weights already in place.
        kv_limit_bytes: default bound of the KV cache; None: what is usable.
        asked_bytes: KV cache the operator asked for; None: the default.
        snapshot_bytes, max_snapshots: bounds of what the prefix cache keeps of states.

    Raises:
        OutOfDeviceMemoryError: not even one sequence and one block fit.
    """
    usable_bytes = int(free_bytes * USABLE_FRACTION)
    slot_bytes = spec.state_bytes_per_slot(dtype)
    block_bytes = spec.kv_bytes_per_token(dtype) * block_size
    num_slots = max_num_seqs
    if slot_bytes:
        num_slots = max(1, min(max_num_seqs, usable_bytes // 2 // slot_bytes))
    state_bytes = num_slots * slot_bytes
    num_snapshots = 0
    if slot_bytes:
        room_bytes = min(snapshot_bytes, int(usable_bytes * MAX_SNAPSHOT_FRACTION))
        if asked_bytes is not None:
            room_bytes = min(room_bytes, free_bytes - state_bytes - asked_bytes)
        num_snapshots = max(0, min(max_snapshots, room_bytes // slot_bytes))
    state_bytes += num_snapshots * slot_bytes
    if asked_bytes is not None:
        kv_bytes = asked_bytes
    else:
        kv_bytes = max(usable_bytes - state_bytes, 0)
        if kv_limit_bytes is not None:
            kv_bytes = min(kv_bytes, kv_limit_bytes)
    num_blocks = num_slots * blocks_for(max_len, block_size)
    if block_bytes:
        num_blocks = min(num_blocks, kv_bytes // block_bytes)
    needed_bytes = state_bytes + max(num_blocks, 1) * block_bytes
    if needed_bytes > free_bytes or num_blocks < 1:
        room = free_bytes if asked_bytes is None else min(free_bytes, asked_bytes + state_bytes)
        raise OutOfDeviceMemoryError(
            f"the caches need {format_bytes(needed_bytes)}, {format_bytes(room)} are free; unload "
            "another model, lower max_num_seqs, or raise cache_bytes if it is set"
        )
    return CachePlan(
        num_blocks=num_blocks,
        num_slots=num_slots,
        max_model_len=min(max_len, num_blocks * block_size),
        cache_bytes=needed_bytes,
        num_snapshots=num_snapshots,
    )


def format_bytes(num_bytes: int) -> str:
    """Return bytes for a message, in GiB and exactly."""
    return f"{num_bytes / GIB:.2f} GiB ({num_bytes} bytes)"
