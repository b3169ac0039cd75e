"""The network of cortex-tiny: its configuration, its first weights, a fast rule for training."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5 import modeling_qwen3_5

_CHUNK = 32


def make_config(vocab_size: int, eos_id: int, pad_id: int) -> Qwen3_5TextConfig:
    """Return the shape of cortex-tiny: six layers, every third one full attention."""
    return Qwen3_5TextConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=48,
        linear_value_head_dim=48,
        linear_conv_kernel_dim=4,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
        },
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        bos_token_id=None,
        architectures=["Qwen3_5ForCausalLM"],
    )


def make_model(config: Qwen3_5TextConfig, seed: int, device: torch.device) -> Qwen3_5ForCausalLM:
    """Return the model with random weights; decays start slow, as in Gated DeltaNet."""
    torch.manual_seed(seed)
    model = Qwen3_5ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("A_log"):
                weight.copy_(torch.empty_like(weight).uniform_(1, 8).log())
            elif name.endswith("dt_bias"):
                step = torch.empty_like(weight).uniform_(math.log(1e-3), math.log(1e-1)).exp()
                weight.copy_(step + torch.log(-torch.expm1(-step)))
            elif name.endswith("conv1d.weight"):
                weight.copy_(torch.empty_like(weight).uniform_(-0.5, 0.5))
            elif name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                weight.mul_(0.5)
            elif name.endswith("embed_tokens.weight"):
                weight.copy_(torch.randn_like(weight) * 0.05)
    nn.Module.to(model, device)
    return model


def use_fast_rule() -> None:
    """Let transformers' layers run `chunk_rule`; only for training, where no state is kept."""
    modeling_qwen3_5.torch_chunk_gated_delta_rule = chunk_rule


def chunk_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **_options: object
) -> tuple[Tensor, None]:
    """Apply the gated delta rule in chunks of 32 tokens.

    Args:
        query, key: (batch, tokens, k_heads, k_dim), not yet normalised.
        value: (batch, tokens, v_heads, v_dim).
        g: (batch, tokens, v_heads), log decay.  beta: (batch, tokens, v_heads).

    Returns:
        (batch, tokens, v_heads, v_dim), and no state.

    Source: Gated Delta Networks, arXiv 2412.06464.
    """
    batch, tokens, k_heads, k_dim = key.shape
    v_heads, v_dim = value.shape[-2:]
    query, key, value = (
        functional.pad(x, (0, 0, 0, 0, 0, -tokens % _CHUNK)) for x in (query, key, value)
    )
    g, beta = (functional.pad(x, (0, 0, 0, -tokens % _CHUNK)) for x in (g, beta))
    groups, chunks = v_heads // k_heads, query.shape[1] // _CHUNK
    query = functional.normalize(query, dim=-1, eps=1e-6) * k_dim**-0.5
    key = functional.normalize(key, dim=-1, eps=1e-6)

    def split(x: Tensor, heads: int) -> Tensor:
        x = x.view(batch, chunks, _CHUNK, heads, -1).permute(0, 3, 1, 2, 4)
        return x if heads == v_heads else x.repeat_interleave(groups, dim=1)

    q, k, v = split(query, k_heads), split(key, k_heads), split(value, v_heads)
    rate, decay = split(beta, v_heads), split(g, v_heads).squeeze(-1).cumsum(-1)
    upper = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=q.device).triu(1)
    pair = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(upper, -torch.inf).exp()
    rated = k * rate
    k_t = k.transpose(-1, -2)
    right = torch.cat([v * rate, rated * decay.exp().unsqueeze(-1)], dim=-1)
    solved = torch.linalg.solve_triangular(
        (rated @ k_t) * pair, right, upper=False, unitriangular=True
    )
    new, read = solved.split([v_dim, k_dim], dim=-1)
    inside = (q @ k_t) * pair
    q = q * decay.exp().unsqueeze(-1)
    k = (k * (decay[..., -1:] - decay).exp().unsqueeze(-1)).transpose(-1, -2)
    fade = decay[..., -1].exp()[..., None, None]
    state = torch.zeros(batch, v_heads, k_dim, v_dim, dtype=q.dtype, device=q.device)
    out = []
    for idx in range(chunks):
        fresh = new[:, :, idx] - read[:, :, idx] @ state
        out.append(q[:, :, idx] @ state + inside[:, :, idx] @ fresh)
        state = state * fade[:, :, idx] + k[:, :, idx] @ fresh
    joined = torch.stack(out, dim=2).permute(0, 2, 3, 1, 4)
    return joined.reshape(batch, -1, v_heads, v_dim)[:, :tokens], None
