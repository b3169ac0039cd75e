// The CPU kernels, once for each instruction set: the source files avx512.cpp, avx2.cpp and
// baseline.cpp choose it, set GDN_CPU_LANES (floats in a vector) and GDN_CPU_KERNELS (the name of
// the table), and include this file.
//
// All of it has internal linkage and calls no template or inline function from elsewhere: the
// linker keeps one copy of such a function, and it could be one that the machine cannot run. For
// that reason there is no C++ header in here but those of types.

#include <stdint.h>

#include "dispatch.h"

#if defined(__clang__)
#define GDN_UNROLL _Pragma("unroll")
#else
#define GDN_UNROLL _Pragma("GCC unroll 16")
#endif
#define GDN_INLINE inline __attribute__((always_inline))

namespace gdn::cpu {
namespace {

constexpr int kLanes = GDN_CPU_LANES;

#include "vector.h"

// Calls f with a value of the C++ type of a GdnDtype.
template <class F>
void with_dtype(int dtype, const F& f) {
    switch (dtype) {
        case kGdnFloat16:
            return f(F16{});
        case kGdnBFloat16:
            return f(Bf16{});
        default:
            return f(float{});
    }
}

// Parts that use those before them are apart, so that sorting leaves their order.
#include "functions.h"

#include "rule.h"

#include "conv.h"
#include "elementwise.h"
#include "rule_units.h"
#include "step.h"

}  // namespace

const Kernels GDN_CPU_KERNELS = {GDN_CPU_NAME, rule_units,   conv_units,  gating_units,
                                 norm_units,   decode_units, verify_units};

}  // namespace gdn::cpu
