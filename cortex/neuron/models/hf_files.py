"""The files of a Hugging Face layout directory: JSON, safetensors headers; imports no torch."""

import pathlib
from typing import TypeVar

import msgspec

from cortex.core.errors import CheckpointError

MAX_HEADER_BYTES = 100 << 20
MAX_JSON_BYTES = 16 << 20
_LENGTH_BYTES = 8
_INDEX_NAME = "model.safetensors.index.json"

_PREFIXES = ("model.language_model.", "model.")


class StoredTensor(msgspec.Struct, kw_only=True, frozen=True):
    """Where one tensor lies and how it is stored."""

    name: str
    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


class _HeaderEntry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


_HEADER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY = msgspec.json.Decoder(_HeaderEntry)
T = TypeVar("T", bound=msgspec.Struct)


def read_json(path: pathlib.Path, kind: type[T]) -> T:
    """Return what a checkpoint's JSON file says, as far as `kind` has fields for it.

    Raises:
        CheckpointError: the file is missing, too large or malformed.
    """
    try:
        with path.open("rb") as file:
            body = file.read(MAX_JSON_BYTES + 1)
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}") from exc
    if len(body) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes: not a model's file")
    try:
        return msgspec.json.decode(body, type=kind, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise CheckpointError(f"{path}: {exc}") from exc


def list_text_tensors(directory: pathlib.Path) -> dict[str, StoredTensor]:
    """Return the text model's tensors by name, without the `model.` or wrapper prefix.

    Vision towers and multi-token-prediction heads are left out.

    Raises:
        CheckpointError: no safetensors files, or one is missing, malformed or cut short.
    """
    tensors = _list_tensors(directory)
    prefix = next(
        (p for p in _PREFIXES if f"{p}embed_tokens.weight" in tensors),
        None,
    )
    if prefix is None:
        raise CheckpointError(f"{directory}: tensor 'model.embed_tokens.weight' is missing")
    wanted = (f"{prefix}layers.", f"{prefix}embed_tokens.", f"{prefix}norm.", "lm_head.")
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(wanted)
    }


def _list_tensors(directory: pathlib.Path) -> dict[str, StoredTensor]:
    index = directory / _INDEX_NAME
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        single = directory / "model.safetensors"
        if single in files:
            files = [single]
        if len(files) != 1:
            raise CheckpointError(
                f"{directory}: no model.safetensors and no {_INDEX_NAME}; "
                "a checkpoint in safetensors format is needed"
            )
        return _read_header(files[0])
    weight_map = read_json(index, _Index).weight_map
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        if pathlib.PurePath(file_name).name != file_name:
            raise CheckpointError(f"{index}: shard {file_name!r} is not a file beside the index")
        tensors.update(_read_header(directory / file_name))
    missing = next((name for name in weight_map if name not in tensors), None)
    if missing is not None:
        raise CheckpointError(f"{directory}: tensor {missing!r} is not in {weight_map[missing]}")
    return tensors


def _read_header(file: pathlib.Path) -> dict[str, StoredTensor]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
                raise CheckpointError(f"{file} is not a complete safetensors file")
            body = stream.read(length)
    except OSError as exc:
        raise CheckpointError(f"cannot read {file}: {exc.strerror}") from exc
    try:
        entries = {
            name: _ENTRY.decode(raw)
            for name, raw in _HEADER.decode(body).items()
            if name != "__metadata__"
        }
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise CheckpointError(f"{file}: malformed safetensors header: {exc}") from exc
    data_bytes = size - _LENGTH_BYTES - length
    return {name: _stored(name, file, entry, data_bytes) for name, entry in entries.items()}


def _stored(name: str, file: pathlib.Path, entry: _HeaderEntry, data_bytes: int) -> StoredTensor:
    start, stop = entry.data_offsets
    if not 0 <= start <= stop <= data_bytes:
        raise CheckpointError(
            f"{file}: tensor {name!r} is cut short: it ends at byte {stop} "
            f"of {data_bytes}; download the file again"
        )
    return StoredTensor(
        name=name,
        file=file,
        dtype=entry.dtype,
        shape=tuple(entry.shape),
        num_bytes=stop - start,
    )
