// gdn_prefill on tensor cores by mma.sync: any card from sm_80 on. Maths and tiles: gdn_prefill.cuh.

#include "gdn_prefill.cuh"
#include "gdn_scan.cuh"
#include "launchers.h"
#include "vectors.cuh"

namespace gdn {
namespace {

// Of a 16 x 16 block of a panel, the address that a lane hands to ldmatrix_x4, which then loads the
// 8 x 8 matrices (top left, top right, bottom left, bottom right), or down a column first.
__device__ __forceinline__ int lane_offset_across(int lane) {
    return panel_offset((lane >> 4) * 8 + (lane & 7), lane >> 3 & 1);
}
__device__ __forceinline__ int lane_offset_down(int lane) {
    return panel_offset((lane >> 3 & 1) * 8 + (lane & 7), lane >> 4);
}
// Block (row, column) of a tile of panels, in blocks of 16.
__device__ __forceinline__ SharedAddress block_at(SharedAddress tile, int lane_offset, int row,
                                                  int column) {
    return tile + (lane_offset ^ (column & 3) << 5) + row * 2048 + (column >> 2) * kPanelBytes;
}

// d (16 x 16) += a b for a block b whose fragments ldmatrix_x4 has loaded for both its halves.
__device__ __forceinline__ void multiply(float (&left)[4], float (&right)[4],
                                         const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    mma_m16n8k16<f16>(left, a, first);
    mma_m16n8k16<f16>(right, a, second);
}

// x as the sum of two f16, which keeps 22 bits of it.
__device__ __forceinline__ void split2(float x, float y, uint32_t& high, uint32_t& low) {
    high = pack2<f16>(x, y);
    const float2 rounded = unpack2<f16>(high);
    low = pack2<f16>(x - rounded.x, y - rounded.y);
}

constexpr int kChunkThreads = 128;
constexpr int kMaxBlockHeads = 8;
// Blocks that a multiprocessor shall hold, where its registers and shared memory are enough for them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
constexpr int kChunkBlocks = 4;
#else
constexpr int kChunkBlocks = 3;
#endif
constexpr int kDiagonalStride = 20;
// Decays of one token below this are 0 in float32; sums of them stay small, so that differences of
// sums keep their digits.
constexpr float kMinLogDecay = -110.0f;

// Shared memory of the chunk kernel. Keys and queries make room for the system and the results.
struct ChunkShared {
    unsigned char *keys, *queries;    // panels
    unsigned char *high, *low;        // the system, as sums of two f16
    unsigned char *inverse, *scores;  // T and P
    float* diagonals;                 // [4][16][kDiagonalStride]: -A's diagonal blocks, by column
    float *decays, *betas;            // [head of the block][kChunk]

    __device__ ChunkShared(unsigned char* shared, int k_dim) {
        keys = shared, queries = shared + kChunk * k_dim * 2;
        high = shared, low = shared + kTileBytes;
        inverse = shared + 2 * kTileBytes, scores = shared + 3 * kTileBytes;
        diagonals = reinterpret_cast<float*>(shared + 4 * kTileBytes);
        decays = diagonals + 4 * 16 * kDiagonalStride;
        betas = decays + kMaxBlockHeads * kChunk;
    }
    static constexpr size_t kBytes =
        4 * kTileBytes + 4 * (4 * 16 * kDiagonalStride + 2 * kMaxBlockHeads * kChunk);
};

// Normalises a chunk's rows of q or k into panels in shared memory, and in the workspace when `image`
// is given. D / 8 lanes share a row. Rows behind the last token are zeros.
template <class T, int D>
__device__ __forceinline__ void normalise(const T* from, int64_t stride, int tokens, float scale,
                                          unsigned char* tile, f16* image) {
    constexpr int kLanes = D / 8, kRows = kChunkThreads / kLanes, kPasses = kChunk / kRows;
    const int unit = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
    uint4 raw[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const int row = first + pass * kRows;
        raw[pass] = make_uint4(0, 0, 0, 0);
        if (row < tokens) {
            raw[pass] = *reinterpret_cast<const uint4*>(from + row * stride + unit * 8);
        }
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const uint32_t words[4] = {raw[pass].x, raw[pass].y, raw[pass].z, raw[pass].w};
        float2 x[4];
        float squares = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[i] = unpack2<T>(words[i]);
            squares += x[i].x * x[i].x + x[i].y * x[i].y;
        }
#pragma unroll
        for (int bits = kLanes / 2; bits > 0; bits /= 2) {
            squares += __shfl_xor_sync(kAllLanes, squares, bits);
        }
        const float factor = rsqrtf(squares + GDN_NORM_EPS) * scale;
        const uint4 packed = make_uint4(pack2<f16>(x[0].x * factor, x[0].y * factor),
                                        pack2<f16>(x[1].x * factor, x[1].y * factor),
                                        pack2<f16>(x[2].x * factor, x[2].y * factor),
                                        pack2<f16>(x[3].x * factor, x[3].y * factor));
        const int at = unit / 8 * kPanelBytes + panel_offset(first + pass * kRows, unit % 8);
        *reinterpret_cast<uint4*>(tile + at) = packed;
        if (image != nullptr) {
            *reinterpret_cast<uint4*>(reinterpret_cast<unsigned char*>(image) + at) = packed;
        }
    }
}

// One warp sums a head's log decays and leaves the factors of its tokens; a lane owns two of them.
__device__ __forceinline__ void sum_gates(const GdnRule& p, const PrefillWorkspace& w,
                                          int64_t chunk, int64_t first, int tokens, int head,
                                          float* decays, float* betas) {
    const int lane = threadIdx.x % 32, token = 2 * lane;
    float g[2] = {}, beta[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (token + i >= tokens) continue;
        const int64_t at = (first + token + i) * p.num_v_heads + head;
        g[i] = fmaxf(p.g[at], kMinLogDecay);
        beta[i] = p.beta[at];
    }
    float before = g[0] + g[1];
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
        const float left = __shfl_up_sync(kAllLanes, before, delta);
        if (lane >= delta) before += left;
    }
    const float whole = __shfl_sync(kAllLanes, before, 31);
    before = __shfl_up_sync(kAllLanes, before, 1);
    const float sum0 = (lane == 0 ? 0.0f : before) + g[0];
    const float sum[2] = {sum0, lane == 31 ? whole : sum0 + g[1]};
    float factors[kNumGates][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float from_start = fast_exp(sum[i]);
        decays[token + i] = sum[i];
        betas[token + i] = beta[i];
        factors[kBeta][i] = beta[i];
        factors[kBetaDecay][i] = beta[i] * from_start;
        factors[kFromStart][i] = from_start;
        factors[kToEnd][i] = fast_exp(fminf(whole - sum[i], 0.0f));
    }
    float* to = w.gates + gate_offset(p, chunk, head) + token;
#pragma unroll
    for (int gate = 0; gate < kNumGates; ++gate) {
        *reinterpret_cast<float2*>(to + gate * kChunk) =
            make_float2(factors[gate][0], factors[gate][1]);
    }
}

// Of a chunk and key head, 16 rows (by warp) of K K^T and Q K^T, up to the diagonal.
template <int D>
__device__ __forceinline__ void score_keys(const ChunkShared& shared, int rows, float (&kk)[8][4],
                                           float (&qk)[8][4]) {
    const int lane = threadIdx.x % 32;
    const int across = lane_offset_across(lane), down = lane_offset_down(lane);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) kk[j][e] = 0, qk[j][e] = 0;
    }
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        uint32_t key[4], query[4];
        ldmatrix_x4(key, block_at(shared_address(shared.keys), down, rows, step));
        ldmatrix_x4(query, block_at(shared_address(shared.queries), down, rows, step));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (j > rows) continue;
            uint32_t b[4];
            ldmatrix_x4(b, block_at(shared_address(shared.keys), across, j, step));
            multiply(kk[2 * j], kk[2 * j + 1], key, b);
            multiply(qk[2 * j], qk[2 * j + 1], query, b);
        }
    }
}

// One head's rows of P and of the system: below the diagonal blocks -A, as two f16; the diagonal
// block in float32, by column.
__device__ __forceinline__ void decay_scores(const ChunkShared& shared, const float* decays,
                                             const float* betas, int rows, const float (&kk)[8][4],
                                             const float (&qk)[8][4]) {
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
    const int row[2] = {16 * rows + group, 16 * rows + group + 8};
    const float decay[2] = {decays[row[0]], decays[row[1]]};
    const float beta[2] = {betas[row[0]], betas[row[1]]};
    float* diagonal = shared.diagonals + rows * 16 * kDiagonalStride;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        if (j / 2 > rows) break;
        const int column = 8 * j + pair;
        const float2 others = *reinterpret_cast<const float2*>(decays + column);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // No branches: above the diagonal the exponents are zeros.
            const float low = fast_exp(fminf(decay[half] - others.x, 0.0f));
            const float high = fast_exp(fminf(decay[half] - others.y, 0.0f));
            const float d[2] = {row[half] >= column ? low : 0.0f, row[half] > column ? high : 0.0f};
            const int at = panel_offset(row[half], j) + pair * 2;
            *reinterpret_cast<uint32_t*>(shared.scores + at) =
                pack2<f16>(qk[j][2 * half] * d[0], qk[j][2 * half + 1] * d[1]);
            const float a[2] = {-beta[half] * kk[j][2 * half] * d[0],
                                -beta[half] * kk[j][2 * half + 1] * d[1]};
            if (j / 2 < rows) {
                uint32_t high, low;
                split2(a[0], a[1], high, low);
                *reinterpret_cast<uint32_t*>(shared.high + at) = high;
                *reinterpret_cast<uint32_t*>(shared.low + at) = low;
            } else {
                float* to = diagonal + (column - 16 * rows) * kDiagonalStride + group + 8 * half;
                to[0] = a[0], to[kDiagonalStride] = a[1];
            }
        }
    }
}

// Inverts one diagonal block of I + A by forward substitution: a lane owns a column, and lanes past
// 15 store the low halves of what the others hold. Each solved row is taken off the later ones at
// once, so that the chain is one product a row.
__device__ __forceinline__ void invert_diagonal(const ChunkShared& shared, int rows) {
    const int lane = threadIdx.x % 32, column = lane % 16;
    const float* diagonal = shared.diagonals + rows * 16 * kDiagonalStride;
    float t[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) t[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int m = 0; m < 15; ++m) {
#pragma unroll
        for (int quad = 0; quad < 4; ++quad) {
            if (4 * quad + 3 <= m) continue;
            const float4 a =
                *reinterpret_cast<const float4*>(diagonal + m * kDiagonalStride + 4 * quad);
            const float below[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (4 * quad + i > m) t[4 * quad + i] += below[i] * t[m];
            }
        }
    }
    const int unit = 2 * rows + column / 8;
    unsigned char* part = lane < 16 ? shared.high : shared.low;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const int at = panel_offset(16 * rows + i, unit) + column % 8 * 2;
        const f16 high = from_float<f16>(t[i]);
        *reinterpret_cast<f16*>(part + at) =
            lane < 16 ? high : from_float<f16>(t[i] - to_float(high));
        if (lane < 16) *reinterpret_cast<f16*>(shared.inverse + at) = high;
    }
}

// A 16 x 16 sum of products whose operands are sums of two f16. The product of the low halves is below
// what float32 keeps of the sum. Large and small ones add up apart, so that few wait for another.
struct SplitSum {
    float large[2][4] = {}, small[2][4] = {};

    __device__ __forceinline__ void add(const uint32_t (&a_high)[4], const uint32_t (&a_low)[4],
                                        SharedAddress b_high, SharedAddress b_low) {
        uint32_t whole[4], rest[4];
        ldmatrix_x4(whole, b_high);
        ldmatrix_x4(rest, b_low);
        multiply(large[0], large[1], a_high, whole);
        multiply(small[0], small[1], a_low, whole);
        multiply(small[0], small[1], a_high, rest);
    }
    __device__ __forceinline__ float at(int half, int e) const {
        return large[half][e] + small[half][e];
    }
};

// The blocks of T below the diagonal block of one block column, by warp:
//   T_ij = T_ii sum_m (-A_im) T_mj over m from j to i - 1,
// on transposes, so that each T_mj stays in registers as the left operand. Single f16 products would
// not do: for nearly equal keys and beta near 1 the sum cancels to a hundredth of its terms.
__device__ __forceinline__ void invert_column(const ChunkShared& shared, int column) {
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
    const int across = lane_offset_across(lane);
    uint32_t high[4][4], low[4][4];
    ldmatrix_x4_trans(high[0], block_at(shared_address(shared.high), across, column, column));
    ldmatrix_x4_trans(low[0], block_at(shared_address(shared.low), across, column, column));
#pragma unroll
    for (int below = 1; below < 4; ++below) {
        const int row = column + below;
        if (row > 3) break;
        SplitSum sum, block;
#pragma unroll
        for (int m = 0; m < below; ++m) {
            sum.add(high[m], low[m], block_at(shared_address(shared.high), across, row, column + m),
                    block_at(shared_address(shared.low), across, row, column + m));
        }
        uint32_t sum_high[4], sum_low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            split2(sum.at(i / 2, i % 2 * 2), sum.at(i / 2, i % 2 * 2 + 1), sum_high[i], sum_low[i]);
        }
        block.add(sum_high, sum_low, block_at(shared_address(shared.high), across, row, row),
                  block_at(shared_address(shared.low), across, row, row));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float x[2] = {block.at(i / 2, i % 2 * 2), block.at(i / 2, i % 2 * 2 + 1)};
            split2(x[0], x[1], high[below][i], low[below][i]);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int at = panel_offset(16 * row + i / 2 * 8 + pair + e, 2 * column + i % 2);
                *reinterpret_cast<f16*>(shared.inverse + at + group * 2) = from_float<f16>(x[e]);
            }
        }
    }
}

// Keys, queries, T, P and gates of one chunk.
//
// Block (chunk, key head, up to kMaxBlockHeads of its value heads): 128 threads, ChunkShared::kBytes
// of shared memory. K K^T and Q K^T are made once and stay in registers, a warp owning 16 rows of
// them; the value heads then take turns. Which rows a warp owns turns with the block, because the
// later rows have more work and warps of one number share a scheduler. Tokens behind the chunk's
// last one have zero rows and columns; chunks of padding sequences are left out. Later chunks come
// first, so that the cache holds the earlier ones when the scan begins.
template <class T, int D>
__global__ void __launch_bounds__(kChunkThreads, kChunkBlocks)
    prefill_chunk_kernel(GdnRule p, PrefillWorkspace w, int block_heads) {
    GDN_DYNAMIC_SHARED(dynamic);
    const ChunkShared shared(dynamic, D);
    const int group_heads = p.num_v_heads / p.num_k_heads;
    const int parts = (group_heads + block_heads - 1) / block_heads;
    const int part = static_cast<int>(blockIdx.x % parts);
    const int k_head = static_cast<int>(blockIdx.x / parts % p.num_k_heads);
    const int64_t chunk = p.num_chunks - 1 - blockIdx.x / parts / p.num_k_heads;
    const int4 described = reinterpret_cast<const int4*>(p.chunks)[chunk];
    if (slot_of(p, described.z) < 0) return;
    const int64_t first = described.x;
    const int tokens = described.y;
    const int first_head = k_head * group_heads + part * block_heads;
    const int heads = min(block_heads, group_heads - part * block_heads);
    const int warp = threadIdx.x / 32;
    const int rows = (warp + blockIdx.x) % 4;

    const int64_t image = key_tile_offset(p, chunk, k_head);
    normalise<T, D>(static_cast<const T*>(p.k) + first * p.k_stride + k_head * D, p.k_stride,
                    tokens, 1.0f, shared.keys, part == 0 ? w.keys + image : nullptr);
    normalise<T, D>(static_cast<const T*>(p.q) + first * p.q_stride + k_head * D, p.q_stride,
                    tokens, rsqrtf(static_cast<float>(D)), shared.queries,
                    part == 0 ? w.queries + image : nullptr);
    for (int i = warp; i < heads; i += kChunkThreads / 32) {
        sum_gates(p, w, chunk, first, tokens, first_head + i, shared.decays + i * kChunk,
                  shared.betas + i * kChunk);
    }
    __syncthreads();
    float kk[8][4], qk[8][4];
    score_keys<D>(shared, rows, kk, qk);
    __syncthreads();
    for (int at = threadIdx.x * 16; at < 2 * kTileBytes; at += kChunkThreads * 16) {
        *reinterpret_cast<uint4*>(shared.inverse + at) = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    for (int i = 0; i < heads; ++i) {
        decay_scores(shared, shared.decays + i * kChunk, shared.betas + i * kChunk, rows, kk, qk);
        __syncwarp();
        invert_diagonal(shared, rows);
        __syncthreads();
        invert_column(shared, rows);
        __syncthreads();
        const int64_t tile = value_tile_offset(p, chunk, first_head + i) * 2;
        unsigned char* inverse = reinterpret_cast<unsigned char*>(w.inverses) + tile;
        unsigned char* scores = reinterpret_cast<unsigned char*>(w.scores) + tile;
        for (int at = threadIdx.x * 16; at < kTileBytes; at += kChunkThreads * 16) {
            *reinterpret_cast<uint4*>(inverse + at) =
                *reinterpret_cast<const uint4*>(shared.inverse + at);
            *reinterpret_cast<uint4*>(scores + at) =
                *reinterpret_cast<const uint4*>(shared.scores + at);
        }
        __syncthreads();
    }
}

constexpr int kMaxScanWarps = 8;
// Shared memory of the scan. Keys, T, values and gates of the next chunk arrive while this one's are
// read; queries and P arrive while the state is advanced. Outputs replace a warp's own values.
template <int D, bool kIsMap>
struct ScanShared {
    unsigned char *keys, *inverses, *gates, *values, *queries, *scores;

    __device__ ScanShared(unsigned char* shared, int buffer, int warps) {
        constexpr int kKeyBytes = kChunk * D * 2;
        keys = shared + buffer * kKeyBytes;
        inverses = shared + 2 * kKeyBytes + buffer * kTileBytes;
        gates = shared + 2 * (kKeyBytes + kTileBytes) + buffer * kGateBytes;
        unsigned char* rest = shared + 2 * (kKeyBytes + kTileBytes + kGateBytes);
        values = rest + buffer * warps * kValueBytes;
        queries = rest + 2 * warps * kValueBytes;
        scores = queries + kKeyBytes;
    }
    static size_t bytes(int warps) {
        return 2 * (kChunk * D * 2 + kTileBytes + kGateBytes + warps * kValueBytes) +
               (kIsMap ? 0 : kChunk * D * 2 + kTileBytes);
    }
};

__device__ __forceinline__ void copy_units(unsigned char* to, const void* from, int bytes) {
    for (int at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16) {
        cp_async_16(to + at, static_cast<const unsigned char*>(from) + at, true);
    }
}

// The blocks of T or P that are not above the diagonal; the others are never read.
__device__ __forceinline__ void copy_lower(unsigned char* to, const f16* from) {
    for (int at = threadIdx.x * 16; at < kTileBytes; at += blockDim.x * 16) {
        const int row = at / 128, unit = (at / 16 ^ row) & 7;
        if (unit / 2 <= row / 16) {
            cp_async_16(to + at, reinterpret_cast<const unsigned char*>(from) + at, true);
        }
    }
}

// Asks for what the state's advance needs: keys, T, gates and values.
template <class T, int D, class Shared>
__device__ __forceinline__ void fetch_chunk(const GdnRule& p, const PrefillWorkspace& w,
                                            const ScanUnit& unit, const Shared& shared,
                                            int64_t chunk, int4 described, bool has_values) {
    copy_units(shared.keys, w.keys + key_tile_offset(p, chunk, unit.k_head), kChunk * D * 2);
    copy_lower(shared.inverses, w.inverses + value_tile_offset(p, chunk, unit.head));
    copy_units(shared.gates, w.gates + gate_offset(p, chunk, unit.head), kGateBytes);
    const int per_token = 2 * unit.warps;
    const int at = threadIdx.x % per_token, first = threadIdx.x / per_token;
    const T* values = static_cast<const T*>(p.v) + described.x * p.v_stride +
                      int64_t{unit.head} * p.v_dim + unit.first_row + at * 8;
    unsigned char* to = shared.values + at / 2 * kValueBytes;
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {
        const int token = first + 16 * pass;
        const bool valid = has_values && token < described.y;
        cp_async_16(to + value_offset(token, at % 2),
                    valid ? values + token * p.v_stride : static_cast<const T*>(p.v), valid);
    }
}

// x (16 rows of 64 tokens) += left operand times the rows of a tile of keys or queries.
template <int D>
__device__ __forceinline__ void multiply_tokens(float (&x)[8][4],
                                                const uint32_t (&operand)[D / 16][4],
                                                const unsigned char* tile, int across) {
    const SharedAddress from = shared_address(tile);
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            uint32_t b[4];
            ldmatrix_x4(b, block_at(from, across, j, step));
            multiply(x[2 * j], x[2 * j + 1], operand[step], b);
        }
    }
}

// x += left operand (16 rows of 64 tokens) times the transpose of a lower triangular tile.
__device__ __forceinline__ void multiply_lower(float (&x)[8][4], const uint32_t (&operand)[4][4],
                                               const unsigned char* tile, int across) {
    const SharedAddress from = shared_address(tile);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int j = step; j < 4; ++j) {
            uint32_t b[4];
            ldmatrix_x4(b, block_at(from, across, j, step));
            multiply(x[2 * j], x[2 * j + 1], operand[step], b);
        }
    }
}

// Advances a warp's rows over a chunk; leaves V' as left operand.
template <class T, int D>
__device__ __forceinline__ void advance(ScanRows<D>& rows, uint32_t (&fresh)[4][4],
                                        const unsigned char* keys, const unsigned char* inverses,
                                        const unsigned char* gates, const unsigned char* values) {
    const int lane = threadIdx.x % 32, pair = lane % 4 * 2;
    const int across = lane_offset_across(lane), down = lane_offset_down(lane);
    rows.fit_state();
    rows.pack();
    float x[8][4] = {};
    multiply_tokens<D>(x, rows.operand, keys, across);

    const float scale[2] = {power_of_two(rows.exponents[0]), power_of_two(rows.exponents[1])};
    const SharedAddress own_values =
        shared_address(values) + value_offset((lane >> 4) * 8 + (lane & 7), lane >> 3 & 1);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        uint32_t v[4];
        ldmatrix_x4_trans(v, own_values + j * 16 * kRowBytes);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int n = 2 * j + i / 2, half = i % 2, token = 8 * n + pair;
            const float2 value = unpack2<T>(v[i]);
            const float2 beta = gates_at(gates, kBeta, token);
            const float2 decay = gates_at(gates, kBetaDecay, token);
            x[n][2 * half] = beta.x * (value.x * scale[half]) - decay.x * x[n][2 * half];
            x[n][2 * half + 1] = beta.y * (value.y * scale[half]) - decay.y * x[n][2 * half + 1];
        }
    }
    // Here and below: what comes next shall not be loaded yet, since all registers are taken.
    __syncwarp();
    rows.fit_deltas(x, [&](float2) { rows.pack(); });
    uint32_t right[4][4];
#pragma unroll
    for (int step = 0; step < 4; ++step) pack_block(right[step], x[2 * step], x[2 * step + 1]);
    float delta[8][4] = {};
    multiply_lower(delta, right, inverses, across);

#pragma unroll
    for (int step = 0; step < 4; ++step) {
        pack_block(fresh[step], delta[2 * step], delta[2 * step + 1]);
#pragma unroll
        for (int n = 2 * step; n < 2 * step + 2; ++n) {
            const float2 to_end = gates_at(gates, kToEnd, 8 * n + pair);
            delta[n][0] *= to_end.x, delta[n][1] *= to_end.y;
            delta[n][2] *= to_end.x, delta[n][3] *= to_end.y;
        }
        pack_block(right[step], delta[2 * step], delta[2 * step + 1]);
    }
    __syncwarp();
    const float whole = gates_at(gates, kFromStart, kChunk - 2).y;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rows.state[n][e] *= whole;
    }
    const SharedAddress key_rows = shared_address(keys);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, block_at(key_rows, down, step, j));
            multiply(rows.state[2 * j], rows.state[2 * j + 1], right[step], b);
        }
    }
}

// The outputs of a warp's rows, laid over its values as [token][row].
template <class T, int D>
__device__ __forceinline__ void read_out(const ScanRows<D>& rows, const int (&exponents)[2],
                                         const uint32_t (&fresh)[4][4],
                                         const unsigned char* queries, const unsigned char* scores,
                                         const unsigned char* gates, unsigned char* values) {
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
    const int across = lane_offset_across(lane);
    float x[8][4] = {};
    multiply_tokens<D>(x, rows.operand, queries, across);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const float2 from_start = gates_at(gates, kFromStart, 8 * n + pair);
        x[n][0] *= from_start.x, x[n][1] *= from_start.y;
        x[n][2] *= from_start.x, x[n][3] *= from_start.y;
    }
    multiply_lower(x, fresh, scores, across);

    // Lanes of neighbouring rows swap tokens: the even row's lane takes both rows' values of the
    // first token, the odd row's lane those of the second.
    const float scale[2] = {power_of_two(-exponents[0]), power_of_two(-exponents[1])};
    const bool is_odd = group % 2 != 0;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const uint32_t first = pack2<T>(x[n][0] * scale[0], x[n][2] * scale[1]);
        const uint32_t second = pack2<T>(x[n][1] * scale[0], x[n][3] * scale[1]);
        const uint32_t other = __shfl_xor_sync(kAllLanes, is_odd ? first : second, 4);
        const uint32_t even_row = is_odd ? other : first, odd_row = is_odd ? second : other;
        const int token = 8 * n + pair + is_odd;
        unsigned char* to = values + group / 2 * 4;
        *reinterpret_cast<uint32_t*>(to + value_offset(token, 0)) =
            (even_row & 0xffffu) | odd_row << 16;
        *reinterpret_cast<uint32_t*>(to + value_offset(token, 1)) =
            even_row >> 16 | (odd_row & 0xffff0000u);
    }
    __syncwarp();
}

// The state from the left end of a segment to its right end, with the outputs on the way.
//
// Block (tile of 16 rows of values a warp, value head, segment), any number of warps up to
// kMaxScanWarps, ScanShared::bytes of shared memory. A warp owns 16 rows of the state, 16 x D
// float32 in registers in mma's layout, and all products on them: warps share the chunk's operands
// and nothing else, so that a chunk has two barriers, both for copies.
//
// With kIsMap there are no outputs: tiles up to v_dim give what the segment makes of a state of
// zeros (of the slot's state, when it is its sequence's first), later ones its transfer matrix, by
// scanning the identity without values. Last segments need neither.
//
// Padding sequences get zero outputs. Rows behind a chunk's last token have zeros for values, which
// is why outputs and states never see what lies there.
template <class T, int D, bool kIsMap>
__global__ void __launch_bounds__(32 * kMaxScanWarps, 1)
    prefill_scan_kernel(GdnRule p, PrefillWorkspace w, int tiles) {
    GDN_DYNAMIC_SHARED(dynamic);
    using Shared = ScanShared<D, kIsMap>;
    ScanUnit unit;
    unit.warps = blockDim.x / 32;
    const int tile = static_cast<int>(blockIdx.x % tiles);
    unit.head = static_cast<int>(blockIdx.x / tiles % p.num_v_heads);
    unit.segment = blockIdx.x / tiles / p.num_v_heads;
    unit.k_head = unit.head / (p.num_v_heads / p.num_k_heads);
    const int4 segment = reinterpret_cast<const int4*>(p.segments)[unit.segment];
    const int begin = segment.y, end = segment.z;
    const bool is_first = segment.w != 0, is_last = end == p.first_chunks[segment.x + 1];
    const int virtual_row = tile * unit.warps * kWarpRows;
    const bool is_transfer = kIsMap && virtual_row >= p.v_dim;
    unit.first_row = is_transfer ? virtual_row - p.v_dim : virtual_row;
    if (begin >= end || (kIsMap && (is_last || (is_transfer && is_first)))) return;
    const int64_t slot = slot_of(p, segment.x);
    if (slot < 0) {
        if (!kIsMap) zero_outputs<T>(p, unit, begin, end);
        return;
    }

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = unit.first_row + warp * kWarpRows + lane / 4;
    const int64_t head_size = int64_t{p.v_dim} * D;
    const int64_t in_slot = (slot * p.num_v_heads + unit.head) * head_size;
    const int64_t in_segment = (unit.segment * p.num_v_heads + unit.head) * head_size;
    const int4* chunks = reinterpret_cast<const int4*>(p.chunks);
    int4 described = chunks[begin];
    int4 next = chunks[min(begin + 1, end - 1)];
    fetch_chunk<T, D>(p, w, unit, Shared(dynamic, 0, unit.warps), begin, described, !is_transfer);
    cp_async_commit();

    ScanRows<D> rows;
    rows.exponents[0] = rows.exponents[1] = 0;
    rows.last_delta = 0;
    if (kIsMap && !is_first) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int column = 8 * n + lane % 4 * 2 + e % 2;
                rows.state[n][e] = is_transfer && column == row + e / 2 * 8 ? 1.0f : 0.0f;
            }
        }
    } else if (!kIsMap && w.starts != nullptr) {
        load_rows(rows, w.starts, in_segment, kGdnFloat32, row);
    } else {
        load_rows(rows, p.states, in_slot, p.state_dtype, row);
    }

    for (int chunk = begin; chunk < end; ++chunk) {
        const Shared shared(dynamic, chunk - begin & 1, unit.warps);
        unsigned char* values = shared.values + warp * kValueBytes;
        cp_async_wait<0>();
        __syncthreads();
        if (!kIsMap) {
            copy_units(shared.queries, w.queries + key_tile_offset(p, chunk, unit.k_head),
                       kChunk * D * 2);
            copy_lower(shared.scores, w.scores + value_tile_offset(p, chunk, unit.head));
            cp_async_commit();
        }
        if (chunk + 1 < end) {
            fetch_chunk<T, D>(p, w, unit, Shared(dynamic, chunk + 1 - begin & 1, unit.warps),
                              chunk + 1, next, !is_transfer);
        }
        cp_async_commit();
        const int4 after = chunks[min(chunk + 2, end - 1)];

        uint32_t fresh[4][4];
        advance<T, D>(rows, fresh, shared.keys, shared.inverses, shared.gates, values);
        if (!kIsMap) {
            cp_async_wait<1>();
            __syncthreads();
            read_out<T, D>(rows, rows.exponents, fresh, shared.queries, shared.scores, shared.gates,
                           values);
            T* out = static_cast<T*>(p.out) +
                     (int64_t{described.x} * p.num_v_heads + unit.head) * p.v_dim + unit.first_row +
                     warp * kWarpRows + lane % 2 * 8;
#pragma unroll
            for (int pass = 0; pass < 4; ++pass) {
                const int token = pass * 16 + lane / 2;
                if (token >= described.y) continue;
                *reinterpret_cast<uint4*>(out + int64_t{token} * p.num_v_heads * p.v_dim) =
                    *reinterpret_cast<const uint4*>(values + value_offset(token, lane % 2));
            }
            if (described.w >= 0) {
                store_rows(rows, p.snapshots,
                           (int64_t{described.w} * p.num_v_heads + unit.head) * head_size,
                           p.state_dtype, row);
            }
        }
        described = next, next = after;
    }

    if (kIsMap) {
        store_rows(rows, is_transfer ? w.transfers : w.ends, in_segment, kGdnFloat32, row);
    } else if (is_last) {
        store_rows(rows, p.states, in_slot, p.state_dtype, row);
    }
}

constexpr int kJoinRows = 16;

// The state before each segment, from the segments' maps: S <- S M + N from left to right.
//
// Block (kJoinRows rows of values, value head, segment), of which those of a sequence's first
// segment do the work: D threads, one a column. Rows of the current state lie in shared memory.
template <int D>
__global__ void __launch_bounds__(D, 1)
    prefill_join_kernel(GdnRule p, PrefillWorkspace w, int tiles) {
    alignas(16) __shared__ float current[kJoinRows][D];
    const int first_row = static_cast<int>(blockIdx.x % tiles) * kJoinRows;
    const int head = static_cast<int>(blockIdx.x / tiles % p.num_v_heads);
    int64_t segment = blockIdx.x / tiles / p.num_v_heads;
    const int4* segments = reinterpret_cast<const int4*>(p.segments);
    const int4 described = segments[segment];
    const int64_t slot = slot_of(p, described.x);
    if (described.w == 0 || slot < 0) return;
    const int column = threadIdx.x;
    const auto at = [&](int64_t of, int row) {
        return ((of * p.num_v_heads + head) * p.v_dim + first_row + row) * D + column;
    };
    float sum[kJoinRows];
#pragma unroll
    for (int row = 0; row < kJoinRows; ++row) {
        const int64_t from = at(slot, row);
        w.starts[at(segment, row)] = p.state_dtype == kGdnBFloat16
                                         ? to_float(static_cast<const bf16*>(p.states)[from])
                                         : static_cast<const float*>(p.states)[from];
    }
    for (; segment + 1 < p.num_segments && segments[segment + 1].w == 0; ++segment) {
#pragma unroll
        for (int row = 0; row < kJoinRows; ++row) sum[row] = w.ends[at(segment, row)];
        if (segments[segment].w == 0) {
            const float* transfer = w.transfers + (segment * p.num_v_heads + head) * D * D + column;
            for (int k = 0; k < D; k += 4) {
                const float m[4] = {transfer[k * D], transfer[(k + 1) * D], transfer[(k + 2) * D],
                                    transfer[(k + 3) * D]};
#pragma unroll
                for (int row = 0; row < kJoinRows; ++row) {
                    const float4 s = *reinterpret_cast<const float4*>(&current[row][k]);
                    sum[row] += s.x * m[0] + s.y * m[1] + s.z * m[2] + s.w * m[3];
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (int row = 0; row < kJoinRows; ++row) {
            current[row][column] = sum[row];
            w.starts[at(segment + 1, row)] = sum[row];
        }
        __syncthreads();
    }
}

template <class T, int D>
int launch_chunks(const GdnRule& p, const PrefillWorkspace& w, void* stream) {
    const int group_heads = p.num_v_heads / p.num_k_heads;
    const int64_t units = p.num_chunks * p.num_k_heads;
    // Few chunks fill the device better with one value head a block, though each normalises anew.
    const int block_heads =
        units < 2 * multiprocessor_count() ? 1 : min(group_heads, kMaxBlockHeads);
    const int64_t blocks = units * ((group_heads + block_heads - 1) / block_heads);
    if (blocks > kMaxBlocks) return kUnsupportedShape;
    return GDN_LAUNCH((prefill_chunk_kernel<T, D>), dim3(static_cast<unsigned>(blocks)),
                      dim3(kChunkThreads), ChunkShared::kBytes, stream, p, w, block_heads);
}

// Warps of a scan's block. A warp's chain of products leaves its scheduler idle half the time, and
// four schedulers share the shared memory that feeds them: up to four warps cost about the same, and
// from there on the busiest multiprocessor decides. Larger tiles fetch less.
template <class Shared>
int choose_scan_warps(int64_t heads, int rows) {
    const int64_t multiprocessors = max(multiprocessor_count(), 1);
    const size_t most_bytes = static_cast<size_t>(max(max_shared_bytes(), 0));
    int best = 1;
    int64_t least = INT64_MAX;
    for (int warps = min(kMaxScanWarps, rows / kWarpRows); warps > 0; warps /= 2) {
        if (warps > 1 && Shared::bytes(warps) > most_bytes) continue;
        const int64_t blocks = heads * (rows / (kWarpRows * warps));
        const int64_t busiest = (blocks + multiprocessors - 1) / multiprocessors * warps;
        const int64_t cost = max(busiest, int64_t{4});
        if (cost < least) least = cost, best = warps;
    }
    return best;
}

template <class T, int D, bool kIsMap>
int launch_scan(const GdnRule& p, const PrefillWorkspace& w, void* stream) {
    const int64_t heads = p.num_segments * p.num_v_heads;
    const int warps = choose_scan_warps<ScanShared<D, kIsMap>>(heads, p.v_dim);
    const int tiles = (p.v_dim + (kIsMap ? p.k_dim : 0)) / (kWarpRows * warps);
    if (heads * tiles > kMaxBlocks) return kUnsupportedShape;
    return GDN_LAUNCH((prefill_scan_kernel<T, D, kIsMap>),
                      dim3(static_cast<unsigned>(heads * tiles)), dim3(32 * warps),
                      (ScanShared<D, kIsMap>::bytes(warps)), stream, p, w, tiles);
}

template <class T, int D>
int launch_starts(const GdnRule& p, const PrefillWorkspace& w, void* stream) {
    const int code = launch_scan<T, D, true>(p, w, stream);
    if (code != 0) return code;
    const int tiles = p.v_dim / kJoinRows;
    return GDN_LAUNCH((prefill_join_kernel<D>),
                      dim3(static_cast<unsigned>(p.num_segments * p.num_v_heads * tiles)), dim3(D),
                      0, stream, p, w, tiles);
}

// Whether tensor cores serve a call: 16-byte loads and stores of rows, and states in pairs.
bool is_served(const GdnRule& p) {
    if (p.dtype != kGdnFloat16 && p.dtype != kGdnBFloat16) return false;
    if (p.k_dim != p.v_dim || (p.k_dim != 64 && p.k_dim != 128)) return false;
    return p.q_stride % 8 == 0 && p.k_stride % 8 == 0 && p.v_stride % 8 == 0 &&
           is_aligned(p.q, 16) && is_aligned(p.k, 16) && is_aligned(p.v, 16) &&
           is_aligned(p.out, 16) && is_aligned(p.states, 8) && is_aligned(p.snapshots, 8) &&
           is_aligned(p.chunks, 16) && is_aligned(p.segments, 16);
}

int scan(const GdnRule& p, const PrefillWorkspace& w, void* stream) {
#ifdef GDN_SM90A
    if (prefill_sm90_wanted(p)) return prefill_sm90_scan(p, w, stream);
#endif
    return GDN_WITH_PREFILL_SHAPE(p, launch_scan<T, D, false>(p, w, stream));
}

}  // namespace

int prefill_chunks(const GdnRule& p, const PrefillWorkspace& w, void* stream) {
    return GDN_WITH_PREFILL_SHAPE(p, launch_chunks<T, D>(p, w, stream));
}

int prefill_starts(const GdnRule& p, const PrefillWorkspace& w, void* stream) {
    return GDN_WITH_PREFILL_SHAPE(p, launch_starts<T, D>(p, w, stream));
}

}  // namespace gdn

extern "C" {

int64_t gdn_cuda_prefill_workspace(const GdnRule* args) {
    return gdn::is_served(*args) ? gdn::prefill_workspace(*args, nullptr).bytes : 0;
}

int gdn_cuda_gdn_prefill(const GdnRule* args, void* stream) {
    const GdnRule& p = *args;
    if (!gdn::is_served(p)) return gdn_cuda_plain_prefill(args, stream);
    if (p.num_chunks == 0) return 0;
    const gdn::PrefillWorkspace w = gdn::prefill_workspace(p, p.workspace);
    if (const int code = gdn::prefill_chunks(p, w, stream)) return code;
    if (gdn::is_segmented(p)) {
        if (const int code = gdn::prefill_starts(p, w, stream)) return code;
    }
    return gdn::scan(p, w, stream);
}

}  // extern "C"
