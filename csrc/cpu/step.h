// gdn_decode_step and gdn_verify: the mixer between its projections, for one key head and its
// value heads in one sequence, which is the unit of work: so the window of the key head's channels
// has one owner.
//
// Part of kernels.h.

template <class T>
class StepRun {
  public:
    StepRun(const GdnStep& args, bool verify, Scratch& scratch)
        : args_(args),
          verify_(verify),
          scratch_(scratch),
          drafts_(verify ? args.num_draft : 1),
          history_(args.width - 1),
          group_(args.num_v_heads / args.num_k_heads),
          k_pad_(padded(args.k_dim)),
          v_pad_(padded(args.v_dim)),
          conv_dim_(2 * int64_t{args.num_k_heads} * args.k_dim +
                    int64_t{args.num_v_heads} * args.v_dim) {}

    void units(int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
            k_head_ = static_cast<int>(unit % args_.num_k_heads);
            sequence_ = unit / args_.num_k_heads;
            slot_ = args_.slots[sequence_];
            first_token_ = sequence_ * drafts_;
            if (slot_ < 0 || slot_ >= args_.num_slots) {
                zeros();
                continue;
            }
            const int64_t pending = verify_ ? args_.pending[sequence_] : 0;
            const int64_t most = verify_ ? args_.max_draft : 0;
            pending_ = static_cast<int>(pending < 0 ? 0 : pending < most ? pending : most);
            heads();
        }
    }

  private:
    void zeros() {
        for (int t = 0; t < drafts_; ++t) {
            __builtin_memset(out(t, k_head_ * group_), 0, sizeof(T) * group_ * args_.v_dim);
        }
    }

    void heads() {
        const int64_t at = int64_t{k_head_} * args_.k_dim;
        convolve(at, args_.k_dim, k_pad_, scratch_.queries);
        convolve(at + int64_t{args_.num_k_heads} * args_.k_dim, args_.k_dim, k_pad_, scratch_.keys);
        for (int t = 0; t < drafts_; ++t) {
            float* key = scratch_.keys + t * k_pad_;
            float* query = scratch_.queries + t * k_pad_;
            normalise(key, k_pad_, 1.0f);
            normalise(query, k_pad_, query_scale(args_.k_dim));
            k_dot_q_[t] = dot(key, query, k_pad_);
        }
        // Where a chunk's lanes hold all drafts and most lanes are taken, it beats single tokens.
        chunked_ = verify_ && drafts_ >= kMinChunk && drafts_ <= kLanes;
        if (chunked_) {
            clear_rows(scratch_.keys);
            clear_rows(scratch_.queries);
            prepare_chunk(scratch_, k_pad_);
        }
        for (int i = 0; i < group_; i += kLanes) {
            const int first = k_head_ * group_ + i;
            const int count = group_ - i < kLanes ? group_ - i : kLanes;
            load_gates(first, count);
            for (int j = 0; j < count; ++j) value_head(first + j, j);
        }
    }

    void clear_rows(float* rows) {
        for (int i = drafts_ * k_pad_; i < kLanes * k_pad_; i += kLanes) store(rows + i, Floats{});
    }

    // Row i of the window that the drafts see, and then of the drafts: what has been folded in
    // comes from the ring.
    const T* input(int64_t channel, int i) const {
        if (i >= history_) {
            return static_cast<const T*>(args_.mixed) +
                   (first_token_ + i - history_) * args_.mixed_stride + channel;
        }
        i += pending_;
        return i < history_ ? window(channel) + i * conv_dim_ : ring(channel, i - history_);
    }

    T* window(int64_t channel) const {
        return static_cast<T*>(args_.windows) + slot_ * history_ * conv_dim_ + channel;
    }

    T* ring(int64_t channel, int entry) const {
        return static_cast<T*>(args_.ring_inputs) + (slot_ * args_.max_draft + entry) * conv_dim_ +
               channel;
    }

    // The convolution of one head's channels, [draft][dim_pad] with zeros past dim; then the window
    // moves on, and the ring takes the drafts.
    void convolve(int64_t channel, int dim, int dim_pad, float* to) {
        const T* weight = static_cast<const T*>(args_.conv_weight) + channel * args_.width;
        load_taps(weight, args_.width, dim, kGdnMaxHeadDim, scratch_.taps);
        const T* rows[kGdnMaxDraftTokens + kGdnMaxConvWidth];
        for (int i = 0; i < history_ + drafts_; ++i) rows[i] = input(channel, i);
        for (int t = 0; t < drafts_ && dim < dim_pad; ++t) {
            store(to + (t + 1) * dim_pad - kLanes, Floats{});
        }
        conv_rows(rows, dim, drafts_, args_.width, scratch_.taps, kGdnMaxHeadDim, to, dim_pad);
        if (!verify_) {
            move_window(rows + 1, dim, args_.width, conv_dim_, window(channel));
            return;
        }
        if (pending_ > 0) move_window(rows, dim, args_.width, conv_dim_, window(channel));
        for (int t = 0; t < drafts_; ++t) {
            __builtin_memcpy(ring(channel, t), rows[history_ + t], dim * sizeof(T));
        }
    }

    void load_gates(int first, int count) {
        const Floats rate = -exp(load(args_.a_log + first, count));
        const Floats bias = load(args_.dt_bias + first, count);
        for (int t = 0; t < drafts_; ++t) {
            const int64_t token = first_token_ + t;
            const T* b = static_cast<const T*>(args_.b) + token * args_.b_stride + first;
            const T* a = static_cast<const T*>(args_.a) + token * args_.a_stride + first;
            const Floats g = rate * softplus(load(a, count) + bias);
            store(beta_[t], sigmoid(load(b, count)));
            store(g_[t], g);
            store(decay_[t], exp(g));
        }
    }

    T* out(int t, int v_head) const {
        return static_cast<T*>(args_.out) +
               ((first_token_ + t) * args_.num_v_heads + v_head) * args_.v_dim;
    }

    int64_t ring_entry(int entry, int v_head) const {
        return (slot_ * args_.max_draft + entry) * args_.num_v_heads + v_head;
    }

    // `lane` is the head's in the gates.
    void value_head(int v_head, int lane) {
        const int64_t channel =
            2 * int64_t{args_.num_k_heads} * args_.k_dim + int64_t{v_head} * args_.v_dim;
        convolve(channel, args_.v_dim, v_pad_, scratch_.heads);
        if (chunked_) {
            prepare_head(scratch_, &g_[0][lane], &beta_[0][lane], kLanes, drafts_, head_);
        }
        for (int row = 0; row < args_.v_dim; row += kStepRows) {
            const int left = args_.v_dim - row;
            const StateRows state =
                state_rows(args_.states, args_.state_dtype, slot_, args_.num_v_heads, args_.v_dim,
                           args_.k_dim, v_head, row, left < kStepRows ? left : kStepRows);
            verify_ ? verify_rows(state, v_head, lane, row) : decode_rows(state, lane, row);
        }
        for (int t = 0; t < drafts_; ++t) {
            const T* gate = static_cast<const T*>(args_.z) + (first_token_ + t) * args_.z_stride +
                            int64_t{v_head} * args_.v_dim;
            norm_head(scratch_.heads + t * v_pad_, gate, args_.norm_weight, args_.v_dim,
                      args_.norm_eps, out(t, v_head));
        }
        for (int t = 0; t < drafts_ && verify_; ++t) {
            const int64_t entry = ring_entry(t, v_head);
            args_.ring_decays[entry] = g_[t][lane];
            narrow(scratch_.keys + t * k_pad_, args_.k_dim, args_.ring_keys + entry * args_.k_dim);
        }
    }

    void decode_rows(const StateRows& state, int lane, int row) {
        float* tile = state.in_place() ? state.floats() : scratch_.tiles;
        if (!state.in_place()) state.load(tile);
        step(tile, state.rows, 0, lane, row, scratch_.deltas);
        if (!state.in_place()) state.store(tile);
    }

    void step(float* tile, int rows, int t, int lane, int row, float* deltas) {
        const Step step{scratch_.keys + t * k_pad_,
                        scratch_.queries + t * k_pad_,
                        k_dot_q_[t],
                        decay_[t][lane],
                        beta_[t][lane],
                        k_pad_};
        float* values = scratch_.heads + t * v_pad_ + row;
        step_tile(step, tile, k_pad_, rows, values, deltas, values);
    }

    // Folds the pending tokens into rows of the state, then runs the drafts on a copy of them.
    void verify_rows(const StateRows& state, int v_head, int lane, int row) {
        float* tile = scratch_.tiles;
        if (pending_ == 0 && drafts_ == 0) return;
        state.load(tile);
        for (int i = 0; i < pending_; i += kLanes) {
            fold(tile, state.rows, i, pending_ - i < kLanes ? pending_ - i : kLanes, v_head, row);
        }
        if (pending_ > 0) state.store(tile);
        if (chunked_) {
            draft_chunk(tile, state.rows, v_head, row);
            return;
        }
        for (int t = 0; t < drafts_; ++t) {
            step(tile, state.rows, t, lane, row,
                 args_.ring_deltas + ring_entry(t, v_head) * args_.v_dim + row);
        }
    }

    // S <- exp(sum g) S + sum_i exp(g_{i+1} + ...) delta_i k_i^T for `count` entries of the ring.
    void fold(float* tile, int rows, int first, int count, int v_head, int row) {
        float decay = 1.0f;
        for (int i = count - 1; i >= 0; --i) {
            const int64_t entry = ring_entry(first + i, v_head);
            widen(args_.ring_keys + entry * args_.k_dim, args_.k_dim, k_pad_,
                  scratch_.fold_keys + i * k_pad_);
            const float* deltas = args_.ring_deltas + entry * args_.v_dim + row;
            for (int r = 0; r < rows; ++r) {
                scratch_.fold_weights[r * kLanes + i] = decay * deltas[r];
            }
            decay *= exp(broadcast(args_.ring_decays[entry]))[0];
        }
        accumulate_tile(tile, k_pad_, rows, scratch_.fold_keys, k_pad_, count,
                        scratch_.fold_weights, decay);
    }

    void draft_chunk(float* tile, int rows, int v_head, int row) {
        float* heads = scratch_.heads + row;
        float* deltas = scratch_.fold_weights;
        load_values(heads, v_pad_, drafts_, rows, scratch_.values);
        chunk_tile(head_, scratch_, k_pad_, drafts_, tile, k_pad_, rows, scratch_.values, deltas);
        store_values(scratch_.values, v_pad_, drafts_, rows, heads);
        store_values(deltas, int64_t{args_.num_v_heads} * args_.v_dim, drafts_, rows,
                     args_.ring_deltas + ring_entry(0, v_head) * args_.v_dim + row);
    }

    const GdnStep& args_;
    const bool verify_;
    Scratch& scratch_;
    const int drafts_, history_, group_, k_pad_, v_pad_;
    const int64_t conv_dim_;
    // The unit at work.
    int k_head_, pending_;
    int64_t sequence_, slot_, first_token_;
    bool chunked_;
    ChunkHead head_;
    float k_dot_q_[kGdnMaxDraftTokens];
    // Of up to kLanes value heads.
    float beta_[kGdnMaxDraftTokens][kLanes], g_[kGdnMaxDraftTokens][kLanes],
        decay_[kGdnMaxDraftTokens][kLanes];
};

void decode_units(const GdnStep& args, int64_t begin, int64_t end, Scratch& scratch) {
    with_dtype(args.dtype, [&](auto element) {
        StepRun<decltype(element)>(args, false, scratch).units(begin, end);
    });
}

void verify_units(const GdnStep& args, int64_t begin, int64_t end, Scratch& scratch) {
    with_dtype(args.dtype, [&](auto element) {
        StepRun<decltype(element)>(args, true, scratch).units(begin, end);
    });
}
