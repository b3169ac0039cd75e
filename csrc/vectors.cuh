// Reads and writes of a few neighbouring elements as float32, and the functions of the gates.

#pragma once

#include "device.cuh"
#include "gdn.h"

namespace gdn {

// kCount (1, 2 or 4) elements, whose address is a multiple of their size together.
template <class T, int kCount>
__device__ __forceinline__ void load(const T* from, float (&to)[kCount]) {
    if constexpr (kCount == 1) {
        to[0] = to_float(from[0]);
    } else if constexpr (std::is_same_v<T, float>) {
        if constexpr (kCount == 4) {
            const float4 x = *reinterpret_cast<const float4*>(from);
            to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
        } else {
            const float2 x = *reinterpret_cast<const float2*>(from);
            to[0] = x.x, to[1] = x.y;
        }
    } else if constexpr (kCount == 4) {
        const uint2 x = *reinterpret_cast<const uint2*>(from);
        const float2 low = unpack2<T>(x.x), high = unpack2<T>(x.y);
        to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
    } else {
        const float2 x = unpack2<T>(*reinterpret_cast<const uint32_t*>(from));
        to[0] = x.x, to[1] = x.y;
    }
}

template <class T, int kCount>
__device__ __forceinline__ void store(T* to, const float (&from)[kCount]) {
    if constexpr (kCount == 1) {
        to[0] = from_float<T>(from[0]);
    } else if constexpr (std::is_same_v<T, float>) {
        if constexpr (kCount == 4) {
            *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
        } else {
            *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
        }
    } else if constexpr (kCount == 4) {
        *reinterpret_cast<uint2*>(to) =
            make_uint2(pack2<T>(from[0], from[1]), pack2<T>(from[2], from[3]));
    } else {
        *reinterpret_cast<uint32_t*>(to) = pack2<T>(from[0], from[1]);
    }
}

// kCount neighbouring elements as they lie in memory: what is read ahead of its use stays packed, so
// that nothing waits for it.
template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 4 ? 4 : kCount * sizeof(T)) Packed {
    static constexpr int kWords = kCount * sizeof(T) / 4;
    uint32_t words[kWords > 0 ? kWords : 1];
};
template <class T, int kCount>
__device__ __forceinline__ Packed<T, kCount> load_packed(const T* from) {
    if constexpr (kCount * sizeof(T) < 4) {
        uint16_t bits;
        memcpy(&bits, from, 2);
        return {{bits}};
    } else {
        return *reinterpret_cast<const Packed<T, kCount>*>(from);
    }
}
template <class T, int kCount>
__device__ __forceinline__ void widen(const Packed<T, kCount>& from, float (&to)[kCount]) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) memcpy(&to[i], &from.words[i], 4);
    } else if constexpr (kCount == 1) {
        to[0] = unpack2<T>(from.words[0]).x;
    } else {
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            const float2 pair = unpack2<T>(from.words[i]);
            to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
        }
    }
}

// Whether kCount elements at every multiple of each stride can be read at once.
inline bool is_aligned(const void* p, size_t bytes) {
    return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

inline size_t element_bytes(int32_t dtype) {
    return dtype == kGdnFloat32 ? 4 : 2;
}

__device__ __forceinline__ float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}
// For a value that is kept as T: 16 bits have no use for the last digits of float32, which take most
// of the time.
template <class T = float>
__device__ __forceinline__ float silu(float x) {
    if constexpr (sizeof(T) == 2) {
        return fast_divide(x, 1.0f + fast_exp(-x));
    } else {
        return x / (1.0f + expf(-x));
    }
}
// log(1 + exp(x)), without overflow for large x.
__device__ __forceinline__ float softplus(float x) {
    return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(0xffffffffu, x, bits);
    return x;
}

}  // namespace gdn

// Runs a statement with `T` as the type of a dtype.
#define GDN_WITH_TYPE(dtype, ...)    \
    [&]() -> int {                   \
        switch (dtype) {             \
            case kGdnFloat16: {      \
                using T = gdn::f16;  \
                return __VA_ARGS__;  \
            }                        \
            case kGdnBFloat16: {     \
                using T = gdn::bf16; \
                return __VA_ARGS__;  \
            }                        \
            default: {               \
                using T = float;     \
                return __VA_ARGS__;  \
            }                        \
        }                            \
    }()
