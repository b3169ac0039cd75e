// CUDA's language and the device primitives of device.cuh, spelt in C++ for the host; see fibers.h.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ static
#define __constant__ static
#define __grid_constant__

#define threadIdx (gdn::host::machine.current().thread)
#define blockIdx (gdn::host::machine.block_index())
#define blockDim (gdn::host::machine.block_dim())
#define gridDim (gdn::host::machine.grid_dim())

#define GDN_DYNAMIC_SHARED(name) unsigned char* name = gdn::host::machine.shared()

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) int2 {
    int32_t x, y;
};
struct alignas(16) int4 {
    int32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}
inline uint2 make_uint2(uint32_t x, uint32_t y) {
    return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    return {x, y, z, w};
}
inline int2 make_int2(int32_t x, int32_t y) {
    return {x, y};
}
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) {
    return {x, y, z, w};
}

inline float rsqrtf(float x) {
    return 1.0f / std::sqrt(x);
}
inline float __int_as_float(int x) {
    float f;
    std::memcpy(&f, &x, 4);
    return f;
}
inline int __float_as_int(float f) {
    int x;
    std::memcpy(&x, &f, 4);
    return x;
}
inline uint32_t __float_as_uint(float f) {
    return static_cast<uint32_t>(__float_as_int(f));
}
inline float __uint_as_float(uint32_t x) {
    return __int_as_float(static_cast<int>(x));
}

template <class T, class U>
inline std::common_type_t<T, U> min(T a, U b) {
    return b < a ? static_cast<std::common_type_t<T, U>>(b) : a;
}
template <class T, class U>
inline std::common_type_t<T, U> max(T a, U b) {
    return a < b ? static_cast<std::common_type_t<T, U>>(b) : a;
}

template <class T>
inline T __ldg(const T* p) {
    return *p;
}
inline int atomicAdd(int* p, int value) {
    const int old = *p;
    *p += value;
    return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

inline void __syncthreads() {
    gdn::host::machine.meet_block();
}

namespace gdn::host {

// Waits for the warp's other lanes; returns the buffer that this exchange fills.
template <class Fill>
unsigned char* exchange(const char* where, const Fill& fill) {
    Fiber& fiber = machine.current();
    WarpExchange& warp = machine.warp();
    unsigned char* data = warp.data[fiber.exchanges++ % 2];
    fill(data);
    machine.meet(warp.barrier, warp.num_lanes, where);
    return data;
}

inline int lane() {
    return machine.current().rank % kWarpSize;
}

// Only whole warps meet here: no kernel of ours shuffles among a part of one.
inline void check_mask(unsigned mask, const char* where) {
    const int lanes = machine.warp().num_lanes;
    const unsigned all = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
    if ((mask & all) != all) {
        std::fprintf(stderr, "%s among a part of a warp: mask %08x\n", where, mask);
        std::abort();
    }
}

template <class T>
T shuffle(unsigned mask, T value, int source, const char* where) {
    static_assert(sizeof(T) <= 8);
    check_mask(mask, where);
    const int lanes = machine.warp().num_lanes;
    const int from = source < 0 || source >= lanes ? lane() : source;
    unsigned char* data = exchange(
        where, [&](unsigned char* to) { std::memcpy(to + 8 * lane(), &value, sizeof(T)); });
    T got;
    std::memcpy(&got, data + 8 * from, sizeof(T));
    return got;
}

inline void check_aligned(const void* p, size_t bytes, const char* where) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
        std::fprintf(stderr, "%s of an address that is not %zu-byte aligned\n", where, bytes);
        std::abort();
    }
}

}  // namespace gdn::host

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    gdn::host::check_mask(mask, "__syncwarp");
    gdn::host::exchange("__syncwarp", [](unsigned char*) {});
}

// In the shuffles, `width` cuts the warp into groups of that many lanes.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const int base = gdn::host::lane() / width * width;
    return gdn::host::shuffle(mask, value, base + source % width, "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int lane = gdn::host::lane(), source = lane ^ bits;
    const bool inside = source / width <= lane / width;
    return gdn::host::shuffle(mask, value, inside ? source : lane, "__shfl_xor_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
    const int lane = gdn::host::lane(), source = lane + delta;
    const bool inside = source / width == lane / width;
    return gdn::host::shuffle(mask, value, inside ? source : lane, "__shfl_down_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
    const int lane = gdn::host::lane(), source = lane - delta;
    const bool inside = source >= lane / width * width;
    return gdn::host::shuffle(mask, value, inside ? source : lane, "__shfl_up_sync");
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
    using namespace gdn::host;
    check_mask(mask, "__ballot_sync");
    unsigned char* data =
        exchange("__ballot_sync", [&](unsigned char* to) { to[lane()] = predicate; });
    unsigned bits = 0;
    for (int i = 0; i < machine.warp().num_lanes; ++i) bits |= unsigned{data[i]} << i;
    return bits;
}
inline bool __any_sync(unsigned mask, bool predicate) {
    return __ballot_sync(mask, predicate) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate) {
    return __ballot_sync(mask, !predicate) == 0;
}

namespace gdn {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    _Float16 value;
};

inline float to_float(float x) {
    return x;
}
inline float to_float(bf16 x) {
    return __uint_as_float(uint32_t{x.bits} << 16);
}
inline float to_float(f16 x) {
    return static_cast<float>(x.value);
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
    if (std::isnan(x)) return {0x7fff};
    const uint32_t bits = __float_as_uint(x);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
    return {static_cast<_Float16>(x)};
}

// Two values in one register, the first in the low half.
template <class T>
inline uint32_t pack2(float low, float high) {
    const T pair[2] = {from_float<T>(low), from_float<T>(high)};
    uint32_t packed;
    std::memcpy(&packed, pair, 4);
    return packed;
}
template <class T>
inline float2 unpack2(uint32_t packed) {
    T pair[2];
    std::memcpy(pair, &packed, 4);
    return {to_float(pair[0]), to_float(pair[1])};
}

inline float fast_exp(float x) {
    return std::exp(x);
}
inline float fast_divide(float x, float y) {
    return x / y;
}

inline int multiprocessor_count() {
    return 4;
}
inline int max_shared_bytes() {
    return static_cast<int>(host::kMaxSharedBytes);
}
inline int compute_capability() {
    return host::machine.capability();
}

// Copies are made as late as may be, so that a missing wait shows; or at once, so that what they
// overwrite too early does.
inline void cp_async_16(void* to, const void* from, bool valid) {
    host::check_aligned(to, 16, "cp.async to");
    if (valid) host::check_aligned(from, 16, "cp.async from");
    const host::PendingCopy copy{to, from, valid};
    if (host::machine.is_eager()) {
        copy.make();
    } else {
        host::machine.current().copies.back().push_back(copy);
    }
}
inline void cp_async_commit() {
    host::machine.current().copies.emplace_back();
}
template <int kGroups>
inline void cp_async_wait() {
    auto& groups = host::machine.current().copies;
    const size_t open = 1;
    size_t done = groups.size() > kGroups + open ? groups.size() - kGroups - open : 0;
    for (size_t i = 0; i < done; ++i) {
        for (const host::PendingCopy& copy : groups[i]) copy.make();
    }
    groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(done));
}

namespace host {

// Matrices of 8 rows of 16 bytes; lane 8 i + r names row r of matrix i.
template <int kMatrices, bool kTransposed>
void load_matrices(uint32_t (&registers)[kMatrices], const void* row) {
    if (lane() < 8 * kMatrices) check_aligned(row, 16, "ldmatrix");
    unsigned char* data =
        exchange("ldmatrix", [&](unsigned char* to) { std::memcpy(to + 8 * lane(), &row, 8); });
    for (int i = 0; i < kMatrices; ++i) {
        uint16_t pair[2];
        for (int e = 0; e < 2; ++e) {
            const int r = kTransposed ? lane() % 4 * 2 + e : lane() / 4;
            const int c = kTransposed ? lane() / 4 : lane() % 4 * 2 + e;
            const unsigned char* from;
            std::memcpy(&from, data + 8 * (8 * i + r), 8);
            std::memcpy(&pair[e], from + 2 * c, 2);
        }
        std::memcpy(&registers[i], pair, 4);
    }
}

}  // namespace host

using SharedAddress = const unsigned char*;
inline SharedAddress shared_address(const void* p) {
    return static_cast<const unsigned char*>(p);
}

inline void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
    host::load_matrices<4, false>(r, row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
    host::load_matrices<4, true>(r, row);
}
inline void ldmatrix_x2(uint32_t (&r)[2], SharedAddress row) {
    host::load_matrices<2, false>(r, row);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], SharedAddress row) {
    host::load_matrices<2, true>(r, row);
}

namespace host {

// d += a b for the 16 x K and K x 8 operands that the warp's lanes have spread out.
template <int kDepth>
void multiply(float (&d)[4], const unsigned char* data) {
    const auto* a = reinterpret_cast<const float*>(data);
    const float* b = a + 16 * kDepth;
    const int row = lane() / 4, column = lane() % 4 * 2;
    for (int i = 0; i < 4; ++i) {
        float sum = 0;
        for (int k = 0; k < kDepth; ++k) {
            sum += a[(row + i / 2 * 8) * kDepth + k] * b[k * 8 + column + i % 2];
        }
        d[i] += sum;
    }
}

}  // namespace host

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    static_assert((16 * 16 + 16 * 8) * 4 <= sizeof(host::WarpExchange::data) / 2);
    const unsigned char* data = host::exchange("mma", [&](unsigned char* to) {
        auto* left = reinterpret_cast<float*>(to);
        float* right = left + 16 * 16;
        const int group = host::lane() / 4, pair = host::lane() % 4 * 2;
        for (int i = 0; i < 4; ++i) {
            const float2 x = unpack2<T>(a[i]);
            const int row = group + i % 2 * 8, column = pair + i / 2 * 8;
            left[row * 16 + column] = x.x, left[row * 16 + column + 1] = x.y;
        }
        for (int i = 0; i < 2; ++i) {
            const float2 x = unpack2<T>(b[i]);
            right[(pair + i * 8) * 8 + group] = x.x, right[(pair + i * 8 + 1) * 8 + group] = x.y;
        }
    });
    host::multiply<16>(d, data);
}

inline uint32_t to_tf32(float x) {
    // Rounded to 10 bits of mantissa, ties away from zero.
    return (__float_as_uint(x) + 0x1000) & 0xffffe000u;
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const unsigned char* data = host::exchange("mma", [&](unsigned char* to) {
        auto* left = reinterpret_cast<float*>(to);
        float* right = left + 16 * 8;
        const int group = host::lane() / 4, column = host::lane() % 4;
        for (int i = 0; i < 4; ++i) {
            const uint32_t bits = a[i] & 0xffffe000u;
            left[(group + i % 2 * 8) * 8 + column + i / 2 * 4] = __uint_as_float(bits);
        }
        for (int i = 0; i < 2; ++i) {
            right[(column + i * 4) * 8 + group] = __uint_as_float(b[i] & 0xffffe000u);
        }
    });
    host::multiply<8>(d, data);
}

namespace host {

template <class... Params, class... Args>
int launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Params...), Args... args) {
    return machine.launch({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes,
                          [&] { kernel(static_cast<Params>(args)...); });
}

}  // namespace host

}  // namespace gdn

#define GDN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    (static_cast<void>(stream), gdn::host::launch(grid, block, shared_bytes, kernel, __VA_ARGS__))
