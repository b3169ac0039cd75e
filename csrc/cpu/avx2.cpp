// The kernels for AVX2 with FMA and F16C. The instruction set is chosen here, and not by a flag of
// the build, which gives all source files the same ones.

#if defined(__x86_64__)

#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
#endif

#define GDN_CPU_LANES 8
#define GDN_CPU_NAME "avx2"
#define GDN_CPU_KERNELS kAvx2Kernels
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
