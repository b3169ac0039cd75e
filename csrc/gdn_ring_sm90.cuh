// Hopper's scan of a prefill: the ring of stages in shared memory through which a chunk's operands come,
// and the warpgroup that fetches them.

#pragma once

#include "gdn_scan.cuh"
#include "sm90.cuh"

namespace gdn {
// Not anonymous: the passes for other architectures refer to little of it, and would say so.
namespace sm90 {

constexpr int kGroupThreads = 128;
constexpr int kGroupWarps = kGroupThreads / 32;
constexpr int kGroupRows = kGroupWarps * kWarpRows;  // rows of values of a warpgroup
constexpr int kMaxGroups = 2;
constexpr int kMaxThreads = (1 + kMaxGroups) * kGroupThreads;
constexpr int kStages = 3;
// Of a thread; a block of kMaxThreads has 65536 together.
constexpr int kFetchRegisters = 40, kScanRegisters = 232;
static_assert(kGroupThreads * (kFetchRegisters + kMaxGroups * kScanRegisters) <= 65536);

// A token's values lie 16 bytes further apart than they are long: ldmatrix then has no bank conflicts.
constexpr int kTokenBytes = 2 * kGroupRows + 16;
constexpr int kGroupValueBytes = kChunk * kTokenBytes;
constexpr int kPatternBytes = 1024;  // of the swizzle; stages begin at multiples of it

// Shared memory: stages of a ring that hold one chunk's operands each, every warp's outputs on their
// way to memory, and two barriers a stage.
template <int D>
struct ScanRing {
    static constexpr int kKeyBytes = kChunk * D * 2;
    static constexpr int kQueries = kKeyBytes, kInverses = 2 * kKeyBytes;
    static constexpr int kScores = kInverses + kTileBytes, kGates = kScores + kTileBytes;
    static constexpr int kBulkBytes = kGates + kGateBytes, kValues = kBulkBytes;
    static_assert(kValues % kPatternBytes == 0 && kGroupValueBytes % kPatternBytes == 0);

    unsigned char *stages, *outputs;
    Mbarrier *full, *empty;  // [kStages]: filled by the fetching warpgroup; read by all the others
    int stage_bytes;

    __device__ ScanRing(unsigned char* shared, int groups) {
        stages = shared + (-shared_offset(shared) & (kPatternBytes - 1));
        stage_bytes = kValues + groups * kGroupValueBytes;
        outputs = stages + kStages * stage_bytes;
        full = reinterpret_cast<Mbarrier*>(outputs + groups * kGroupWarps * kValueBytes);
        empty = full + kStages;
    }
    static size_t bytes(int groups) {
        return kPatternBytes + kStages * (kValues + groups * kGroupValueBytes) +
               groups * kGroupWarps * kValueBytes + 2 * kStages * sizeof(Mbarrier);
    }
};

// The stage of the ring that is next, and the parity of the phase that its barriers are in.
struct ScanTurn {
    int stage = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// The fetching warpgroup: of each chunk keys, queries, T, P and gates in bulk, whose images in the
// workspace are those of shared memory, and the values by cp.async, since tokens lie apart.
template <class T, int D>
__device__ __forceinline__ void fetch_chunks(const GdnRule& p, const PrefillWorkspace& w,
                                             const ScanUnit& unit, const ScanRing<D>& ring,
                                             int begin, int end) {
    using Ring = ScanRing<D>;
    const int4* chunks = reinterpret_cast<const int4*>(p.chunks);
    const int token_units = unit.warps * kRowBytes / 16;
    const int at = threadIdx.x % token_units, first = threadIdx.x / token_units;
    const int step = kGroupThreads / token_units;
    const T* head_values =
        static_cast<const T*>(p.v) + int64_t{unit.head} * p.v_dim + unit.first_row + at * 8;
    const int value_place =
        Ring::kValues + at / 8 * kGroupValueBytes + first * kTokenBytes + at % 8 * 16;
    ScanTurn turn;
    int4 described = chunks[begin];
#pragma unroll 1
    for (int chunk = begin; chunk < end; ++chunk) {
        unsigned char* stage = ring.stages + turn.stage * ring.stage_bytes;
        Mbarrier* full = ring.full + turn.stage;
        const int4 next = chunks[min(chunk + 1, end - 1)];
        mbarrier_wait(ring.empty + turn.stage, turn.parity ^ 1);
        if (threadIdx.x == 0) {
            mbarrier_arrive_expect(full, Ring::kBulkBytes);
            const int64_t key_tile = key_tile_offset(p, chunk, unit.k_head);
            const int64_t value_tile = value_tile_offset(p, chunk, unit.head);
            bulk_copy(stage, w.keys + key_tile, Ring::kKeyBytes, full);
            bulk_copy(stage + Ring::kInverses, w.inverses + value_tile, kTileBytes, full);
            bulk_copy(stage + Ring::kGates, w.gates + gate_offset(p, chunk, unit.head), kGateBytes,
                      full);
            bulk_copy(stage + Ring::kQueries, w.queries + key_tile, Ring::kKeyBytes, full);
            bulk_copy(stage + Ring::kScores, w.scores + value_tile, kTileBytes, full);
        }
        unsigned char* to = stage + value_place;
        const T* from = head_values + (described.x + first) * p.v_stride;
#pragma unroll 1
        for (int token = first; token < kChunk; token += step) {
            const bool valid = token < described.y;
            cp_async_16(to, valid ? from : static_cast<const T*>(p.v), valid);
            to += step * kTokenBytes, from += step * p.v_stride;
        }
        mbarrier_arrive_after_copies(full);
        described = next;
        turn.advance();
    }
    // No thread ends with copies of its own under way.
    cp_async_commit();
    cp_async_wait<0>();
}

}  // namespace sm90
}  // namespace gdn
