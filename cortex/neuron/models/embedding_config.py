"""What a checkpoint says of the vectors it makes: sentence-transformers' files; imports no torch.

`modules.json` names the steps from tokens to a vector: the transformer, how its hidden states are
pooled, and whether the vector is normalised.
"""

import pathlib
from typing import Literal

import msgspec

from cortex.core.errors import CheckpointError
from cortex.neuron.models.hf_files import read_json
from cortex.neuron.models.source import ModelSource

MODULES_NAME = "modules.json"
# model_type of the encoders that `models.bert` computes.
ENCODER_TYPES = ("bert", "roberta", "xlm-roberta", "camembert")
_LIMITS_NAME = "sentence_bert_config.json"

Pooling = Literal["cls", "mean", "max", "mean_sqrt_len", "weighted_mean", "last"]
# The names of each pooling: as a key that is true, and as a value of `pooling_mode`.
_POOLING_KEYS: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
_POOLING_VALUES: dict[str, Pooling] = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}


class EmbeddingSpec(msgspec.Struct, kw_only=True, frozen=True):
    """How vectors are made of hidden states.

    Attributes:
        is_encoder: whether every token sees all others; else each sees those before it.
        max_tokens: of one text, as its author bounds it; None where nothing is said.
        is_lowercased: whether texts are put in lower case before they are tokenized.
        dimension: numbers of a vector.
        any_dimensions: whether the first numbers of a vector, however many, are one as well.
        dimensions: how many of them are, where only some counts were trained.
    """

    is_encoder: bool
    pooling: Pooling
    is_normalized: bool
    dimension: int
    max_tokens: int | None = None
    is_lowercased: bool = False
    any_dimensions: bool = False
    dimensions: tuple[int, ...] = ()

    def allows(self, dimensions: int) -> bool:
        """Whether vectors may be cut down to so many numbers."""
        if dimensions == self.dimension:
            return True
        if self.dimensions:
            return dimensions in self.dimensions
        return self.any_dimensions and dimensions < self.dimension


class _RawConfig(msgspec.Struct, kw_only=True):
    model_type: str | None = None
    hidden_size: int | None = None
    is_matryoshka: bool = False
    matryoshka_dimensions: list[int] | None = None


class _RawModule(msgspec.Struct, kw_only=True):
    path: str = ""
    type: str = ""

    @property
    def kind(self) -> str:
        return self.type.rpartition(".")[2]


class _RawLimits(msgspec.Struct, kw_only=True):
    max_seq_length: int | None = None
    do_lower_case: bool = False


class _PoolingFile(msgspec.Struct, kw_only=True):
    pooling_mode: str | list[str] | None = None
    pooling_mode_cls_token: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False


def read_embedding_spec(source: ModelSource) -> EmbeddingSpec | None:
    """Return how a checkpoint makes vectors, None for one that is made to write.

    Raises:
        CheckpointError: a file is missing or malformed, or asks for what is not supported.
    """
    directory = pathlib.Path(source.path)
    if source.kind != "hf":
        return None
    has_modules = (directory / MODULES_NAME).is_file()
    config_path = directory / "config.json"
    if not has_modules and not config_path.is_file():
        return None
    config = read_json(config_path, _RawConfig)
    is_encoder = config.model_type in ENCODER_TYPES
    if not has_modules:
        if not is_encoder:
            return None
        raise CheckpointError(
            f"{directory}: {MODULES_NAME} is missing, which says how a model of type "
            f"{config.model_type!r} makes vectors; a checkpoint of sentence-transformers is needed"
        )
    if config.hidden_size is None:
        raise CheckpointError(f"{config_path}: hidden_size is missing")
    pooling, is_normalized = _read_modules(directory)
    limits_path = directory / _LIMITS_NAME
    limits = read_json(limits_path, _RawLimits) if limits_path.is_file() else _RawLimits()
    dimensions = tuple(each for each in config.matryoshka_dimensions or () if each > 0)
    return EmbeddingSpec(
        is_encoder=is_encoder,
        pooling=pooling,
        is_normalized=is_normalized,
        dimension=config.hidden_size,
        max_tokens=limits.max_seq_length,
        is_lowercased=limits.do_lower_case,
        any_dimensions=config.is_matryoshka,
        dimensions=dimensions,
    )


def _read_modules(directory: pathlib.Path) -> tuple[Pooling, bool]:
    path = directory / MODULES_NAME
    modules = read_json(path, list[_RawModule])
    kinds = [each.kind for each in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointError(
            f"{path}: the modules {', '.join(kinds) or 'of an empty list'} are not supported; "
            "supported are Transformer, Pooling and, after them, Normalize"
        )
    transformer, pooling = modules[:2]
    if transformer.path:
        raise CheckpointError(
            f"{path}: the transformer lies in {transformer.path!r}; "
            "only checkpoints that have it beside modules.json are supported"
        )
    if not pathlib.PurePath(pooling.path).name == pooling.path:
        raise CheckpointError(f"{path}: {pooling.path!r} is not a directory beside it")
    return _read_pooling(directory / pooling.path / "config.json"), len(kinds) == 3


def _read_pooling(path: pathlib.Path) -> Pooling:
    raw = read_json(path, _PoolingFile)
    named = [raw.pooling_mode] if isinstance(raw.pooling_mode, str) else raw.pooling_mode or []
    unknown = next((each for each in named if each not in _POOLING_VALUES), None)
    if unknown is not None:
        raise CheckpointError(f"{path}: pooling_mode {unknown!r} is not supported")
    found = [_POOLING_VALUES[each] for each in named]
    found += [kind for key, kind in _POOLING_KEYS.items() if getattr(raw, key)]
    if len(found) != 1:
        modes = ", ".join(found) or "none"
        raise CheckpointError(f"{path}: exactly one pooling mode is supported, it names {modes}")
    return found[0]
