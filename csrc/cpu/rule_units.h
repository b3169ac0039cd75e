// gated_delta_rule_recurrence, chunked_gated_delta_rule_recurrence and gdn_prefill, which is the
// same work on CPUs: full chunks by matrix products, what is left by single tokens.
//
// Part of kernels.h. A unit is a tile of a value head's rows in one sequence; units that follow
// each other share the keys and queries of their key head, chunk by chunk. q, k and v become
// float32 a chunk at a time. States in float32 whose rows are whole vectors are worked on where
// they lie; others are copied, so that a bfloat16 state is rounded once a call.

template <class T>
class RuleRun {
  public:
    RuleRun(const GdnRule& args, bool prefill, const RulePlan& plan, Scratch& scratch)
        : args_(args),
          prefill_(prefill),
          plan_(plan),
          scratch_(scratch),
          k_pad_(padded(args.k_dim)),
          group_(args.num_v_heads / args.num_k_heads) {}

    void units(int64_t begin, int64_t end) {
        const int64_t per_pair = int64_t{group_} * plan_.tiles;
        const bool copied = args_.state_dtype == kGdnBFloat16 || args_.k_dim != k_pad_;
        const int64_t room = kTileFloats / (int64_t{plan_.tile_rows} * k_pad_);
        while (begin < end) {
            const int64_t pair = begin / per_pair;
            first_ = static_cast<int>(begin % per_pair);
            int64_t count = per_pair - first_;
            if (count > end - begin) count = end - begin;
            if (copied && count > room) count = room;
            count_ = static_cast<int>(count);
            k_head_ = static_cast<int>(pair / args_.num_sequences);
            sequence_ = pair % args_.num_sequences;
            slot_ = args_.slots[sequence_];
            pair_units(copied);
            begin += count;
        }
    }

  private:
    struct Tile {
        int v_head, row, rows;
    };

    Tile tile(int i) const {
        const int at = first_ + i;
        const int row = at % plan_.tiles * plan_.tile_rows;
        const int rows = args_.v_dim - row < plan_.tile_rows ? args_.v_dim - row : plan_.tile_rows;
        return {k_head_ * group_ + at / plan_.tiles, row, rows};
    }

    StateRows rows_of(void* states, int64_t slot, const Tile& t) const {
        return state_rows(states, args_.state_dtype, slot, args_.num_v_heads, args_.v_dim,
                          args_.k_dim, t.v_head, t.row, t.rows);
    }

    float* copy_of(int i) { return scratch_.tiles + int64_t{i} * plan_.tile_rows * k_pad_; }

    float* floats_of(int i) {
        const StateRows rows = rows_of(args_.states, slot_, tile(i));
        return rows.in_place() ? rows.floats() : copy_of(i);
    }

    void pair_units(bool copied) {
        const bool held = slot_ >= 0 && slot_ < args_.num_slots;
        if (held && copied) {
            for (int i = 0; i < count_; ++i) {
                rows_of(args_.states, slot_, tile(i)).load(copy_of(i));
            }
        }
        if (prefill_) {
            prefill_tokens(held);
        } else if (args_.starts) {
            tokens(args_.starts[sequence_], args_.starts[sequence_ + 1], held);
        } else {
            const int64_t each = args_.num_tokens / args_.num_sequences;
            tokens(sequence_ * each, (sequence_ + 1) * each, held);
        }
        if (held && copied) {
            for (int i = 0; i < count_; ++i) {
                rows_of(args_.states, slot_, tile(i)).store(copy_of(i));
            }
        }
    }

    // Chunks that no snapshot parts are one run of tokens.
    void prefill_tokens(bool held) {
        const int32_t end = args_.first_chunks[sequence_ + 1];
        int64_t first = -1;
        for (int32_t c = args_.first_chunks[sequence_]; c < end; ++c) {
            const int32_t* chunk = args_.chunks + 4 * int64_t{c};
            if (first < 0) first = chunk[0];
            if (chunk[3] < 0 && c + 1 < end) continue;
            tokens(first, int64_t{chunk[0]} + chunk[1], held);
            first = -1;
            if (chunk[3] < 0 || !held) continue;
            for (int i = 0; i < count_; ++i) {
                StateRows to = rows_of(args_.snapshots, chunk[3], tile(i));
                const float* from = floats_of(i);
                to.store(from);
            }
        }
    }

    void tokens(int64_t begin, int64_t end, bool held) {
        if (!held) return zeros(begin, end);
        while (begin < end) {
            const int count = end - begin < kLanes ? static_cast<int>(end - begin) : kLanes;
            load_keys(begin, count);
            count < kMinChunk ? steps(begin, count) : chunk(begin, count);
            begin += count;
        }
    }

    void zeros(int64_t begin, int64_t end) {
        for (int i = 0; i < count_; ++i) {
            const Tile t = tile(i);
            for (int64_t token = begin; token < end; ++token) {
                __builtin_memset(out(token, t), 0, t.rows * sizeof(T));
            }
        }
    }

    const T* value(int64_t token, const Tile& t) const {
        return static_cast<const T*>(args_.v) + token * args_.v_stride +
               int64_t{t.v_head} * args_.v_dim + t.row;
    }

    T* out(int64_t token, const Tile& t) const {
        return static_cast<T*>(args_.out) + (token * args_.num_v_heads + t.v_head) * args_.v_dim +
               t.row;
    }

    const float* gate(const float* gates, int64_t token, const Tile& t) const {
        return gates + token * args_.num_v_heads + t.v_head;
    }

    void load_keys(int64_t token, int count) {
        const int64_t at = int64_t{k_head_} * args_.k_dim;
        for (int i = 0; i < count; ++i) {
            float* key = scratch_.keys + i * k_pad_;
            float* query = scratch_.queries + i * k_pad_;
            widen(static_cast<const T*>(args_.k) + (token + i) * args_.k_stride + at, args_.k_dim,
                  k_pad_, key);
            widen(static_cast<const T*>(args_.q) + (token + i) * args_.q_stride + at, args_.k_dim,
                  k_pad_, query);
            if (!prefill_) continue;
            normalise(key, k_pad_, 1.0f);
            normalise(query, k_pad_, query_scale(args_.k_dim));
        }
    }

    void chunk(int64_t token, int count) {
        for (int i = count * k_pad_; i < kLanes * k_pad_; i += kLanes) {
            store(scratch_.keys + i, Floats{});
            store(scratch_.queries + i, Floats{});
        }
        prepare_chunk(scratch_, k_pad_);
        int prepared = -1;
        for (int i = 0; i < count_; ++i) {
            const Tile t = tile(i);
            if (t.v_head != prepared) {
                prepare_head(scratch_, gate(args_.g, token, t), gate(args_.beta, token, t),
                             args_.num_v_heads, count, head_);
                prepared = t.v_head;
            }
            load_values(value(token, t), args_.v_stride, count, t.rows, scratch_.values);
            chunk_tile(head_, scratch_, k_pad_, count, floats_of(i), k_pad_, t.rows,
                       scratch_.values, nullptr);
            store_values(scratch_.values, int64_t{args_.num_v_heads} * args_.v_dim, count, t.rows,
                         out(token, t));
        }
    }

    void steps(int64_t token, int count) {
        float k_dot_q[kLanes] = {};
        for (int j = 0; j < count; ++j) {
            k_dot_q[j] = dot(scratch_.keys + j * k_pad_, scratch_.queries + j * k_pad_, k_pad_);
        }
        for (int i = 0; i < count_; ++i) {
            const Tile t = tile(i);
            for (int j = 0; j < count; ++j) {
                const float decay = exp(broadcast(*gate(args_.g, token + j, t)))[0];
                const Step step{scratch_.keys + j * k_pad_,
                                scratch_.queries + j * k_pad_,
                                k_dot_q[j],
                                decay,
                                *gate(args_.beta, token + j, t),
                                k_pad_};
                widen(value(token + j, t), t.rows, padded(t.rows), scratch_.values);
                step_tile(step, floats_of(i), k_pad_, t.rows, scratch_.values, scratch_.deltas,
                          scratch_.values);
                narrow(scratch_.values, t.rows, out(token + j, t));
            }
        }
    }

    const GdnRule& args_;
    const bool prefill_;
    const RulePlan& plan_;
    Scratch& scratch_;
    const int k_pad_, group_;
    ChunkHead head_;
    // The units at work: `count_` tiles of one sequence and key head.
    int first_, count_, k_head_;
    int64_t sequence_, slot_;
};

void rule_units(const GdnRule& args, bool prefill, const RulePlan& plan, int64_t begin, int64_t end,
                Scratch& scratch) {
    with_dtype(args.dtype, [&](auto element) {
        RuleRun<decltype(element)>(args, prefill, plan, scratch).units(begin, end);
    });
}
