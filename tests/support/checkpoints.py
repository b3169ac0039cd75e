"""Tiny random checkpoints in the layouts that the loader has to read, and a tokenizer for them.

Weights are drawn anew after transformers has made the model: its default initialisation gives
logits so flat that a wrong layer would pass unnoticed.
"""

import json
import pathlib
import shutil
import sys
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

# Where it is installed, transformers takes its Triton kernels for models on a CPU too.
sys.modules.setdefault("fla", None)  # type: ignore[arg-type]

VOCAB_SIZE = 500
EOS_ID = 2
IMAGE_TOKEN_ID = 264

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": EOS_ID,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_QWEN3_5: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "eos_token_id": EOS_ID,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
    },
}
_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "num_position_embeddings": 25,
}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE: dict[str, Any] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def llama(directory: pathlib.Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Write a llama checkpoint and return transformers' model, float32, in evaluation mode."""
    config = transformers.LlamaConfig(**{**_LLAMA, **changes})
    return _write(transformers.LlamaForCausalLM, config, directory, dtype)


def qwen3_5_text(
    directory: pathlib.Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
    **changes: Any,
) -> Any:
    """Write a qwen3_5_text checkpoint and return transformers' model; see `llama`."""
    config = transformers.Qwen3_5TextConfig(**{**_QWEN3_5, **changes})
    return _write(transformers.Qwen3_5ForCausalLM, config, directory, dtype, shard_bytes)


def qwen3_5_wrapper(
    directory: pathlib.Path, *, vision: dict[str, Any] | None = None, **changes: Any
) -> Any:
    """Write a qwen3_5 checkpoint with a nested text_config and a vision tower.

    Args:
        vision: changes of the tower; the others are of the text model.
    """
    config = transformers.Qwen3_5Config(
        text_config={**_QWEN3_5, **changes},
        vision_config={**_VISION, **(vision or {})},
        image_token_id=IMAGE_TOKEN_ID,
        tie_word_embeddings=changes.get("tie_word_embeddings", False),
    )
    return _write(transformers.Qwen3_5ForConditionalGeneration, config, directory, torch.float32)


def write_image_rules(directory: pathlib.Path, *, min_pixels: int, max_pixels: int) -> None:
    """Write a preprocessor_config.json whose normalisation differs from the defaults."""
    settings = {
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.2],
        "patch_size": _VISION["patch_size"],
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))


def _write(
    kind: Any,
    config: Any,
    directory: pathlib.Path,
    dtype: torch.dtype,
    shard_bytes: int | None = None,
) -> Any:
    model = kind(config).eval().requires_grad_(False)
    randomise(model, seed=7)
    # What is stored is what is compared: a rounded checkpoint's oracle is rounded too.
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    stored = {
        name: tensor if name.endswith(("A_log", "linear_attn.norm.weight")) else tensor.to(dtype)
        for name, tensor in model.state_dict().items()
    }
    options = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    model.save_pretrained(directory, state_dict=stored, **options)
    return model


_TOWER_NORMS = (".norm1.weight", ".norm2.weight", "merger.norm.weight")


def randomise(model: torch.nn.Module, *, seed: int) -> None:
    """Draw every parameter anew, at scales that make logits differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("A_log"):
            parameter.copy_(noise.abs().clamp(max=2.5))
        elif name.endswith("dt_bias"):
            parameter.copy_(noise - 2.0)
        elif "conv1d" in name:
            parameter.copy_(0.4 * noise)
        elif name.endswith(("linear_attn.norm.weight", *_TOWER_NORMS)):
            parameter.copy_(1.0 + 0.2 * noise)
        elif "norm" in name:
            centre = 0.0 if hasattr(model.config, "linear_num_key_heads") else 1.0
            centre = 0.0 if hasattr(model.config, "text_config") else centre
            parameter.copy_(centre + 0.2 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.3 * noise)
        elif "embed_tokens" in name:
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_(1.6 * noise / parameter[0].numel() ** 0.5)


def write_gguf(
    model: Any, path: pathlib.Path, *, kind: gguf.GGMLQuantizationType, **metadata: Any
) -> None:
    """Write transformers' llama model as GGUF, matrices quantised, norms in float32.

    Keys of `metadata` have their dots written as double underscores; a value of None removes one.
    """
    config = model.config
    rope = config.rope_parameters
    fields = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": rope["rope_theta"],
        "tokenizer.ggml.eos_token_id": EOS_ID,
    }
    fields |= {key.replace("__", "."): value for key, value in metadata.items()}
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, tensor in model.state_dict().items():
        _add_gguf_tensor(writer, config, name, tensor, kind)
    _finish_gguf(writer)


def write_raw_gguf(
    path: pathlib.Path, architecture: str, tensors: dict[str, tuple[np.ndarray, Any]], **fields: int
) -> None:
    """Write a GGUF file of given raw tensors and number fields; dots as double underscores."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    _finish_gguf(writer)


def _finish_gguf(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _add_gguf_tensor(writer: Any, config: Any, name: str, tensor: Tensor, kind: Any) -> None:
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return
    module, _, suffix = name.rpartition(".")
    block = ""
    if module.startswith("model.layers."):
        _, _, index, module = module.split(".", 3)
        block = f"blk.{index}."
    heads = {"self_attn.q_proj": config.num_attention_heads}
    heads["self_attn.k_proj"] = config.num_key_value_heads
    data = tensor.numpy()
    if module in heads:
        # Row order of llama GGUF files: the two rows of a rotated pair lie side by side.
        halves = data.reshape(heads[module], 2, config.head_dim // 2, *data.shape[1:])
        data = halves.swapaxes(1, 2).reshape(data.shape)
    name = f"{block}{_GGUF_NAMES[module]}.{suffix}"
    if data.ndim == 1:
        writer.add_tensor(name, data)
    else:
        writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# With a loop over parts, as templates of models with eyes have it.
VISION_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKER_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def write_tokenizer(directory: pathlib.Path, *, has_vision: bool = False) -> None:
    """Write a tokenizer of single bytes with chat markers, and a ChatML template.

    Ids 0..2 are special, 2 is `EOS_ID`; 3..6 are markers that stay in decoded text; the 256
    bytes follow, and with `has_vision` three special ones, `IMAGE_TOKEN_ID` among them. Higher
    ids of the tiny models have no token, as in real padded vocabularies.
    """
    vision = VISION_TOKENS if has_vision else ()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIAL_TOKENS, *MARKER_TOKENS, *alphabet, *vision]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, *vision])
    tokenizer.add_tokens([tokenizers.AddedToken(name, special=False) for name in MARKER_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = VISION_CHAT_TEMPLATE if has_vision else CHAT_TEMPLATE
    settings = {"eos_token": SPECIAL_TOKENS[2], "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def rewrite_json(path: pathlib.Path, **changes: Any) -> None:
    """Set keys of a JSON file; a value of None removes the key."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def rewrite_tensors(directory: pathlib.Path, change: Any) -> None:
    """Pass a single-file checkpoint's tensors through a function of their dictionary."""
    file = directory / "model.safetensors"
    tensors = change(load_file(file))
    file.unlink()
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})


def copy(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Copy a checkpoint so that a test may damage it."""
    return pathlib.Path(shutil.copytree(source, target))
