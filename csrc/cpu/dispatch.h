// What gdn_cpu.cpp and the kernels of each instruction set share: their table and their scratch.
//
// Only declarations and plain data: a function defined here would be compiled once for every
// instruction set under one name, and the linker could keep the copy the machine cannot run.

#pragma once

#include "../gdn.h"

namespace gdn::cpu {

enum {
    kMaxLanes = 16,           // floats in the widest vector
    kConvChannels = 1024,     // channels that a convolution keeps the taps of at a time
    kTileFloats = 256 * 256,  // of states that cannot be worked on in place
    kStepRows = 32,           // rows of a state that gdn_decode_step and gdn_verify take at a time
};

// Two float32 rows per token or one per channel; [.] are the largest sizes, of which a call uses
// the first `k_pad` or so, densely.
struct alignas(64) Scratch {
    float keys[kMaxLanes * kGdnMaxHeadDim];                  // [token][k_pad]
    float queries[kMaxLanes * kGdnMaxHeadDim];               // [token][k_pad]
    float transposed[kGdnMaxHeadDim * 2 * kMaxLanes];        // [k_pad][keys, queries][token]
    float key_products[kMaxLanes * kMaxLanes];               // [s][t]: k_s . k_t
    float query_products[kMaxLanes * kMaxLanes];             // [s][t]: k_s . q_t
    float values[(kGdnMaxHeadDim + kMaxLanes) * kMaxLanes];  // v, then out
    float deltas[kGdnMaxHeadDim];                            // [row]
    float tiles[kTileFloats];                                // states in float32, [row][k_pad]
    float heads[kGdnMaxDraftTokens * kGdnMaxHeadDim];  // v of one head, then out, [token][v_pad]
    float fold_keys[kMaxLanes * kGdnMaxHeadDim];       // [ring entry][k_pad]
    float fold_weights[(kStepRows + kMaxLanes) * kMaxLanes];  // [row][ring entry]
    float taps[kGdnMaxConvWidth * kConvChannels];             // [tap][channel]
};

// How the heads and sequences of a GdnRule are cut into units of work.
struct RulePlan {
    int64_t num_units;  // k_heads * sequences * (v_heads / k_heads) * tiles, in that order
    int32_t tiles;      // of a value head's rows
    int32_t tile_rows;
};

// One instruction set's kernels, each over a range of units of work.
struct Kernels {
    const char* name;
    // Units of `plan`.
    void (*rule)(const GdnRule&, bool prefill, const RulePlan& plan, int64_t begin, int64_t end,
                 Scratch&);
    // Units are blocks of `block` channels times sequences, in that order.
    void (*conv)(const GdnConv&, int32_t block, int64_t begin, int64_t end, Scratch&);
    // Units are tokens.
    void (*gating)(const GdnGating&, int64_t begin, int64_t end);
    // Units are tokens times value heads.
    void (*norm)(const GdnNorm&, int64_t begin, int64_t end);
    // Units are sequences times key heads.
    void (*decode)(const GdnStep&, int64_t begin, int64_t end, Scratch&);
    void (*verify)(const GdnStep&, int64_t begin, int64_t end, Scratch&);
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace gdn::cpu

// For tests and benchmarks: makes the calls that follow use one of the instruction sets that
// `gdn_cpu_capability` can name, or the best one (null). Returns 0, or 1 if this machine lacks it.
extern "C" int gdn_cpu_set_capability(const char* name);
