// The plain operators in CUDA: any head dims up to 256, any alignment, no tensor cores.

#include "device.cuh"
#include "gdn.h"
#include "launchers.h"
#include "vectors.cuh"

namespace gdn {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 256;

// beta = sigmoid(b), g = -exp(a_log) softplus(a + dt_bias), one thread per (token, head).
template <class T>
__global__ void fused_gdn_gating_kernel(GdnGating p) {
    const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (at >= p.num_tokens * p.num_v_heads) return;
    const int64_t token = at / p.num_v_heads;
    const int head = static_cast<int>(at % p.num_v_heads);
    const float b = to_float(static_cast<const T*>(p.b)[token * p.b_stride + head]);
    const float a = to_float(static_cast<const T*>(p.a)[token * p.a_stride + head]);
    p.beta[at] = sigmoid(b);
    p.g[at] = -expf(p.a_log[head]) * softplus(a + p.dt_bias[head]);
}

// x / sqrt(mean x^2 + eps) * weight * silu(gate). A warp takes kNormRows rows, each a value head of a
// token, and asks for all of them before it uses one. A lane owns kCount neighbouring elements in
// every 32 * kCount, of which v_dim has kSteps.
constexpr int kNormRows = 4;
template <class T, int kCount, int kSteps>
__global__ void gdn_gated_norm_kernel(GdnNorm p) {
    const int64_t warp = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
    const int64_t first = warp * kNormRows, num_rows = p.num_tokens * p.num_v_heads;
    const int lane = threadIdx.x % 32;
    Packed<T, kCount> values[kNormRows][kSteps], gates[kNormRows][kSteps];
#pragma unroll
    for (int r = 0; r < kNormRows; ++r) {
        const int64_t row = min(first + r, num_rows - 1);
        const int64_t token = row / p.num_v_heads, head = row - token * p.num_v_heads;
        const T* x = static_cast<const T*>(p.x) + row * p.v_dim;
        const T* gate = static_cast<const T*>(p.gate) + token * p.gate_stride + head * p.v_dim;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int at = (step * 32 + lane) * kCount;
            values[r][step] = {}, gates[r][step] = {};
            if (at >= p.v_dim) continue;
            values[r][step] = load_packed<T, kCount>(x + at);
            gates[r][step] = load_packed<T, kCount>(gate + at);
        }
    }
#pragma unroll
    for (int r = 0; r < kNormRows; ++r) {
        if (first + r >= num_rows) return;
        float x[kSteps][kCount], squares = 0;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            widen<T, kCount>(values[r][step], x[step]);
#pragma unroll
            for (int i = 0; i < kCount; ++i) squares += x[step][i] * x[step][i];
        }
        const float scale = rsqrtf(warp_sum(squares) / static_cast<float>(p.v_dim) + p.eps);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int at = (step * 32 + lane) * kCount;
            if (at >= p.v_dim) continue;
            float gate[kCount], weight[kCount];
            widen<T, kCount>(gates[r][step], gate);
            load<float, kCount>(p.weight + at, weight);
#pragma unroll
            for (int i = 0; i < kCount; ++i) x[step][i] *= scale * weight[i] * silu<T>(gate[i]);
            store<T, kCount>(static_cast<T*>(p.out) + (first + r) * p.v_dim + at, x[step]);
        }
    }
}

// Where a sequence's tokens lie.
struct Span {
    int64_t begin, end;
};

__device__ __forceinline__ Span span_of(const int64_t* starts, int64_t sequence, int64_t num_tokens,
                                        int64_t num_sequences) {
    if (starts != nullptr) return {starts[sequence], starts[sequence + 1]};
    const int64_t each = num_tokens / num_sequences;
    return {sequence * each, (sequence + 1) * each};
}

// The sequence that a token belongs to.
__device__ __forceinline__ int64_t sequence_of(const GdnConv& p, int64_t token) {
    if (p.starts == nullptr) return token / (p.num_tokens / p.num_sequences);
    int64_t low = 0, high = p.num_sequences;  // starts[low] <= token < starts[high]
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (p.starts[middle] <= token) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

__device__ __forceinline__ bool is_held(int64_t slot, int64_t num_slots) {
    return slot >= 0 && slot < num_slots;
}

constexpr int kConvThreads = 128;
constexpr int kConvTokens = 32;
constexpr int kConvGroup = 8;  // tokens that are asked for together

// The taps of kCount neighbouring channels and the inputs before the next one, oldest first. A
// convolution of fewer than kTaps taps has zeros for its oldest.
template <class T, int kCount, int kTaps>
struct ConvChannels {
    float taps[kTaps][kCount];
    float past[kTaps - 1][kCount];

    __device__ void load_taps(const GdnConv& p, int64_t channel) {
        const T* weight = static_cast<const T*>(p.weight) + channel * p.width;
        if (kCount == 4 && kTaps == 4 && p.width == 4) {
            Packed<T, 4> rows[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) rows[i] = load_packed<T, 4>(weight + 4 * i);
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                float row[4];
                widen<T, 4>(rows[i], row);
#pragma unroll
                for (int tap = 0; tap < kTaps; ++tap) taps[tap][i] = row[tap % 4];
            }
            return;
        }
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
            const int at = tap - (kTaps - p.width);
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                taps[tap][i] = at < 0 ? 0.0f : to_float(weight[i * p.width + at]);
            }
        }
    }

    // The inputs before token `token` of the sequence in `slot`, which begins at `begin`.
    __device__ void load_past(const GdnConv& p, int64_t channel, int64_t slot, int64_t begin,
                              int64_t token) {
#pragma unroll
        for (int i = 0; i < kTaps - 1; ++i) {
            const int back = kTaps - 1 - i;
            const int64_t at = token - back;
            if (back >= p.width) {
#pragma unroll
                for (int c = 0; c < kCount; ++c) past[i][c] = 0;
            } else if (at >= begin) {
                load<T, kCount>(static_cast<const T*>(p.x) + at * p.x_stride + channel, past[i]);
            } else {
                const int64_t row = slot * (p.width - 1) + p.width - 1 + (at - begin);
                load<T, kCount>(static_cast<const T*>(p.windows) + row * p.num_channels + channel,
                                past[i]);
            }
        }
    }

    // Takes the next input in and returns the outputs in it.
    __device__ void advance(float (&x)[kCount]) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
            float sum = taps[kTaps - 1][c] * x[c];
#pragma unroll
            for (int i = 0; i < kTaps - 1; ++i) sum += taps[i][c] * past[i][c];
#pragma unroll
            for (int i = 0; i < kTaps - 2; ++i) past[i][c] = past[i + 1][c];
            past[kTaps - 2][c] = x[c];
            x[c] = silu<T>(sum);
        }
    }
};

// Block: kConvTokens tokens of kConvThreads * kCount channels; blocks of one tile of tokens lie side
// by side. A thread owns kCount neighbouring channels and walks the tokens with their past in
// registers. Windows are read here and written by causal_conv1d_window_kernel after it, so that no
// block reads what another writes.
template <class T, int kCount, int kTaps>
__global__ void causal_conv1d_full_kernel(GdnConv p, int channel_blocks) {
    const int64_t tile = blockIdx.x / channel_blocks;
    const int64_t channel =
        (int64_t{blockIdx.x % channel_blocks} * kConvThreads + threadIdx.x) * kCount;
    if (channel >= p.num_channels) return;
    const int64_t first = tile * kConvTokens;
    const int64_t last = min(first + kConvTokens, p.num_tokens);
    ConvChannels<T, kCount, kTaps> channels;
    channels.load_taps(p, channel);
    int64_t sequence = sequence_of(p, first);
    Span span = span_of(p.starts, sequence, p.num_tokens, p.num_sequences);
    int64_t slot = p.slots[sequence];
    bool held = is_held(slot, p.num_slots);
    if (held) channels.load_past(p, channel, slot, span.begin, first);
    const T* x = static_cast<const T*>(p.x) + channel;
    T* out = static_cast<T*>(p.out) + channel;
    for (int64_t token = first; token < last;) {
        if (token == span.end) {
            do {
                ++sequence;
                span = span_of(p.starts, sequence, p.num_tokens, p.num_sequences);
            } while (span.end <= token);
            slot = p.slots[sequence];
            held = is_held(slot, p.num_slots);
            if (held) channels.load_past(p, channel, slot, span.begin, token);
        }
        const int count = static_cast<int>(min(last, span.end) - token);
        for (int done = 0; done < count; done += kConvGroup) {
            const int here = min(kConvGroup, count - done);
            Packed<T, kCount> read[kConvGroup];
#pragma unroll
            for (int i = 0; i < kConvGroup; ++i) {
                read[i] = {};
                if (held && i < here)
                    read[i] = load_packed<T, kCount>(x + (token + done + i) * p.x_stride);
            }
#pragma unroll
            for (int i = 0; i < kConvGroup; ++i) {
                if (i >= here) break;
                float values[kCount];
                widen<T, kCount>(read[i], values);
                if (held) channels.advance(values);
                store<T, kCount>(out + (token + done + i) * p.num_channels, values);
            }
        }
        token += count;
    }
}

// The windows after a call: one thread per (sequence, channel).
template <class T>
__global__ void causal_conv1d_window_kernel(GdnConv p) {
    const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (at >= p.num_sequences * p.num_channels) return;
    const int64_t sequence = at / p.num_channels, channel = at % p.num_channels;
    const int64_t slot = p.slots[sequence];
    if (!is_held(slot, p.num_slots)) return;
    const Span span = span_of(p.starts, sequence, p.num_tokens, p.num_sequences);
    const int64_t length = span.end - span.begin;
    const T* x = static_cast<const T*>(p.x) + channel;
    T* window = static_cast<T*>(p.windows) + slot * (p.width - 1) * p.num_channels + channel;
    if (length == 0) return;
    // Row i takes what came `length` inputs later: a newer row, or an input of this call.
    for (int i = 0; i < p.width - 1; ++i) {
        const int64_t input = length - (p.width - 1) + i;
        window[i * p.num_channels] = input >= 0 ? x[(span.begin + input) * p.x_stride]
                                                : window[(i + length) * p.num_channels];
    }
}

// One token of each sequence: one thread per (sequence, kCount neighbouring channels), which alone
// reads and writes their window.
template <class T, int kCount, int kTaps>
__global__ void causal_conv1d_update_kernel(GdnConv p, int channel_blocks) {
    const int64_t sequence = blockIdx.x / channel_blocks;
    const int64_t channel =
        (int64_t{blockIdx.x % channel_blocks} * kConvThreads + threadIdx.x) * kCount;
    if (channel >= p.num_channels) return;
    const int64_t slot = p.slots[sequence];
    float x[kCount] = {};
    if (is_held(slot, p.num_slots)) {
        ConvChannels<T, kCount, kTaps> channels;
        channels.load_taps(p, channel);
        channels.load_past(p, channel, slot, sequence, sequence);
        load<T, kCount>(static_cast<const T*>(p.x) + sequence * p.x_stride + channel, x);
        channels.advance(x);
#pragma unroll
        for (int i = 0; i < kTaps - 1; ++i) {
            const int row = i - (kTaps - p.width);
            if (row < 0) continue;
            store<T, kCount>(static_cast<T*>(p.windows) +
                                 (slot * (p.width - 1) + row) * p.num_channels + channel,
                             channels.past[i]);
        }
    }
    store<T, kCount>(static_cast<T*>(p.out) + sequence * p.num_channels + channel, x);
}

constexpr int kRuleThreads = 128;
constexpr int kRuleRows = 8;  // of a warp
constexpr int kRuleTile = kRuleThreads / 32 * kRuleRows;
// Blocks that a multiprocessor shall hold, so that enough of the states are on their way.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1200
constexpr int kRuleBlocks = 6;
#else
constexpr int kRuleBlocks = 5;
#endif

// A lane's part of a row of keys: kPer elements, side by side where rows are 32 * kPer long and
// aligned (kVector), else every 32nd one.
template <int kPer, bool kVector>
struct KeyLane {
    template <class T>
    static __device__ void read(const T* row, int lane, int k_dim, float (&to)[kPer]) {
        if constexpr (kVector) {
            load<T, kPer>(row + lane * kPer, to);
        } else {
#pragma unroll
            for (int i = 0; i < kPer; ++i) {
                const int at = i * 32 + lane;
                to[i] = at < k_dim ? to_float(row[at]) : 0.0f;
            }
        }
    }
    // Rows of a state, the first `count` of them; the others are zeros.
    template <class T, int kRows>
    static __device__ void read_rows(const T* rows, int count, int lane, int k_dim,
                                     float (&to)[kRows][kPer]) {
        if constexpr (kVector) {
            Packed<T, kPer> packed[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                packed[r] = {};
                if (r < count) packed[r] = load_packed<T, kPer>(rows + r * k_dim + lane * kPer);
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) widen<T, kPer>(packed[r], to[r]);
        } else {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
                for (int i = 0; i < kPer; ++i) to[r][i] = 0;
                if (r < count) read(rows + r * k_dim, lane, k_dim, to[r]);
            }
        }
    }
    template <class T, int kRows>
    static __device__ void write_rows(T* rows, int count, int lane, int k_dim,
                                      const float (&from)[kRows][kPer]) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (r < count) write(rows + r * k_dim, lane, k_dim, from[r]);
        }
    }
    template <class T>
    static __device__ void write(T* row, int lane, int k_dim, const float (&from)[kPer]) {
        if constexpr (kVector) {
            store<T, kPer>(row + lane * kPer, from);
        } else {
#pragma unroll
            for (int i = 0; i < kPer; ++i) {
                const int at = i * 32 + lane;
                if (at < k_dim) row[at] = from_float<T>(from[i]);
            }
        }
    }
};

// Sums 16 values of every lane over the warp, with 16 shuffles: each step adds what the partner
// holds and hands it half of the values. Returns value lane / 2.
template <int kCount>
__device__ __forceinline__ float sum_lanes(const float (&values)[kCount], int lane) {
    if constexpr (kCount == 1) {
        return values[0] + __shfl_xor_sync(kAllLanes, values[0], 1);
    } else {
        const bool upper = lane & kCount;
        float half[kCount / 2];
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            const float sent = upper ? values[i] : values[i + kCount / 2];
            const float kept = upper ? values[i + kCount / 2] : values[i];
            half[i] = kept + __shfl_xor_sync(kAllLanes, sent, kCount);
        }
        return sum_lanes(half, lane);
    }
}

// One token of a value head, as a warp needs it.
template <int kPer>
struct Token {
    float q[kPer], k[kPer];
    float v, g, beta;  // v of the row that the lane sums
};

// Block (value tile, value head, sequence): kRuleTile rows of a state through all tokens. A warp
// owns kRuleRows rows and keeps them in registers, a lane kPer elements of each. With S the state
// before a token, a = exp(g), d = beta (v - a S k): o = a S q + d (k q), so that both products read
// the old state in one pass; then S <- a S + d k^T. The next token is read while this one is
// computed. No shared memory.
template <class T, int kPer, bool kVector>
__global__ void __launch_bounds__(kRuleThreads, kPer == 4 && kVector ? kRuleBlocks : 1)
    gated_delta_rule_recurrence_kernel(GdnRule p, int tiles) {
    using Lane = KeyLane<kPer, kVector>;
    const int lane = threadIdx.x % 32;
    const int64_t unit = blockIdx.x / tiles;
    const int head = static_cast<int>(unit % p.num_v_heads);
    const int64_t sequence = unit / p.num_v_heads;
    const int first_row = static_cast<int>(blockIdx.x % tiles) * kRuleTile +
                          static_cast<int>(threadIdx.x) / 32 * kRuleRows;
    const int k_head = head / (p.num_v_heads / p.num_k_heads);
    // Lanes 0..15 end up with the products with k of rows 0..7, two lanes each, the others with
    // those with q.
    const int row = first_row + lane / 2 % kRuleRows;
    const Span span = span_of(p.starts, sequence, p.num_tokens, p.num_sequences);
    const int64_t slot = p.slots[sequence];
    T* out = static_cast<T*>(p.out) + int64_t{head} * p.v_dim + row;
    const int64_t out_stride = int64_t{p.num_v_heads} * p.v_dim;
    const bool writes = lane >= 16 && lane % 2 == 0 && row < p.v_dim;
    if (!is_held(slot, p.num_slots)) {
        for (int64_t t = span.begin; writes && t < span.end; ++t) {
            out[t * out_stride] = from_float<T>(0.0f);
        }
        return;
    }

    const int64_t state_at =
        ((slot * p.num_v_heads + head) * p.v_dim + first_row) * int64_t{p.k_dim};
    // The type is asked for once, so that all rows are under way together.
    const bool is_half = p.state_dtype == kGdnBFloat16;
    const int count = p.v_dim - first_row;
    float state[kRuleRows][kPer];
    if (is_half) {
        Lane::read_rows(static_cast<const bf16*>(p.states) + state_at, count, lane, p.k_dim, state);
    } else {
        Lane::read_rows(static_cast<const float*>(p.states) + state_at, count, lane, p.k_dim,
                        state);
    }

    const auto fetch = [&](int64_t t) {
        Token<kPer> token;
        const int64_t key = int64_t{k_head} * p.k_dim;
        Lane::read(static_cast<const T*>(p.q) + t * p.q_stride + key, lane, p.k_dim, token.q);
        Lane::read(static_cast<const T*>(p.k) + t * p.k_stride + key, lane, p.k_dim, token.k);
        const T* v = static_cast<const T*>(p.v) + t * p.v_stride + int64_t{head} * p.v_dim;
        token.v = row < p.v_dim ? to_float(v[row]) : 0.0f;
        token.g = p.g[t * p.num_v_heads + head];
        token.beta = p.beta[t * p.num_v_heads + head];
        return token;
    };
    Token<kPer> next;
    if (span.begin < span.end) next = fetch(span.begin);
    for (int64_t t = span.begin; t < span.end; ++t) {
        const Token<kPer> token = next;
        if (t + 1 < span.end) next = fetch(t + 1);
        float products[2 * kRuleRows], k_dot_q = 0;
#pragma unroll
        for (int r = 0; r < kRuleRows; ++r) {
            float with_k = 0, with_q = 0;
#pragma unroll
            for (int i = 0; i < kPer; ++i) {
                with_k += state[r][i] * token.k[i];
                with_q += state[r][i] * token.q[i];
            }
            products[r] = with_k, products[kRuleRows + r] = with_q;
        }
#pragma unroll
        for (int i = 0; i < kPer; ++i) k_dot_q += token.k[i] * token.q[i];
        k_dot_q = warp_sum(k_dot_q);
        const float decay = expf(token.g);
        const float product = decay * sum_lanes(products, lane);
        float delta = token.beta * (token.v - product);
        delta = __shfl_sync(kAllLanes, delta, lane % 16);
        if (writes) out[t * out_stride] = from_float<T>(product + delta * k_dot_q);
#pragma unroll
        for (int r = 0; r < kRuleRows; ++r) {
            const float d = __shfl_sync(kAllLanes, delta, 2 * r);
#pragma unroll
            for (int i = 0; i < kPer; ++i) state[r][i] = decay * state[r][i] + d * token.k[i];
        }
    }

    if (is_half) {
        Lane::write_rows(static_cast<bf16*>(p.states) + state_at, count, lane, p.k_dim, state);
    } else {
        Lane::write_rows(static_cast<float*>(p.states) + state_at, count, lane, p.k_dim, state);
    }
}

constexpr int kChunkTile = 32;  // rows of v of a block
constexpr int kMaxPiece = 32;   // tokens that are handled together, one warp's width

// Rows of different tokens start in different banks.
__host__ __device__ __forceinline__ int padded(int size) {
    return size | 1;
}

// Shared memory of a block of the chunked kernel, float32.
struct ChunkMemory {
    float* k;      // [piece][k_dim]
    float* q;      // [piece][k_dim]
    float* state;  // [kChunkTile][k_dim]
    float* below;  // [piece][piece], beta_i (k_i k_j) exp(G_i - G_j), j < i
    float* score;  // [piece][piece], (q_i k_j) exp(G_i - G_j), j <= i
    float* fresh;  // [piece][kChunkTile], v, then what each token adds to the state
    float* total;  // [piece], G: the running sum of g
    float* beta;   // [piece]

    static __host__ __device__ int64_t floats(int piece, int k_dim) {
        return int64_t{2 * piece + kChunkTile} * padded(k_dim) + 2 * piece * padded(piece) +
               piece * padded(kChunkTile) + 2 * piece;
    }

    __device__ ChunkMemory(unsigned char* memory, int piece, int k_dim) {
        k = reinterpret_cast<float*>(memory);
        q = k + piece * padded(k_dim);
        state = q + piece * padded(k_dim);
        below = state + kChunkTile * padded(k_dim);
        score = below + piece * padded(piece);
        fresh = score + piece * padded(piece);
        total = fresh + piece * padded(kChunkTile);
        beta = total + piece;
    }
};

// One block's part of the rule: rows of one head's state through the tokens of one sequence.
template <class T>
struct ChunkedRule {
    const GdnRule& p;
    const ChunkMemory memory;
    int piece, head, k_head, first_row, rows;
    bool is_raw;  // q and k are not normalised yet

    __device__ int thread() const { return static_cast<int>(threadIdx.x); }

    // Reads up to `piece` tokens from `first` on; `count` of them are there, the rest are zeros,
    // which leave the state as it is.
    __device__ void load_tokens(int64_t first, int count) const {
        const int lane = thread() % 32;
        for (int i = thread() / 32; i < 2 * piece; i += kThreads / 32) {
            const int token = i / 2;
            const bool is_query = i % 2 == 1;
            const T* base = static_cast<const T*>(is_query ? p.q : p.k);
            const int64_t stride = is_query ? p.q_stride : p.k_stride;
            const T* row = base + (first + token) * stride + int64_t{k_head} * p.k_dim;
            float* to = (is_query ? memory.q : memory.k) + token * padded(p.k_dim);
            float squares = 0;
            for (int x = lane; x < p.k_dim; x += 32) {
                const float value = token < count ? to_float(row[x]) : 0.0f;
                to[x] = value;
                squares += value * value;
            }
            if (!is_raw) continue;
            float scale = rsqrtf(warp_sum(squares) + GDN_NORM_EPS);
            if (is_query) scale *= rsqrtf(static_cast<float>(p.k_dim));
            for (int x = lane; x < p.k_dim; x += 32) to[x] *= scale;
        }
        for (int i = thread(); i < piece * kChunkTile; i += kThreads) {
            const int token = i / kChunkTile, row = i % kChunkTile;
            const T* v = static_cast<const T*>(p.v) + (first + token) * p.v_stride +
                         int64_t{head} * p.v_dim + first_row;
            memory.fresh[token * padded(kChunkTile) + row] =
                token < count && row < rows ? to_float(v[row]) : 0.0f;
        }
        if (thread() < 32) {
            const int64_t at = (first + lane) * p.num_v_heads + head;
            float sum = lane < count ? p.g[at] : 0.0f;
#pragma unroll
            for (int distance = 1; distance < 32; distance *= 2) {
                const float before = __shfl_up_sync(kAllLanes, sum, distance);
                if (lane >= distance) sum += before;
            }
            if (lane < piece) {
                memory.total[lane] = sum;
                memory.beta[lane] = lane < count ? p.beta[at] : 0.0f;
            }
        }
    }

    // below and score. The decay is never split into exp(G_i) exp(-G_j), which overflows.
    __device__ void compare_tokens() const {
        for (int at = thread(); at < piece * piece; at += kThreads) {
            const int i = at / piece, j = at % piece;
            if (j > i) continue;
            const float* k_i = memory.k + i * padded(p.k_dim);
            const float* q_i = memory.q + i * padded(p.k_dim);
            const float* k_j = memory.k + j * padded(p.k_dim);
            float keys = 0, queries = 0;
            for (int x = 0; x < p.k_dim; ++x) {
                keys += k_i[x] * k_j[x];
                queries += q_i[x] * k_j[x];
            }
            const float decay = expf(memory.total[i] - memory.total[j]);
            memory.below[i * padded(piece) + j] = memory.beta[i] * keys * decay;
            memory.score[i * padded(piece) + j] = queries * decay;
        }
    }

    __device__ float along_k(int row, const float* token) const {
        const float* state = memory.state + row * padded(p.k_dim);
        float sum = 0;
        for (int x = 0; x < p.k_dim; ++x) sum += state[x] * token[x];
        return sum;
    }

    // fresh <- (I + below)^-1 beta (v - exp(G) S k).
    __device__ void solve() const {
        for (int at = thread(); at < piece * kChunkTile; at += kThreads) {
            const int token = at / kChunkTile, row = at % kChunkTile;
            float& fresh = memory.fresh[token * padded(kChunkTile) + row];
            const float seen = along_k(row, memory.k + token * padded(p.k_dim));
            fresh = memory.beta[token] * (fresh - expf(memory.total[token]) * seen);
        }
        __syncthreads();
        if (thread() < kChunkTile) {
            for (int i = 1; i < piece; ++i) {
                float sum = memory.fresh[i * padded(kChunkTile) + thread()];
                for (int j = 0; j < i; ++j) {
                    sum -= memory.below[i * padded(piece) + j] *
                           memory.fresh[j * padded(kChunkTile) + thread()];
                }
                memory.fresh[i * padded(kChunkTile) + thread()] = sum;
            }
        }
    }

    // o = exp(G) S q + score fresh.
    __device__ void write_outputs(int64_t first, int count) const {
        for (int at = thread(); at < count * kChunkTile; at += kThreads) {
            const int token = at / kChunkTile, row = at % kChunkTile;
            if (row >= rows) continue;
            float sum =
                expf(memory.total[token]) * along_k(row, memory.q + token * padded(p.k_dim));
            for (int j = 0; j <= token; ++j) {
                sum += memory.score[token * padded(piece) + j] *
                       memory.fresh[j * padded(kChunkTile) + row];
            }
            static_cast<T*>(
                p.out)[((first + token) * p.num_v_heads + head) * p.v_dim + first_row + row] =
                from_float<T>(sum);
        }
    }

    // S <- exp(G_C) S + fresh^T (k exp(G_C - G)).
    __device__ void advance_state() const {
        const float last = memory.total[piece - 1];
        for (int at = thread(); at < kChunkTile * p.k_dim; at += kThreads) {
            const int row = at / p.k_dim, x = at % p.k_dim;
            float sum = expf(last) * memory.state[row * padded(p.k_dim) + x];
            for (int i = 0; i < piece; ++i) {
                sum += expf(last - memory.total[i]) * memory.fresh[i * padded(kChunkTile) + row] *
                       memory.k[i * padded(p.k_dim) + x];
            }
            memory.state[row * padded(p.k_dim) + x] = sum;
        }
    }

    __device__ void tokens(int64_t begin, int64_t end) const {
        for (int64_t first = begin; first < end; first += piece) {
            const int count = static_cast<int>(min(end - first, int64_t{piece}));
            __syncthreads();
            load_tokens(first, count);
            __syncthreads();
            compare_tokens();
            solve();
            __syncthreads();
            write_outputs(first, count);
            __syncthreads();
            advance_state();
        }
    }

    __device__ int64_t state_offset(int64_t index) const {
        return ((index * p.num_v_heads + head) * p.v_dim + first_row) * int64_t{p.k_dim};
    }

    __device__ void load_state(const void* states, int64_t slot) const {
        for (int at = thread(); at < kChunkTile * p.k_dim; at += kThreads) {
            const int64_t from = state_offset(slot) + at;
            float value = 0;
            if (at < rows * p.k_dim) {
                value = p.state_dtype == kGdnBFloat16
                            ? to_float(static_cast<const bf16*>(states)[from])
                            : static_cast<const float*>(states)[from];
            }
            memory.state[at / p.k_dim * padded(p.k_dim) + at % p.k_dim] = value;
        }
    }

    __device__ void store_state(void* states, int64_t index) const {
        __syncthreads();
        for (int at = thread(); at < rows * p.k_dim; at += kThreads) {
            const int64_t to = state_offset(index) + at;
            const float value = memory.state[at / p.k_dim * padded(p.k_dim) + at % p.k_dim];
            if (p.state_dtype == kGdnBFloat16) {
                static_cast<bf16*>(states)[to] = from_float<bf16>(value);
            } else {
                static_cast<float*>(states)[to] = value;
            }
        }
    }

    __device__ void zero_outputs(int64_t begin, int64_t end) const {
        for (int64_t at = thread(); at < (end - begin) * rows; at += kThreads) {
            const int64_t token = begin + at / rows;
            static_cast<T*>(
                p.out)[(token * p.num_v_heads + head) * p.v_dim + first_row + at % rows] =
                from_float<T>(0.0f);
        }
    }
};

// Block (value tile, value head, sequence): kChunkTile rows of a state, in shared memory, through
// the tokens of a sequence, `piece` at a time. With the tables of gdn_prefill (p.chunks) q and k are
// raw, and the states after the chunks that name a snapshot are written to it.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    chunked_gated_delta_rule_recurrence_kernel(GdnRule p, int tiles, int piece) {
    GDN_DYNAMIC_SHARED(shared);
    const ChunkMemory memory(shared, piece, p.k_dim);
    const int64_t unit = blockIdx.x / tiles;
    const int head = static_cast<int>(unit % p.num_v_heads);
    const int64_t sequence = unit / p.num_v_heads;
    const int first_row = static_cast<int>(blockIdx.x % tiles) * kChunkTile;
    const bool has_tables = p.chunks != nullptr;
    const ChunkedRule<T> rule{p,
                              memory,
                              piece,
                              head,
                              head / (p.num_v_heads / p.num_k_heads),
                              first_row,
                              min(kChunkTile, p.v_dim - first_row),
                              has_tables};
    const int64_t slot = p.slots[sequence];
    const bool held = is_held(slot, p.num_slots);
    if (held) rule.load_state(p.states, slot);
    if (!has_tables) {
        const Span span = span_of(p.starts, sequence, p.num_tokens, p.num_sequences);
        held ? rule.tokens(span.begin, span.end) : rule.zero_outputs(span.begin, span.end);
    } else {
        for (int c = p.first_chunks[sequence]; c < p.first_chunks[sequence + 1]; ++c) {
            const int32_t* chunk = p.chunks + int64_t{c} * 4;
            const int64_t begin = chunk[0], end = begin + chunk[1];
            held ? rule.tokens(begin, end) : rule.zero_outputs(begin, end);
            if (held && chunk[3] >= 0) rule.store_state(p.snapshots, chunk[3]);
        }
    }
    if (held) rule.store_state(p.states, slot);
}

// Blocks for some work items; more than a grid holds are no shape that is served.
struct Grid {
    int64_t blocks;
    bool fits() const { return blocks <= 2147483647; }
    dim3 dim() const { return dim3(static_cast<unsigned>(blocks)); }
};

Grid grid_of(int64_t items, int64_t per_block) {
    return {(items + per_block - 1) / per_block};
}

template <class T, int kCount>
int launch_conv_taps(const GdnConv& p, bool is_update, void* stream) {
    const int channel_blocks =
        static_cast<int>(grid_of(p.num_channels, int64_t{kConvThreads} * kCount).blocks);
    const Grid grid{channel_blocks *
                    (is_update ? p.num_sequences : grid_of(p.num_tokens, kConvTokens).blocks)};
    if (!grid.fits()) return kUnsupportedShape;
    if (is_update) {
        return p.width <= 4 ? GDN_LAUNCH((causal_conv1d_update_kernel<T, kCount, 4>), grid.dim(),
                                         dim3(kConvThreads), 0, stream, p, channel_blocks)
                            : GDN_LAUNCH((causal_conv1d_update_kernel<T, kCount, 8>), grid.dim(),
                                         dim3(kConvThreads), 0, stream, p, channel_blocks);
    }
    return p.width <= 4 ? GDN_LAUNCH((causal_conv1d_full_kernel<T, kCount, 4>), grid.dim(),
                                     dim3(kConvThreads), 0, stream, p, channel_blocks)
                        : GDN_LAUNCH((causal_conv1d_full_kernel<T, kCount, 8>), grid.dim(),
                                     dim3(kConvThreads), 0, stream, p, channel_blocks);
}

template <class T>
int launch_conv(const GdnConv& p, bool is_update, void* stream) {
    const size_t bytes = 4 * sizeof(T);
    const bool is_vector = p.num_channels % 4 == 0 && p.x_stride % 4 == 0 &&
                           is_aligned(p.x, bytes) && is_aligned(p.windows, bytes) &&
                           is_aligned(p.out, bytes) && is_aligned(p.weight, bytes);
    return is_vector ? launch_conv_taps<T, 4>(p, is_update, stream)
                     : launch_conv_taps<T, 1>(p, is_update, stream);
}

template <class T>
int launch_recurrence(const GdnRule& p, void* stream) {
    const int tiles = (p.v_dim + kRuleTile - 1) / kRuleTile;
    const Grid grid{p.num_sequences * p.num_v_heads * tiles};
    if (!grid.fits()) return kUnsupportedShape;
    const int per = p.k_dim / 32;
    const size_t bytes = per * sizeof(T);
    const size_t state_bytes = per * element_bytes(p.state_dtype);
    const bool is_vector = (p.k_dim == 64 || p.k_dim == 128) && p.q_stride % per == 0 &&
                           p.k_stride % per == 0 && is_aligned(p.q, bytes) &&
                           is_aligned(p.k, bytes) && is_aligned(p.states, state_bytes);
    if (is_vector && per == 4) {
        return GDN_LAUNCH((gated_delta_rule_recurrence_kernel<T, 4, true>), grid.dim(),
                          dim3(kRuleThreads), 0, stream, p, tiles);
    }
    if (is_vector) {
        return GDN_LAUNCH((gated_delta_rule_recurrence_kernel<T, 2, true>), grid.dim(),
                          dim3(kRuleThreads), 0, stream, p, tiles);
    }
    return GDN_LAUNCH((gated_delta_rule_recurrence_kernel<T, kGdnMaxHeadDim / 32, false>),
                      grid.dim(), dim3(kRuleThreads), 0, stream, p, tiles);
}

template <class T>
int launch_gated_norm(const GdnNorm& p, void* stream) {
    constexpr int64_t kBlockRows = kThreads / 32 * kNormRows;
    const Grid grid = grid_of(p.num_tokens * p.num_v_heads, kBlockRows);
    if (grid.blocks == 0) return 0;
    if (!grid.fits()) return kUnsupportedShape;
    const size_t bytes = 4 * sizeof(T);
    const bool is_vector = p.v_dim % 4 == 0 && p.gate_stride % 4 == 0 && is_aligned(p.x, bytes) &&
                           is_aligned(p.gate, bytes) && is_aligned(p.out, bytes) &&
                           is_aligned(p.weight, 16);
    if (is_vector && p.v_dim <= 128) {
        return GDN_LAUNCH((gdn_gated_norm_kernel<T, 4, 1>), grid.dim(), dim3(kThreads), 0, stream,
                          p);
    }
    if (is_vector) {
        return GDN_LAUNCH((gdn_gated_norm_kernel<T, 4, kGdnMaxHeadDim / 128>), grid.dim(),
                          dim3(kThreads), 0, stream, p);
    }
    return GDN_LAUNCH((gdn_gated_norm_kernel<T, 1, kGdnMaxHeadDim / 32>), grid.dim(),
                      dim3(kThreads), 0, stream, p);
}

template <class T>
int launch_chunked(const GdnRule& p, void* stream) {
    const int tiles = (p.v_dim + kChunkTile - 1) / kChunkTile;
    const Grid grid{p.num_sequences * p.num_v_heads * tiles};
    if (!grid.fits()) return kUnsupportedShape;
    // Half as many tokens of the longest keys, so that every card's shared memory holds a block.
    const int piece = p.k_dim <= 128 ? kMaxPiece : kMaxPiece / 2;
    const size_t bytes = static_cast<size_t>(ChunkMemory::floats(piece, p.k_dim)) * sizeof(float);
    return GDN_LAUNCH((chunked_gated_delta_rule_recurrence_kernel<T>), grid.dim(), dim3(kThreads),
                      bytes, stream, p, tiles, piece);
}

}  // namespace
}  // namespace gdn

extern "C" {

int gdn_cuda_gated_delta_rule_recurrence(const GdnRule* args, void* stream) {
    if (args->num_tokens == 0 || args->num_sequences == 0) return 0;
    return GDN_WITH_TYPE(args->dtype, gdn::launch_recurrence<T>(*args, stream));
}

int gdn_cuda_chunked_gated_delta_rule_recurrence(const GdnRule* args, void* stream) {
    if (args->num_tokens == 0 || args->num_sequences == 0) return 0;
    GdnRule without_tables = *args;
    without_tables.chunks = nullptr;
    return GDN_WITH_TYPE(args->dtype, gdn::launch_chunked<T>(without_tables, stream));
}

int gdn_cuda_plain_prefill(const GdnRule* args, void* stream) {
    if (args->num_tokens == 0 || args->num_sequences == 0) return 0;
    return GDN_WITH_TYPE(args->dtype, gdn::launch_chunked<T>(*args, stream));
}

int gdn_cuda_causal_conv1d_update(const GdnConv* args, void* stream) {
    if (args->num_sequences == 0 || args->num_channels == 0) return 0;
    return GDN_WITH_TYPE(args->dtype, gdn::launch_conv<T>(*args, true, stream));
}

int gdn_cuda_causal_conv1d_full(const GdnConv* args, void* stream) {
    if (args->num_tokens == 0 || args->num_sequences == 0 || args->num_channels == 0) return 0;
    const int code = GDN_WITH_TYPE(args->dtype, gdn::launch_conv<T>(*args, false, stream));
    if (code != 0) return code;
    const gdn::Grid grid = gdn::grid_of(args->num_sequences * args->num_channels, gdn::kThreads);
    if (!grid.fits()) return gdn::kUnsupportedShape;
    return GDN_WITH_TYPE(args->dtype, GDN_LAUNCH((gdn::causal_conv1d_window_kernel<T>), grid.dim(),
                                                 dim3(gdn::kThreads), 0, stream, *args));
}

int gdn_cuda_fused_gdn_gating(const GdnGating* args, void* stream) {
    const gdn::Grid grid = gdn::grid_of(args->num_tokens * args->num_v_heads, gdn::kThreads);
    if (grid.blocks == 0) return 0;
    if (!grid.fits()) return gdn::kUnsupportedShape;
    return GDN_WITH_TYPE(args->dtype, GDN_LAUNCH((gdn::fused_gdn_gating_kernel<T>), grid.dim(),
                                                 dim3(gdn::kThreads), 0, stream, *args));
}

int gdn_cuda_gdn_gated_norm(const GdnNorm* args, void* stream) {
    return GDN_WITH_TYPE(args->dtype, gdn::launch_gated_norm<T>(*args, stream));
}

const char* gdn_cuda_error_text(int code) {
    if (code == gdn::kUnsupportedShape) return "more work than one launch can hold";
#ifdef GDN_HOST
    return gdn::host::error_text(code);
#else
    return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
}

}  // extern "C"
