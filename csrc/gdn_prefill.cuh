// gdn_prefill on tensor cores: what its scans share, which is what the chunk kernel leaves for them.
//
// Maths, per value head and chunk of C <= 64 tokens, with k and q normalised and q scaled, G the
// running sum of g, and D_ij = exp(G_i - G_j) for i >= j:
//   A = strict_lower(diag(beta) (K K^T * D)),  T = (I + A)^-1,  P = lower(Q K^T * D)
//   R = diag(beta) (V - diag(exp(G)) K S^T),   V' = T R
//   O = diag(exp(G)) Q S^T + P V',             S <- exp(G_C) S + V'^T diag(exp(G_C - G)) K
// V' equals U - W S^T of the WY form, U = T diag(beta) V and W = T diag(beta exp(G)) K. T is kept
// instead of them: 8 KiB a chunk and head where U and W take 32, for one more product in the scan.
//
// The scan works on transposes, which keeps a warp's (or a warpgroup's) rows of values to itself:
// S, X^T = S K^T, R^T, V'^T = R^T T^T, O^T and the new S all have values for rows, so that every
// accumulator is the next product's left operand, and right operands are tiles of K, Q, T and P.
//
// Operands are f16 for both dtypes, for its three more bits of mantissa. K, Q, T, P and the entries
// of W are at most 1 by construction. S, R and V' are as large as the values are, so a scan holds
// each row of them times a power of two that keeps it well inside f16; rows do not mix.

#pragma once

#include "device.cuh"
#include "gdn.h"

namespace gdn {

constexpr int kChunk = kGdnChunkTokens;
constexpr int kPanelBytes = kChunk * 128;  // 64 rows of 64 f16
constexpr int kTileBytes = kPanelBytes;    // of T and P

// The factors of a chunk's tokens, kChunk floats each. Behind the chunk's last token: 0, 0, exp(G_C)
// and 1.
enum PrefillGate { kBeta, kBetaDecay, kFromStart, kToEnd, kNumGates };
constexpr int kGateBytes = kNumGates * kChunk * 4;

// Where the workspace's tensors lie; C chunks, HK key heads, HV value heads.
//
// Tiles are images of shared memory. A panel is 64 rows (tokens) of 128 bytes (64 f16 columns),
// whose 16-byte units are permuted within a row: unit c of row r lies at place c ^ (r % 8), which is
// the 128-byte swizzle of wgmma and TMA and leaves ldmatrix without bank conflicts. Columns past 64
// are a second panel. Rows behind the chunk's last token are zeros, but for the diagonal of T.
struct PrefillWorkspace {
    f16* keys;         // [C][HK][k_dim / 64] panels: normalised k
    f16* queries;      // [C][HK][k_dim / 64] panels: normalised and scaled q
    f16* inverses;     // [C][HV] panels: T, row i, column j; zeros above the diagonal
    f16* scores;       // [C][HV] panels: P, row i, column j; zeros above the diagonal
    float* gates;      // [C][HV][kNumGates][kChunk]: beta, beta exp(G), exp(G), exp(G_C - G)
    float* starts;     // [segment][HV][v_dim][k_dim]: the state before each segment; null: one
                       // segment a sequence, whose state is read from its slot
    float* ends;       // [segment][HV][v_dim][k_dim]: what a segment makes of a state of zeros; the
                       // first one of a sequence: of its slot's state
    float* transfers;  // [segment][HV][k_dim][k_dim]: M; the state behind is start M + end
    int64_t bytes;
};

inline int64_t panels_of(int dim) {
    return dim / 64;
}

// Whether sequences are cut into segments that are scanned side by side.
inline bool is_segmented(const GdnRule& p) {
    return p.num_segments > p.num_sequences;
}

inline PrefillWorkspace prefill_workspace(const GdnRule& p, void* base) {
    PrefillWorkspace w{};
    const auto place = [&](int64_t bytes) {
        const int64_t at = w.bytes;
        w.bytes += (bytes + 1023) / 1024 * 1024;
        return static_cast<char*>(base) + at;
    };
    const int64_t key_tiles = p.num_chunks * p.num_k_heads * panels_of(p.k_dim);
    const int64_t value_tiles = p.num_chunks * p.num_v_heads;
    w.keys = reinterpret_cast<f16*>(place(key_tiles * kPanelBytes));
    w.queries = reinterpret_cast<f16*>(place(key_tiles * kPanelBytes));
    w.inverses = reinterpret_cast<f16*>(place(value_tiles * kTileBytes));
    w.scores = reinterpret_cast<f16*>(place(value_tiles * kTileBytes));
    w.gates = reinterpret_cast<float*>(place(value_tiles * kGateBytes));
    if (is_segmented(p)) {
        const int64_t rows = p.num_segments * p.num_v_heads * 4 * p.k_dim;
        w.starts = reinterpret_cast<float*>(place(rows * p.v_dim));
        w.ends = reinterpret_cast<float*>(place(rows * p.v_dim));
        w.transfers = reinterpret_cast<float*>(place(rows * p.k_dim));
    }
    return w;
}

// Byte offset of 16-byte unit `unit` (of 8) of a row within its panel.
__device__ __forceinline__ int panel_offset(int row, int unit) {
    return row * 128 + ((unit ^ (row & 7)) << 4);
}

// Where a chunk's tiles lie in the workspace, in elements.
__device__ __forceinline__ int64_t key_tile_offset(const GdnRule& p, int64_t chunk, int k_head) {
    return (chunk * p.num_k_heads + k_head) * kChunk * p.k_dim;
}
__device__ __forceinline__ int64_t value_tile_offset(const GdnRule& p, int64_t chunk, int v_head) {
    return (chunk * p.num_v_heads + v_head) * kChunk * kChunk;
}
__device__ __forceinline__ int64_t gate_offset(const GdnRule& p, int64_t chunk, int v_head) {
    return (chunk * p.num_v_heads + v_head) * kNumGates * kChunk;
}

// Fills keys, queries, inverses, scores and gates.
int prefill_chunks(const GdnRule& p, const PrefillWorkspace& w, void* stream);
// Fills starts, where sequences are cut into segments; needs what prefill_chunks leaves.
int prefill_starts(const GdnRule& p, const PrefillWorkspace& w, void* stream);

#ifdef GDN_SM90A
// The scan with wgmma, in gdn_prefill_sm90.cu: whether it serves this call on this device, and the
// scan itself, which takes the workspace as the two functions above leave it.
bool prefill_sm90_wanted(const GdnRule& p);
int prefill_sm90_scan(const GdnRule& p, const PrefillWorkspace& w, void* stream);
#endif

}  // namespace gdn

#ifdef GDN_SM90A
// For tests on Hopper: 0 leaves the scan to mma.sync, 1 is as it was.
extern "C" void gdn_cuda_allow_sm90(int allowed);
#endif
