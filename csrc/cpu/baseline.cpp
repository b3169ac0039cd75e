// The kernels for whatever the compiler takes as a given: SSE2 on x86-64, NEON on aarch64.

#define GDN_CPU_LANES 4
#define GDN_CPU_NAME "baseline"
#define GDN_CPU_KERNELS kBaselineKernels
#include "kernels.h"
