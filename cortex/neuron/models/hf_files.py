"""The files of a Hugging Face layout directory: JSON, safetensors headers; imports no torch."""

import pathlib
from collections.abc import Collection
from typing import TypeVar

import msgspec

from cortex.core.errors import CheckpointError

MAX_HEADER_BYTES = 100 << 20
MAX_JSON_BYTES = 16 << 20
_LENGTH_BYTES = 8
_INDEX_NAME = "model.safetensors.index.json"

# Embedding models are often stored without their outer class, and so without a prefix.
_PREFIXES = ("model.language_model.", "model.", "")
_ENCODER_PREFIXES = ("", "bert.", "roberta.")
_VISION_PREFIXES = ("model.visual.", "visual.")
_VISION_NAME = "visual."
_VISION_PROBE = "patch_embed.proj.weight"


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
T = TypeVar("T")


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


def list_tensors(directory: pathlib.Path, *, with_vision: bool) -> dict[str, StoredTensor]:
    """Return a model's tensors by name, without the `model.` or wrapper prefix.

    Those of a vision tower begin with `visual.`; without `with_vision` they are left out, and
    multi-token-prediction heads are in any case.

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
    text = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(wanted)
    }
    tower = _vision_prefix(tensors) if with_vision else None
    if tower is None:
        return text
    return text | {
        _VISION_NAME + name.removeprefix(tower): tensor
        for name, tensor in tensors.items()
        if name.startswith(tower)
    }


def has_vision_tower(directory: pathlib.Path) -> bool:
    """Whether the weights of a vision tower are among the files; no more than a look.

    Raises:
        CheckpointError: a file is malformed or cut short.
    """
    index = directory / _INDEX_NAME
    if index.exists():
        return _vision_prefix(read_json(index, _Index).weight_map) is not None
    files = _single_file(directory)
    return len(files) == 1 and _vision_prefix(_read_header(files[0])) is not None


def _vision_prefix(names: Collection[str]) -> str | None:
    return next((each for each in _VISION_PREFIXES if each + _VISION_PROBE in names), None)


def _single_file(directory: pathlib.Path) -> list[pathlib.Path]:
    """Return the one file that holds all tensors where there is no index; else what there is."""
    single = directory / "model.safetensors"
    files = sorted(directory.glob("*.safetensors"))
    return [single] if single in files else files


def list_encoder_tensors(directory: pathlib.Path) -> dict[str, StoredTensor]:
    """Return a BERT-family encoder's tensors by name, without prefix and without any head.

    Raises:
        CheckpointError: as `list_tensors`.
    """
    tensors = _list_tensors(directory)
    first = "embeddings.word_embeddings.weight"
    prefix = next((p for p in _ENCODER_PREFIXES if f"{p}{first}" in tensors), None)
    if prefix is None:
        raise CheckpointError(f"{directory}: tensor {first!r} is missing")
    wanted = (f"{prefix}embeddings.", f"{prefix}encoder.layer.")
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        # A buffer of old checkpoints: the numbers from 0 on.
        if name.startswith(wanted) and not name.endswith("position_ids")
    }


def _list_tensors(directory: pathlib.Path) -> dict[str, StoredTensor]:
    index = directory / _INDEX_NAME
    if not index.exists():
        files = _single_file(directory)
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
