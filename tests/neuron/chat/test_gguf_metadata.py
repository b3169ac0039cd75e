"""Reading a GGUF header."""

import struct
from pathlib import Path

import pytest

from cortex.core.errors import CheckpointError
from cortex.neuron.chat.gguf_metadata import read_gguf_metadata


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def header(*entries: bytes, num_keys: int | None = None, version: int = 3) -> bytes:
    count = len(entries) if num_keys is None else num_keys
    return b"GGUF" + struct.pack("<IQQ", version, 0, count) + b"".join(entries)


def entry(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return path


def test_scalars_texts_and_arrays_are_read(tmp_path: Path) -> None:
    strings = struct.pack("<IQ", 8, 2) + text("é") + text("")
    numbers = struct.pack("<IQ3i", 5, 3, 1, -2, 3)
    path = write(
        tmp_path,
        header(
            entry("a", 8, text("llama")),
            entry("b", 4, struct.pack("<I", 8192)),
            entry("c", 7, b"\x01"),
            entry("d", 6, struct.pack("<f", 0.5)),
            entry("e", 9, strings),
            entry("f", 9, numbers),
        ),
    )
    assert read_gguf_metadata(path) == {
        "a": "llama",
        "b": 8192,
        "c": True,
        "d": 0.5,
        "e": ["é", ""],
        "f": [1, -2, 3],
    }


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "x.gguf"),
        (b"PK\x03\x04", "does not begin with GGUF"),
        (header(version=1), "version 1"),
        (header(num_keys=1), "x.gguf"),
        (header(num_keys=1 << 40), "over the limit"),
        (header(entry("a", 8, struct.pack("<Q", 1 << 60))), "over the limit"),
        (header(entry("a", 8, struct.pack("<Q", 20) + b"short")), "past the end"),
        (header(entry("a", 99, b"")), "value type 99"),
        (header(entry("a", 9, struct.pack("<IQ", 8, 1 << 50))), "over the limit"),
        (header(entry("a", 9, struct.pack("<IQ", 5, 1000))), "x.gguf"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, data: bytes, reason: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(CheckpointError, match=reason):
        read_gguf_metadata(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.gguf"):
        read_gguf_metadata(tmp_path / "none.gguf")
