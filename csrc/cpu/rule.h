// The gated delta rule over a tile of a value head's state: some of its rows, in float32.
//
// Part of kernels.h. With c_t = exp(g_0 + ... + g_t) and D_ts = exp(g_{s+1} + ... + g_t), a chunk
// of kLanes tokens, one to a lane, takes
//   A_ts = beta_t (k_t . k_s) D_ts for s < t,  T = (I + A)^-1,  M_ts = (q_t . k_s) D_ts for s <= t,
//   Delta = T (beta (V - c K S^T)),  O = c Q S^T + M Delta,  S <- c_C S + sum_s D_Cs Delta_s k_s^T.
// Its products take no more multiplications than the rule token by token, but rows of the state
// stay in L1 for a whole chunk and no product ends in a sum across lanes. D is made of products,
// never of differences of sums: nothing overflows, and one strong decay costs the later ones no
// bits. All matrices of one chunk are kept by column, with the token t in the lanes.

constexpr int kRowBlock = kLanes == 16 ? 8 : 4;
// Below this many tokens a chunk's empty lanes cost more than steps of one token.
constexpr int kMinChunk = kLanes * 3 / 4;

// The value heads and rows that share a chunk's keys.
struct ChunkHead {
    Floats solve[kLanes];   // [s][t]: T
    Floats scores[kLanes];  // [s][t]: M
    Floats from_start;      // c_t
    Floats to_end;          // D_Ct
    Floats beta;
    float whole;  // c_C
};

// Row r of the state times every key and query of the chunk.
template <int kRows>
GDN_INLINE void project(const float* tile, int64_t stride, int k_pad, const float* transposed,
                        Floats (&by_keys)[kRows], Floats (&by_queries)[kRows]) {
    GDN_UNROLL
    for (int r = 0; r < kRows; ++r) by_keys[r] = by_queries[r] = Floats{};
    for (int i = 0; i < k_pad; ++i) {
        const Floats keys = load(transposed + 2 * kLanes * i);
        const Floats queries = load(transposed + 2 * kLanes * i + kLanes);
        GDN_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const Floats s = in_register(broadcast(tile[r * stride + i]));
            by_keys[r] += s * keys;
            by_queries[r] += s * queries;
        }
    }
}

// kVecs vectors of kRows rows become decay S + sum_t weights[r][t] k_t.
template <int kRows, int kVecs>
GDN_INLINE void accumulate(float* tile, int64_t stride, const float* keys, int k_pad, int count,
                           const float* weights, float decay) {
    Floats state[kRows][kVecs];
    GDN_UNROLL
    for (int r = 0; r < kRows; ++r) {
        GDN_UNROLL
        for (int j = 0; j < kVecs; ++j) {
            state[r][j] = load(tile + r * stride + j * kLanes) * broadcast(decay);
        }
    }
    for (int t = 0; t < count; ++t) {
        Floats key[kVecs];
        GDN_UNROLL
        for (int j = 0; j < kVecs; ++j) key[j] = load(keys + t * k_pad + j * kLanes);
        GDN_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const Floats weight = broadcast(weights[r * kLanes + t]);
            GDN_UNROLL
            for (int j = 0; j < kVecs; ++j) state[r][j] += weight * key[j];
        }
    }
    GDN_UNROLL
    for (int r = 0; r < kRows; ++r) {
        GDN_UNROLL
        for (int j = 0; j < kVecs; ++j) store(tile + r * stride + j * kLanes, state[r][j]);
    }
}

template <int kRows>
GDN_INLINE void accumulate_rows(float* tile, int64_t stride, const float* keys, int k_pad,
                                int count, const float* weights, float decay) {
    constexpr int kVecs = kLanes == 16 ? 4 : 2;
    int i = 0;
    for (; i + kVecs * kLanes <= k_pad; i += kVecs * kLanes) {
        accumulate<kRows, kVecs>(tile + i, stride, keys + i, k_pad, count, weights, decay);
    }
    for (; i < k_pad; i += kLanes) {
        accumulate<kRows, 1>(tile + i, stride, keys + i, k_pad, count, weights, decay);
    }
}

// S <- decay S + sum_t weights[.][t] k_t over a whole tile.
void accumulate_tile(float* tile, int64_t stride, int rows, const float* keys, int k_pad, int count,
                     const float* weights, float decay) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) {
        accumulate_rows<4>(tile + r * stride, stride, keys, k_pad, count, weights + r * kLanes,
                           decay);
    }
    for (; r < rows; ++r) {
        accumulate_rows<1>(tile + r * stride, stride, keys, k_pad, count, weights + r * kLanes,
                           decay);
    }
}

// out[r] = sum_s x[r][s] columns[s].
template <int kRows>
GDN_INLINE void multiply(const float* x, const Floats (&columns)[kLanes], Floats (&out)[kRows]) {
    GDN_UNROLL
    for (int s = 0; s < kLanes; ++s) {
        const Floats column = columns[s];
        GDN_UNROLL
        for (int r = 0; r < kRows; ++r) out[r] += broadcast(x[r * kLanes + s]) * column;
    }
}

// One block of rows through a chunk. `values` holds v and then o, [row][token]. Where `deltas`
// is null the state is updated; else they are kept, [row][token], and the state stays as it is.
template <int kRows>
GDN_INLINE void chunk_rows(const ChunkHead& head, const Scratch& scratch, int k_pad, int count,
                           float* tile, int64_t stride, float* values, float* deltas) {
    Floats by_keys[kRows], by_queries[kRows];
    project<kRows>(tile, stride, k_pad, scratch.transposed, by_keys, by_queries);
    alignas(64) float rows[kRows * kLanes];
    Floats delta[kRows];
    GDN_UNROLL
    for (int r = 0; r < kRows; ++r) {
        store(rows + r * kLanes,
              head.beta * (load(values + r * kLanes) - head.from_start * by_keys[r]));
        delta[r] = Floats{};
    }
    multiply<kRows>(rows, head.solve, delta);
    GDN_UNROLL
    for (int r = 0; r < kRows; ++r) {
        store(rows + r * kLanes, delta[r]);
        if (deltas) store(deltas + r * kLanes, delta[r]);
        by_queries[r] *= head.from_start;
    }
    multiply<kRows>(rows, head.scores, by_queries);
    GDN_UNROLL
    for (int r = 0; r < kRows; ++r) {
        store(values + r * kLanes, by_queries[r]);
        store(rows + r * kLanes, delta[r] * head.to_end);
    }
    if (deltas) return;
    constexpr int kPart = kRows < 4 ? kRows : 4;
    for (int r = 0; r < kRows; r += kPart) {
        accumulate_rows<kPart>(tile + r * stride, stride, scratch.keys, k_pad, count,
                               rows + r * kLanes, head.whole);
    }
}

void chunk_tile(const ChunkHead& head, const Scratch& scratch, int k_pad, int count, float* tile,
                int64_t stride, int rows, float* values, float* deltas) {
    int r = 0;
    for (; r + kRowBlock <= rows; r += kRowBlock) {
        chunk_rows<kRowBlock>(head, scratch, k_pad, count, tile + r * stride, stride,
                              values + r * kLanes, deltas ? deltas + r * kLanes : nullptr);
    }
    for (; r < rows; ++r) {
        chunk_rows<1>(head, scratch, k_pad, count, tile + r * stride, stride, values + r * kLanes,
                      deltas ? deltas + r * kLanes : nullptr);
    }
}

// What the value heads of one key head share in a chunk: both transposes and all products.
// Expects kLanes keys and queries, of which the tokens that are not there are zeros.
void prepare_chunk(Scratch& scratch, int k_pad) {
    for (int i = 0; i < k_pad; i += kLanes) {
        Floats keys[kLanes], queries[kLanes];
        GDN_UNROLL
        for (int t = 0; t < kLanes; ++t) keys[t] = load(scratch.keys + t * k_pad + i);
        transpose(keys);
        float* to = scratch.transposed + 2 * kLanes * i;
        GDN_UNROLL
        for (int j = 0; j < kLanes; ++j) store(to + 2 * kLanes * j, keys[j]);
        GDN_UNROLL
        for (int t = 0; t < kLanes; ++t) queries[t] = load(scratch.queries + t * k_pad + i);
        transpose(queries);
        GDN_UNROLL
        for (int j = 0; j < kLanes; ++j) store(to + 2 * kLanes * j + kLanes, queries[j]);
    }
    for (int s = 0; s < kLanes; s += 4) {
        Floats by_keys[4], by_queries[4];
        project<4>(scratch.keys + s * k_pad, k_pad, k_pad, scratch.transposed, by_keys, by_queries);
        GDN_UNROLL
        for (int r = 0; r < 4; ++r) {
            store(scratch.key_products + (s + r) * kLanes, by_keys[r]);
            store(scratch.query_products + (s + r) * kLanes, by_queries[r]);
        }
    }
}

// 1 in lane i.
GDN_INLINE Floats unit(int i) {
    Floats x{};
    x[i] = 1.0f;
    return x;
}

// What one value head needs besides: `g` and `beta` are its first token's, `stride` apart. The
// tokens that are not there neither decay (g = 0) nor write (beta = 0).
void prepare_head(const Scratch& scratch, const float* g, const float* beta, int64_t stride,
                  int count, ChunkHead& head) {
    alignas(64) float gates[kLanes] = {}, betas[kLanes] = {}, decays[kLanes], to_end[kLanes];
    for (int t = 0; t < count; ++t) {
        gates[t] = g[t * stride];
        betas[t] = beta[t * stride];
    }
    store(decays, exp(load(gates)));
    head.beta = load(betas);
    to_end[kLanes - 1] = 1.0f;
    for (int t = kLanes - 1; t > 0; --t) to_end[t - 1] = to_end[t] * decays[t];
    head.to_end = load(to_end);

    // Column s of D is row s of the identity plus a_{s+1} times column s + 1.
    alignas(64) float lower[kLanes][kLanes];  // [s][t]: A, and what else lies on or above it
    Floats decay{};
    for (int s = kLanes - 1; s >= 0; --s) {
        decay += unit(s);
        store(lower[s], head.beta * load(scratch.key_products + s * kLanes) * decay);
        head.scores[s] = load(scratch.query_products + s * kLanes) * decay;
        decay *= decays[s];
    }
    head.from_start = decay;
    head.whole = decay[kLanes - 1];

    // T (I + A) = I gives column s of T from those after it, which are subtracted as they come.
    GDN_UNROLL
    for (int s = 0; s < kLanes; ++s) head.solve[s] = unit(s);
    for (int r = kLanes - 1; r > 0; --r) {
        const Floats column = head.solve[r];
        for (int s = 0; s < r; ++s) head.solve[s] -= lower[s][r] * column;
    }
}

// One token, as every value head of its key head sees it.
struct Step {
    const float* key;
    const float* query;
    float k_dot_q, decay, beta;
    int k_pad;
};

// States of one token at a time come from memory, a page after the other: asking this far ahead
// took a decode step whose states lie outside the cache to 0.6 of its time.
constexpr int kPrefetchFloats = 3584;

// Rows of the state times the key and the query, lane by lane.
template <int kRows>
struct StepSums {
    Floats by_key[kRows], by_query[kRows];
};

template <int kRows>
GDN_INLINE StepSums<kRows> step_project(const Step& step, const float* tile, int64_t stride) {
    StepSums<kRows> sums;
    GDN_UNROLL
    for (int r = 0; r < kRows; ++r) sums.by_key[r] = sums.by_query[r] = Floats{};
    const int k_pad = step.k_pad;
    for (int i = 0; i < k_pad; i += kLanes) {
        const Floats k = load(step.key + i), q = load(step.query + i);
        GDN_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const float* at = tile + r * stride + i;
            __builtin_prefetch(at + kPrefetchFloats);
            const Floats s = in_register(load(at));
            sums.by_key[r] += s * k;
            sums.by_query[r] += s * q;
        }
    }
    return sums;
}

// S_new q = a (S q) + delta (k . q), so both products are those of the old state.
template <int kRows>
GDN_INLINE void step_solve(const Step& step, const StepSums<kRows>& sums, const float* value,
                           float* delta, float* out) {
    static_assert(kRows == 1 || kRows == 4, "sum4 sums four rows, or the two products of one");
    if constexpr (kRows == 4) {
        const auto &k = sums.by_key, &q = sums.by_query;
        const Quad seen = sum4(k[0], k[1], k[2], k[3]);
        const Quad read = sum4(q[0], q[1], q[2], q[3]);
        const Quad deltas = step.beta * (load_raw<Quad>(value) - step.decay * seen);
        const Quad result = step.decay * read + step.k_dot_q * deltas;
        __builtin_memcpy(delta, &deltas, sizeof(deltas));
        __builtin_memcpy(out, &result, sizeof(result));
    } else {
        const Floats k = sums.by_key[0], q = sums.by_query[0];
        const Quad totals = sum4(k, q, k, q);
        delta[0] = step.beta * (value[0] - step.decay * totals[0]);
        out[0] = step.decay * totals[1] + step.k_dot_q * delta[0];
    }
}

template <int kRows>
GDN_INLINE void step_update(const Step& step, const float* delta, float* tile, int64_t stride) {
    // What the loop reads is copied first, since its stores might change it for all it knows.
    const Floats decay = broadcast(step.decay);
    Floats deltas[kRows];
    GDN_UNROLL
    for (int r = 0; r < kRows; ++r) deltas[r] = broadcast(delta[r]);
    const float* key = step.key;
    const int k_pad = step.k_pad;
    for (int i = 0; i < k_pad; i += kLanes) {
        const Floats k = in_register(load(key + i));
        GDN_UNROLL
        for (int r = 0; r < kRows; ++r) {
            float* at = tile + r * stride + i;
            store(at, load(at) * decay + k * deltas[r]);
        }
    }
}

// One token through a tile; `deltas` and `out` take a float a row, and `out` may be `value`. The
// products of the next rows come before the update of these, which has to wait for its sums.
void step_tile(const Step& step, float* tile, int64_t stride, int rows, const float* value,
               float* deltas, float* out) {
    int r = 0;
    if (rows >= 4) {
        StepSums<4> sums = step_project<4>(step, tile, stride);
        for (; r + 4 <= rows; r += 4) {
            step_solve<4>(step, sums, value + r, deltas + r, out + r);
            float* at = tile + r * stride;
            if (r + 8 <= rows) sums = step_project<4>(step, at + 4 * stride, stride);
            step_update<4>(step, deltas + r, at, stride);
        }
    }
    for (; r < rows; ++r) {
        float* at = tile + r * stride;
        step_solve<1>(step, step_project<1>(step, at, stride), value + r, deltas + r, out + r);
        step_update<1>(step, deltas + r, at, stride);
    }
}

float dot(const float* x, const float* y, int k_pad) {
    Floats total{};
    for (int i = 0; i < k_pad; i += kLanes) total += load(x + i) * load(y + i);
    return sum(total);
}

// Scales x, whose padding is zeros, to length `scale`.
void normalise(float* x, int k_pad, float scale) {
    const Floats factor = broadcast(scale / __builtin_sqrtf(dot(x, x, k_pad) + GDN_NORM_EPS));
    for (int i = 0; i < k_pad; i += kLanes) store(x + i, load(x + i) * factor);
}

float query_scale(int k_dim) {
    return 1.0f / __builtin_sqrtf(static_cast<float>(k_dim));
}

template <class T>
void widen(const T* from, int count, int padded, float* to) {
    for (int i = 0; i < padded; i += kLanes) {
        store(to + i, i < count ? load(from + i, count - i) : Floats{});
    }
}

template <class T>
void narrow(const float* from, int count, T* to) {
    for (int i = 0; i < count; i += kLanes) store(to + i, load(from + i, count - i), count - i);
}

template <class T>
void load_rows(const T* from, int rows, int k_dim, int k_pad, float* tile) {
    for (int r = 0; r < rows; ++r) widen(from + r * k_dim, k_dim, k_pad, tile + r * k_pad);
}

template <class T>
void store_rows(const float* tile, int rows, int k_dim, int k_pad, T* to) {
    for (int r = 0; r < rows; ++r) narrow(tile + r * k_pad, k_dim, to + r * k_dim);
}

// Rows of states in memory, of either type.
struct StateRows {
    char* first;
    int rows, k_dim, k_pad;
    bool narrow;  // bfloat16

    bool in_place() const { return !narrow && k_dim == k_pad; }
    float* floats() const { return reinterpret_cast<float*>(first); }
    void load(float* tile) const {
        narrow ? load_rows(reinterpret_cast<const Bf16*>(first), rows, k_dim, k_pad, tile)
               : load_rows(floats(), rows, k_dim, k_pad, tile);
    }
    void store(const float* tile) const {
        narrow ? store_rows(tile, rows, k_dim, k_pad, reinterpret_cast<Bf16*>(first))
               : store_rows(tile, rows, k_dim, k_pad, floats());
    }
};

int padded(int k_dim) {
    return (k_dim + kLanes - 1) / kLanes * kLanes;
}

StateRows state_rows(void* states, int state_dtype, int64_t slot, int num_v_heads, int v_dim,
                     int k_dim, int v_head, int row, int rows) {
    const bool is_narrow = state_dtype == kGdnBFloat16;
    const int64_t at = ((slot * num_v_heads + v_head) * v_dim + row) * k_dim;
    return {static_cast<char*>(states) + at * (is_narrow ? 2 : 4), rows, k_dim, padded(k_dim),
            is_narrow};
}

// v of `count` tokens for `rows` rows, [row][token]; zeros where a lane has no token.
template <class T>
void load_values(const T* v, int64_t stride, int count, int rows, float* values) {
    for (int r = 0; r < rows; r += kLanes) {
        Floats x[kLanes];
        GDN_UNROLL
        for (int t = 0; t < kLanes; ++t) {
            x[t] = t < count ? load(v + t * stride + r, rows - r) : Floats{};
        }
        transpose(x);
        GDN_UNROLL
        for (int j = 0; j < kLanes; ++j) store(values + (r + j) * kLanes, x[j]);
    }
}

template <class T>
void store_values(const float* values, int64_t stride, int count, int rows, T* out) {
    for (int r = 0; r < rows; r += kLanes) {
        Floats x[kLanes];
        GDN_UNROLL
        for (int j = 0; j < kLanes; ++j) x[j] = load(values + (r + j) * kLanes);
        transpose(x);
        for (int t = 0; t < count; ++t) store(out + t * stride + r, x[t], rows - r);
    }
}
