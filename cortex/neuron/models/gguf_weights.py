"""Tensors of a llama GGUF file, dequantised one at a time, under Hugging Face's names."""

import math
import re
from collections.abc import Callable
from typing import Final

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cortex.core.errors import CheckpointError
from cortex.neuron.models.config import ModelConfig
from cortex.neuron.models.gguf_file import GgufFile, GgufTensor

_TOP: Final = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER: Final = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")

_Kind = gguf.GGMLQuantizationType
_READABLE: Final = frozenset(
    {
        _Kind.F32,
        _Kind.F16,
        _Kind.BF16,
        _Kind.Q4_0,
        _Kind.Q4_1,
        _Kind.Q8_0,
        _Kind.Q4_K,
        _Kind.Q6_K,
    }
)

# Numbers dequantised at a time, whole blocks of every kind: larger chunks leave the caches and
# smaller ones, or one for each row, spend their time between numpy's calls.
_CHUNK_VALUES = 1 << 18


class GgufWeights:
    """The tensors of a GGUF file; see `WeightSource`.

    Args:
        file: its header.
        config: read from the same file.
        progress: called after each tensor with the bytes read and the bytes in all.
    """

    def __init__(
        self, file: GgufFile, config: ModelConfig, progress: Callable[[int, int], None]
    ) -> None:
        self._file = file
        self._config = config
        self._progress = progress
        self._bytes_done = 0
        self._bytes_total = sum(each.num_bytes for each in file.tensors.values())

    def __contains__(self, name: str) -> bool:
        """Whether the file has this tensor."""
        return _gguf_name(name) in self._file.tensors

    @property
    def dtype(self) -> torch.dtype:
        """Bfloat16: what quantised weights are worth."""
        return torch.bfloat16

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read one tensor and return it in float32."""
        stored = self._file.tensors.get(_gguf_name(name))
        if stored is None:
            raise CheckpointError(f"{self._file.path}: tensor {_gguf_name(name)!r} is missing")
        if stored.shape != shape:
            raise CheckpointError(
                f"{self._file.path}: tensor {stored.name!r} has shape {list(stored.shape)}, "
                f"the metadata ask for {list(shape)}"
            )
        if stored.kind not in _READABLE:
            raise CheckpointError(
                f"{self._file.path}: tensor {stored.name!r} is quantised as "
                f"{stored.kind.name}; supported are "
                + ", ".join(sorted(kind.name for kind in _READABLE))
            )
        values = _dequantize(self._file.read(stored), stored)
        tensor = torch.from_numpy(values).view(shape)
        self._bytes_done += stored.num_bytes
        self._progress(self._bytes_done, self._bytes_total)
        if ".q_proj." in name:
            return _rotate_half_order(tensor, self._config.num_heads)
        if ".k_proj." in name:
            return _rotate_half_order(tensor, self._config.num_kv_heads)
        return tensor


def _dequantize(data: npt.NDArray[np.uint8], stored: GgufTensor) -> npt.NDArray[np.float32]:
    """Return a tensor's numbers, flat; by large chunks whatever the length of its rows."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[stored.kind]
    values = np.empty(math.prod(stored.shape), dtype=np.float32)
    step = _CHUNK_VALUES // block_size * block_bytes
    for i, start in enumerate(range(0, data.size, step)):
        chunk = values[i * _CHUNK_VALUES : (i + 1) * _CHUNK_VALUES]
        chunk[:] = gguf.dequantize(data[start : start + step], stored.kind)
    return values


def _gguf_name(name: str) -> str:
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return _TOP.get(name, name)
    index, module, kind = match.groups()
    return f"blk.{index}.{_LAYER.get(module, module)}.{kind}"


def _rotate_half_order(rows: Tensor, num_heads: int) -> Tensor:
    """Undo the row order of llama GGUF files, which puts the two rows of a rotated pair together.

    In the checkpoint's own order a head's first halves of all pairs come before the second ones.
    """
    pairs = rows.view(num_heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
