"""Where a checkpoint lies on this host."""

from typing import Literal

import msgspec


class ModelSource(msgspec.Struct, kw_only=True, frozen=True):
    """A checkpoint: a Hugging Face layout directory (`hf`) or one GGUF file (`gguf`)."""

    kind: Literal["hf", "gguf"]
    path: str
