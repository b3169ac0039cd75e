// The scan of gdn_prefill over a segment's chunks: what the mma.sync and the wgmma one share, which
// is a warp's rows of a state in registers and their way from and to memory.

#pragma once

#include "gdn_prefill.cuh"

namespace gdn {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int64_t slot_of(const GdnRule& p, int64_t sequence) {
    const int64_t slot = p.slots[sequence];
    return slot >= 0 && slot < p.num_slots ? slot : -1;
}

// Two accumulators of neighbouring columns as the next product's left operand.
__device__ __forceinline__ void pack_block(uint32_t (&to)[4], const float (&left)[4],
                                           const float (&right)[4]) {
    to[0] = pack2<f16>(left[0], left[1]);
    to[1] = pack2<f16>(left[2], left[3]);
    to[2] = pack2<f16>(right[0], right[1]);
    to[3] = pack2<f16>(right[2], right[3]);
}

constexpr int kWarpRows = 16;  // rows of values of a warp
constexpr int kRowBytes = 2 * kWarpRows;
constexpr int kValueBytes = kChunk * kRowBytes;  // a warp's values of a chunk

// Rows are rescaled when their state passes kMaxState or what they add passes kMaxDelta, whose 64
// fold fits f16 (entries of T are at most 1), and when both are below kMinScaled. Rescaled rows begin
// at 2^kTargetExponent.
constexpr float kMaxState = 8192.0f, kMaxDelta = 512.0f, kMinScaled = 0.015625f;
constexpr int kTargetExponent = 3, kMaxExponent = 60;

__device__ __forceinline__ float power_of_two(int exponent) {
    return __int_as_float((127 + exponent) << 23);
}

// A warp's 16 rows of a transposed product: row lane / 4 in elements 0 and 1, and 8 rows further in
// 2 and 3, of columns 8 n + lane % 4 * 2 and the next one.
template <int D>
struct ScanRows {
    float state[D / 8][4];        // times 2^exponents
    uint32_t operand[D / 16][4];  // the state before this chunk, as left operand
    int exponents[2];             // of rows lane / 4 and lane / 4 + 8
    float last_delta;             // the largest |R| of the last chunk, in this lane

    __device__ __forceinline__ void pack() {
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            pack_block(operand[step], state[2 * step], state[2 * step + 1]);
        }
    }

    __device__ __forceinline__ float largest_state(int half) const {
        float largest = 0;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            largest =
                fmaxf(largest, fmaxf(fabsf(state[n][2 * half]), fabsf(state[n][2 * half + 1])));
        }
        return largest;
    }

    // Moves each row to where its largest element is about 2^kTargetExponent; returns the factors.
    // `others` are the largest of what the rows hold besides the state.
    __device__ __forceinline__ float2 rescale(float other0, float other1) {
        float factors[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = fmaxf(largest_state(half), half == 0 ? other0 : other1);
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
            const int exponent = (__float_as_int(largest) >> 23) - 127;
            const int wanted = exponents[half] + kTargetExponent - exponent;
            const int clamped = max(-kMaxExponent, min(kMaxExponent, wanted));
            const int to = largest > 0.0f ? clamped : exponents[half];
            factors[half] = power_of_two(to - exponents[half]);
            exponents[half] = to;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                state[n][2 * half] *= factors[half];
                state[n][2 * half + 1] *= factors[half];
            }
        }
        return make_float2(factors[0], factors[1]);
    }

    // Keeps the state inside f16 before it becomes an operand.
    __device__ __forceinline__ void fit_state() {
        const float largest = fmaxf(largest_state(0), largest_state(1));
        const bool is_small = fmaxf(largest, last_delta) < kMinScaled;
        if (__any_sync(kAllLanes, largest > kMaxState) || __all_sync(kAllLanes, is_small)) {
            rescale(last_delta, last_delta);
        }
    }

    // Keeps R inside f16, and with it what T makes of it. Where state and R had to be rescaled, the
    // caller is told by which factors: the operand is left to it.
    template <class Rescaled>
    __device__ __forceinline__ void fit_deltas(float (&x)[8][4], const Rescaled& rescaled) {
        float largest[2] = {};
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            largest[0] = fmaxf(largest[0], fmaxf(fabsf(x[n][0]), fabsf(x[n][1])));
            largest[1] = fmaxf(largest[1], fmaxf(fabsf(x[n][2]), fabsf(x[n][3])));
        }
        last_delta = fminf(fmaxf(largest[0], largest[1]), kMaxDelta);
        if (__any_sync(kAllLanes, fmaxf(largest[0], largest[1]) > kMaxDelta)) {
            const float2 factors = rescale(largest[0], largest[1]);
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                x[n][0] *= factors.x, x[n][1] *= factors.x;
                x[n][2] *= factors.y, x[n][3] *= factors.y;
            }
            rescaled(factors);
        }
    }
};

// Place of 16-byte unit `unit` (of 2) of a token among a warp's values.
__device__ __forceinline__ int value_offset(int token, int unit) {
    return token * kRowBytes + ((unit ^ (token >> 2 & 1)) << 4);
}

// What a block scans: some rows of one value head over a segment's chunks.
struct ScanUnit {
    int64_t segment;
    int head, k_head, first_row, warps;
};

__device__ __forceinline__ float2 gates_at(const unsigned char* gates, PrefillGate gate,
                                           int token) {
    return *reinterpret_cast<const float2*>(gates + (gate * kChunk + token) * 4);
}

// Two neighbouring elements of a state, of type state_dtype.
__device__ __forceinline__ float2 load_state2(const void* states, int64_t at, int32_t dtype) {
    if (dtype == kGdnBFloat16) {
        return unpack2<bf16>(
            *reinterpret_cast<const uint32_t*>(static_cast<const bf16*>(states) + at));
    }
    return *reinterpret_cast<const float2*>(static_cast<const float*>(states) + at);
}
__device__ __forceinline__ void store_state2(void* states, int64_t at, int32_t dtype, float x,
                                             float y) {
    if (dtype == kGdnBFloat16) {
        *reinterpret_cast<uint32_t*>(static_cast<bf16*>(states) + at) = pack2<bf16>(x, y);
    } else {
        *reinterpret_cast<float2*>(static_cast<float*>(states) + at) = make_float2(x, y);
    }
}

// A warp's rows of a state that begins at element `from`; `row` is the lane's first one.
template <int D>
__device__ __forceinline__ void load_rows(ScanRows<D>& rows, const void* states, int64_t from,
                                          int32_t dtype, int row) {
    const int pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t at = from + int64_t{row + 8 * half} * D + 8 * n + pair;
            const float2 x = load_state2(states, at, dtype);
            rows.state[n][2 * half] = x.x, rows.state[n][2 * half + 1] = x.y;
        }
    }
}
template <int D>
__device__ __forceinline__ void store_rows(const ScanRows<D>& rows, void* states, int64_t to,
                                           int32_t dtype, int row) {
    const int pair = threadIdx.x % 4 * 2;
    const float scale[2] = {power_of_two(-rows.exponents[0]), power_of_two(-rows.exponents[1])};
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t at = to + int64_t{row + 8 * half} * D + 8 * n + pair;
            store_state2(states, at, dtype, rows.state[n][2 * half] * scale[half],
                         rows.state[n][2 * half + 1] * scale[half]);
        }
    }
}

template <class T>
__device__ __forceinline__ void zero_outputs(const GdnRule& p, const ScanUnit& unit, int begin,
                                             int end) {
    const int units = 2 * unit.warps;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int4 described = reinterpret_cast<const int4*>(p.chunks)[chunk];
        for (int at = threadIdx.x; at < described.y * units; at += blockDim.x) {
            const int64_t token = described.x + at / units;
            *reinterpret_cast<uint4*>(static_cast<T*>(p.out) +
                                      (token * p.num_v_heads + unit.head) * p.v_dim +
                                      unit.first_row + at % units * 8) = make_uint4(0, 0, 0, 0);
        }
    }
}

// Blocks of a grid's first dimension; more than it holds are no shape that is served.
constexpr int64_t kMaxBlocks = 2147483647;

}  // namespace gdn

// Runs a statement with `T` as the type of the values and `D` as the head dim.
#define GDN_WITH_PREFILL_SHAPE(p, ...)                                              \
    [&]() -> int {                                                                  \
        const bool is_bf16 = (p).dtype == kGdnBFloat16, is_wide = (p).k_dim == 128; \
        if (is_bf16 && is_wide) {                                                   \
            using T = bf16;                                                         \
            constexpr int D = 128;                                                  \
            return __VA_ARGS__;                                                     \
        }                                                                           \
        if (is_bf16) {                                                              \
            using T = bf16;                                                         \
            constexpr int D = 64;                                                   \
            return __VA_ARGS__;                                                     \
        }                                                                           \
        using T = f16;                                                              \
        if (is_wide) {                                                              \
            constexpr int D = 128;                                                  \
            return __VA_ARGS__;                                                     \
        }                                                                           \
        constexpr int D = 64;                                                       \
        return __VA_ARGS__;                                                         \
    }()
