// The scan of gdn_prefill on Hopper: wgmma, bulk copies, a warpgroup that fetches for one or two that
// compute. Maths and tiles: gdn_prefill.cuh.

#ifdef GDN_SM90A

#include <atomic>

#include "gdn_prefill.cuh"
#include "gdn_ring_sm90.cuh"
#include "gdn_scan.cuh"
#include "launchers.h"
#include "sm90.cuh"

namespace gdn {
namespace sm90 {

// x = left operand (64 rows of 16 kSteps) times the transpose of a tile of 64 rows.
template <int kSteps>
__device__ __forceinline__ void multiply_tile(float (&x)[8][4],
                                              const uint32_t (&operand)[kSteps][4],
                                              const unsigned char* tile) {
    const uint64_t start = matrix_descriptor<PanelRows::kColumns>(tile);
    wgmma<64, PanelRows::kColumns, false>(x, operand[0], start);
#pragma unroll
    for (int step = 1; step < kSteps; ++step) {
        const int bytes = step / 4 * kPanelBytes + step % 4 * 32;
        wgmma<64, PanelRows::kColumns, true>(x, operand[step], descriptor_after(start, bytes));
    }
}

// x = or += left operand (64 rows of 64 tokens) times half of the transpose of a lower triangular tile:
// to its first or last 32 tokens. `x` are the half's registers.
template <bool kAdds, int kHalf>
__device__ __forceinline__ void multiply_lower(float (*x)[4], const uint32_t (&operand)[4][4],
                                               const unsigned char* tile) {
    const uint64_t start = matrix_descriptor<PanelRows::kColumns>(tile + kHalf * 32 * 128);
    wgmma<32, PanelRows::kColumns, kAdds>(x, operand[0], start);
#pragma unroll
    for (int step = 1; step < 2 + 2 * kHalf; ++step) {
        wgmma<32, PanelRows::kColumns, true>(x, operand[step], descriptor_after(start, step * 32));
    }
}

// state += left operand (64 rows of 32 tokens, the first or the last ones) times keys.
template <int D, int kHalf>
__device__ __forceinline__ void multiply_keys(float (&state)[D / 8][4],
                                              const uint32_t (&operand)[4][4],
                                              const unsigned char* keys) {
    const uint64_t start = matrix_descriptor<PanelRows::kRows>(keys);
#pragma unroll
    for (int step = 2 * kHalf; step < 2 * kHalf + 2; ++step) {
#pragma unroll
        for (int panel = 0; panel < D / 64; ++panel) {
            const int bytes = panel * kPanelBytes + step * 16 * 128;
            wgmma<64, PanelRows::kRows, true>(&state[8 * panel], operand[step],
                                              descriptor_after(start, bytes));
        }
    }
}

// x = beta (V - exp(G) x) for a warp's rows, V times 2^exponents.
template <class T>
__device__ __forceinline__ void subtract_from_values(float (&x)[8][4],
                                                     const uint32_t (&values)[4][4],
                                                     const unsigned char* gates,
                                                     const int (&exponents)[2]) {
    const int pair = threadIdx.x % 4 * 2;
    const float scale[2] = {power_of_two(exponents[0]), power_of_two(exponents[1])};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const float2 beta = gates_at(gates, kBeta, 8 * n + pair);
        const float2 decay = gates_at(gates, kBetaDecay, 8 * n + pair);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 value = unpack2<T>(values[n / 2][n % 2 * 2 + half]);
            x[n][2 * half] = beta.x * (value.x * scale[half]) - decay.x * x[n][2 * half];
            x[n][2 * half + 1] = beta.y * (value.y * scale[half]) - decay.y * x[n][2 * half + 1];
        }
    }
}

// to = x, each of a lane's two rows times its own factor.
__device__ __forceinline__ void scale_rows(float (&to)[8][4], const float (&x)[8][4],
                                           float2 factors) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        to[n][0] = x[n][0] * factors.x, to[n][1] = x[n][1] * factors.x;
        to[n][2] = x[n][2] * factors.y, to[n][3] = x[n][3] * factors.y;
    }
}

// Decays what each token reads of the state before the chunk.
__device__ __forceinline__ void decay_reads(float (&x)[8][4], const unsigned char* gates) {
    const int pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const float2 decay = gates_at(gates, kFromStart, 8 * n + pair);
        x[n][0] *= decay.x, x[n][1] *= decay.y;
        x[n][2] *= decay.x, x[n][3] *= decay.y;
    }
}

__device__ __forceinline__ void pack_tokens(uint32_t (&to)[4][4], const float (&x)[8][4]) {
#pragma unroll
    for (int step = 0; step < 4; ++step) pack_block(to[step], x[2 * step], x[2 * step + 1]);
}

// V' of half of a chunk's tokens as left operands: as it is, and times exp(G_C - G).
template <int kHalf>
__device__ __forceinline__ void take_deltas(uint32_t (&fresh)[4][4], uint32_t (&ends)[4][4],
                                            const float (&x)[8][4], const unsigned char* gates) {
    const int pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int step = 2 * kHalf; step < 2 * kHalf + 2; ++step) {
        float scaled[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float* from = x[2 * step + i];
            const float2 to_end = gates_at(gates, kToEnd, 8 * (2 * step + i) + pair);
            scaled[i][0] = from[0] * to_end.x, scaled[i][1] = from[1] * to_end.y;
            scaled[i][2] = from[2] * to_end.x, scaled[i][3] = from[3] * to_end.y;
        }
        pack_block(fresh[step], x[2 * step], x[2 * step + 1]);
        pack_block(ends[step], scaled[0], scaled[1]);
    }
}

// Of a 16 x 16 block of values, 16 tokens by 2 units of 16 bytes, the row that a lane names to
// ldmatrix_x4_trans and stmatrix_x4_trans, whose registers are then an accumulator's blocks.
__device__ __forceinline__ int lane_token() {
    return (threadIdx.x >> 4 & 1) * 8 + (threadIdx.x & 7);
}
__device__ __forceinline__ int lane_unit() {
    return threadIdx.x >> 3 & 1;
}

// Writes a warp's 16 rows of outputs of a chunk, by way of its part of shared memory.
template <class T>
__device__ __forceinline__ void write_outputs(const float (&x)[8][4], unsigned char* staged, T* out,
                                              int64_t token_stride, int tokens) {
    const SharedAddress own = shared_address(staged) + value_offset(lane_token(), lane_unit());
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        uint32_t block[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float* row = x[2 * j + i];
            block[2 * i] = pack2<T>(row[0], row[1]);
            block[2 * i + 1] = pack2<T>(row[2], row[3]);
        }
        stmatrix_x4_trans(own + j * 16 * kRowBytes, block);
    }
    __syncwarp();
    const int first = threadIdx.x % 32 / 2, unit = threadIdx.x % 2;
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {
        const int token = pass * 16 + first;
        if (token >= tokens) continue;
        *reinterpret_cast<uint4*>(out + token * token_stride + unit * 8) =
            *reinterpret_cast<const uint4*>(staged + value_offset(token, unit));
    }
}

// The state before a segment's first chunk.
template <int D>
__device__ __forceinline__ void load_start(ScanRows<D>& rows, const GdnRule& p,
                                           const PrefillWorkspace& w, const ScanUnit& unit,
                                           int64_t slot, int row) {
    rows.exponents[0] = rows.exponents[1] = 0;
    rows.last_delta = 0;
    const int64_t of = w.starts != nullptr ? unit.segment : slot;
    const int64_t from = (of * p.num_v_heads + unit.head) * p.v_dim * D;
    // The type is asked for once, so that all loads are under way together.
    if (w.starts != nullptr) {
        load_rows(rows, w.starts, from, kGdnFloat32, row);
    } else if (p.state_dtype == kGdnBFloat16) {
        load_rows(rows, p.states, from, kGdnBFloat16, row);
    } else {
        load_rows(rows, p.states, from, kGdnFloat32, row);
    }
}

template <int D>
__device__ __forceinline__ void decay_state(ScanRows<D>& rows, float decay) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rows.state[n][e] *= decay;
    }
}

// A warp's rows of a chunk's values, in the places of an accumulator's blocks.
__device__ __forceinline__ void load_values(uint32_t (&values)[4][4], SharedAddress from) {
#pragma unroll
    for (int j = 0; j < 4; ++j) ldmatrix_x4_trans(values[j], from + j * 16 * kTokenBytes);
}

// A computing warpgroup: its 64 rows of the state over the chunks of a segment.
//
// The chain from state to state is S K^T, R T^T and V'^T K; what reads out is asked for where the
// tensor cores would else wait for it: S Q^T while R is made of S K^T, V' P^T while the new state is
// packed, and a chunk's outputs leave during the next one's S K^T. T and P are lower triangular: the
// first 32 tokens need half of their products only, and are multiplied by their keys while the others'
// are under way.
template <class T, int D>
__device__ __forceinline__ void scan_chunks(const GdnRule& p, const PrefillWorkspace& w,
                                            const ScanUnit& unit, const ScanRing<D>& ring,
                                            int begin, int end, bool is_last, int64_t slot) {
    using Ring = ScanRing<D>;
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 - kGroupWarps;  // among those that compute
    const int warp_row = unit.first_row + warp * kWarpRows, row = warp_row + lane / 4;
    const int64_t head_size = int64_t{p.v_dim} * D;
    const int4* chunks = reinterpret_cast<const int4*>(p.chunks);
    const int64_t token_stride = int64_t{p.num_v_heads} * p.v_dim;
    T* out = static_cast<T*>(p.out) + int64_t{unit.head} * p.v_dim + warp_row;
    unsigned char* staged = ring.outputs + warp * kValueBytes;
    const int value_place = Ring::kValues + warp / kGroupWarps * kGroupValueBytes +
                            lane_token() * kTokenBytes +
                            (warp % kGroupWarps * 2 + lane_unit()) * 16;

    ScanRows<D> rows;
    load_start(rows, p, w, unit, slot, row);
    rows.fit_state();
    rows.pack();
    ScanTurn turn;
    int4 last{};  // the chunk whose outputs are still to be written
    float outputs[8][4];
#pragma unroll 1
    for (int chunk = begin; chunk < end; ++chunk) {
        const unsigned char* stage = ring.stages + turn.stage * ring.stage_bytes;
        const unsigned char* gates = stage + Ring::kGates;
        const int4 described = chunks[chunk];
        float x[8][4], read[8][4];
        uint32_t right[4][4], fresh[4][4], ends[4][4];
        mbarrier_wait(ring.full + turn.stage, turn.parity);
        wgmma_fence();
        multiply_tile(x, rows.operand, stage);
        wgmma_commit();

        if (chunk > begin) {
            write_outputs(outputs, staged, out + last.x * token_stride, token_stride, last.y);
        }
        uint32_t values[4][4];
        load_values(values, shared_address(stage) + value_place);
        wgmma_fence();
        multiply_tile(read, rows.operand, stage + Ring::kQueries);
        wgmma_commit();

        wgmma_wait<1>();
        wgmma_settle(x);
        subtract_from_values<T>(x, values, gates, rows.exponents);
        bool is_rescaled = false;
        float2 factors{};
        rows.fit_deltas(x, [&](float2 by) { is_rescaled = true, factors = by; });
        pack_tokens(right, x);
        wgmma_fence();
        multiply_lower<false, 0>(&x[0], right, stage + Ring::kInverses);
        wgmma_commit();
        wgmma_fence();
        multiply_lower<false, 1>(&x[4], right, stage + Ring::kInverses);
        wgmma_commit();

        decay_state(rows, gates_at(gates, kFromStart, kChunk - 2).y);
        wgmma_wait<1>();
        wgmma_settle<4>(&x[0]), wgmma_settle(read), wgmma_settle(rows.operand);
        take_deltas<0>(fresh, ends, x, gates);
        wgmma_fence();
        multiply_keys<D, 0>(rows.state, ends, stage);
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_settle<4>(&x[4]), wgmma_settle(right);
        take_deltas<1>(fresh, ends, x, gates);
        wgmma_fence();
        multiply_keys<D, 1>(rows.state, ends, stage);
        wgmma_commit();

        decay_reads(read, gates);
        if (is_rescaled) scale_rows(read, read, factors);
        const float2 out_scale =
            make_float2(power_of_two(-rows.exponents[0]), power_of_two(-rows.exponents[1]));
        wgmma_fence();
        multiply_lower<true, 0>(&read[0], fresh, stage + Ring::kScores);
        multiply_lower<true, 1>(&read[4], fresh, stage + Ring::kScores);
        wgmma_commit();

        wgmma_wait<1>();
        wgmma_settle(rows.state), wgmma_settle(ends);
        if (described.w >= 0) {
            store_rows(rows, p.snapshots,
                       (int64_t{described.w} * p.num_v_heads + unit.head) * head_size,
                       p.state_dtype, row);
        }
        rows.fit_state();
        rows.pack();
        wgmma_wait<0>();
        wgmma_settle(read), wgmma_settle(fresh);
        // Lanes have read gates and values, and products the rest of the stage.
        __syncwarp();
        if (lane == 0) mbarrier_arrive(ring.empty + turn.stage);
        // Into registers that no product has: else ptxas would not let the next one run beside them.
        scale_rows(outputs, read, out_scale);
        last = described;
        turn.advance();
    }
    write_outputs(outputs, staged, out + last.x * token_stride, token_stride, last.y);
    if (is_last) {
        store_rows(rows, p.states, (slot * p.num_v_heads + unit.head) * head_size, p.state_dtype,
                   row);
    }
}

// What prefill_scan_kernel does but for the maps.
//
// Block (tile of 64 rows of values a computing warpgroup, value head, segment): one warpgroup that
// fetches and one or two that compute, ScanRing::bytes of shared memory. A computing warpgroup owns
// its rows of the state, 64 x D float32 in registers in wgmma's layout, and all products on them;
// each of its warps keeps the scale of its own rows. Warpgroups share the ring of operands and nothing
// else. Padding sequences get zero outputs.
template <class T, int D>
__global__ void __launch_bounds__(kMaxThreads, 1)
    prefill_scan_sm90_kernel(GdnRule p, PrefillWorkspace w, int tiles) {
#ifdef GDN_SM90A_CODE
    GDN_DYNAMIC_SHARED(dynamic);
    const int groups = static_cast<int>(blockDim.x) / kGroupThreads - 1;
    ScanUnit unit;
    unit.warps = groups * kGroupWarps;
    unit.first_row = static_cast<int>(blockIdx.x % tiles) * groups * kGroupRows;
    unit.head = static_cast<int>(blockIdx.x / tiles % p.num_v_heads);
    unit.segment = blockIdx.x / tiles / p.num_v_heads;
    unit.k_head = unit.head / (p.num_v_heads / p.num_k_heads);
    const int4 segment = reinterpret_cast<const int4*>(p.segments)[unit.segment];
    const int begin = segment.y, end = segment.z;
    if (begin >= end) return;
    const int64_t slot = slot_of(p, segment.x);
    if (slot < 0) {
        zero_outputs<T>(p, unit, begin, end);
        return;
    }

    const ScanRing<D> ring(dynamic, groups);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            // All fetching threads bring values, one of them the rest as well.
            mbarrier_init(ring.full + stage, kGroupThreads + 1);
            mbarrier_init(ring.empty + stage, unit.warps);
        }
        fence_proxy_async();
    }
    __syncthreads();
    if (threadIdx.x < kGroupThreads) {
        lower_registers<kFetchRegisters>();
        fetch_chunks<T, D>(p, w, unit, ring, begin, end);
    } else {
        raise_registers<kScanRegisters>();
        const bool is_last = end == p.first_chunks[segment.x + 1];
        scan_chunks<T, D>(p, w, unit, ring, begin, end, is_last, slot);
    }
#endif
}

// Warpgroups of a block that compute. Two share what they fetch, but a multiprocessor then takes about
// half as long again for a chunk, so that one is better where it gives every multiprocessor a block.
inline int choose_groups(int64_t heads, int rows) {
    if (rows < 2 * kGroupRows) return 1;
    const int64_t multiprocessors = max(multiprocessor_count(), 1);
    const auto rounds = [&](int64_t blocks) {
        return (blocks + multiprocessors - 1) / multiprocessors;
    };
    const int64_t tiles = rows / kGroupRows;
    return 2 * rounds(heads * tiles) < 3 * rounds(heads * tiles / 2) ? 1 : 2;
}

template <class T, int D>
int launch_scan(const GdnRule& p, const PrefillWorkspace& w, void* stream) {
    const int64_t heads = p.num_segments * p.num_v_heads;
    const int groups = choose_groups(heads, p.v_dim);
    const int tiles = p.v_dim / (groups * kGroupRows);
    if (heads * tiles > kMaxBlocks) return kUnsupportedShape;
    return GDN_LAUNCH((prefill_scan_sm90_kernel<T, D>), dim3(static_cast<unsigned>(heads * tiles)),
                      dim3((1 + groups) * kGroupThreads), (ScanRing<D>::bytes(groups)), stream, p,
                      w, tiles);
}

}  // namespace sm90

namespace {

std::atomic<bool> is_allowed{true};

}  // namespace

bool prefill_sm90_wanted(const GdnRule&) {
    return is_allowed && compute_capability() == 90;
}

int prefill_sm90_scan(const GdnRule& p, const PrefillWorkspace& w, void* stream) {
    return GDN_WITH_PREFILL_SHAPE(p, sm90::launch_scan<T, D>(p, w, stream));
}

}  // namespace gdn

extern "C" void gdn_cuda_allow_sm90(int allowed) {
    gdn::is_allowed = allowed != 0;
}

#endif
