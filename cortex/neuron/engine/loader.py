"""Loads a model into this process: weights, caches, warm-up."""

import time
from collections.abc import Callable
from typing import Literal

import torch

from cortex.core.errors import InternalError
from cortex.neuron.engine.embedder import Embedder
from cortex.neuron.engine.embedding_loader import load_embedder
from cortex.neuron.engine.engine import Engine
from cortex.neuron.engine.free_memory import free_memory_bytes
from cortex.neuron.engine.protocol import Loaded, LoadModel, Progress
from cortex.neuron.engine.runner import Runner
from cortex.neuron.engine.scheduler import Scheduler
from cortex.neuron.engine.sizing import (
    CPU_CACHE_BYTES,
    CachePlan,
    OutOfDeviceMemoryError,
    format_bytes,
    plan_caches,
)
from cortex.neuron.layers.context import Caches
from cortex.neuron.models.base import CausalLM
from cortex.neuron.models.embedding_config import read_embedding_spec
from cortex.neuron.models.registry import load_causal_lm

# Bound of an engine's own queue. The neuron admits far fewer at a time; this only stops a flood.
MAX_WAITING = 4096

_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_engine(
    command: LoadModel,
    *,
    progress: Callable[[Progress], None],
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Engine | Embedder, Loaded]:
    """Load a checkpoint and return an engine that is ready to serve it, of the kind it is for.

    Args:
        progress: called as the load goes on; what it raises ends the load.
        clock: monotonic seconds, for the engine's rates.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        OutOfDeviceMemoryError: weights or caches do not fit.
        InternalError: there is no such device.
    """
    torch.set_num_threads(command.num_threads)
    device = _device(command.device)
    progress(Progress(phase="starting"))
    free_bytes = free_memory_bytes(device)

    def on_weights(bytes_done: int, bytes_total: int) -> None:
        if bytes_total > free_bytes:
            raise OutOfDeviceMemoryError(
                f"the weights need {format_bytes(bytes_total)}, {format_bytes(free_bytes)} are "
                f"free on {device}; unload another model"
            )
        progress(Progress(phase="weights", bytes_done=bytes_done, bytes_total=bytes_total))

    embedding = read_embedding_spec(command.source)
    if embedding is not None:
        return load_embedder(
            command,
            embedding,
            device=device,
            dtype=_DTYPES[command.dtype],
            on_weights=on_weights,
            progress=progress,
            clock=clock,
        )
    model = load_causal_lm(
        command.source, device=device, dtype=_DTYPES[command.dtype], progress=on_weights
    )
    progress(Progress(phase="caches"))
    return build_engine(command, model, progress=progress, clock=clock)


def build_engine(
    command: LoadModel,
    model: CausalLM,
    *,
    progress: Callable[[Progress], None],
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Engine, Loaded]:
    """Give a model its caches, run it once, and return its engine.

    Raises:
        OutOfDeviceMemoryError: the caches do not fit.
    """
    limit = model.max_position_embeddings
    plan = plan_caches(
        model.cache_spec,
        dtype=model.dtype,
        block_size=command.block_size,
        max_num_seqs=command.max_num_seqs,
        max_len=limit if command.max_model_len is None else min(command.max_model_len, limit),
        free_bytes=free_memory_bytes(model.device),
        kv_limit_bytes=CPU_CACHE_BYTES if model.device.type == "cpu" else None,
        asked_bytes=command.cache_bytes,
        snapshot_bytes=command.snapshot_bytes if command.prefix_cache else 0,
        max_snapshots=command.max_snapshots,
    )
    caches = Caches.allocate(
        model.cache_spec,
        num_blocks=plan.num_blocks,
        block_size=command.block_size,
        num_slots=plan.num_slots + plan.num_snapshots,
        dtype=model.dtype,
        device=model.device,
    )
    runner = Runner(model, caches, max_len=plan.max_model_len, num_snapshots=plan.num_snapshots)
    progress(Progress(phase="warmup"))
    runner.warm_up()
    prefix_match = _prefix_match(command, model, plan)
    scheduler = Scheduler(
        num_blocks=plan.num_blocks,
        block_size=command.block_size,
        num_slots=plan.num_slots,
        max_batched_tokens=max(command.max_batched_tokens, plan.num_slots),
        max_waiting=MAX_WAITING,
        prefix_cache=prefix_match is not None,
        num_snapshots=plan.num_snapshots if prefix_match == "snapshot" else None,
    )
    loaded = Loaded(
        max_model_len=plan.max_model_len,
        vocab_size=model.vocab_size,
        max_num_seqs=plan.num_slots,
        num_kv_blocks=plan.num_blocks,
        block_size=command.block_size,
        weight_bytes=model.weight_bytes,
        cache_bytes=plan.cache_bytes,
        num_snapshots=plan.num_snapshots,
        prefix_match=prefix_match,
        torch_version=str(torch.__version__),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
    )
    engine = Engine(runner, scheduler, max_model_len=plan.max_model_len, clock=clock)
    return engine, loaded


def _prefix_match(
    command: LoadModel, model: CausalLM, plan: CachePlan
) -> Literal["block", "snapshot"] | None:
    """Return from where a prompt may go on, None where it has to begin anew."""
    if not command.prefix_cache:
        return None
    if not model.cache_spec.state_bytes_per_slot(model.dtype):
        return "block"
    return "snapshot" if plan.num_snapshots else None


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InternalError(f"there is no device {name}: torch sees {count} CUDA devices")
    return device
