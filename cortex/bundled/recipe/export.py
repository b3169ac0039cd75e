"""Writes the model folder: bfloat16 weights, float32 where a layer keeps small vectors."""

from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from transformers import Qwen3_5ForCausalLM

# What transformers writes for every model and no loader of this one reads.
_NOISE = {
    "_name_or_path", "chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict",
}  # fmt: skip


def export(model: Qwen3_5ForCausalLM, folder: Path) -> None:
    """Write weights, config.json and generation_config.json, each by a rename."""
    weights = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        kind = torch.float32 if weight.ndim == 1 else torch.bfloat16
        weights[name] = weight.detach().to(device="cpu", dtype=kind).contiguous()
    part = folder / "model.safetensors.part"
    save_file(weights, part, metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(folder / "model.safetensors")

    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOISE}
    config["dtype"] = "bfloat16"
    _write(folder / "config.json", config)
    ends = [config["eos_token_id"], config["pad_token_id"]]
    generation = {"do_sample": False, "eos_token_id": ends, "pad_token_id": config["pad_token_id"]}
    _write(folder / "generation_config.json", generation)


def _write(path: Path, value: dict[str, object]) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
    part.replace(path)
