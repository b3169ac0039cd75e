"""Tensors of a Hugging Face layout directory, read one at a time from safetensors files."""

import contextlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cortex.core.errors import CheckpointError
from cortex.neuron.models.hf_files import StoredTensor, list_tensors

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_EMBEDDINGS: Final = ("embed_tokens.weight", "embeddings.word_embeddings.weight")
_FP8: Final = "F8_E4M3"
_FP8_BLOCK = 128


class SafetensorsWeights:
    """A model's tensors, memory-mapped; see `WeightSource`.

    Args:
        directory: where the files lie.
        with_vision: whether the vision tower's are among them.
        progress: called after each tensor with the bytes read and the bytes in all.
        tensors: what is read of them instead.

    Raises:
        CheckpointError: the files are missing, malformed or cut short.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        progress: Callable[[int, int], None],
        *,
        with_vision: bool = False,
        tensors: Mapping[str, StoredTensor] | None = None,
    ) -> None:
        self._directory = directory
        if tensors is None:
            tensors = list_tensors(directory, with_vision=with_vision)
        self._tensors = tensors
        self._progress = progress
        self._bytes_done = 0
        self._bytes_total = sum(t.num_bytes for t in self._tensors.values())
        self._files = contextlib.ExitStack()
        self._open: dict[pathlib.Path, safe_open] = {}

    def __enter__(self) -> "SafetensorsWeights":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._open.clear()
        self._files.close()

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has this tensor."""
        return name in self._tensors

    @property
    def dtype(self) -> torch.dtype:
        """The type of the embedding, which no quantisation touches."""
        first = next(self._tensors[name] for name in _EMBEDDINGS if name in self._tensors)
        return _DTYPES.get(first.dtype, torch.bfloat16)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read one tensor; 8-bit floating-point weights come back scaled, in float32."""
        stored = self._stored(name, shape)
        tensor = self._read(stored)
        if stored.dtype == _FP8:
            scale_shape = tuple(-(-size // _FP8_BLOCK) for size in shape)
            scales = self._read(self._stored(f"{name}_scale_inv", scale_shape))
            return _scale_blocks(tensor.float(), scales.float())
        if stored.dtype not in _DTYPES:
            raise CheckpointError(
                f"{stored.file}: tensor {stored.name!r} is of type {stored.dtype}"
            )
        return tensor

    def _stored(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        stored = self._tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{self._directory}: tensor {name!r} is missing")
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.file}: tensor {stored.name!r} has shape {list(stored.shape)}, "
                f"the configuration asks for {list(shape)}"
            )
        return stored

    def _read(self, stored: StoredTensor) -> Tensor:
        try:
            file = self._open.get(stored.file)
            if file is None:
                file = self._files.enter_context(safe_open(stored.file, framework="pt"))
                self._open[stored.file] = file
            tensor: Tensor = file.get_tensor(stored.name)
        except (SafetensorError, OSError) as exc:
            raise CheckpointError(f"{stored.file}: tensor {stored.name!r}: {exc}") from exc
        self._bytes_done += stored.num_bytes
        self._progress(self._bytes_done, self._bytes_total)
        return tensor


def _scale_blocks(weight: Tensor, scales: Tensor) -> Tensor:
    """Multiply each 128 x 128 block of a matrix by its scale; edge blocks may be smaller."""
    rows, columns = weight.shape
    wide = scales.repeat_interleave(_FP8_BLOCK, 0)[:rows]
    return weight * wide.repeat_interleave(_FP8_BLOCK, 1)[:, :columns]
