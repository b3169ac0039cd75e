"""A GGUF file: its metadata, its list of tensors, a tensor's bytes; imports no torch.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3,
little-endian). The gguf package's own reader makes several arrays of every word of a vocabulary,
which takes seconds; this one takes a tenth of a second.
"""

import functools
import math
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import gguf
import msgspec
import numpy as np
import numpy.typing as npt

from cortex.core.errors import CheckpointError

MAX_KEYS = 65536
MAX_TENSORS = 65536
MAX_DIMENSIONS = 4
MAX_ARRAY_LEN = 1 << 24
MAX_TEXT_BYTES = 64 << 20
# Headers kept in memory; one with a large vocabulary is some tens of MB.
MAX_REMEMBERED = 4

GgufValue = int | float | bool | str | list[int | float | bool] | list[str]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_CHUNK_BYTES = 1 << 20
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_MISSING = object()


class GgufTensor(msgspec.Struct, kw_only=True, frozen=True):
    """Where one tensor lies and how it is stored; `shape` has rows first."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class GgufFile(msgspec.Struct, kw_only=True, frozen=True):
    """What the header of a GGUF file says: metadata by key, tensors by name."""

    path: pathlib.Path
    metadata: Mapping[str, GgufValue]
    tensors: Mapping[str, GgufTensor]

    def value(self, key: str, default: Any = _MISSING) -> Any:
        """Return a metadata value; without a default, raise CheckpointError if it is missing."""
        value = self.metadata.get(key, default)
        if value is _MISSING:
            raise CheckpointError(f"{self.path}: metadata {key!r} is missing")
        return value

    def read(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes as they are stored, (num_bytes,), in memory of their own.

        The file is not mapped: reading a map of a file that is cut short ends the process.

        Raises:
            CheckpointError: the file has gone or has become shorter.
        """
        try:
            data = np.fromfile(
                self.path, dtype=np.uint8, count=tensor.num_bytes, offset=tensor.offset
            )
        except OSError as exc:
            raise CheckpointError(f"cannot read {self.path}: {exc.strerror or exc}") from exc
        if data.size != tensor.num_bytes:
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name!r} is cut short; download the file again"
            )
        return data


def read_gguf(path: pathlib.Path) -> GgufFile:
    """Return a GGUF file's header, read once for as long as the file does not change.

    Raises:
        CheckpointError: the file is missing, cut short or not GGUF version 2 or 3.
    """
    try:
        status = path.stat()
        return _read_header(path, status.st_mtime_ns, status.st_size)
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (ValueError, struct.error) as exc:
        raise CheckpointError(f"{path} is not a complete GGUF file: {exc}") from exc


@functools.lru_cache(maxsize=MAX_REMEMBERED)
def _read_header(path: pathlib.Path, _mtime_ns: int, size: int) -> GgufFile:
    with path.open("rb") as stream:
        cursor = _Cursor(stream)
        if cursor.take(len(_MAGIC)) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = int(cursor.scalar(_U32))
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is not supported, only 2 and 3 are")
        num_tensors = cursor.count(_U64, MAX_TENSORS)
        num_keys = cursor.count(_U64, MAX_KEYS)
        metadata = {cursor.text(): cursor.value() for _ in range(num_keys)}
        found = [cursor.tensor() for _ in range(num_tensors)]
    start = _aligned(cursor.position, metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
    tensors = {
        tensor.name: msgspec.structs.replace(tensor, offset=start + tensor.offset)
        for tensor in found
    }
    if len(metadata) != num_keys or len(tensors) != num_tensors:
        raise ValueError("a key or a tensor occurs twice")
    for tensor in tensors.values():
        stop = tensor.offset + tensor.num_bytes
        if stop > size:
            raise ValueError(f"tensor {tensor.name!r} ends at byte {stop} of {size}")
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def _aligned(position: int, alignment: GgufValue) -> int:
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"an alignment of {alignment!r} is not possible")
    return -(-position // alignment) * alignment


class _Cursor:
    """Reads values one after the other; a read past the end is a ValueError."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._data = b""
        self._at = 0
        self._passed = 0

    @property
    def position(self) -> int:
        """How many bytes of the file were taken."""
        return self._passed + self._at

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            self._passed += self._at
            rest = self._data[self._at :]
            self._data = rest + self._stream.read(max(size - len(rest), _CHUNK_BYTES))
            self._at, end = 0, size
            if end > len(self._data):
                raise ValueError("it ends in the middle of its header")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def scalar(self, layout: struct.Struct) -> int | float | bool:
        (value,) = layout.unpack(self.take(layout.size))
        assert isinstance(value, int | float)
        return value

    def count(self, layout: struct.Struct, limit: int) -> int:
        value = int(self.scalar(layout))
        if value > limit:
            raise ValueError(f"a count of {value} is over the limit of {limit}")
        return value

    def text(self) -> str:
        return self.take(self.count(_U64, MAX_TEXT_BYTES)).decode("utf-8", "replace")

    def value(self) -> GgufValue:
        kind = int(self.scalar(_U32))
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.scalar(_layout_of(kind))
        item_kind = int(self.scalar(_U32))
        length = self.count(_U64, MAX_ARRAY_LEN)
        if item_kind == _STRING:
            return [self.text() for _ in range(length)]
        layout = struct.Struct(f"<{length}{_layout_of(item_kind).format[1:]}")
        return list(layout.unpack(self.take(layout.size)))

    def tensor(self) -> GgufTensor:
        """Take one entry of the tensor list; its offset counts from the start of the data."""
        name = self.text()
        num_dimensions = self.count(_U32, MAX_DIMENSIONS)
        # The file lists the fastest dimension first.
        shape = tuple(int(self.scalar(_U64)) for _ in range(num_dimensions))[::-1]
        kind = gguf.GGMLQuantizationType(int(self.scalar(_U32)))
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block_size:
            raise ValueError(f"tensor {name!r} of shape {list(shape)} cannot be {kind.name}")
        return GgufTensor(
            name=name,
            kind=kind,
            shape=shape,
            offset=int(self.scalar(_U64)),
            num_bytes=math.prod(shape) // block_size * block_bytes,
        )


def _layout_of(kind: int) -> struct.Struct:
    layout = _SCALARS.get(kind)
    if layout is None:
        raise ValueError(f"value type {kind} is unknown")
    return layout
