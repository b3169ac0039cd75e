// The primitives of sm90.cuh on the host's fibers.
//
// What is asynchronous happens at one of two moments, whichever the order of fibers asks for: as late
// as it may, at the wait for it, so that what uses it too early finds it missing; or at once, so that
// what it needs must be there already, and what it overwrites must be done with. Registers and
// descriptors are laid out as the PTX ISA has them.

#pragma once

#include <algorithm>
#include <unordered_map>

#include "device.h"

#define GDN_SM90A_CODE

namespace gdn::host {

constexpr int kWarpgroupSize = 128;

[[noreturn]] inline void stop(const char* what) {
    std::fprintf(stderr, "thread %d: %s\n", machine.current().rank, what);
    std::abort();
}

// A copy in bulk, or one of cp.async that an mbarrier follows.
struct BulkCopy {
    void* to;
    const void* from;
    size_t bytes;
    bool valid;

    void make() const {
        if (valid) {
            std::memcpy(to, from, bytes);
        } else {
            std::memset(to, 0, bytes);
        }
    }
};

struct MbarrierState {
    int arrivals = 0, pending = 0;
    int owner = 0;              // the thread that initialised it
    int64_t missing_bytes = 0;  // that are expected and that no copy was asked for
    int phase = 0;
    bool is_fenced = false;
    std::vector<BulkCopy> copies;  // of the running phase, not made yet

    // Ends the phase if all is there, or will be once the copies are made.
    void advance() {
        if (pending != 0 || missing_bytes != 0) return;
        for (const BulkCopy& copy : copies) copy.make();
        copies.clear();
        pending = arrivals, ++phase;
    }
};

// A product of a fiber that was asked for: its own registers, and the right operand.
struct Product {
    float (*d)[4];
    const uint32_t* a;
    uint64_t b;
    int columns;
    bool is_mn_major, adds;

    int registers() const { return columns / 2; }  // of d
};

struct ProductQueue {
    std::vector<std::vector<Product>> groups{1};  // the open one last
    // What accumulators will hold; until a wait gives it back they are full of NaN.
    std::unordered_map<float (*)[4], std::vector<float>> sums;
    bool is_fenced = false;
};

// What a block's asynchronous units have before them.
struct Hopper {
    uint64_t block = ~uint64_t{0};
    std::vector<MbarrierState> barriers;
    std::vector<ProductQueue> queues;  // by thread
    Barrier warpgroups[kMaxThreads / kWarpgroupSize];

    static Hopper& of_this_block();

    ProductQueue& own() { return queues[machine.current().rank]; }

    // Waits for the warpgroup's other threads; `act` is done once, by the last one.
    template <class Act>
    void meet_warpgroup(const Act& act, const char* where) {
        const int group = machine.current().rank / kWarpgroupSize;
        Barrier& barrier = warpgroups[group];
        if (barrier.waiting.size() + 1 == kWarpgroupSize) act(&queues[group * kWarpgroupSize]);
        machine.meet(barrier, kWarpgroupSize, where);
    }
};

inline Hopper hopper;

inline Hopper& Hopper::of_this_block() {
    if (hopper.block != machine.blocks_begun()) {
        hopper.block = machine.blocks_begun();
        hopper.barriers.clear();
        hopper.queues.assign(kMaxThreads, {});
        for (Barrier& barrier : hopper.warpgroups) barrier.waiting.clear();
    }
    return hopper;
}

// An mbarrier's eight bytes hold a mark and the number of its state.
constexpr uint64_t kMbarrierMark = 0x6d62617200000000u;

inline MbarrierState& state_of(const Mbarrier* barrier) {
    std::vector<MbarrierState>& barriers = Hopper::of_this_block().barriers;
    const uint64_t index = *barrier ^ kMbarrierMark;
    if (index >= barriers.size()) stop("use of an mbarrier that was not initialised");
    return barriers[index];
}

// An element of the right operand, where the descriptor's fields and the swizzle put it.
inline float right_element(uint64_t descriptor, bool is_mn_major, int k, int n) {
    const auto field = [&](int first, int bits) {
        return static_cast<uint32_t>(descriptor >> first & ((uint64_t{1} << bits) - 1));
    };
    const uint32_t start = field(0, 14) * 16, leading = field(16, 14) * 16;
    const uint32_t stride = field(32, 14) * 16;
    if (field(62, 2) != 1) stop("a product's operand without the 128-byte swizzle");
    if (field(49, 3) != 0 || (start & 0x380) != 0) {
        stop("a product's operand does not begin with its swizzle's pattern");
    }
    const uint32_t linear = is_mn_major
                                ? k / 8 * stride + k % 8 * 128 + n / 64 * leading + n % 64 * 2
                                : n / 8 * stride + n % 8 * 128 + k * 2;
    const uint32_t at = start + linear;
    const uint32_t swizzled = at ^ (at >> 7 & 7) << 4;
    if (swizzled + 2 > machine.shared_bytes()) stop("a product's operand ends past shared memory");
    f16 element;
    std::memcpy(&element, machine.shared() + swizzled, 2);
    return to_float(element);
}

// Carries out a product for the 128 threads of a warpgroup, each of whom has asked for it.
template <class ProductOf, class SumOf>
void multiply_warpgroup(const ProductOf& product_of, const SumOf& sum_of) {
    static float a[64][16], b[16][64], d[64][64];
    const Product& product = product_of(0);
    const int columns = product.columns, registers = product.registers();
    for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < columns; ++n)
            b[k][n] = right_element(product.b, product.is_mn_major, k, n);
    }
    const auto row_of = [](int thread) { return thread / 32 * 16 + thread % 32 / 4; };
    for (int thread = 0; thread < kWarpgroupSize; ++thread) {
        const Product& own = product_of(thread);
        if (own.b != product.b || own.columns != columns ||
            own.is_mn_major != product.is_mn_major || own.adds != product.adds) {
            stop("threads of a warpgroup ask for different products");
        }
        const int row = row_of(thread), pair = thread % 4 * 2;
        for (int i = 0; i < 4; ++i) {
            const float2 x = unpack2<f16>(own.a[i]);
            a[row + i % 2 * 8][pair + i / 2 * 8] = x.x;
            a[row + i % 2 * 8][pair + i / 2 * 8 + 1] = x.y;
        }
        const float* sum = sum_of(thread);
        for (int i = 0; i < registers; ++i) {
            d[row + i % 4 / 2 * 8][i / 4 * 8 + pair + i % 2] = product.adds ? sum[i] : 0.0f;
        }
    }
    for (int m = 0; m < 64; ++m) {
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < columns; ++n) d[m][n] += a[m][k] * b[k][n];
        }
    }
    for (int thread = 0; thread < kWarpgroupSize; ++thread) {
        float* sum = sum_of(thread);
        for (int i = 0; i < registers; ++i) {
            sum[i] = d[row_of(thread) + i % 4 / 2 * 8][i / 4 * 8 + thread % 4 * 2 + i % 2];
        }
    }
}

// Carries out a warpgroup's oldest groups but for the newest `kept` ones.
inline void complete_products(ProductQueue* queues, size_t kept) {
    const size_t groups = queues[0].groups.size() - 1;
    const size_t done = groups > kept ? groups - kept : 0;
    for (int thread = 0; thread < kWarpgroupSize; ++thread) {
        if (queues[thread].groups.size() - 1 != groups || !queues[thread].groups.back().empty()) {
            stop("threads of a warpgroup wait after different groups, or within one");
        }
    }
    for (size_t group = 0; group < done; ++group) {
        const size_t products = queues[0].groups[group].size();
        for (size_t i = 0; i < products; ++i) {
            const auto product_of = [&](int thread) -> const Product& {
                return queues[thread].groups[group].at(i);
            };
            multiply_warpgroup(product_of, [&](int thread) {
                return queues[thread].sums.at(product_of(thread).d).data();
            });
        }
    }
    for (int thread = 0; thread < kWarpgroupSize; ++thread) {
        ProductQueue& queue = queues[thread];
        queue.groups.erase(queue.groups.begin(),
                           queue.groups.begin() + static_cast<std::ptrdiff_t>(done));
        for (auto sum = queue.sums.begin(); sum != queue.sums.end();) {
            bool is_under_way = false;
            for (const auto& group : queue.groups) {
                for (const Product& product : group) is_under_way |= product.d == sum->first;
            }
            if (is_under_way) {
                ++sum;
            } else {
                std::copy(sum->second.begin(), sum->second.end(), sum->first[0]);
                sum = queue.sums.erase(sum);
            }
        }
    }
}

}  // namespace gdn::host

namespace gdn {

inline uint32_t shared_offset(const void* p) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - host::machine.shared());
}

inline void mbarrier_init(Mbarrier* barrier, int arrivals) {
    host::check_aligned(barrier, 8, "mbarrier.init");
    std::vector<host::MbarrierState>& barriers = host::Hopper::of_this_block().barriers;
    *barrier = host::kMbarrierMark ^ barriers.size();
    host::MbarrierState& state = barriers.emplace_back();
    state.arrivals = state.pending = arrivals, state.owner = host::machine.current().rank;
}
inline void fence_proxy_async() {
    for (host::MbarrierState& barrier : host::Hopper::of_this_block().barriers) {
        if (barrier.owner == host::machine.current().rank) barrier.is_fenced = true;
    }
}

namespace host {

inline void arrive(MbarrierState& barrier) {
    barrier.advance();
    if (barrier.pending-- == 0) stop("one arrival too many at an mbarrier");
    if (barrier.copies.empty()) barrier.advance();
}

}  // namespace host

inline void mbarrier_arrive(Mbarrier* barrier) {
    host::arrive(host::state_of(barrier));
}
inline void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
    host::MbarrierState& state = host::state_of(barrier);
    state.advance();
    state.missing_bytes += bytes;
    host::arrive(state);
}
inline void mbarrier_arrive_after_copies(Mbarrier* barrier) {
    host::MbarrierState& state = host::state_of(barrier);
    state.advance();
    auto& groups = host::machine.current().copies;
    for (const auto& group : groups) {
        for (const host::PendingCopy& copy : group) {
            state.copies.push_back({copy.to, copy.from, 16, copy.valid});
        }
    }
    groups.assign(1, {});
    host::arrive(state);
}
inline void mbarrier_wait(Mbarrier* barrier, int parity) {
    host::machine.wait_until(
        [&] {
            host::MbarrierState& state = host::state_of(barrier);
            state.advance();
            return (state.phase & 1) != parity;
        },
        "mbarrier.try_wait");
}

inline void bulk_copy(void* to, const void* from, int bytes, Mbarrier* barrier) {
    host::check_aligned(to, 16, "cp.async.bulk to");
    host::check_aligned(from, 16, "cp.async.bulk from");
    if (bytes % 16 != 0) host::stop("cp.async.bulk of bytes that are no multiple of 16");
    if (size_t{shared_offset(to)} + bytes > host::machine.shared_bytes()) {
        host::stop("cp.async.bulk to a place past shared memory");
    }
    host::MbarrierState& state = host::state_of(barrier);
    if (!state.is_fenced) host::stop("cp.async.bulk to an mbarrier that was not fenced");
    state.advance();
    const host::BulkCopy copy{to, from, static_cast<size_t>(bytes), true};
    state.missing_bytes -= bytes;
    if (host::machine.is_eager()) {
        copy.make();
        state.advance();
    } else {
        state.copies.push_back(copy);
    }
}

template <int kRegisters>
inline void lower_registers() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
inline void raise_registers() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

inline void stmatrix_x4_trans(SharedAddress row, const uint32_t (&r)[4]) {
    constexpr int kLaneBytes = 24;
    host::check_aligned(row, 16, "stmatrix");
    const unsigned char* data = host::exchange("stmatrix", [&](unsigned char* to) {
        std::memcpy(to + kLaneBytes * host::lane(), &row, 8);
        std::memcpy(to + kLaneBytes * host::lane() + 8, r, 16);
    });
    // A lane stores the row that it has named: column lane % 8 of the fragment.
    const int matrix = host::lane() / 8, column = host::lane() % 8;
    for (int i = 0; i < 8; ++i) {
        const int holder = i * 4 + column / 2;
        std::memcpy(const_cast<unsigned char*>(row) + 2 * i,
                    data + kLaneBytes * holder + 8 + 4 * matrix + column % 2 * 2, 2);
    }
}

inline void wgmma_fence() {
    host::Hopper::of_this_block().own().is_fenced = true;
}
inline void wgmma_commit() {
    host::ProductQueue& queue = host::Hopper::of_this_block().own();
    queue.groups.emplace_back();
    queue.is_fenced = false;
}
template <int kGroups>
inline void wgmma_wait() {
    host::Hopper::of_this_block().meet_warpgroup(
        [](host::ProductQueue* queues) { host::complete_products(queues, kGroups); },
        "wgmma.wait_group");
}
template <class Registers>
inline void wgmma_settle(Registers&) {}
template <int N>
inline void wgmma_settle(float (*)[4]) {}

template <int N, PanelRows kPanelRows, bool kAdds>
inline void wgmma(float (*d)[4], const uint32_t (&a)[4], uint64_t b) {
    host::Hopper& hopper = host::Hopper::of_this_block();
    host::ProductQueue& queue = hopper.own();
    if (!queue.is_fenced) host::stop("a group of products without a fence before it");
    const host::Product product{d, a, b, N, kPanelRows == PanelRows::kRows, kAdds};
    if (host::machine.is_eager()) {
        queue.groups.back().push_back(product);
        hopper.meet_warpgroup(
            [](host::ProductQueue* queues) {
                const auto product_of = [&](int thread) -> const host::Product& {
                    return queues[thread].groups.back().at(0);
                };
                host::multiply_warpgroup(product_of,
                                         [&](int thread) { return product_of(thread).d[0]; });
                for (int i = 0; i < host::kWarpgroupSize; ++i) queues[i].groups.back().clear();
            },
            "wgmma.mma_async");
        return;
    }
    queue.groups.back().push_back(product);
    if (queue.sums.count(d) == 0) queue.sums[d].assign(d[0], d[0] + product.registers());
    std::fill(d[0], d[0] + product.registers(), std::nanf(""));
}

}  // namespace gdn
