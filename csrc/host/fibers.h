// A block's threads as fibers of one host thread, so that the kernels' arithmetic runs without a
// GPU. Blocks run one after another. A fiber runs until it waits at a barrier, so a missing barrier
// shows as values that are not there yet, and the more so in another order of fibers
// (gdn_host_set_order). What it cannot show: speed, races that only true concurrency has, and
// anything about memory beyond the order of accesses.

#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace gdn::host {

constexpr int kMaxThreads = 1024;
constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kMaxSharedBytes = 227 << 10;

// Codes of GDN_LAUNCH beside 0; the texts are in error_text.
enum LaunchError { kInvalidLaunch = 9001, kStuckLaunch = 9002 };

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

// A copy that cp.async has been asked for and that no wait has completed.
struct PendingCopy {
    void* to;
    const void* from;
    bool valid;

    void make() const {
        if (valid) {
            std::memcpy(to, from, 16);
        } else {
            std::memset(to, 0, 16);
        }
    }
};

struct Fiber {
    jmp_buf resume;
    std::unique_ptr<unsigned char[]> stack;
    Index thread;
    int rank = 0;  // linear thread index
    bool is_started = false;
    bool has_ended = true;
    const char* waits_at = "";
    unsigned exchanges = 0;                        // of its warp so far
    std::vector<std::vector<PendingCopy>> copies;  // by group, the open one last
};

// A meeting point of `expected` fibers.
struct Barrier {
    std::vector<int> waiting;
};

// What the lanes of a warp hand each other; two buffers, so that one is read while the other fills.
struct WarpExchange {
    Barrier barrier;
    int num_lanes = 0;
    alignas(16) unsigned char data[2][kWarpSize * 64];
};

class Machine {
  public:
    template <class Body>
    int launch(Index grid, Index block, size_t shared_bytes, const Body& body) {
        const size_t threads = size_t{block.x} * block.y * block.z;
        if (threads == 0 || threads > kMaxThreads || shared_bytes > kMaxSharedBytes ||
            grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 ||
            grid.x > 2147483647u) {
            return kInvalidLaunch;
        }
        grid_ = grid, block_ = block, shared_bytes_ = shared_bytes;
        body_ = [](const void* context) { (*static_cast<const Body*>(context))(); };
        context_ = &body;
        const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
        for (uint64_t i = 0; i < blocks; ++i) {
            const uint64_t at = order_ == 1 ? blocks - 1 - i : i;
            index_ = {static_cast<unsigned>(at % grid.x),
                      static_cast<unsigned>(at / grid.x % grid.y),
                      static_cast<unsigned>(at / grid.x / grid.y)};
            if (!run_block(static_cast<int>(threads))) return kStuckLaunch;
        }
        return 0;
    }

    Fiber& current() { return fibers_[current_]; }
    Index block_index() const { return index_; }
    Index block_dim() const { return block_; }
    Index grid_dim() const { return grid_; }
    unsigned char* shared() { return shared_; }
    size_t shared_bytes() const { return shared_bytes_; }
    uint64_t blocks_begun() const { return blocks_begun_; }
    WarpExchange& warp() { return warps_[fibers_[current_].rank / kWarpSize]; }
    void set_order(int order) { order_ = order, random_ = 0x9e3779b9u + order; }
    // Whether what is asynchronous happens at once, and not as late as it may.
    bool is_eager() const { return order_ == 1; }
    int capability() const { return capability_; }
    void set_capability(int capability) { capability_ = capability; }

    // Blocks the current fiber until `expected` fibers have come.
    void meet(Barrier& barrier, int expected, const char* where) {
        barrier.waiting.push_back(current_);
        if (static_cast<int>(barrier.waiting.size()) == expected) {
            wake(barrier);
        }
        current().waits_at = where;
        leave();
    }

    // __syncthreads: of all threads of the block.
    void meet_block() { meet(block_barrier_, num_threads_, "__syncthreads"); }

    // A named barrier of some of the block's threads.
    void meet_named(int id, int expected) { meet(named_[id], expected, "a named barrier"); }

    // Blocks the current fiber until a condition holds, which other fibers bring about.
    template <class Condition>
    void wait_until(const Condition& holds, const char* where) {
        while (!holds()) {
            ++idle_polls_;
            current().waits_at = where;
            ready_.push_back(current_);
            leave();
        }
        idle_polls_ = 0;
    }

  private:
    bool run_block(int threads) {
        std::memset(shared_, 0xff, sizeof shared_);  // NaN in every float type
        num_threads_ = threads;
        ++blocks_begun_;
        block_barrier_.waiting.clear();
        for (Barrier& barrier : named_) barrier.waiting.clear();
        ready_.clear();
        for (int i = 0; i < threads; ++i) {
            Fiber& fiber = fibers_[i];
            fiber.rank = i;
            fiber.thread = {i % block_.x, i / block_.x % block_.y, i / block_.x / block_.y};
            fiber.has_ended = false;
            fiber.exchanges = 0;
            fiber.copies.assign(1, {});
            ready_.push_back(i);
        }
        for (int w = 0; w * kWarpSize < threads; ++w) {
            warps_[w].barrier.waiting.clear();
            const int left = threads - w * kWarpSize;
            warps_[w].num_lanes = left < kWarpSize ? left : kWarpSize;
        }
        shuffle(ready_);
        idle_polls_ = 0;
        for (int ended = 0; ended < threads;) {
            if (ready_.empty() || idle_polls_ > 4 * threads) {
                explain();
                for (Fiber& fiber : fibers_) fiber = Fiber{};
                return false;
            }
            next_.swap(ready_);
            ready_.clear();
            for (int fiber : next_) {
                enter(fiber);
                ended += fibers_[fiber].has_ended;
            }
        }
        return true;
    }

    void wake(Barrier& barrier) {
        shuffle(barrier.waiting);
        ready_.insert(ready_.end(), barrier.waiting.begin(), barrier.waiting.end());
        barrier.waiting.clear();
        idle_polls_ = 0;
    }

    void shuffle(std::vector<int>& fibers) {
        if (order_ == 0) return;
        for (size_t i = fibers.size(); i > 1; --i) {
            random_ = random_ * 1664525u + 1013904223u;
            const size_t j = order_ == 1 ? i - 1 : (random_ >> 8) % i;
            std::swap(fibers[i - 1], fibers[j]);
        }
        if (order_ == 1) {
            for (size_t i = 0, j = fibers.size(); i + 1 < j; ++i) std::swap(fibers[i], fibers[--j]);
        }
    }

    void enter(int fiber) {
        current_ = fiber;
        if (_setjmp(scheduler_) != 0) return;
        Fiber& next = fibers_[fiber];
        if (next.is_started) _longjmp(next.resume, 1);
        next.is_started = true;
        if (!next.stack) next.stack.reset(new unsigned char[kStackBytes]);
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = next.stack.get();
        context.uc_stack.ss_size = kStackBytes;
        context.uc_link = nullptr;
        makecontext(&context, &Machine::life, 0);
        setcontext(&context);
    }

    // Back to the scheduler; returns when the fiber is entered again.
    void leave() {
        if (_setjmp(fibers_[current_].resume) == 0) _longjmp(scheduler_, 1);
    }

    // A fiber lives through all launches, so that its stack is made once.
    static void life();

    void explain() {
        std::string places;
        for (int i = 0; i < num_threads_; ++i) {
            if (fibers_[i].has_ended) continue;
            if (places.size() > 400) {
                places += " ...";
                break;
            }
            places += " " + std::to_string(i) + ":" + fibers_[i].waits_at;
        }
        std::fprintf(stderr,
                     "block (%u, %u, %u) is stuck: some of its %d threads wait for others that "
                     "have ended or wait elsewhere:%s\n",
                     index_.x, index_.y, index_.z, num_threads_, places.c_str());
    }

    std::vector<Fiber> fibers_{kMaxThreads};
    std::vector<WarpExchange> warps_{kMaxThreads / kWarpSize};
    std::vector<int> ready_, next_;
    Barrier block_barrier_;
    Barrier named_[16];
    jmp_buf scheduler_;
    int current_ = 0, num_threads_ = 0, order_ = 0, idle_polls_ = 0, capability_ = 80;
    size_t shared_bytes_ = 0;
    uint64_t blocks_begun_ = 0;
    uint32_t random_ = 1;
    Index grid_, block_, index_;
    void (*body_)(const void*) = nullptr;
    const void* context_ = nullptr;
    alignas(1024) unsigned char shared_[kMaxSharedBytes];
};

inline Machine machine;

inline const char* error_text(int code) {
    return code == kStuckLaunch ? "a block is stuck at a barrier" : "a launch is out of bounds";
}

inline void Machine::life() {
    for (;;) {
        machine.body_(machine.context_);
        machine.current().has_ended = true;
        machine.idle_polls_ = 0;
        machine.leave();
    }
}

}  // namespace gdn::host

extern "C" {
// 0: by rank; 1: the other way round, and what is asynchronous happens at once; others: at random,
// with this seed.
__attribute__((used, visibility("default"))) inline void gdn_host_set_order(int order) {
    gdn::host::machine.set_order(order);
}
// The compute capability that launchers see: 80, or 90 for Hopper's own kernels.
__attribute__((used, visibility("default"))) inline void gdn_host_set_capability(int capability) {
    gdn::host::machine.set_capability(capability);
}
}
