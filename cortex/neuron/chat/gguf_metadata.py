"""The key-value header of a GGUF file, read without touching its tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3,
little-endian).
"""

import mmap
import struct
from pathlib import Path

from cortex.core.errors import CheckpointError

MAX_KEYS = 65536
MAX_ARRAY_LEN = 1 << 24

_MAGIC = b"GGUF"
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

Value = int | float | bool | str | list[int | float | bool] | list[str]


class _Cursor:
    """Reads values one after the other; a read past the end is a `struct.error`."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = len(_MAGIC)

    def unpack(self, layout: struct.Struct) -> int | float | bool:
        (value,) = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        assert isinstance(value, int | float)
        return value

    def count(self, layout: struct.Struct, limit: int) -> int:
        value = int(self.unpack(layout))
        if value > limit:
            raise ValueError(f"a count of {value} is over the limit of {limit}")
        return value

    def text(self) -> str:
        length = self.count(_U64, len(self._data))
        end = self._at + length
        if end > len(self._data):
            raise ValueError("a text runs past the end of the file")
        raw = self._data[self._at : end]
        self._at = end
        return raw.decode("utf-8", "replace")

    def value(self) -> Value:
        kind = int(self.unpack(_U32))
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.unpack(_scalar(kind))
        item_kind = int(self.unpack(_U32))
        length = self.count(_U64, MAX_ARRAY_LEN)
        if item_kind == _STRING:
            return [self.text() for _ in range(length)]
        layout = struct.Struct(f"<{length}{_scalar(item_kind).format[1:]}")
        values = list(layout.unpack_from(self._data, self._at))
        self._at += layout.size
        return values


def _scalar(kind: int) -> struct.Struct:
    layout = _SCALARS.get(kind)
    if layout is None:
        raise ValueError(f"value type {kind} is unknown")
    return layout


def read_gguf_metadata(path: Path) -> dict[str, Value]:
    """Return all keys of a GGUF file's header with their values.

    Raises:
        CheckpointError: the file is missing, truncated or not GGUF version 2 or 3.
    """
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            if data[: len(_MAGIC)] != _MAGIC:
                raise ValueError("it does not begin with GGUF")
            cursor = _Cursor(data)
            version = int(cursor.unpack(_U32))
            if version not in (2, 3):
                raise ValueError(f"version {version} is not supported, only 2 and 3 are")
            cursor.unpack(_U64)  # number of tensors
            num_keys = cursor.count(_U64, MAX_KEYS)
            return {cursor.text(): cursor.value() for _ in range(num_keys)}
    except (OSError, ValueError, struct.error) as exc:
        raise CheckpointError(f"cannot read the GGUF file {path.name}: {exc}") from exc
