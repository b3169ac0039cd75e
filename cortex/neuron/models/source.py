"""Where a checkpoint lies on this host."""

import importlib.metadata
import pathlib
from typing import Literal

import msgspec


class ModelSource(msgspec.Struct, kw_only=True, frozen=True):
    """A checkpoint: a Hugging Face layout directory (`hf`) or one GGUF file (`gguf`)."""

    kind: Literal["hf", "gguf"]
    path: str


def detect(path: pathlib.Path) -> ModelSource | None:
    """Return the checkpoint that lies at a path, None where there is none."""
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(kind="gguf", path=str(path))
    if (path / "config.json").is_file():
        return ModelSource(kind="hf", path=str(path))
    return None


def distribution_gguf(distribution: str) -> pathlib.Path | None:
    """Return the .gguf file that an installed Python distribution carries, None without one.

    The distribution's file list is read; its code is never imported.
    """
    try:
        files = importlib.metadata.distribution(distribution).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for entry in files:
        path = pathlib.Path(str(entry.locate()))
        if entry.suffix == ".gguf" and path.is_file():
            return path
    return None
