"""Loads a model that makes vectors into this process."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from cortex.neuron.engine.cache import blocks_for
from cortex.neuron.engine.embedder import Embedder, Encoder
from cortex.neuron.engine.free_memory import free_memory_bytes
from cortex.neuron.engine.protocol import Loaded, LoadModel, Progress
from cortex.neuron.engine.sizing import CPU_CACHE_BYTES, plan_caches
from cortex.neuron.layers.context import Caches, StepBatch
from cortex.neuron.models.base import CausalLM
from cortex.neuron.models.bert import Bert
from cortex.neuron.models.embedding_config import EmbeddingSpec
from cortex.neuron.models.facts import bounded
from cortex.neuron.models.registry import load_causal_lm, load_encoder


class BertEncoder:
    """A BERT-family encoder; it meets `Encoder`. Its texts cannot come in pieces."""

    can_split = False

    def __init__(self, model: Bert, *, max_model_len: int, max_texts: int) -> None:
        self.max_model_len = max_model_len
        self.max_texts = max_texts
        self.vocab_size = model.vocab_size
        self._model = model

    def encode(self, pieces: list[list[int]], start: int) -> list[Tensor]:
        """Return the hidden states of whole texts."""
        assert start == 0, "a text came in pieces"
        return self._model.encode(pieces)

    def is_healthy(self) -> bool:
        """Whether the device still computes."""
        return is_healthy(self._model.device)


class DecoderEncoder:
    """A causal model whose hidden states are wanted; it meets `Encoder`.

    Nothing outlives a step but the caches of a single text that comes in pieces, so each step
    lays its texts out from the first block and the first slot on.

    Args:
        max_texts: texts of one step, at most the slots of `caches`.
        only_last: whether the last state of each piece is all that is pooled.
    """

    can_split = True

    def __init__(
        self,
        model: CausalLM,
        caches: Caches,
        *,
        max_model_len: int,
        max_texts: int,
        only_last: bool,
    ) -> None:
        self.max_model_len = max_model_len
        self.max_texts = max_texts
        self.vocab_size = model.vocab_size
        self._model = model
        self._caches = caches
        self._block_size = caches.keys.shape[2]
        self._only_last = only_last

    def encode(self, pieces: list[list[int]], start: int) -> list[Tensor]:
        """Return the hidden states of pieces that all begin at `start`, or the last of each."""
        # Single tokens come first in a step.
        order = sorted(range(len(pieces)), key=lambda at: len(pieces[at]) > 1)
        laid = [pieces[at] for at in order]
        hidden = self._model.encode(self._batch(laid, start), self._caches)
        sizes = [1 if self._only_last else len(each) for each in laid]
        states = dict(zip(order, torch.split(hidden, sizes), strict=True))
        return [states[at] for at in range(len(pieces))]

    def is_healthy(self) -> bool:
        """Whether the device still computes."""
        return is_healthy(self._model.device)

    def _batch(self, pieces: list[list[int]], start: int) -> StepBatch:
        lengths = [len(each) for each in pieces]
        num_blocks = [blocks_for(start + each, self._block_size) for each in lengths]
        first_blocks = [sum(num_blocks[:at]) for at in range(len(pieces))]
        tables = [
            [first + at if at < count else -1 for at in range(max(num_blocks))]
            for first, count in zip(first_blocks, num_blocks, strict=True)
        ]
        starts = [sum(lengths[:at]) for at in range(len(pieces) + 1)]
        slots = list(range(len(pieces)))
        rows = [stop - 1 for stop in starts[1:]] if self._only_last else range(starts[-1])
        return StepBatch(
            token_ids=self._tensor([at for each in pieces for at in each]),
            positions=self._tensor([start + at for each in lengths for at in range(each)]),
            query_lens=tuple(lengths),
            context_lens=(start,) * len(pieces),
            query_starts=self._tensor(starts),
            kv_slots=self._tensor(
                [
                    first * self._block_size + start + at
                    for first, count in zip(first_blocks, lengths, strict=True)
                    for at in range(count)
                ]
            ),
            block_tables=self._tensor(tables),
            state_slots=self._tensor(slots),
            fresh_slots=() if start else tuple(slots),
            logit_rows=self._tensor(list(rows)),
        )

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._model.device)


def load_embedder(
    command: LoadModel,
    spec: EmbeddingSpec,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    on_weights: Callable[[int, int], None],
    progress: Callable[[Progress], None],
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Embedder, Loaded]:
    """Load a checkpoint that makes vectors and return an engine that is ready.

    Args:
        on_weights: called after each tensor with the bytes read and the bytes in all.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        OutOfDeviceMemoryError: its caches do not fit.
    """
    model: Bert | CausalLM
    encoder: Encoder
    num_blocks = cache_bytes = 0
    step_tokens = command.max_batched_tokens
    if spec.is_encoder:
        model = load_encoder(command.source, device=device, dtype=dtype, progress=on_weights)
        limit = _limit(model.max_tokens, spec, command)
        encoder = BertEncoder(model, max_model_len=limit, max_texts=command.max_num_seqs)
    else:
        model = load_causal_lm(
            command.source, device=device, dtype=dtype, progress=on_weights, has_head=False
        )
        progress(Progress(phase="caches"))
        limit = _limit(model.max_position_embeddings, spec, command)
        encoder, cache_bytes, step_tokens = _with_caches(model, limit, spec, command)
        num_blocks = blocks_for(encoder.max_model_len, command.block_size)
    progress(Progress(phase="warmup"))
    with torch.inference_mode():
        encoder.encode([[0], [0, 0]], 0)
    engine = Embedder(encoder, spec, max_batched_tokens=step_tokens, clock=clock)
    loaded = Loaded(
        max_model_len=encoder.max_model_len,
        vocab_size=encoder.vocab_size,
        max_num_seqs=encoder.max_texts,
        num_kv_blocks=num_blocks,
        block_size=command.block_size,
        weight_bytes=model.weight_bytes,
        cache_bytes=cache_bytes,
        torch_version=str(torch.__version__),
        device=str(device),
        dtype=str(model.dtype).removeprefix("torch."),
    )
    return engine, loaded


def is_healthy(device: torch.device) -> bool:
    """Whether a device still computes; after a device-side fault it never does again."""
    if device.type == "cpu":
        return True
    try:
        return int(torch.ones(2, device=device).sum().item()) == 2
    except RuntimeError:
        return False


def _limit(max_tokens: int, spec: EmbeddingSpec, command: LoadModel) -> int:
    limit = bounded(max_tokens, spec)
    return limit if command.max_model_len is None else min(limit, command.max_model_len)


def _with_caches(
    model: CausalLM, limit: int, spec: EmbeddingSpec, command: LoadModel
) -> tuple[DecoderEncoder, int, int]:
    """Return a model with caches for one step's texts, their bytes, and the tokens of a step.

    One text may be as long as the model takes, and many short ones begin a block each.
    """
    plan = plan_caches(
        model.cache_spec,
        dtype=model.dtype,
        block_size=command.block_size,
        max_num_seqs=command.max_num_seqs,
        max_len=limit,
        free_bytes=free_memory_bytes(model.device),
        kv_limit_bytes=CPU_CACHE_BYTES if model.device.type == "cpu" else None,
        asked_bytes=command.cache_bytes,
    )
    step_blocks = blocks_for(command.max_batched_tokens, command.block_size) + plan.num_slots
    wanted = max(blocks_for(limit, command.block_size), step_blocks)
    num_blocks = min(plan.num_blocks, wanted)
    # Half of the blocks at least are for tokens, whatever texts begin with a block of their own.
    max_texts = max(1, min(plan.num_slots, num_blocks // 2))
    caches = Caches.allocate(
        model.cache_spec,
        num_blocks=num_blocks,
        block_size=command.block_size,
        num_slots=max_texts,
        dtype=model.dtype,
        device=model.device,
    )
    cache_bytes = sum(
        each.nbytes
        for each in (caches.keys, caches.values, caches.conv_states, caches.recurrent_states)
    )
    encoder = DecoderEncoder(
        model,
        caches,
        max_model_len=min(limit, num_blocks * command.block_size),
        max_texts=max_texts,
        only_last=spec.pooling == "last",
    )
    room = max(1, num_blocks - max_texts) * command.block_size
    return encoder, cache_bytes, min(command.max_batched_tokens, room)
