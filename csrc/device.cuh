// The device primitives that C++ does not have, and how kernels are launched.
//
// One text, two meanings: CUDA, and with GDN_HOST the fibers of csrc/host, on which the tests run the
// kernels' arithmetic without a GPU. Kernels use CUDA's language and what is named here, no more.

#pragma once

#ifdef GDN_HOST
#include "host/device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#define GDN_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace gdn {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float x) {
    return x;
}
__device__ __forceinline__ float to_float(bf16 x) {
    return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(f16 x) {
    return __half2float(x);
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
    if constexpr (std::is_same_v<T, bf16>) {
        return __float2bfloat16_rn(x);
    } else if constexpr (std::is_same_v<T, f16>) {
        return __float2half_rn(x);
    } else {
        return x;
    }
}

// Two values in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
    uint32_t packed;
    if constexpr (std::is_same_v<T, bf16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        memcpy(&packed, &pair, 4);
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        memcpy(&packed, &pair, 4);
    }
    return packed;
}
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t packed) {
    if constexpr (std::is_same_v<T, bf16>) {
        __nv_bfloat162 pair;
        memcpy(&pair, &packed, 4);
        return __bfloat1622float2(pair);
    } else {
        __half2 pair;
        memcpy(&pair, &packed, 4);
        return __half22float2(pair);
    }
}

// To a few parts in a million.
__device__ __forceinline__ float fast_exp(float x) {
    return __expf(x);
}
__device__ __forceinline__ float fast_divide(float x, float y) {
    return __fdividef(x, y);
}

// A place in shared memory, to which offsets in bytes can be added: half the registers of a pointer.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes to shared memory in the background; fills them with zeros when not valid.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
}
// Closes a group of copies; a wait leaves the newest kGroups groups under way.
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory");
}

// Loads 8 x 8 matrices of 16-bit elements; lane 8 i + r names row r of matrix i in shared memory.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
}

// d += a b, a 16 x 16, b 16 x 8, in the fragments of the PTX ISA.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, bf16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

__device__ __forceinline__ uint32_t to_tf32(float x) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "f"(x));
    return rounded;
}

// d += a b, a 16 x 8, b 8 x 8, of values from to_tf32.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    cudaDeviceGetAttribute(&value, attribute, device);
    return value;
}
inline int multiprocessor_count() {
    return device_attribute(cudaDevAttrMultiProcessorCount);
}
// Of one block, in bytes.
inline int max_shared_bytes() {
    return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}
// 90 for sm_90.
inline int compute_capability() {
    return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
           device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// Launches a kernel; returns 0 or the code of what went wrong. More than 48 KiB of dynamic shared
// memory has to be asked for.
template <class... Params, class... Args>
int launch(dim3 grid, dim3 block, size_t shared_bytes, void* stream, void (*kernel)(Params...),
           Args... args) {
    if (shared_bytes > 48 * 1024) {
        const cudaError_t raised = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        if (raised != cudaSuccess) return raised;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
    return launched != cudaSuccess ? launched : cudaGetLastError();
}

}  // namespace gdn

#define GDN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    gdn::launch(grid, block, shared_bytes, stream, kernel, __VA_ARGS__)

#endif
