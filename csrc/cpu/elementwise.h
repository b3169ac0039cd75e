// fused_gdn_gating and gdn_gated_norm.
//
// Part of kernels.h.

void gating_units(const GdnGating& args, int64_t begin, int64_t end) {
    with_dtype(args.dtype, [&](auto element) {
        using T = decltype(element);
        const T* b = static_cast<const T*>(args.b);
        const T* a = static_cast<const T*>(args.a);
        for (int h = 0; h < args.num_v_heads; h += kLanes) {
            const int lanes = args.num_v_heads - h;
            const Floats rate = -exp(load(args.a_log + h, lanes));
            const Floats bias = load(args.dt_bias + h, lanes);
            for (int64_t t = begin; t < end; ++t) {
                const int64_t at = t * args.num_v_heads + h;
                store(args.beta + at, sigmoid(load(b + t * args.b_stride + h, lanes)), lanes);
                const Floats step = softplus(load(a + t * args.a_stride + h, lanes) + bias);
                store(args.g + at, rate * step, lanes);
            }
        }
    });
}

// out = x / sqrt(mean x^2 + eps) * weight * silu(gate) over one head; out may be x.
template <class In, class T>
void norm_head(const In* x, const T* gate, const float* weight, int v_dim, float eps, T* out) {
    Floats squares{};
    for (int i = 0; i < v_dim; i += kLanes) {
        const Floats part = load(x + i, v_dim - i);
        squares += part * part;
    }
    const float factor = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(v_dim) + eps);
    for (int i = 0; i < v_dim; i += kLanes) {
        const int lanes = v_dim - i;
        const Floats normed = load(x + i, lanes) * factor * load(weight + i, lanes);
        store(out + i, normed * silu(load(gate + i, lanes)), lanes);
    }
}

void norm_units(const GdnNorm& args, int64_t begin, int64_t end) {
    with_dtype(args.dtype, [&](auto element) {
        using T = decltype(element);
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t token = unit / args.num_v_heads, head = unit % args.num_v_heads;
            norm_head(
                static_cast<const T*>(args.x) + unit * args.v_dim,
                static_cast<const T*>(args.gate) + token * args.gate_stride + head * args.v_dim,
                args.weight, args.v_dim, args.eps, static_cast<T*>(args.out) + unit * args.v_dim);
        }
    });
}
