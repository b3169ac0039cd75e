// The Gated DeltaNet operators as plain C: what each takes, for CPUs and for CUDA alike.
//
// A call gets one struct of pointers and sizes. Its tensors were allocated and checked by the
// caller (bindings.cpp); no function here allocates or waits for the device. Every function returns
// 0, or a code that `gdn_cuda_error_text` explains. Offsets are 64-bit throughout.
//
// Maths, per value head, with a state S (v_dim, k_dim) and one key head for every
// num_v_heads / num_k_heads consecutive value heads:
//   S <- exp(g) S;  S <- S + beta (v - S k) k^T;  o = S q
// Source: Gated Delta Networks, arXiv 2412.06464.

#pragma once

#include <cstdint>

#ifdef __cplusplus
extern "C" {
#endif

// Element types. States are kGdnFloat32 or kGdnBFloat16.
enum GdnDtype { kGdnFloat32 = 0, kGdnFloat16 = 1, kGdnBFloat16 = 2 };

enum {
    kGdnChunkTokens = 64,     // tokens of a chunk, at most
    kGdnMaxHeadDim = 256,     // of keys and of values
    kGdnMaxConvWidth = 8,     // taps of the short convolution, at least 2
    kGdnMaxDraftTokens = 16,  // tokens of a sequence in gdn_verify
};

// q and k are normalised as x / sqrt(sum x^2 + this); q is then scaled by k_dim^-0.5.
#define GDN_NORM_EPS 1e-6f

// gated_delta_rule_recurrence, chunked_gated_delta_rule_recurrence and gdn_prefill.
//
// Tokens of all sequences lie side by side in one dimension. A sequence reads its state from its
// slot and leaves the new one there, so a sequence that comes in parts ends as one that comes whole.
// A slot outside [0, num_slots) is padding: the outputs of its tokens are zeros and no state is
// touched. No two sequences of a call share a slot.
struct GdnRule {
    const void* q;         // [token][k_head][k_dim], dtype
    const void* k;         // [token][k_head][k_dim], dtype
    const void* v;         // [token][v_head][v_dim], dtype
    const float* g;        // [token][v_head], log decay, at most 0
    const float* beta;     // [token][v_head], in (0, 1)
    void* states;          // [slot][v_head][v_dim][k_dim], state_dtype, updated in place
    const int64_t* slots;  // [sequence]
    // [sequence + 1] first tokens, ascending from 0 to num_tokens; null: num_tokens / num_sequences
    // tokens each. Not read by gdn_prefill.
    const int64_t* starts;
    void* out;  // [token][v_head][v_dim], dtype

    // Elements from one token to the next; heads and dims are dense.
    int64_t q_stride, k_stride, v_stride;
    int64_t num_tokens, num_sequences, num_slots;
    int32_t num_k_heads, num_v_heads, k_dim, v_dim;
    int32_t dtype, state_dtype;

    // The rest is for gdn_prefill, whose q and k are raw: it normalises and scales them itself.
    const int32_t* chunks;  // [chunk][4]: first token, tokens (1..64), sequence, snapshot or -1
    const int32_t* first_chunks;  // [sequence + 1]: a sequence's chunks lie side by side, in order
    const int32_t* segments;      // [segment][4]: sequence, first chunk, end chunk, 1 if it is its
                                  // sequence's first segment; in order, side by side
    // [snapshot][v_head][v_dim][k_dim], state_dtype: the state after each chunk that names a
    // snapshot; null where none does.
    void* snapshots;
    void* workspace;  // gdn_cuda_prefill_workspace bytes, 256-byte aligned; unused on CPUs
    int64_t num_chunks, num_segments, num_snapshots;
};

// causal_conv1d_full and causal_conv1d_update: each channel over its own past, then SiLU.
// A window holds the inputs before the call's first one, oldest first, and then those before the
// next call's. Padding is as above. `update` has one token for each sequence and no starts.
struct GdnConv {
    const void* x;          // [token][channel], dtype
    const void* weight;     // [channel][width], dtype, oldest tap first
    void* windows;          // [slot][width - 1][channel], dtype, updated in place
    const int64_t* slots;   // [sequence]
    const int64_t* starts;  // as in GdnRule; null: equal lengths
    void* out;              // [token][channel], dtype, dense
    int64_t x_stride;       // elements from one token to the next
    int64_t num_tokens, num_sequences, num_slots, num_channels;
    int32_t width, dtype;
};

// fused_gdn_gating: beta = sigmoid(b), g = -exp(a_log) softplus(a + dt_bias).
struct GdnGating {
    const void* b;         // [token][v_head], dtype
    const void* a;         // [token][v_head], dtype
    const float* a_log;    // [v_head]
    const float* dt_bias;  // [v_head]
    float* beta;           // [token][v_head]
    float* g;              // [token][v_head]
    int64_t b_stride, a_stride, num_tokens;
    int32_t num_v_heads, dtype;
};

// gdn_gated_norm: x / sqrt(mean x^2 + eps) * weight * silu(gate), over the value dimension.
struct GdnNorm {
    const void* x;        // [token][v_head][v_dim], dtype, dense
    const void* gate;     // [token][v_head][v_dim], dtype, heads and dims dense
    const float* weight;  // [v_dim]
    void* out;            // [token][v_head][v_dim], dtype, dense; may be x
    int64_t gate_stride, num_tokens;
    float eps;
    int32_t num_v_heads, v_dim, dtype;
};

// gdn_decode_step (one token per sequence) and gdn_verify (num_draft tokens per sequence): the
// whole mixer between its projections. Convolution and SiLU of [q heads | k heads | v heads],
// normalised q and k, gates, recurrence, gated norm.
//
// gdn_decode_step leaves the new state and window in the slot.
//
// gdn_verify first folds the first `pending` tokens of its slot's ring (what the last call left
// there) into state and window, which is how accepted drafts are taken and rejected ones are
// forgotten; then it computes its own tokens from that state without changing it, and leaves them in
// the ring. With num_draft = 0 it only folds.
struct GdnStep {
    const void* mixed;         // [sequence][draft][conv_dim], dtype
    const void* z;             // [sequence][draft][v_head][v_dim], dtype
    const void* b;             // [sequence][draft][v_head], dtype
    const void* a;             // [sequence][draft][v_head], dtype
    const void* conv_weight;   // [conv_dim][width], dtype, oldest tap first
    const float* a_log;        // [v_head]
    const float* dt_bias;      // [v_head]
    const float* norm_weight;  // [v_dim]
    void* windows;             // [slot][width - 1][conv_dim], dtype, oldest first, updated in place
    void* states;              // [slot][v_head][v_dim][k_dim], state_dtype, updated in place
    const int64_t* slots;      // [sequence]; outside [0, num_slots): padding, out is zeros
    // [at least num_sequences * num_k_heads], all zeros before and after the call: lets the last
    // block that has read a key head's channels be the one that moves their window. Unused on CPUs.
    int32_t* arrivals;
    void* out;  // [sequence][draft][v_head][v_dim], dtype, dense

    // Elements from one token to the next, of all tokens in [sequence][draft] order.
    int64_t mixed_stride, z_stride, b_stride, a_stride;
    int64_t num_sequences, num_slots;
    int32_t num_k_heads, num_v_heads, k_dim, v_dim, width;
    int32_t dtype, state_dtype;
    float norm_eps;

    // gdn_verify only. The ring of a slot holds max_draft entries, the oldest first.
    const int64_t* pending;  // [sequence], clamped to [0, max_draft]
    void* ring_inputs;       // [slot][max_draft][conv_dim], dtype: inputs of the convolution
    float* ring_keys;    // [slot][max_draft][v_head][k_dim], normalised (one copy per value head)
    float* ring_deltas;  // [slot][max_draft][v_head][v_dim], beta (v - S k)
    float* ring_decays;  // [slot][max_draft][v_head], g
    int32_t num_draft, max_draft;
};

// On CPUs. Threads are torch's own; pointers are the host's.
int gdn_cpu_gated_delta_rule_recurrence(const struct GdnRule* args);
int gdn_cpu_chunked_gated_delta_rule_recurrence(const struct GdnRule* args);
int gdn_cpu_causal_conv1d_update(const struct GdnConv* args);
int gdn_cpu_causal_conv1d_full(const struct GdnConv* args);
int gdn_cpu_fused_gdn_gating(const struct GdnGating* args);
int gdn_cpu_gdn_gated_norm(const struct GdnNorm* args);
int gdn_cpu_gdn_decode_step(const struct GdnStep* args);
int gdn_cpu_gdn_prefill(const struct GdnRule* args);
int gdn_cpu_gdn_verify(const struct GdnStep* args);
// The instruction set chosen at run time: "avx512", "avx2" or "baseline".
const char* gdn_cpu_capability(void);

// On the current CUDA device, in the given cudaStream_t; pointers are the device's.
int gdn_cuda_gated_delta_rule_recurrence(const struct GdnRule* args, void* stream);
int gdn_cuda_chunked_gated_delta_rule_recurrence(const struct GdnRule* args, void* stream);
int gdn_cuda_causal_conv1d_update(const struct GdnConv* args, void* stream);
int gdn_cuda_causal_conv1d_full(const struct GdnConv* args, void* stream);
int gdn_cuda_fused_gdn_gating(const struct GdnGating* args, void* stream);
int gdn_cuda_gdn_gated_norm(const struct GdnNorm* args, void* stream);
int gdn_cuda_gdn_decode_step(const struct GdnStep* args, void* stream);
int gdn_cuda_gdn_verify(const struct GdnStep* args, void* stream);
// Any shape and dtype: on tensor cores for f16 and bf16 with head dims of 64 or 128, where rows can be
// read 16 bytes at a time, else by the plain kernel.
int gdn_cuda_gdn_prefill(const struct GdnRule* args, void* stream);
// Bytes of workspace that gdn_cuda_gdn_prefill wants for these sizes on the current device.
int64_t gdn_cuda_prefill_workspace(const struct GdnRule* args);
// The text of a code other than 0.
const char* gdn_cuda_error_text(int code);

#ifdef __cplusplus
}
#endif
