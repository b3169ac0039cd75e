// Hopper's asynchronous primitives: mbarriers, bulk copies, and products of warpgroups.
//
// One text, two meanings, as in device.cuh. Kernels that use these are compiled for sm_90a alone:
// their bodies stand under GDN_SM90A_CODE.

#pragma once

#include "device.cuh"

namespace gdn {

// A barrier in shared memory, of phases that end one after another: a phase ends when `arrivals`
// threads have arrived and all bytes that it was told to expect are there. Whoever initialises
// barriers calls fence_proxy_async, and then the block meets.
using Mbarrier = uint64_t;

// What the rows of a right operand's panel are: its columns, whose 16 elements lie side by side in a
// row (K-major), or its rows, whose 64 elements do (MN-major).
enum class PanelRows { kColumns, kRows };

}  // namespace gdn

#ifdef GDN_HOST
#include "host/sm90.h"
#else

// Set while nvcc compiles for sm_90a; other architectures of one build see kernels without a body.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define GDN_SM90A_CODE
#endif

namespace gdn {

// Where something lies in the window of shared memory.
__device__ __forceinline__ uint32_t shared_offset(const void* p) {
    return shared_address(p);
}

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}
// Orders this thread's earlier accesses to shared memory before those of the async proxy, which is
// who copies in bulk and reads the operands of products.
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
                 : "memory");
}
// Arrives, and has the phase expect so many bytes of bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}
// Arrives when all copies that this thread has asked cp.async for are there. It is one of the
// arrivals that the barrier was initialised with (noinc).
__device__ __forceinline__ void mbarrier_arrive_after_copies(Mbarrier* barrier) {
    asm volatile(
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(shared_address(barrier))
        : "memory");
}
// Waits for the end of the running phase if its parity is the given one, else for nothing: the first
// phase has parity 0, and a barrier that has just been initialised counts as past one of parity 1.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, int parity) {
    uint32_t has_ended;
    do {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}\n"
            : "=r"(has_ended)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (has_ended == 0);
}

// Copies a multiple of 16 bytes, between addresses that are multiples of 16, to shared memory in the
// background; the barrier's phase is told when they are there.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes,
                                          Mbarrier* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];\n" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// Gives a warpgroup fewer registers a thread, or waits until it has more.
template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// The reverse of ldmatrix_x4_trans: lane 8 i + r names where row r of matrix i goes, and gets there
// what the lanes hold of column r of the fragment's matrix i.
__device__ __forceinline__ void stmatrix_x4_trans(SharedAddress row, const uint32_t (&r)[4]) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(row),
        "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
        : "memory");
}

// The order of products: registers that a product reads or writes are written before the fence, and
// neither read nor written between the product and the wait that its group falls under.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
// Closes a group of products; a wait leaves the newest kGroups groups under way.
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kGroups) : "memory");
}
// After the wait: nothing that uses these registers moves up across it.
template <int N>
__device__ __forceinline__ void wgmma_settle(float (*d)[4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
    }
}
template <int N>
__device__ __forceinline__ void wgmma_settle(float (&d)[N][4]) {
    wgmma_settle<N>(&d[0]);
}
template <int N>
__device__ __forceinline__ void wgmma_settle(uint32_t (&a)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
    }
}

// An accumulator's registers, by rows of d, in a product's text and among its operands.
#define GDN_WGMMA_ROWS_4 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define GDN_WGMMA_ROWS_8                                                      \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "  \
    "%30, %31}"
#define GDN_WGMMA_ROW(constraint, row) \
    constraint(row[0]), constraint(row[1]), constraint(row[2]), constraint(row[3])
#define GDN_WGMMA_REGISTERS_4(constraint, d)                          \
    GDN_WGMMA_ROW(constraint, d[0]), GDN_WGMMA_ROW(constraint, d[1]), \
        GDN_WGMMA_ROW(constraint, d[2]), GDN_WGMMA_ROW(constraint, d[3])
#define GDN_WGMMA_REGISTERS_8(constraint, d)                               \
    GDN_WGMMA_REGISTERS_4(constraint, d), GDN_WGMMA_ROW(constraint, d[4]), \
        GDN_WGMMA_ROW(constraint, d[5]), GDN_WGMMA_ROW(constraint, d[6]),  \
        GDN_WGMMA_ROW(constraint, d[7])
// A product as text: its shape, d, and what follows it; whether it adds to d, "1" or "0"; then the
// outputs. What follows d is a, b, whether to add, both operands times 1, and 1 for an MN-major b.
#define GDN_WGMMA(shape, d_text, rest, adds, ...)                                             \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds                               \
                 ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32.f16.f16 " d_text ", " rest \
                 ";\n}\n"                                                                     \
                 : __VA_ARGS__                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kIsMnMajor))
#define GDN_WGMMA_REST_4 "{%16, %17, %18, %19}, %20, adds, 1, 1, %21"
#define GDN_WGMMA_REST_8 "{%32, %33, %34, %35}, %36, adds, 1, 1, %37"

// d (64 x N) = a b, or += a b, of f16, asynchronously: a 16 x N right operand in shared memory, N being
// 64 or 32, and the left one in registers as mma_m16n8k16 has it. Of d and a, warp w of the warpgroup
// holds rows 16 w to 16 w + 15: row lane / 4 of them in d[n][0] and d[n][1], 8 rows further in d[n][2]
// and d[n][3], columns 8 n + lane % 4 * 2 and the next one.
template <int N, PanelRows kPanelRows, bool kAdds>
__device__ __forceinline__ void wgmma(float (*d)[4], const uint32_t (&a)[4], uint64_t b) {
    static_assert(N == 64 || N == 32);
    constexpr int kIsMnMajor = kPanelRows == PanelRows::kRows;
    if constexpr (N == 64 && kAdds) {
        GDN_WGMMA("m64n64k16", GDN_WGMMA_ROWS_8, GDN_WGMMA_REST_8, "1",
                  GDN_WGMMA_REGISTERS_8("+f", d));
    } else if constexpr (N == 64) {
        GDN_WGMMA("m64n64k16", GDN_WGMMA_ROWS_8, GDN_WGMMA_REST_8, "0",
                  GDN_WGMMA_REGISTERS_8("=f", d));
    } else if constexpr (kAdds) {
        GDN_WGMMA("m64n32k16", GDN_WGMMA_ROWS_4, GDN_WGMMA_REST_4, "1",
                  GDN_WGMMA_REGISTERS_4("+f", d));
    } else {
        GDN_WGMMA("m64n32k16", GDN_WGMMA_ROWS_4, GDN_WGMMA_REST_4, "0",
                  GDN_WGMMA_REGISTERS_4("=f", d));
    }
}

#undef GDN_WGMMA_ROWS_4
#undef GDN_WGMMA_ROWS_8
#undef GDN_WGMMA_ROW
#undef GDN_WGMMA_REGISTERS_4
#undef GDN_WGMMA_REGISTERS_8
#undef GDN_WGMMA
#undef GDN_WGMMA_REST_4
#undef GDN_WGMMA_REST_8

}  // namespace gdn

#endif

namespace gdn {

// Names a product's right operand: 16 x N f16 of a panel whose rows are 128 bytes with the 128-byte
// swizzle, 8 rows being one pattern. The start is a pattern's first row (K-major: plus 32 bytes for
// each 16 elements to skip). The fields, lengths in units of 16 bytes:
//   bits 0-13   start address
//   bits 16-29  leading dimension offset. MN-major: from one pattern to the next along the columns;
//               a pattern holds all 64, so it is not used, and the stride stands in for it. K-major:
//               not used with a swizzle, 1 by convention
//   bits 32-45  stride dimension offset: from one pattern of 8 rows to the next
//   bits 49-51  base offset: 0, for patterns begin at multiples of 1024 bytes
//   bits 62-63  1: the 128-byte swizzle
template <PanelRows kPanelRows>
__device__ __forceinline__ uint64_t matrix_descriptor(const void* start) {
    constexpr uint64_t kStride = 1024 / 16;
    constexpr uint64_t kLeading = kPanelRows == PanelRows::kColumns ? 1 : kStride;
    return uint64_t{(shared_offset(start) & 0x3ffffu) >> 4} | kLeading << 16 | kStride << 32 |
           uint64_t{1} << 62;
}
// The descriptor of what lies so many bytes further.
__device__ __forceinline__ uint64_t descriptor_after(uint64_t descriptor, int bytes) {
    return descriptor + static_cast<uint64_t>(bytes >> 4);
}

}  // namespace gdn
