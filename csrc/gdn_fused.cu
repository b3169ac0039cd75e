// gdn_decode_step and gdn_verify in CUDA: all of the mixer between its projections in one launch.
//
// A block owns one value head of one sequence, since the gated norm needs all of v_dim. The blocks
// of a key head share its q and k channels: each computes them for itself, and the last one that
// has read them moves their window.

#include "device.cuh"
#include "gdn.h"
#include "launchers.h"
#include "vectors.cuh"

namespace gdn {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kTaps = 4;          // of the kernels with vector loads
constexpr int kWarpRows = 16;     // rows of the state that a warp holds there
constexpr int kAnyThreads = 256;  // of the kernel for any shape

// Four neighbouring elements as they lie in memory. They are widened only when they are needed, so
// that loads stay under way until then.
template <class T>
using Four = std::conditional_t<sizeof(T) == 4, float4, uint2>;

template <class T>
__device__ __forceinline__ const Four<T>* fours(const T* p) {
    return reinterpret_cast<const Four<T>*>(p);
}
template <class T>
__device__ __forceinline__ Four<T>* fours(T* p) {
    return reinterpret_cast<Four<T>*>(p);
}

template <class T>
__device__ __forceinline__ float4 widen(Four<T> x) {
    if constexpr (sizeof(T) == 4) {
        return x;
    } else {
        const float2 low = unpack2<T>(x.x), high = unpack2<T>(x.y);
        return make_float4(low.x, low.y, high.x, high.y);
    }
}
template <class T>
__device__ __forceinline__ Four<T> narrow(float4 x) {
    if constexpr (sizeof(T) == 4) {
        return x;
    } else {
        return make_uint2(pack2<T>(x.x, x.y), pack2<T>(x.z, x.w));
    }
}

// States are read and written once a step and never found in a cache, so they leave it first. Their
// loads are issued where they stand, ahead of the work that they overlap with.
#ifdef GDN_HOST
template <class Vector>
inline Vector load_streaming(const Vector* from) {
    return *from;
}
template <class Vector>
inline void store_streaming(Vector* to, Vector x) {
    *to = x;
}
template <class Vector>
inline void keep_narrow(Vector&) {}
inline void cp_async_8(void* to, const void* from) {
    memcpy(to, from, 8);
}
#else
__device__ __forceinline__ float4 load_streaming(const float4* from) {
    float4 x;
    asm volatile("ld.global.cs.v4.f32 {%0, %1, %2, %3}, [%4];\n"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(__cvta_generic_to_global(from))
                 : "memory");
    return x;
}
__device__ __forceinline__ uint2 load_streaming(const uint2* from) {
    uint2 x;
    asm volatile("ld.global.cs.v2.b32 {%0, %1}, [%2];\n"
                 : "=r"(x.x), "=r"(x.y)
                 : "l"(__cvta_generic_to_global(from))
                 : "memory");
    return x;
}
template <class Vector>
__device__ __forceinline__ void store_streaming(Vector* to, Vector x) {
    __stcs(to, x);
}
// Has the compiler widen x anew where it is used next, rather than hold what it has widened.
__device__ __forceinline__ void keep_narrow(uint2& x) {
    asm volatile("" : "+r"(x.x), "+r"(x.y));
}
__device__ __forceinline__ void keep_narrow(float4&) {}
__device__ __forceinline__ void cp_async_8(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;\n" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
}
#endif

// Copies four elements to shared memory in the background.
template <class T>
__device__ __forceinline__ void copy_four(Four<T>* to, const T* from) {
    if constexpr (sizeof(T) == 4) {
        cp_async_16(to, from, true);
    } else {
        cp_async_8(to, from);
    }
}

__device__ __forceinline__ float dot(float4 a, float4 b) {
    return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}
__device__ __forceinline__ float4 times(float4 a, float4 b) {
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
// a x + b y
__device__ __forceinline__ float4 combine(float a, float4 x, float b, float4 y) {
    return make_float4(a * x.x + b * y.x, a * x.y + b * y.y, a * x.z + b * y.z, a * x.w + b * y.w);
}
__device__ __forceinline__ float4 scaled(float a, float4 x) {
    return make_float4(a * x.x, a * x.y, a * x.z, a * x.w);
}

struct Dims {
    int k, v, width;  // of keys, of values, of the convolution
};

// The value head of one sequence that a block owns, and where its inputs lie.
struct Head {
    Dims dims;
    int num_draft, pending;
    int v_head, k_head, group;
    int sequence, conv_dim;
    int64_t slot;

    // Of a draft among the tokens of the batch.
    __device__ __forceinline__ int64_t token(int t) const {
        return int64_t{sequence} * num_draft + t;
    }
};

// blockIdx is (v_head, sequence % kGridRows, sequence / kGridRows).
constexpr int kGridRows = 65535;

__device__ __forceinline__ Head head_of_block(const GdnStep& p, Dims dims, int num_draft) {
    Head head;
    head.sequence = static_cast<int>(blockIdx.y + blockIdx.z * kGridRows);
    // The grid's last layer may be in part beyond the batch.
    head.slot = head.sequence < p.num_sequences ? p.slots[head.sequence] : -1;
    head.dims = dims;
    head.num_draft = head.sequence < p.num_sequences ? num_draft : 0;
    head.pending = 0;
    head.v_head = static_cast<int>(blockIdx.x);
    head.group = p.num_v_heads / p.num_k_heads;
    head.k_head = head.v_head / head.group;
    head.conv_dim = 2 * p.num_k_heads * dims.k + p.num_v_heads * dims.v;
    return head;
}

__device__ __forceinline__ bool is_held(const GdnStep& p, const Head& head) {
    return head.slot >= 0 && head.slot < p.num_slots;
}

__device__ __forceinline__ int pending_of(const GdnStep& p, const Head& head) {
    const int64_t pending = p.pending[head.sequence];
    return static_cast<int>(min(max(pending, int64_t{0}), int64_t{p.max_draft}));
}

// The first channel of the head's q (part 0), k (1) or v (2).
__device__ __forceinline__ int first_channel(const GdnStep& p, const Head& head, int part) {
    if (part == 2) {
        return 2 * p.num_k_heads * head.dims.k + head.v_head * head.dims.v;
    }
    return (part * p.num_k_heads + head.k_head) * head.dims.k;
}

// Row i of the inputs of the convolution: the width - 1 before the drafts, then the drafts. What is
// folded in comes from the ring.
template <class T>
__device__ __forceinline__ const T* input_row(const GdnStep& p, const Head& head, int i) {
    const int history = head.dims.width - 1;
    if (i >= history) {
        return static_cast<const T*>(p.mixed) + head.token(i - history) * p.mixed_stride;
    }
    i += head.pending;
    if (i < history) {
        return static_cast<const T*>(p.windows) + (head.slot * history + i) * head.conv_dim;
    }
    const int64_t entry = head.slot * p.max_draft + i - history;
    return static_cast<const T*>(p.ring_inputs) + entry * head.conv_dim;
}

// The head's part of an array [slot][max_draft][v_head][dim].
__device__ __forceinline__ int64_t ring_offset(const GdnStep& p, const Head& head, int entry,
                                               int dim) {
    return ((head.slot * p.max_draft + entry) * p.num_v_heads + head.v_head) * dim;
}

struct Gates {
    float beta, g;
};

template <class T>
struct GateInputs {
    T b, a;
    float a_log, dt_bias;

    static __device__ __forceinline__ GateInputs load(const GdnStep& p, const Head& head, int t) {
        const int64_t token = head.token(t);
        return {static_cast<const T*>(p.b)[token * p.b_stride + head.v_head],
                static_cast<const T*>(p.a)[token * p.a_stride + head.v_head], p.a_log[head.v_head],
                p.dt_bias[head.v_head]};
    }

    __device__ __forceinline__ Gates gates() const {
        return {sigmoid(to_float(b)), -expf(a_log) * softplus(to_float(a) + dt_bias)};
    }
};

// The head's output of draft t.
template <class T>
__device__ __forceinline__ T* out_of(const GdnStep& p, const Head& head, int t) {
    const int64_t row = head.token(t) * p.num_v_heads + head.v_head;
    return static_cast<T*>(p.out) + row * head.dims.v;
}
template <class T>
__device__ __forceinline__ const T* z_of(const GdnStep& p, const Head& head, int t) {
    return static_cast<const T*>(p.z) + head.token(t) * p.z_stride +
           int64_t{head.v_head} * head.dims.v;
}

template <class T>
__device__ __forceinline__ void clear_outputs(const GdnStep& p, const Head& head) {
    for (int t = 0; t < head.num_draft; ++t) {
        T* out = out_of<T>(p, head, t);
        for (int i = threadIdx.x; i < head.dims.v; i += blockDim.x) out[i] = from_float<T>(0.0f);
    }
}

__device__ __forceinline__ float4 silu_of_four(float4 x) {
    return make_float4(silu(x.x), silu(x.y), silu(x.z), silu(x.w));
}

// Four channels of the convolution and SiLU: x[i] are the inputs of tap i, taps[c] those of channel
// c.
template <class T>
__device__ __forceinline__ float4 convolved(const Four<T> (&x)[kTaps], const Four<T> (&taps)[4]) {
    float4 rows[kTaps];
#pragma unroll
    for (int i = 0; i < kTaps; ++i) rows[i] = widen<T>(x[i]);
    return silu_of_four(make_float4(
        dot(make_float4(rows[0].x, rows[1].x, rows[2].x, rows[3].x), widen<T>(taps[0])),
        dot(make_float4(rows[0].y, rows[1].y, rows[2].y, rows[3].y), widen<T>(taps[1])),
        dot(make_float4(rows[0].z, rows[1].z, rows[2].z, rows[3].z), widen<T>(taps[2])),
        dot(make_float4(rows[0].w, rows[1].w, rows[2].w, rows[3].w), widen<T>(taps[3]))));
}

// q (part 0) and k (part 1) as the rule wants them; v as it is. All lanes of a warp take part.
template <int kDim>
__device__ __forceinline__ float4 normalised(float4 x, int part) {
    if (part == 2) return x;
    const float scale = rsqrtf(warp_sum(dot(x, x)) + GDN_NORM_EPS);
    return scaled(part == 0 ? scale * rsqrtf(static_cast<float>(kDim)) : scale, x);
}

// How a warp holds kWarpRows rows of a head's state (kDim, kDim): kLanes lanes share a row, four
// neighbouring columns each, and a lane has kRows rows. Twice kRows is kLanes, so that the products
// of these rows with k and with q come out as one number per lane.
template <int kDim>
struct Layout {
    static constexpr int kLanes = kDim / 4;
    static constexpr int kRows = kDim / 8;
    static constexpr int kThreads = kDim / kWarpRows * 32;
    static_assert(kRows * (32 / kLanes) == kWarpRows);

    int lane, column;
    int first_row;  // of the lane's rows
    int row;        // whose products with k and q the lane gets
    bool has_q;     // it gets the one with q first, else the one with k

    __device__ explicit Layout(int thread) {
        lane = thread % 32;
        column = lane % kLanes;
        first_row = thread / 32 * kWarpRows + lane / kLanes * kRows;
        row = first_row + lane % kRows;
        has_q = lane & kRows;
    }

    // Elements from the head's state to the lane's part of its row r.
    __device__ int at(int r) const { return (first_row + r) * kDim + 4 * column; }
};

// delta and output of the lane's row.
struct RowResult {
    float delta, out;
};

// Adds up the sums of kRows rows over as many lanes, of which each lane gets one, its lane's. An
// exchange halves the sums that a lane carries and the lanes that a sum is spread over; sums are made
// as they are wanted, so that few are carried at a time. kCount is 1.
template <int kRows, int kCount, class RowSum>
__device__ __forceinline__ float gather_sums(const RowSum& row_sum, int first, int lane) {
    if constexpr (kCount == kRows) {
        return row_sum(first);
    } else {
        const float low = gather_sums<kRows, 2 * kCount>(row_sum, first, lane);
        const float high = gather_sums<kRows, 2 * kCount>(row_sum, first + kCount, lane);
        const bool is_high = lane & kCount;
        return (is_high ? high : low) + __shfl_xor_sync(kAllLanes, is_high ? low : high, kCount);
    }
}

// Reads the rows of a warp for one token: with S the state before it, m = S k and n = S q,
//   delta = beta (v - decay m),  out = decay n + delta (k . q).
template <int kDim, class Rows>
__device__ __forceinline__ RowResult read_rows(const Layout<kDim>& at, const Rows& rows, float4 k,
                                               float4 q, float v, float decay, float beta) {
    constexpr int kRows = Layout<kDim>::kRows;
    float k_dot_q = dot(k, q);
#pragma unroll
    for (int bits = kRows; bits > 0; bits /= 2) {
        k_dot_q += __shfl_xor_sync(kAllLanes, k_dot_q, bits);
    }
    const auto row_sum = [&](int r) {
        const float4 s = rows(r);
        const float with_k = dot(s, k), with_q = dot(s, q);
        const float sent = at.has_q ? with_k : with_q;
        return (at.has_q ? with_q : with_k) + __shfl_xor_sync(kAllLanes, sent, kRows);
    };
    const float own = gather_sums<kRows, 1>(row_sum, 0, at.lane);
    const float other = __shfl_xor_sync(kAllLanes, own, kRows);
    const float m = at.has_q ? other : own, n = at.has_q ? own : other;
    const float delta = beta * (v - decay * m);
    return {delta, decay * n + delta * k_dot_q};
}

// The delta of the lane's row r.
template <int kDim>
__device__ __forceinline__ float delta_of_row(float delta, int r) {
    return __shfl_sync(kAllLanes, delta, r, Layout<kDim>::kLanes);
}

// out = x / sqrt(mean x^2 + eps) * gates, by one warp; lanes past kDim / 4 have zeros.
template <class T, int kDim>
__device__ __forceinline__ void store_normed(float4 x, float4 gates, float eps, int lane, T* out) {
    const float scale = rsqrtf(warp_sum(dot(x, x)) / kDim + eps);
    if (lane >= kDim / 4) return;
    *fours(out + 4 * lane) = narrow<T>(times(scaled(scale, x), gates));
}

// What a block of gdn_decode_step_kernel has in shared memory, four columns per vector.
template <class T, int kDim>
struct DecodeShared {
    static constexpr int kFours = kDim / 4;

    // Of the channels of q, k and v: the inputs, oldest first, and the taps of every fourth channel.
    Four<T> inputs[3][kTaps][kFours], taps[3][4][kFours];
    Four<T> z[kFours];
    float4 norm_weight[kFours];
    float4 parts[4][kFours];  // q, k, v and then the output, silu(z)
    float4 deltas[kFours];    // of the rows
    float decay, beta;
};

// The inputs of a warp beside the state: the channels of q (warp 0), k (1) or v (2), or what gates
// and norm take (3), four elements per lane. A lane copies what it reads itself, so that the copies
// are under way without registers or a barrier.
template <class T, int kDim>
struct DecodeInputs {
    static constexpr int kFours = kDim / 4;

    const GdnStep& p;
    const Head& head;
    DecodeShared<T, kDim>& shared;
    const int warp, lane;
    GateInputs<T> gates = {};

    // Starts what can be loaded before the slot is known.
    __device__ __forceinline__ void load_ahead() {
        if (head.num_draft == 0 || lane >= kFours) return;
        if (warp == 3) {
            copy_four(shared.z + lane, z_of<T>(p, head, 0) + 4 * lane);
            copy_four(shared.norm_weight + lane, p.norm_weight + 4 * lane);
            gates = GateInputs<T>::load(p, head, 0);
        } else if (warp < 3) {
            const int channel = first_channel(p, head, warp) + 4 * lane;
            copy_four(shared.inputs[warp][kTaps - 1] + lane,
                      input_row<T>(p, head, kTaps - 1) + channel);
            const T* weight = static_cast<const T*>(p.conv_weight) + int64_t{channel} * kTaps;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                copy_four(shared.taps[warp][c] + lane, weight + c * kTaps);
            }
        }
    }

    __device__ __forceinline__ void load_window() {
        if (warp < 3 && lane < kFours) {
            const int channel = first_channel(p, head, warp) + 4 * lane;
#pragma unroll
            for (int i = 0; i < kTaps - 1; ++i) {
                copy_four(shared.inputs[warp][i] + lane, input_row<T>(p, head, i) + channel);
            }
        }
        cp_async_commit();
    }

    __device__ __forceinline__ void prepare() {
        if (warp > 3) return;
        cp_async_wait<0>();
        const bool has_channels = lane < kFours;
        float4 y = make_float4(0, 0, 0, 0);
        if (warp == 3) {
            if (has_channels) y = silu_of_four(widen<T>(shared.z[lane]));
            const Gates of_head = gates.gates();
            if (lane == 0) shared.decay = expf(of_head.g), shared.beta = of_head.beta;
        } else {
            Four<T> x[kTaps], taps[4];
#pragma unroll
            for (int i = 0; i < kTaps; ++i) x[i] = shared.inputs[warp][i][lane % kFours];
#pragma unroll
            for (int c = 0; c < 4; ++c) taps[c] = shared.taps[warp][c][lane % kFours];
            if (has_channels) y = convolved<T>(x, taps);
            y = normalised<kDim>(y, warp);
        }
        if (has_channels) shared.parts[warp][lane] = y;
    }

    // The window after this token, four channels of the warp's part per lane.
    __device__ __forceinline__ void store_window() const {
        if (lane >= kFours) return;
        T* window = static_cast<T*>(p.windows) + head.slot * (kTaps - 1) * head.conv_dim +
                    first_channel(p, head, warp) + 4 * lane;
#pragma unroll
        for (int i = 1; i < kTaps; ++i) {
            *fours(window) = shared.inputs[warp][i][lane];
            window += head.conv_dim;
        }
    }
};

// The readers of a key head's q channels are counted in the low half of its arrival counter, those
// of its k channels in the high half, so that a warp needs no other one to know.
constexpr int kPartBits = 16;

// Counts a warp that has read q (part 0) or k (1); returns how many there were before, to lane 0.
__device__ __forceinline__ int count_reader(const GdnStep& p, const Head& head, int part,
                                            int lane) {
    if (part > 1 || head.group == 1 || lane != 0) return 0;
    __threadfence();
    const int64_t counter = int64_t{head.sequence} * p.num_k_heads + head.k_head;
    const int count = atomicAdd(p.arrivals + counter, 1 << kPartBits * part);
    return count >> kPartBits * part & ((1 << kPartBits) - 1);
}

// Whether no block is still to read a warp's part. The last reader clears its count.
__device__ __forceinline__ bool is_free_to_move(const GdnStep& p, const Head& head, int part,
                                                int lane, int count) {
    if (part == 2 || head.group == 1) return true;
    count = __shfl_sync(kAllLanes, count, 0);
    if (count != head.group - 1) return false;
    __threadfence();
    const int64_t counter = int64_t{head.sequence} * p.num_k_heads + head.k_head;
    if (lane == 0) atomicAdd(p.arrivals + counter, -(head.group << kPartBits * part));
    return true;
}

// Blocks that a multiprocessor shall hold: with 64 KiB (fp32) or 32 KiB (bf16) of state under way
// in each, two or three are more than the memory's latency asks for.
template <class State, int kDim>
constexpr int kDecodeBlocks = (sizeof(State) == 4 ? 2 : 3) * (128 / kDim);

// One token of each sequence.
//
// S (v_dim, k_dim) <- exp(g) S + delta k^T with delta = beta (v - exp(g) S k), and o = S q from what
// was read once: exp(g) S_old q + delta (k . q). Layouts are those of GdnStep; k_dim = v_dim = kDim,
// width kTaps, all addresses aligned to four elements.
//
// Grid of head_of_block, kThreads per block, DecodeShared. A warp holds 16 rows of the state in
// registers (Layout). Warps 0 to 3 have the other inputs to prepare (DecodeInputs), whose few loads
// go out before those of the state; they wait for both together. Windows are moved at the end, those
// of q and k by the last of their readers. A block of a padding row writes zeros and leaves.
template <class T, class State, int kDim>
__global__ void __launch_bounds__(Layout<kDim>::kThreads, (kDecodeBlocks<State, kDim>))
    gdn_decode_step_kernel(GdnStep p) {
    using At = Layout<kDim>;
    __shared__ DecodeShared<T, kDim> shared;
    const Head head = head_of_block(p, {kDim, kDim, kTaps}, 1);
    const int warp = threadIdx.x / 32;
    const At at(threadIdx.x);
    DecodeInputs<T, kDim> inputs{p, head, shared, warp, at.lane};
    inputs.load_ahead();
    if (!is_held(p, head)) return clear_outputs<T>(p, head);
    inputs.load_window();
    State* state =
        static_cast<State*>(p.states) + (head.slot * p.num_v_heads + head.v_head) * (kDim * kDim);
    Four<State> rows[At::kRows];
#pragma unroll
    for (int r = 0; r < At::kRows; ++r) rows[r] = load_streaming(fours(state + at.at(r)));
    inputs.prepare();
    __syncthreads();

    const float4 q = shared.parts[0][at.column], k = shared.parts[1][at.column];
    float* values = reinterpret_cast<float*>(shared.parts[2]);
    const float decay = shared.decay;
    const auto row = [&](int r) {
        keep_narrow(rows[r]);
        return widen<State>(rows[r]);
    };
    const RowResult result = read_rows<kDim>(at, row, k, q, values[at.row], decay, shared.beta);
    // Before an output replaces it, both lanes of a row have read its value.
    __syncwarp();
    float* deltas = reinterpret_cast<float*>(shared.deltas);
    if (!at.has_q) values[at.row] = result.out, deltas[at.row] = result.delta;
    __syncwarp();
    const int count = count_reader(p, head, warp, at.lane);
#pragma unroll
    for (int r = 0; r < At::kRows; r += 4) {
        const float4 delta = shared.deltas[(at.first_row + r) / 4];
        const float of_row[4] = {delta.x, delta.y, delta.z, delta.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float4 s = combine(decay, row(r + i), of_row[i], k);
            store_streaming(fours(state + at.at(r + i)), narrow<State>(s));
        }
    }
    __syncthreads();

    if (warp == 3) {
        float4 o = make_float4(0, 0, 0, 0), gates = o;
        if (at.lane < At::kLanes) {
            o = shared.parts[2][at.lane];
            gates = times(shared.parts[3][at.lane], shared.norm_weight[at.lane]);
        }
        store_normed<T, kDim>(o, gates, p.norm_eps, at.lane, out_of<T>(p, head, 0));
    }
    if (warp < 3 && is_free_to_move(p, head, warp, at.lane, count)) inputs.store_window();
}

// Tells all threads of a block, after all of them have read their inputs, whether it is the last of
// its key head's blocks to have done so.
__device__ __forceinline__ bool is_last_reader(const GdnStep& p, const Head& head) {
    __shared__ int is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        int* counter = p.arrivals + int64_t{head.sequence} * p.num_k_heads + head.k_head;
        __threadfence();
        is_last = head.group == 1 || atomicAdd(counter, 1) == head.group - 1;
        __threadfence();
        if (is_last && head.group > 1) *counter = 0;
    }
    __syncthreads();
    return is_last;
}

// Moves the window of one part's channels on by `step` tokens beside those that are folded in, and
// leaves the drafts in the ring, if there is one. A thread owns a channel.
template <class T>
__device__ __forceinline__ void move_channels(const GdnStep& p, const Head& head, int part,
                                              int step) {
    const int dim = part == 2 ? head.dims.v : head.dims.k, history = head.dims.width - 1;
    for (int c = threadIdx.x; c < dim; c += blockDim.x) {
        const int channel = first_channel(p, head, part) + c;
        T* window = static_cast<T*>(p.windows) + head.slot * history * head.conv_dim + channel;
        T kept[kGdnMaxConvWidth - 1];
#pragma unroll
        for (int i = 0; i < kGdnMaxConvWidth - 1; ++i) {
            if (i < history) kept[i] = input_row<T>(p, head, i + step)[channel];
        }
#pragma unroll
        for (int i = 0; i < kGdnMaxConvWidth - 1; ++i) {
            if (i < history && step + head.pending > 0) window[i * head.conv_dim] = kept[i];
        }
        if (p.ring_inputs == nullptr) continue;
        T* ring = static_cast<T*>(p.ring_inputs) + head.slot * p.max_draft * head.conv_dim;
        for (int t = 0; t < head.num_draft; ++t) {
            ring[t * head.conv_dim + channel] = input_row<T>(p, head, history + t)[channel];
        }
    }
}

template <class T>
__device__ __forceinline__ void move_all_channels(const GdnStep& p, const Head& head, int step) {
    const int first = is_last_reader(p, head) ? 0 : 2;
#pragma unroll 1
    for (int part = first; part < 3; ++part) move_channels<T>(p, head, part, step);
}

// What a block of gdn_verify_kernel has in shared memory, of both what is to be folded in and the
// drafts: four columns per float4.
template <int kDim>
struct VerifyShared {
    static constexpr int kFours = kDim / 4;

    float4* parts;        // [draft][4][kFours]: q, k, v and then the output, gates of the norm
    float4* fold_keys;    // [max_draft][kFours]
    float4* fold_deltas;  // [max_draft][kFours]

    __device__ VerifyShared(unsigned char* shared, const GdnStep& p)
        : parts(reinterpret_cast<float4*>(shared)),
          fold_keys(parts + p.num_draft * 4 * kFours),
          fold_deltas(fold_keys + p.max_draft * kFours) {}

    static size_t bytes(const GdnStep& p) {
        return sizeof(float4) * kFours * (4 * p.num_draft + 2 * p.max_draft);
    }

    __device__ float4* part(int t, int i) const { return parts + (4 * t + i) * kFours; }
};

// Decays and betas of the drafts, and decays of what is folded in.
struct VerifyGates {
    float decays[kGdnMaxDraftTokens], betas[kGdnMaxDraftTokens], fold_decays[kGdnMaxDraftTokens];
};

// Four elements per lane of one draft's q, k, v or gates of the norm. A whole warp takes part.
template <class T, int kDim>
__device__ __forceinline__ float4 draft_part(const GdnStep& p, const Head& head, int t, int part,
                                             int lane) {
    const bool has_channels = lane < kDim / 4;
    if (part == 3) {
        if (!has_channels) return {};
        return times(silu_of_four(widen<T>(*fours(z_of<T>(p, head, t) + 4 * lane))),
                     *fours(p.norm_weight + 4 * lane));
    }
    const int channel = first_channel(p, head, part) + 4 * lane;
    Four<T> x[kTaps] = {}, taps[4] = {};
    if (has_channels) {
#pragma unroll
        for (int i = 0; i < kTaps; ++i) x[i] = *fours(input_row<T>(p, head, t + i) + channel);
        const T* weight = static_cast<const T*>(p.conv_weight) + int64_t{channel} * kTaps;
#pragma unroll
        for (int c = 0; c < 4; ++c) taps[c] = *fours(weight + c * kTaps);
    }
    return normalised<kDim>(convolved<T>(x, taps), part);
}

// Fills a block's shared memory, before a barrier; nothing of the ring is read after it but its
// inputs.
template <class T, int kDim>
__device__ __forceinline__ void prepare_verify(const GdnStep& p, const Head& head,
                                               const VerifyShared<kDim>& shared,
                                               VerifyGates& gates) {
    constexpr int kFours = kDim / 4, kWarps = Layout<kDim>::kThreads / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int unit = warp; unit < 4 * head.num_draft; unit += kWarps) {
        const float4 x = draft_part<T, kDim>(p, head, unit / 4, unit % 4, lane);
        if (lane < kFours) shared.parts[unit * kFours + lane] = x;
    }
    for (int i = threadIdx.x; i < head.pending * kFours; i += Layout<kDim>::kThreads) {
        const int64_t from = ring_offset(p, head, i / kFours, kDim) + i % kFours * 4;
        shared.fold_keys[i] = *fours(p.ring_keys + from);
        shared.fold_deltas[i] = *fours(p.ring_deltas + from);
    }
    if (warp != kWarps - 1) return;
    if (lane < head.num_draft) {
        const Gates of_draft = GateInputs<T>::load(p, head, lane).gates();
        gates.decays[lane] = expf(of_draft.g);
        gates.betas[lane] = of_draft.beta;
    }
    if (lane < head.pending) {
        gates.fold_decays[lane] = expf(p.ring_decays[ring_offset(p, head, lane, 1)]);
    }
}

// The ring's keys and decays of the drafts, after the barrier that ends reading the old ones.
template <class T, int kDim>
__device__ __forceinline__ void leave_drafts(const GdnStep& p, const Head& head,
                                             const VerifyShared<kDim>& shared) {
    constexpr int kFours = kDim / 4;
    for (int i = threadIdx.x; i < head.num_draft * kFours; i += Layout<kDim>::kThreads) {
        const int t = i / kFours, column = i % kFours;
        *fours(p.ring_keys + ring_offset(p, head, t, kDim) + 4 * column) =
            shared.part(t, 1)[column];
    }
    for (int t = threadIdx.x; t < head.num_draft; t += Layout<kDim>::kThreads) {
        p.ring_decays[ring_offset(p, head, t, 1)] = GateInputs<T>::load(p, head, t).gates().g;
    }
}

// Several draft tokens of each sequence, after folding in the first `pending` entries of its ring:
//   S <- exp(g_i) S + delta_i k_i^T for each entry in order,
// which is written back; then the step of gdn_decode_step_kernel for each draft on the state in
// registers, which is not. Its k, delta and g become entries of the ring, its inputs too.
//
// Grid of head_of_block, kThreads per block, VerifyShared::bytes dynamic shared.
// k_dim = v_dim = kDim, width kTaps, all addresses aligned to four elements. A warp holds 16 rows of
// the state (Layout) and needs no other warp from the barrier after the preparation to the one
// before the norm, which takes a warp per draft. A block of a padding row writes zeros and leaves.
template <class T, class State, int kDim>
__global__ void __launch_bounds__(Layout<kDim>::kThreads, 2 * (128 / kDim))
    gdn_verify_kernel(GdnStep p) {
    using At = Layout<kDim>;
    GDN_DYNAMIC_SHARED(dynamic);
    __shared__ VerifyGates gates;
    Head head = head_of_block(p, {kDim, kDim, kTaps}, p.num_draft);
    if (!is_held(p, head)) return clear_outputs<T>(p, head);
    head.pending = pending_of(p, head);
    const VerifyShared<kDim> shared(dynamic, p);
    const At at(threadIdx.x);

    State* state =
        static_cast<State*>(p.states) + (head.slot * p.num_v_heads + head.v_head) * (kDim * kDim);
    Four<State> stored[At::kRows];
#pragma unroll
    for (int r = 0; r < At::kRows; ++r) {
        stored[r] = load_streaming(fours(state + at.at(r)));
    }
    prepare_verify<T, kDim>(p, head, shared, gates);
    __syncthreads();

    float4 rows[At::kRows];
#pragma unroll
    for (int r = 0; r < At::kRows; ++r) rows[r] = widen<State>(stored[r]);
    for (int i = 0; i < head.pending; ++i) {
        const float4 k = shared.fold_keys[i * At::kLanes + at.column];
        const float* deltas = reinterpret_cast<const float*>(shared.fold_deltas) + i * kDim;
#pragma unroll
        for (int r = 0; r < At::kRows; ++r) {
            rows[r] = combine(gates.fold_decays[i], rows[r], deltas[at.first_row + r], k);
        }
    }
    if (head.pending > 0) {
#pragma unroll
        for (int r = 0; r < At::kRows; ++r) {
            store_streaming(fours(state + at.at(r)), narrow<State>(rows[r]));
        }
    }

    for (int t = 0; t < head.num_draft; ++t) {
        const float4 q = shared.part(t, 0)[at.column], k = shared.part(t, 1)[at.column];
        float* values = reinterpret_cast<float*>(shared.part(t, 2));
        const float decay = gates.decays[t];
        const RowResult result = read_rows<kDim>(
            at, [&](int r) { return rows[r]; }, k, q, values[at.row], decay, gates.betas[t]);
#pragma unroll
        for (int r = 0; r < At::kRows; ++r) {
            rows[r] = combine(decay, rows[r], delta_of_row<kDim>(result.delta, r), k);
        }
        // Before an output replaces it, both lanes of a row have read its value.
        __syncwarp();
        if (!at.has_q) {
            values[at.row] = result.out;
            p.ring_deltas[ring_offset(p, head, t, kDim) + at.row] = result.delta;
        }
    }
    leave_drafts<T, kDim>(p, head, shared);
    move_all_channels<T>(p, head, 0);

    for (int t = threadIdx.x / 32; t < head.num_draft; t += At::kThreads / 32) {
        const bool has_channels = at.lane < At::kLanes;
        const float4 o = has_channels ? shared.part(t, 2)[at.lane] : make_float4(0, 0, 0, 0);
        const float4 out_gates =
            has_channels ? shared.part(t, 3)[at.lane] : make_float4(0, 0, 0, 0);
        store_normed<T, kDim>(o, out_gates, p.norm_eps, at.lane, out_of<T>(p, head, t));
    }
}

// What a block of gdn_step_kernel has in shared memory.
struct StepShared {
    float* q;  // [draft][k_dim]
    float* k;  // [draft][k_dim]
    float* v;  // [draft][v_dim], and then the outputs

    __device__ StepShared(unsigned char* shared, const GdnStep& p, int num_draft)
        : q(reinterpret_cast<float*>(shared)),
          k(q + num_draft * p.k_dim),
          v(k + num_draft * p.k_dim) {}

    static size_t bytes(const GdnStep& p, int num_draft) {
        return sizeof(float) * num_draft * (2 * p.k_dim + p.v_dim);
    }
};

struct StepGates {
    float g[kGdnMaxDraftTokens], beta[kGdnMaxDraftTokens], k_dot_q[kGdnMaxDraftTokens];
};

// The convolution and SiLU of the head's channels for all drafts, and their gates.
template <class T>
__device__ __forceinline__ void convolve_step(const GdnStep& p, const Head& head,
                                              const StepShared& shared, StepGates& gates) {
#pragma unroll 1
    for (int part = 0; part < 3; ++part) {
        const int dim = part == 2 ? p.v_dim : p.k_dim;
        float* to = part == 0 ? shared.q : part == 1 ? shared.k : shared.v;
        for (int i = threadIdx.x; i < head.num_draft * dim; i += kAnyThreads) {
            const int t = i / dim;
            const int channel = first_channel(p, head, part) + i % dim;
            const T* weight = static_cast<const T*>(p.conv_weight) + int64_t{channel} * p.width;
            float sum = 0;
#pragma unroll 1
            for (int tap = 0; tap < p.width; ++tap) {
                sum += to_float(weight[tap]) * to_float(input_row<T>(p, head, t + tap)[channel]);
            }
            to[i] = silu(sum);
        }
    }
    if (static_cast<int>(threadIdx.x) < head.num_draft) {
        const Gates of_draft = GateInputs<T>::load(p, head, threadIdx.x).gates();
        gates.g[threadIdx.x] = of_draft.g;
        gates.beta[threadIdx.x] = of_draft.beta;
    }
}

// Normalises q and k, a warp per draft.
__device__ __forceinline__ void normalise_step(const GdnStep& p, const Head& head,
                                               const StepShared& shared, StepGates& gates) {
    const int lane = threadIdx.x % 32;
    for (int t = threadIdx.x / 32; t < head.num_draft; t += kAnyThreads / 32) {
        float* q = shared.q + t * p.k_dim;
        float* k = shared.k + t * p.k_dim;
        float squares_q = 0, squares_k = 0, product = 0;
        for (int i = lane; i < p.k_dim; i += 32) {
            squares_q += q[i] * q[i], squares_k += k[i] * k[i], product += q[i] * k[i];
        }
        const float scale_q =
            rsqrtf(warp_sum(squares_q) + GDN_NORM_EPS) * rsqrtf(static_cast<float>(p.k_dim));
        const float scale_k = rsqrtf(warp_sum(squares_k) + GDN_NORM_EPS);
        for (int i = lane; i < p.k_dim; i += 32) q[i] *= scale_q, k[i] *= scale_k;
        product = warp_sum(product);
        if (lane == 0) gates.k_dot_q[t] = product * scale_q * scale_k;
    }
}

// One row of the state, whose column lane + 32 j is the lane's j-th.
constexpr int kAnyColumns = kGdnMaxHeadDim / 32;

__device__ __forceinline__ void add_to_row(float (&row)[kAnyColumns], float decay, float delta,
                                           const float* k, int lane, int k_dim) {
#pragma unroll
    for (int j = 0; j < kAnyColumns; ++j) {
        if (lane + 32 * j < k_dim) row[j] = decay * row[j] + delta * k[lane + 32 * j];
    }
}

// Folds the ring into one row and runs the drafts on it; the row becomes the state of after the
// drafts (`keeps`) or of before them.
template <class State>
__device__ __forceinline__ void step_row(const GdnStep& p, const Head& head,
                                         const StepShared& shared, const StepGates& gates, int r,
                                         bool keeps) {
    const int lane = threadIdx.x % 32;
    State* state = static_cast<State*>(p.states) +
                   ((head.slot * p.num_v_heads + head.v_head) * p.v_dim + r) * p.k_dim;
    float row[kAnyColumns];
#pragma unroll
    for (int j = 0; j < kAnyColumns; ++j) {
        row[j] = lane + 32 * j < p.k_dim ? to_float(state[lane + 32 * j]) : 0.0f;
    }
    const auto save = [&] {
#pragma unroll
        for (int j = 0; j < kAnyColumns; ++j) {
            if (lane + 32 * j < p.k_dim) state[lane + 32 * j] = from_float<State>(row[j]);
        }
    };
    for (int i = 0; i < head.pending; ++i) {
        add_to_row(row, expf(p.ring_decays[ring_offset(p, head, i, 1)]),
                   p.ring_deltas[ring_offset(p, head, i, p.v_dim) + r],
                   p.ring_keys + ring_offset(p, head, i, p.k_dim), lane, p.k_dim);
    }
    if (head.pending > 0) save();
    // No lane leaves a delta in the ring before all lanes have read the old ones.
    __syncwarp();
    for (int t = 0; t < head.num_draft; ++t) {
        const float* q = shared.q + t * p.k_dim;
        const float* k = shared.k + t * p.k_dim;
        float with_k = 0, with_q = 0;
#pragma unroll
        for (int j = 0; j < kAnyColumns; ++j) {
            const int i = lane + 32 * j;
            if (i < p.k_dim) with_k += row[j] * k[i], with_q += row[j] * q[i];
        }
        const float decay = expf(gates.g[t]);
        const float v = shared.v[t * p.v_dim + r];
        const float delta = gates.beta[t] * (v - decay * warp_sum(with_k));
        const float out = decay * warp_sum(with_q) + delta * gates.k_dot_q[t];
        add_to_row(row, decay, delta, k, lane, p.k_dim);
        if (lane != 0) continue;
        shared.v[t * p.v_dim + r] = out;
        if (!keeps) p.ring_deltas[ring_offset(p, head, t, p.v_dim) + r] = delta;
    }
    if (keeps) save();
}

// The gated norm of the outputs, a warp per draft.
template <class T>
__device__ __forceinline__ void norm_step(const GdnStep& p, const Head& head,
                                          const StepShared& shared) {
    const int lane = threadIdx.x % 32;
    for (int t = threadIdx.x / 32; t < head.num_draft; t += kAnyThreads / 32) {
        const float* o = shared.v + t * p.v_dim;
        float squares = 0;
        for (int i = lane; i < p.v_dim; i += 32) squares += o[i] * o[i];
        const float scale = rsqrtf(warp_sum(squares) / static_cast<float>(p.v_dim) + p.norm_eps);
        const T* z = z_of<T>(p, head, t);
        T* out = out_of<T>(p, head, t);
        for (int i = lane; i < p.v_dim; i += 32) {
            out[i] = from_float<T>(o[i] * scale * p.norm_weight[i] * silu(to_float(z[i])));
        }
    }
}

// gdn_verify, or with `keeps` gdn_decode_step, for any head dims up to kGdnMaxHeadDim, any width and
// any alignment: the maths of gdn_verify_kernel, and of gdn_decode_step_kernel.
//
// Grid of head_of_block, kAnyThreads per block, StepShared::bytes dynamic shared. A
// warp takes one row of the state after the other through all tokens. A block of a padding row
// writes zeros and leaves.
template <class T, class State>
__global__ void __launch_bounds__(kAnyThreads, 1) gdn_step_kernel(GdnStep p, bool keeps) {
    GDN_DYNAMIC_SHARED(dynamic);
    __shared__ StepGates gates;
    Head head = head_of_block(p, {p.k_dim, p.v_dim, p.width}, keeps ? 1 : p.num_draft);
    if (!is_held(p, head)) return clear_outputs<T>(p, head);
    if (!keeps) head.pending = pending_of(p, head);
    const StepShared shared(dynamic, p, head.num_draft);
    convolve_step<T>(p, head, shared, gates);
    __syncthreads();
    normalise_step(p, head, shared, gates);
    __syncthreads();
    for (int r = threadIdx.x / 32; r < p.v_dim; r += kAnyThreads / 32) {
        step_row<State>(p, head, shared, gates, r, keeps);
    }
    move_all_channels<T>(p, head, keeps ? 1 : 0);
    norm_step<T>(p, head, shared);
    if (keeps) return;
    for (int i = threadIdx.x; i < head.num_draft * p.k_dim; i += kAnyThreads) {
        const int t = i / p.k_dim;
        p.ring_keys[ring_offset(p, head, t, p.k_dim) + i % p.k_dim] = shared.k[i];
    }
    for (int t = threadIdx.x; t < head.num_draft; t += kAnyThreads) {
        p.ring_decays[ring_offset(p, head, t, 1)] = gates.g[t];
    }
}

// The head dim of the kernels with vector loads that serve these arguments, or 0.
int vector_dim(const GdnStep& p) {
    if (p.k_dim != p.v_dim || (p.k_dim != 128 && p.k_dim != 64) || p.width != kTaps) return 0;
    // Two counts of readers share an arrival counter.
    if (p.num_v_heads / p.num_k_heads > 0x7fff) return 0;
    if (p.mixed_stride % 4 != 0 || p.z_stride % 4 != 0) return 0;
    const size_t bytes = 4 * element_bytes(p.dtype);
    for (const void* of_dtype :
         {p.mixed, p.z, p.conv_weight, static_cast<const void*>(p.windows),
          static_cast<const void*>(p.ring_inputs), static_cast<const void*>(p.out)}) {
        if (!is_aligned(of_dtype, bytes)) return 0;
    }
    for (const float* of_floats : {p.norm_weight, static_cast<const float*>(p.ring_keys),
                                   static_cast<const float*>(p.ring_deltas)}) {
        if (!is_aligned(of_floats, 16)) return 0;
    }
    return is_aligned(p.states, 4 * element_bytes(p.state_dtype)) ? p.k_dim : 0;
}

template <class T, class State, int kDim>
int launch_vectors(const GdnStep& p, bool keeps, dim3 grid, void* stream) {
    const dim3 block(Layout<kDim>::kThreads);
    if (keeps) {
        return GDN_LAUNCH((gdn_decode_step_kernel<T, State, kDim>), grid, block, 0, stream, p);
    }
    return GDN_LAUNCH((gdn_verify_kernel<T, State, kDim>), grid, block,
                      VerifyShared<kDim>::bytes(p), stream, p);
}

template <class T, class State>
int launch_step(const GdnStep& p, bool keeps, void* stream) {
    if (p.num_sequences > 0x7fffffff) return kUnsupportedShape;
    const int64_t layers = (p.num_sequences + kGridRows - 1) / kGridRows;
    const dim3 grid(static_cast<unsigned>(p.num_v_heads),
                    static_cast<unsigned>(min(p.num_sequences, int64_t{kGridRows})),
                    static_cast<unsigned>(layers));
    switch (vector_dim(p)) {
        case 128:
            return launch_vectors<T, State, 128>(p, keeps, grid, stream);
        case 64:
            return launch_vectors<T, State, 64>(p, keeps, grid, stream);
        default:
            return GDN_LAUNCH((gdn_step_kernel<T, State>), grid, dim3(kAnyThreads),
                              StepShared::bytes(p, keeps ? 1 : p.num_draft), stream, p, keeps);
    }
}

int launch_fused(const GdnStep& p, bool keeps, void* stream) {
    if (p.num_sequences == 0) return 0;
    if (p.state_dtype == kGdnBFloat16) {
        return GDN_WITH_TYPE(p.dtype, launch_step<T, bf16>(p, keeps, stream));
    }
    return GDN_WITH_TYPE(p.dtype, launch_step<T, float>(p, keeps, stream));
}

}  // namespace
}  // namespace gdn

extern "C" {

int gdn_cuda_gdn_decode_step(const GdnStep* args, void* stream) {
    GdnStep without_ring = *args;
    without_ring.ring_inputs = nullptr;
    without_ring.ring_keys = without_ring.ring_deltas = without_ring.ring_decays = nullptr;
    return gdn::launch_fused(without_ring, true, stream);
}

int gdn_cuda_gdn_verify(const GdnStep* args, void* stream) {
    return gdn::launch_fused(*args, false, stream);
}

}  // extern "C"
