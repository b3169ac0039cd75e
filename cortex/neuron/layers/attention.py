"""Grouped-query attention over paged K and V."""

import torch
from torch import Tensor
from torch.nn import functional

from cortex.neuron.layers.linear import Linear
from cortex.neuron.layers.norm import RmsNorm
from cortex.neuron.layers.plan import Decode, Prefill, StepPlan
from cortex.neuron.layers.rotary import RotaryAngles


class Attention:
    """Causal self-attention with rotary positions.

    Args:
        projection: hidden to [all query heads | key heads | value heads], and, when `is_gated`,
            [one gate per query element] after those.
        output: query heads back to hidden.
        qk_norm: norm of query and key heads, weight (num_heads + num_kv_heads, head_dim).
        is_gated: whether the heads' outputs are multiplied by sigmoid(gate).
    """

    def __init__(
        self,
        *,
        projection: Linear,
        output: Linear,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qk_norm: RmsNorm | None = None,
        is_gated: bool = False,
    ) -> None:
        self._projection = projection
        self._output = output
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._qk_norm = qk_norm
        self._is_gated = is_gated

    def __call__(
        self, x: Tensor, angles: RotaryAngles, plan: StepPlan, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Map (N, hidden) to (N, hidden); the step's K and V are written to the cache.

        `keys` and `values` are one layer's cache, (blocks, block_size, kv_heads, head_dim).
        """
        num_q, num_kv, dim = self._num_heads, self._num_kv_heads, self._head_dim
        projected = self._projection(x)
        heads = torch.unflatten(projected[:, : (num_q + 2 * num_kv) * dim], -1, (-1, dim))
        qk, v = heads[:, : num_q + num_kv], heads[:, num_q + num_kv :]
        if self._qk_norm is not None:
            qk = self._qk_norm(qk)
        qk = angles.rotate(qk)
        q, k = qk[:, :num_q], qk[:, num_q:]
        keys.view(-1, num_kv, dim).index_copy_(0, plan.batch.kv_slots, k)
        values.view(-1, num_kv, dim).index_copy_(0, plan.batch.kv_slots, v)
        attended = self._attend(q, k, v, plan, keys, values).flatten(1)
        if self._is_gated:
            attended = attended * torch.sigmoid(projected[:, -num_q * dim :])
        return self._output(attended)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: StepPlan, keys: Tensor, values: Tensor
    ) -> Tensor:
        decode = plan.decode
        if decode is not None and not plan.prefills:
            return self._attend_decode(q, decode, keys, values)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if decode is not None:
            rows = slice(0, plan.num_decode)
            out[rows] = self._attend_decode(q[rows], decode, keys, values)
        for prefill in plan.prefills:
            rows = slice(prefill.start, prefill.stop)
            out[rows] = _attend_prefill(q[rows], k[rows], v[rows], prefill, keys, values)
        return out

    def _attend_decode(self, q: Tensor, decode: Decode, keys: Tensor, values: Tensor) -> Tensor:
        # Query heads of a group stand in for query positions: (D, kv_heads, group, head_dim).
        grouped = torch.unflatten(q, 1, (self._num_kv_heads, -1))
        out = functional.scaled_dot_product_attention(
            grouped,
            _gather(keys, decode.blocks, decode.length),
            _gather(values, decode.blocks, decode.length),
            attn_mask=decode.mask,
        )
        return out.flatten(1, 2)


def _gather(cache: Tensor, blocks: Tensor | slice, length: int) -> Tensor:
    """Return (rows, kv_heads, length, head_dim): a copy for (rows, n) blocks, a view for a run."""
    kv_heads, head_dim = cache.shape[2:]
    if isinstance(blocks, slice):
        return cache[blocks].view(1, -1, kv_heads, head_dim)[:, :length].transpose(1, 2)
    # Whole blocks are copied as one row each, several times faster than indexing does it.
    gathered = cache.flatten(1).index_select(0, blocks.flatten())
    gathered = gathered.view(blocks.shape[0], -1, kv_heads, head_dim)
    return gathered[:, :length].transpose(1, 2)


def _attend_prefill(
    q: Tensor, k: Tensor, v: Tensor, prefill: Prefill, keys: Tensor, values: Tensor
) -> Tensor:
    if prefill.mask is None:
        k_all, v_all = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    else:
        k_all = _gather(keys, prefill.blocks, prefill.length)
        v_all = _gather(values, prefill.blocks, prefill.length)
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k_all,
        v_all,
        attn_mask=prefill.mask,
        is_causal=prefill.mask is None,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)
