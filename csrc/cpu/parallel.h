// The one place that knows whose threads the CPU kernels run on: torch's, or none.

#pragma once

#include <cstdint>

#if !defined(GDN_CPU_SERIAL)
#include <torch/csrc/stable/ops.h>
#endif

namespace gdn::cpu {

// Calls body(begin, end) over ranges that make up [0, count), none shorter than `grain` unless it
// is the last; in this thread where one range is enough.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
    if (count <= 0) return;
#if defined(GDN_CPU_SERIAL)
    (void)grain;
    body(int64_t{0}, count);
#else
    if (count <= grain) return body(int64_t{0}, count);
    torch::stable::parallel_for(0, count, grain, body);
#endif
}

inline int64_t num_threads() {
#if defined(GDN_CPU_SERIAL)
    return 1;
#else
    return torch::stable::get_num_threads();
#endif
}

}  // namespace gdn::cpu
