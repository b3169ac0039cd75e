// The CPU operators of gdn.h: each picks the machine's kernels and shares the work out to threads.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "gdn.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace gdn::cpu {
namespace {

// What a thread has to have to do, in elements of state passed: some 20 us, several times what it
// takes to wake it.
constexpr int64_t kGrainWork = 1 << 18;
// Returned for sizes that gdn.h does not allow: cudaErrorInvalidValue, so that one function
// explains all codes.
constexpr int kInvalidValue = 1;

bool is_supported(const Kernels& kernels) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (&kernels == &kAvx512Kernels) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
    if (&kernels == &kAvx2Kernels) {
        unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    }
#endif
    return &kernels == &kBaselineKernels;
}

// The supported kernels of that name, or the best ones (null name); null if there are none.
const Kernels* find_kernels(const char* name) {
    const Kernels* const best_first[] = {
#if defined(__x86_64__)
        &kAvx512Kernels,
        &kAvx2Kernels,
#endif
        &kBaselineKernels,
    };
    for (const Kernels* kernels : best_first) {
        if ((!name || std::strcmp(name, kernels->name) == 0) && is_supported(*kernels)) {
            return kernels;
        }
    }
    return nullptr;
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> kernels{find_kernels(nullptr)};
    return kernels;
}

const Kernels& kernels() {
    return *chosen().load(std::memory_order_relaxed);
}

// A thread's own, from its first call to its end.
Scratch& scratch() {
    thread_local const std::unique_ptr<Scratch> mine(new Scratch);
    return *mine;
}

int64_t divide_up(int64_t x, int64_t by) {
    return (x + by - 1) / by;
}

// Units that make up a thread's least share, at `work` elements each.
int64_t grain(int64_t work) {
    return work > 0 ? divide_up(kGrainWork, work) : kGrainWork;
}

bool are_heads(int32_t num_k_heads, int32_t k_dim, int32_t v_dim) {
    const auto is_dim = [](int32_t dim) { return 1 <= dim && dim <= kGdnMaxHeadDim; };
    return num_k_heads >= 1 && is_dim(k_dim) && is_dim(v_dim);
}

bool is_width(int32_t width) {
    return 2 <= width && width <= kGdnMaxConvWidth;
}

int run_rule(const GdnRule& args, bool prefill) {
    if (!are_heads(args.num_k_heads, args.k_dim, args.v_dim)) return kInvalidValue;
    if (args.num_sequences == 0 || args.num_v_heads == 0) return 0;
    const int64_t heads = args.num_sequences * args.num_v_heads;
    const int64_t tokens = divide_up(args.num_tokens, args.num_sequences);
    // Rows are only parted where there are too few heads to go round and enough work.
    const int64_t threads = num_threads();
    RulePlan plan{heads, 1, args.v_dim};
    while (plan.num_units < threads && plan.tile_rows > 2 * kMaxLanes &&
           tokens * plan.tile_rows * args.k_dim > 2 * kGrainWork) {
        plan.tile_rows = static_cast<int32_t>(divide_up(plan.tile_rows / 2, kMaxLanes)) * kMaxLanes;
        plan.tiles = static_cast<int32_t>(divide_up(args.v_dim, plan.tile_rows));
        plan.num_units = heads * plan.tiles;
    }
    const int64_t work = tokens * plan.tile_rows * args.k_dim;
    parallel_for(plan.num_units, grain(work), [&](int64_t begin, int64_t end) {
        kernels().rule(args, prefill, plan, begin, end, scratch());
    });
    return 0;
}

int run_conv(const GdnConv& args) {
    if (!is_width(args.width)) return kInvalidValue;
    if (args.num_sequences == 0 || args.num_channels == 0) return 0;
    const int64_t threads = num_threads();
    int32_t block = kConvChannels;
    while (block > 8 * kMaxLanes &&
           divide_up(args.num_channels, block) * args.num_sequences < 2 * threads) {
        block /= 2;
    }
    const int64_t units = divide_up(args.num_channels, block) * args.num_sequences;
    const int64_t work = divide_up(args.num_tokens, args.num_sequences) * block * 4;
    parallel_for(units, grain(work), [&](int64_t begin, int64_t end) {
        kernels().conv(args, block, begin, end, scratch());
    });
    return 0;
}

bool is_step(const GdnStep& args) {
    return are_heads(args.num_k_heads, args.k_dim, args.v_dim) && is_width(args.width);
}

// A unit is a key head with its value heads, in one sequence.
int64_t step_grain(const GdnStep& args, int64_t tokens) {
    const int64_t group = args.num_v_heads / args.num_k_heads;
    return grain(tokens * group * args.v_dim * args.k_dim);
}

}  // namespace
}  // namespace gdn::cpu

using namespace gdn::cpu;

int gdn_cpu_gated_delta_rule_recurrence(const GdnRule* args) {
    return run_rule(*args, false);
}

int gdn_cpu_chunked_gated_delta_rule_recurrence(const GdnRule* args) {
    return run_rule(*args, false);
}

int gdn_cpu_gdn_prefill(const GdnRule* args) {
    return run_rule(*args, true);
}

int gdn_cpu_causal_conv1d_update(const GdnConv* args) {
    GdnConv equal = *args;
    equal.starts = nullptr;
    return run_conv(equal);
}

int gdn_cpu_causal_conv1d_full(const GdnConv* args) {
    return run_conv(*args);
}

int gdn_cpu_fused_gdn_gating(const GdnGating* args) {
    const int64_t work = 32 * int64_t{args->num_v_heads};
    parallel_for(args->num_tokens, grain(work),
                 [&](int64_t begin, int64_t end) { kernels().gating(*args, begin, end); });
    return 0;
}

int gdn_cpu_gdn_gated_norm(const GdnNorm* args) {
    const int64_t rows = args->num_tokens * args->num_v_heads;
    parallel_for(rows, grain(4 * int64_t{args->v_dim}),
                 [&](int64_t begin, int64_t end) { kernels().norm(*args, begin, end); });
    return 0;
}

int gdn_cpu_gdn_decode_step(const GdnStep* args) {
    if (!is_step(*args)) return kInvalidValue;
    const int64_t units = args->num_sequences * args->num_k_heads;
    parallel_for(units, step_grain(*args, 1), [&](int64_t begin, int64_t end) {
        kernels().decode(*args, begin, end, scratch());
    });
    return 0;
}

int gdn_cpu_gdn_verify(const GdnStep* args) {
    if (!is_step(*args)) return kInvalidValue;
    if (args->num_draft < 0 || args->num_draft > kGdnMaxDraftTokens ||
        args->num_draft > args->max_draft) {
        return kInvalidValue;
    }
    const int64_t units = args->num_sequences * args->num_k_heads;
    parallel_for(units, step_grain(*args, 1 + args->num_draft), [&](int64_t begin, int64_t end) {
        kernels().verify(*args, begin, end, scratch());
    });
    return 0;
}

const char* gdn_cpu_capability(void) {
    return kernels().name;
}

int gdn_cpu_set_capability(const char* name) {
    const Kernels* found = find_kernels(name);
    if (!found) return kInvalidValue;
    chosen().store(found, std::memory_order_relaxed);
    return 0;
}
