"""Reading a GGUF file's header and a tensor's bytes."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from cortex.core.errors import CheckpointError
from cortex.neuron.models.gguf_file import GgufTensor, read_gguf

Kind = gguf.GGMLQuantizationType


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, *sizes: int, kind: Kind = Kind.F32, offset: int = 0) -> bytes:
    """One entry of the tensor list; the fastest size comes first."""
    numbers = struct.pack(f"<{len(sizes)}Q", *sizes)
    return (
        text(name)
        + struct.pack("<I", len(sizes))
        + numbers
        + struct.pack("<IQ", kind.value, offset)
    )


def header(
    *entries: bytes,
    tensors: tuple[bytes, ...] = (),
    num_keys: int | None = None,
    num_tensors: int | None = None,
    version: int = 3,
) -> bytes:
    keys = len(entries) if num_keys is None else num_keys
    count = len(tensors) if num_tensors is None else num_tensors
    return b"GGUF" + struct.pack("<IQQ", version, count, keys) + b"".join([*entries, *tensors])


def padded(data: bytes, alignment: int = 32) -> bytes:
    return data + bytes(-len(data) % alignment)


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_scalars_texts_and_arrays_are_read(tmp_path: Path, version: int) -> None:
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
            version=version,
        ),
    )
    assert read_gguf(path).metadata == {
        "a": "llama",
        "b": 8192,
        "c": True,
        "d": 0.5,
        "e": ["é", ""],
        "f": [1, -2, 3],
    }


def test_a_header_longer_than_what_is_read_at_a_time_is_read_whole(tmp_path: Path) -> None:
    words = [f"word {i} " + "x" * 100 for i in range(30_000)]
    packed = struct.pack("<IQ", 8, len(words)) + b"".join(map(text, words))
    path = write(
        tmp_path,
        padded(
            header(
                entry("words", 9, packed),
                entry("long", 8, text("y" * 3_000_000)),
                tensors=(tensor("t", 2),),
            )
        )
        + struct.pack("<2f", 1.5, -2.0),
    )
    file = read_gguf(path)
    assert file.metadata == {"words": words, "long": "y" * 3_000_000}
    assert file.read(file.tensors["t"]).view(np.float32).tolist() == [1.5, -2.0]


def test_tensors_are_listed_rows_first_with_their_place_in_the_file(tmp_path: Path) -> None:
    start = header(tensors=(tensor("a", 64, 3, kind=Kind.Q4_1), tensor("b", 2, offset=128)))
    data = padded(start) + bytes(range(120)) + bytes(8) + struct.pack("<2f", 1.5, -2.0)
    file = read_gguf(write(tmp_path, data))
    at = len(padded(start))
    # A block of Q4_1 is 32 numbers in 20 bytes.
    assert file.tensors == {
        "a": GgufTensor(name="a", kind=Kind.Q4_1, shape=(3, 64), offset=at, num_bytes=120),
        "b": GgufTensor(name="b", kind=Kind.F32, shape=(2,), offset=at + 128, num_bytes=8),
    }
    assert file.read(file.tensors["a"]).tolist() == list(range(120))
    assert file.read(file.tensors["b"]).view(np.float32).tolist() == [1.5, -2.0]


def test_the_alignment_that_the_file_names_is_kept(tmp_path: Path) -> None:
    start = header(entry("general.alignment", 4, struct.pack("<I", 8)), tensors=(tensor("a", 1),))
    path = write(tmp_path, padded(start, 8) + struct.pack("<f", 7.0))
    file = read_gguf(path)
    assert file.read(file.tensors["a"]).view(np.float32).tolist() == [7.0]


def test_the_header_agrees_with_the_gguf_packages_own_reader(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_array("words", ["a", "b"])
    writer.add_float64("number", 0.25)
    writer.add_tensor("m", np.arange(96, dtype=np.float32).reshape(3, 32))
    writer.add_tensor(
        "q", gguf.quantize(np.ones((2, 64), np.float32), Kind.Q8_0), raw_dtype=Kind.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = read_gguf(tmp_path / "x.gguf"), gguf.GGUFReader(tmp_path / "x.gguf")
    assert {key: ours.value(key) for key in ("words", "number", "general.architecture")} == {
        key: theirs.fields[key].contents() for key in ("words", "number", "general.architecture")
    }
    assert [
        (each.name, each.kind, list(reversed(each.shape)), each.offset, each.num_bytes)
        for each in ours.tensors.values()
    ] == [
        (each.name, each.tensor_type, each.shape.tolist(), each.data_offset, each.n_bytes)
        for each in theirs.tensors
    ]
    for name, each in ((each.name, each) for each in theirs.tensors):
        assert ours.read(ours.tensors[name]).tobytes() == each.data.tobytes()


def test_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    path = write(tmp_path, header(entry("a", 8, text("one"))))
    first = read_gguf(path)
    assert read_gguf(path) is first
    write(tmp_path, header(entry("a", 8, text("three"))))
    assert read_gguf(path).metadata == {"a": "three"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ends in the middle"),
        (b"PK\x03\x04", "does not begin with GGUF"),
        (header(version=1), "version 1"),
        (header(num_keys=1), "ends in the middle"),
        (header(num_keys=1 << 40), "over the limit"),
        (header(num_tensors=1 << 40), "over the limit"),
        (header(num_tensors=1), "ends in the middle"),
        (header(entry("a", 8, struct.pack("<Q", 1 << 60))), "over the limit"),
        (header(entry("a", 8, struct.pack("<Q", 20) + b"short")), "ends in the middle"),
        (header(entry("a", 99, b"")), "value type 99"),
        (header(entry("a", 9, struct.pack("<IQ", 8, 1 << 50))), "over the limit"),
        (header(entry("a", 9, struct.pack("<IQ", 5, 1000))), "ends in the middle"),
        (header(entry("a", 7, b"\x00"), entry("a", 7, b"\x00")), "occurs twice"),
        (header(tensors=(tensor("t", 0), tensor("t", 0))), "occurs twice"),
        (header(entry("general.alignment", 4, bytes(4))), "an alignment of 0"),
        (header(tensors=(tensor("t", *[1] * 5),)), "a count of 5 is over the limit of 4"),
        (header(tensors=(tensor("t", 33, kind=Kind.Q8_0),)), r"shape \[33\] cannot be Q8_0"),
        (header(tensors=(tensor("t"),)), r"shape \[\] cannot be F32"),
        (header(tensors=(text("t") + struct.pack("<IQIQ", 1, 1, 77, 0),)), "77 is not a valid"),
        (header(tensors=(tensor("t", 2, 2, offset=64),)), "'t' ends at byte 176 of 65"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, data: bytes, reason: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(CheckpointError, match=rf"x\.gguf is not a complete GGUF file: .*{reason}"):
        read_gguf(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*none\.gguf: No such file"):
        read_gguf(tmp_path / "none.gguf")


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    start = padded(header(tensors=(tensor("t", 4),)))
    path = write(tmp_path, start + bytes(16))
    file = read_gguf(path)
    path.write_bytes(start + bytes(8))
    with pytest.raises(CheckpointError, match=r"tensor 't' is cut short; download the file again"):
        file.read(file.tensors["t"])
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*x\.gguf"):
        file.read(file.tensors["t"])


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    file = read_gguf(write(tmp_path, header()))
    assert file.value("a.b", 5) == 5
    with pytest.raises(CheckpointError, match=r"metadata 'a\.b' is missing"):
        file.value("a.b")
