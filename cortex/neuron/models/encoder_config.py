"""What the config.json of a BERT-family encoder says, as a checked struct; imports no torch."""

import pathlib
from typing import Annotated, Literal

import msgspec

from cortex.core.errors import CheckpointError
from cortex.neuron.models.hf_files import read_json

_Positive = Annotated[int, msgspec.Meta(gt=0)]
Activation = Literal["gelu", "gelu_tanh", "relu"]
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class EncoderConfig(msgspec.Struct, kw_only=True, frozen=True):
    """Everything that fixes an encoder's shapes and maths.

    Attributes:
        num_positions: rows of the table of positions.
        first_position: the row of a text's first token.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    layer_norm_eps: float
    activation: Activation
    num_positions: int
    first_position: int
    num_types: int

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest text."""
        return self.num_positions - self.first_position


class _Raw(msgspec.Struct, kw_only=True):
    model_type: str
    vocab_size: _Positive
    hidden_size: _Positive
    intermediate_size: _Positive
    num_hidden_layers: _Positive
    num_attention_heads: _Positive
    max_position_embeddings: _Positive
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    type_vocab_size: _Positive = 2
    pad_token_id: int | None = None
    position_embedding_type: str | None = "absolute"
    is_decoder: bool = False


def read_encoder_config(directory: pathlib.Path) -> EncoderConfig:
    """Parse the configuration of an encoder's directory.

    Raises:
        CheckpointError: it is missing or malformed, or asks for what is not supported.
    """
    path = directory / "config.json"
    raw = read_json(path, _Raw)
    activation = _ACTIVATIONS.get(raw.hidden_act)
    if activation is None:
        raise CheckpointError(
            f"{path}: hidden_act {raw.hidden_act!r} is not supported; "
            f"supported are {', '.join(_ACTIVATIONS)}"
        )
    if raw.position_embedding_type not in (None, "absolute") or raw.is_decoder:
        raise CheckpointError(f"{path}: only encoders with absolute positions are supported")
    if raw.hidden_size % raw.num_attention_heads:
        raise CheckpointError(
            f"{path}: {raw.num_attention_heads} attention heads do not divide a hidden size of "
            f"{raw.hidden_size}"
        )
    first = 0
    if raw.model_type != "bert":
        # RoBERTa and its kin count positions from the one after that of padding.
        first = 2 if raw.pad_token_id is None else raw.pad_token_id + 1
    if first >= raw.max_position_embeddings:
        raise CheckpointError(f"{path}: there is no position for a first token")
    return EncoderConfig(
        vocab_size=raw.vocab_size,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_layers=raw.num_hidden_layers,
        num_heads=raw.num_attention_heads,
        layer_norm_eps=raw.layer_norm_eps,
        activation=activation,
        num_positions=raw.max_position_embeddings,
        first_position=first,
        num_types=raw.type_vocab_size,
    )
