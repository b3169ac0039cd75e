// The short causal convolution and its SiLU over a range of channels; both conv operators.
//
// Part of kernels.h.

// taps[j][c] = weight[c][j] in float32, rows `stride` apart. `weight` is the first channel's.
template <class T>
void load_taps(const T* weight, int width, int channels, int64_t stride, float* taps) {
    int c = 0;
    if (width == 4) {
        for (; c + kLanes <= channels; c += kLanes) {
            const T* from = weight + 4 * c;
            const Floats a = load(from), b = load(from + kLanes);
            const Floats d = load(from + 2 * kLanes), e = load(from + 3 * kLanes);
            const Floats even_ab = even_lanes(a, b), odd_ab = odd_lanes(a, b);
            const Floats even_de = even_lanes(d, e), odd_de = odd_lanes(d, e);
            store(taps + c, even_lanes(even_ab, even_de));
            store(taps + stride + c, even_lanes(odd_ab, odd_de));
            store(taps + 2 * stride + c, odd_lanes(even_ab, even_de));
            store(taps + 3 * stride + c, odd_lanes(odd_ab, odd_de));
        }
    }
    for (; c < channels; c += kLanes) {
        const int count = channels - c < kLanes ? channels - c : kLanes;
        for (int j = 0; j < width; ++j) {
            T lanes[kLanes] = {};
            for (int i = 0; i < count; ++i) lanes[i] = weight[(c + i) * width + j];
            store(taps + j * stride + c, load(lanes));
        }
    }
}

// out[t][c] = silu(sum_j taps[j][c] rows[t + j][c]) for one vector of channels, the first `lanes`
// of it; kWidth 0 stands for any width.
template <int kWidth, class T, class Out>
GDN_INLINE void conv_vector(const T* const* rows, int64_t at, int lanes, int count, int width,
                            const float* taps, int64_t tap_stride, Out* out, int64_t out_stride) {
    if constexpr (kWidth > 0) {
        Floats tap[kWidth], x[kWidth];
        GDN_UNROLL
        for (int j = 0; j < kWidth; ++j) tap[j] = load(taps + j * tap_stride);
        GDN_UNROLL
        for (int j = 0; j + 1 < kWidth; ++j) x[j] = load(rows[j] + at, lanes);
        for (int t = 0; t < count; ++t) {
            x[kWidth - 1] = load(rows[t + kWidth - 1] + at, lanes);
            Floats total = tap[0] * x[0];
            GDN_UNROLL
            for (int j = 1; j < kWidth; ++j) total += tap[j] * x[j];
            store(out + t * out_stride, silu(total), lanes);
            GDN_UNROLL
            for (int j = 0; j + 1 < kWidth; ++j) x[j] = x[j + 1];
        }
    } else {
        for (int t = 0; t < count; ++t) {
            Floats total{};
            for (int j = 0; j < width; ++j) {
                total += load(taps + j * tap_stride) * load(rows[t + j] + at, lanes);
            }
            store(out + t * out_stride, silu(total), lanes);
        }
    }
}

// `count` tokens: rows[t .. t + width - 1] are the inputs of token t, from the first channel on.
template <class T, class Out>
void conv_rows(const T* const* rows, int channels, int count, int width, const float* taps,
               int64_t tap_stride, Out* out, int64_t out_stride) {
    for (int c = 0; c < channels; c += kLanes) {
        const int lanes = channels - c < kLanes ? channels - c : kLanes;
        if (width == 4) {
            conv_vector<4>(rows, c, lanes, count, width, taps + c, tap_stride, out + c, out_stride);
        } else {
            conv_vector<0>(rows, c, lanes, count, width, taps + c, tap_stride, out + c, out_stride);
        }
    }
}

// The last width - 1 inputs become the window. A row's source lies at or after it, so rows that
// come from the old window are read before they are overwritten.
template <class T>
void move_window(const T* const* rows, int channels, int width, int64_t channel_stride, T* window) {
    for (int j = 0; j + 1 < width; ++j) {
        __builtin_memmove(window + j * channel_stride, rows[j], channels * sizeof(T));
    }
}

// One sequence's channels. The taps lie in scratch.
template <class T>
void conv_sequence(const GdnConv& args, int64_t sequence, int first, int channels,
                   const float* taps) {
    constexpr int kTokens = 8;
    const int history = args.width - 1;
    const int64_t each = args.num_tokens / args.num_sequences;
    const int64_t begin = args.starts ? args.starts[sequence] : sequence * each;
    const int64_t end = args.starts ? args.starts[sequence + 1] : begin + each;
    const int64_t slot = args.slots[sequence], dim = args.num_channels;
    T* out = static_cast<T*>(args.out) + first;
    if (slot < 0 || slot >= args.num_slots) {
        for (int64_t t = begin; t < end; ++t) {
            __builtin_memset(out + t * dim, 0, channels * sizeof(T));
        }
        return;
    }
    const T* x = static_cast<const T*>(args.x) + first;
    T* window = static_cast<T*>(args.windows) + slot * history * dim + first;
    const auto row = [&](int64_t i) -> const T* {
        return i < history ? window + i * dim : x + (begin + i - history) * args.x_stride;
    };
    const T* rows[kTokens + kGdnMaxConvWidth];
    for (int64_t t = begin; t < end; t += kTokens) {
        const int count = end - t < kTokens ? static_cast<int>(end - t) : kTokens;
        for (int i = 0; i < count + history; ++i) rows[i] = row(t - begin + i);
        conv_rows(rows, channels, count, args.width, taps, kConvChannels, out + t * dim, dim);
    }
    for (int i = 0; i < history; ++i) rows[i] = row(end - begin + i);
    if (begin < end) move_window(rows, channels, args.width, dim, window);
}

void conv_units(const GdnConv& args, int32_t block, int64_t begin, int64_t end, Scratch& scratch) {
    with_dtype(args.dtype, [&](auto element) {
        using T = decltype(element);
        int64_t held = -1;
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t first = unit / args.num_sequences * block;
            const int64_t left = args.num_channels - first;
            const int channels = static_cast<int>(left < block ? left : block);
            if (first != held) {
                const T* weight = static_cast<const T*>(args.weight) + first * args.width;
                load_taps(weight, args.width, channels, kConvChannels, scratch.taps);
                held = first;
            }
            conv_sequence<T>(args, unit % args.num_sequences, static_cast<int>(first), channels,
                             scratch.taps);
        }
    });
}
