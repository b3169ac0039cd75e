"""From a checkpoint to a model that can run."""

import pathlib
from collections.abc import Callable

import msgspec
import torch

from cortex.neuron.models.base import CausalLM, WeightSource
from cortex.neuron.models.bert import Bert
from cortex.neuron.models.config import ModelConfig
from cortex.neuron.models.encoder_config import read_encoder_config
from cortex.neuron.models.facts import read_config
from cortex.neuron.models.gguf_file import read_gguf
from cortex.neuron.models.gguf_weights import GgufWeights
from cortex.neuron.models.hf_files import list_encoder_tensors
from cortex.neuron.models.llama import Llama
from cortex.neuron.models.qwen3_5 import Qwen35
from cortex.neuron.models.source import ModelSource
from cortex.neuron.models.weights import SafetensorsWeights


def load_causal_lm(
    source: ModelSource,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: Callable[[int, int], None],
    has_head: bool = True,
) -> CausalLM:
    """Read a checkpoint's configuration, choose its class and stream its weights in.

    Args:
        source: where the checkpoint lies.
        device: where the weights go.
        dtype: of weights and activations; None: float32 on a CPU, elsewhere the checkpoint's own.
        progress: called after each tensor with the bytes read and the bytes in all.
        has_head: whether it is to give logits; else its hidden states are all it gives.

    Raises:
        CheckpointError: the checkpoint cannot be read or is not supported.
    """
    path = pathlib.Path(source.path)
    config = read_config(source).model
    if not has_head:
        config = msgspec.structs.replace(config, has_head=False, vision=None)
    if source.kind == "gguf":
        return _build(config, GgufWeights(read_gguf(path), config, progress), device, dtype)
    with SafetensorsWeights(path, progress, with_vision=config.vision is not None) as weights:
        return _build(config, weights, device, dtype)


@torch.inference_mode()
def load_encoder(
    source: ModelSource,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: Callable[[int, int], None],
) -> Bert:
    """Load a BERT-family encoder; as `load_causal_lm`."""
    path = pathlib.Path(source.path)
    config = read_encoder_config(path)
    with SafetensorsWeights(path, progress, tensors=list_encoder_tensors(path)) as weights:
        return Bert(config, weights, device, _dtype(dtype, weights, device))


@torch.inference_mode()
def _build(
    config: ModelConfig, weights: WeightSource, device: torch.device, dtype: torch.dtype | None
) -> CausalLM:
    kind = Llama if config.family == "llama" else Qwen35
    return kind(config, weights, device, _dtype(dtype, weights, device))


def _dtype(dtype: torch.dtype | None, weights: WeightSource, device: torch.device) -> torch.dtype:
    if dtype is not None:
        return dtype
    return torch.float32 if device.type == "cpu" else weights.dtype
