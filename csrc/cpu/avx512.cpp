// The kernels for AVX-512 F, BW, DQ and VL. The instruction set is chosen here, and not by a flag of
// the build, which gives all source files the same ones.

#if defined(__x86_64__)

#if !defined(__clang__)
// GCC 12 takes the undefined operands within its own intrinsics for ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include <immintrin.h>
#endif

#define GDN_CPU_LANES 16
#define GDN_CPU_NAME "avx512"
#define GDN_CPU_KERNELS kAvx512Kernels
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
