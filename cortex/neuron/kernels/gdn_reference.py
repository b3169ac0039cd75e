"""The five Gated DeltaNet operators in plain torch: any device, float32 or float64, with gradients.

Every function but the one whose name ends in an underscore leaves its arguments alone. Value
heads come in groups of `v_heads / k_heads` consecutive ones that share a key head. Recurrent
states are value-major, (batch, v_heads, v_dim, k_dim): the transpose of the S of the paper.

Source of the maths: Gated Delta Networks, arXiv 2412.06464.
"""

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_TOKENS = 64
_NORM_EPS = 1e-6


def l2_normalise(x: Tensor) -> Tensor:
    """Return x over its Euclidean norm in the last dimension, as the delta rule wants q and k."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _NORM_EPS)


def gated_delta_rule_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply the gated delta rule token by token.

    Per value head and token, with a = exp(g): S <- a S; S <- S + beta (v - S k) k^T; o = S q.

    Args:
        q: (batch, tokens, k_heads, k_dim), L2-normalised and scaled by k_dim ** -0.5.
        k: (batch, tokens, k_heads, k_dim), L2-normalised.
        v: (batch, tokens, v_heads, v_dim).
        g: (batch, tokens, v_heads), log decay, at most 0.
        beta: (batch, tokens, v_heads), in (0, 1).
        state: (batch, v_heads, v_dim, k_dim).

    Returns:
        The outputs, shaped like v, and the state after the last token.
    """
    outputs = []
    for t in range(k.shape[1]):
        out, decay, delta = _read_state(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state)
        outputs.append(out)
        state = torch.addcmul(decay * state, delta, _keys_of_value_heads(k[:, t], v.shape[2]))
    return torch.stack(outputs, dim=1) if outputs else torch.empty_like(v), state


def gated_delta_rule_recurrence_(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> Tensor:
    """Apply the gated delta rule token by token; the state is updated in place, without gradients.

    Arguments and the returned outputs are those of `gated_delta_rule_recurrence`.
    """
    outputs = []
    for t in range(k.shape[1]):
        out, decay, delta = _read_state(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state)
        outputs.append(out)
        state.mul_(decay).addcmul_(delta, _keys_of_value_heads(k[:, t], v.shape[2]))
    return torch.stack(outputs, dim=1) if outputs else torch.empty_like(v)


def _read_state(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return one token's output, and its decay and delta, shaped to be applied to the state."""
    k_heads = k.shape[1]
    alpha = g.exp()[..., None]  # (batch, v_heads, 1)
    # One product with k and q reads the old state once: S q = a (S_old q) + delta (k . q).
    by_k_head = state.reshape(state.shape[0], k_heads, -1, state.shape[3])
    product = torch.stack((k, q), dim=2) @ by_k_head.transpose(-1, -2)
    seen, out = (alpha * product[:, :, i].reshape(v.shape) for i in range(2))
    delta = beta[..., None] * (v - seen)
    k_dot_q = (k * q).sum(-1).repeat_interleave(v.shape[1] // k_heads, dim=1)
    return out + delta * k_dot_q[..., None], alpha[..., None], delta[..., None]


def _keys_of_value_heads(k: Tensor, v_heads: int) -> Tensor:
    """Return (batch, v_heads, 1, k_dim): each key head once for every value head it serves."""
    return k.repeat_interleave(v_heads // k.shape[1], dim=1)[:, :, None]


def chunked_gated_delta_rule_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply the gated delta rule a chunk of tokens at a time; same arguments and results.

    Within a chunk G is the running sum of g and D_ij = exp(G_i - G_j) for i >= j. The product is
    never split into exp(G_i) exp(-G_j), which overflows under strong decay.
    A = strict_lower(diag(beta) (K K^T * D)), T = (I + A)^-1,
    U = T diag(beta) V, W = T diag(beta exp(G)) K, V' = U - W S^T,
    O = (Q * exp(G)) S^T + lower(Q K^T * D) V', S <- exp(G_C) S + V'^T (K * exp(G_C - G)).
    """
    batch, tokens, k_heads, k_dim = k.shape
    v_heads, v_dim = v.shape[2:]
    group = v_heads // k_heads
    if tokens == 0:
        return torch.empty_like(v), state
    size = min(CHUNK_TOKENS, tokens)
    num_chunks = -(-tokens // size)
    padding = num_chunks * size - tokens

    def chunks_of_keys(x: Tensor) -> Tensor:
        x = functional.pad(x, (0, 0, 0, 0, 0, padding)).view(
            batch, num_chunks, size, k_heads, 1, k_dim
        )
        return x.permute(1, 0, 3, 4, 2, 5)

    def chunks_of_gates(x: Tensor) -> Tensor:
        x = functional.pad(x, (0, 0, 0, padding)).view(batch, num_chunks, size, k_heads, group)
        return x.permute(1, 0, 3, 4, 2)

    # All of shape (chunks, batch, k_heads, group or 1, size, ...); padding tokens have
    # beta = 0 and g = 0, so they leave the state as it is.
    qs, ks = chunks_of_keys(q), chunks_of_keys(k)
    vs = functional.pad(v, (0, 0, 0, 0, 0, padding)).view(
        batch, num_chunks, size, k_heads, group, v_dim
    )
    vs = vs.permute(1, 0, 3, 4, 2, 5)
    betas = chunks_of_gates(beta)[..., None]
    total = chunks_of_gates(g).cumsum(-1)

    above = torch.ones(size, size, dtype=torch.bool, device=k.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(above, -torch.inf).exp()
    # Only what is strictly below the diagonal is read: the diagonal is taken as ones.
    A = betas * (ks @ ks.transpose(-1, -2)) * decay
    from_start = total.exp()[..., None]
    right = torch.cat((betas * vs, (betas * from_start) * ks), dim=-1)
    solved = torch.linalg.solve_triangular(A, right, upper=False, unitriangular=True)
    U, W = solved.split((v_dim, k_dim), dim=-1)
    scores = (qs @ ks.transpose(-1, -2)) * decay
    queries = qs * from_start
    to_end = (total[..., -1:] - total).exp()[..., None]
    keys_to_end = ks * to_end
    whole = total[..., -1].exp()[..., None, None]

    current = state.view(batch, k_heads, group, v_dim, k_dim)
    outputs = []
    for c in range(num_chunks):
        fresh = U[c] - W[c] @ current.transpose(-1, -2)
        outputs.append(queries[c] @ current.transpose(-1, -2) + scores[c] @ fresh)
        current = whole[c] * current + fresh.transpose(-1, -2) @ keys_to_end[c]
    out = torch.stack(outputs, dim=1)  # (batch, chunks, k_heads, group, size, v_dim)
    out = out.permute(0, 1, 4, 2, 3, 5).reshape(batch, num_chunks * size, v_heads, v_dim)
    return out[:, :tokens], current.reshape(state.shape)


def causal_conv1d_full(x: Tensor, weight: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve each channel over its own past, then SiLU.

    Args:
        x: (batch, tokens, conv_dim), any number of tokens.
        weight: (conv_dim, width), oldest tap first.
        window: (batch, width - 1, conv_dim), the inputs before x, oldest first.

    Returns:
        The outputs, shaped like x, and the window after the last token.
    """
    tokens, width = x.shape[1], weight.shape[1]
    padded = torch.cat((window.to(x.dtype), x), dim=1)
    out = padded[:, width - 1 :] * weight[:, width - 1]
    for tap in range(width - 1):
        out = out + padded[:, tap : tap + tokens] * weight[:, tap]
    return functional.silu(out), padded[:, tokens:]


def causal_conv1d_update(x: Tensor, weight: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve one token of each sequence, then SiLU.

    Args:
        x: (batch, conv_dim).
        weight: (conv_dim, width), oldest tap first.
        window: (batch, width - 1, conv_dim), the inputs before x, oldest first.

    Returns:
        The outputs, shaped like x, and the window after this token.
    """
    padded = torch.cat((window.to(x.dtype), x[:, None]), dim=1)
    return functional.silu((padded * weight.t()).sum(1)), padded[:, 1:]


def fused_gdn_gating(b: Tensor, a: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the write strength beta = sigmoid(b) and log decay g = -exp(a_log) softplus(a + dt).

    Args:
        b, a: (..., v_heads), any float dtype.
        a_log, dt_bias: (v_heads,), at least float32, which is what the results are computed in.

    Returns:
        beta in (0, 1) and g at most 0, shaped like b and of a_log's dtype.
    """
    beta = b.to(a_log.dtype).sigmoid()
    x = a.to(a_log.dtype) + dt_bias
    # log(1 + exp(x)) without overflow for large x.
    softplus = x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
    return beta, -a_log.exp() * softplus
