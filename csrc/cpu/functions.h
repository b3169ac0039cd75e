// The functions of one variable that gates and norms are made of, within 3 ulp of float32.
//
// Part of kernels.h. NaN in is NaN out.

// The larger (smaller) of x and the bound; x where it is NaN.
GDN_INLINE Floats at_least(Floats x, float bound) {
#if GDN_CPU_LANES == 16
    return _mm512_max_ps(broadcast(bound), x);
#elif GDN_CPU_LANES == 8
    return _mm256_max_ps(broadcast(bound), x);
#else
    return x < bound ? broadcast(bound) : x;
#endif
}

GDN_INLINE Floats at_most(Floats x, float bound) {
    return -at_least(-x, -bound);
}

// x 2^n for x near 1 and whole n, given as n + 1.5 * 2^23. Below 2^-126 that is 0 where the machine
// has no instruction for it.
GDN_INLINE Floats scale(Floats x, Floats shifted) {
#if GDN_CPU_LANES == 16
    return _mm512_scalef_ps(x, shifted - 0x1.8p23f);
#else
    const Ints power = (bit_cast<Ints>(shifted) << 23) + 0x3f800000;
    const Ints tiny = shifted <= 0x1.8p23f - 127.0f;
    return bit_cast<Floats>(bit_cast<Ints>(x * bit_cast<Floats>(power)) & ~tiny);
#endif
}

// For x at most 88. x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial in r that is off by 3e-9
// at most; adding 1.5 * 2^23 rounds to a whole number, which is then in the sum's low bits.
GDN_INLINE Floats exp_bounded(Floats x) {
    x = at_least(x, -104.0f);
    const Floats shifted = x * 1.44269504f + 0x1.8p23f;
    const Floats n = shifted - 0x1.8p23f;
    const Floats r = (x - n * 0.693145751953125f) - n * 1.42860677e-6f;
    // By halves, which are there sooner than one term after the other.
    const Floats square = r * r;
    const Floats low = r * 1.66665196e-1f + 4.99999940e-1f;
    const Floats high = square * 1.38144777e-3f + (r * 8.36877991e-3f + 4.16683927e-2f);
    return scale((square * high + low) * square + (r + 1.0f), shifted);
}

// Takes what is above 88 for 88.
GDN_INLINE Floats exp(Floats x) {
    return exp_bounded(at_most(x, 88.0f));
}

// a / b for b in [1, 4]: where there is an estimate y of 1 / b, a y (1 + rest + rest^2 ...).
GDN_INLINE Floats quotient(Floats a, Floats b) {
#if GDN_CPU_LANES == 16
    const Floats y = _mm512_rcp14_ps(b);
    return a * y + (a * y) * (1.0f - b * y);
#elif GDN_CPU_LANES == 8
    const Floats y = _mm256_rcp_ps(b);
    const Floats rest = 1.0f - b * y;
    return a * y + (a * y) * (rest * rest + rest);
#else
    return a / b;
#endif
}

GDN_INLINE Floats magnitude(Floats x) {
    return bit_cast<Floats>(bit_cast<Words>(x) & 0x7fffffff);
}

// 1 / (1 + exp(-x)) by exp(-|x|), which overflows for no x.
GDN_INLINE Floats sigmoid(Floats x) {
    const Floats e = exp_bounded(-magnitude(x));
    return quotient(x < 0.0f ? e : broadcast(1.0f), e + 1.0f);
}

GDN_INLINE Floats silu(Floats x) {
    return x * sigmoid(x);
}

// log(1 + exp(x)) = max(x, 0) + log1p(e) with e = exp(-|x|), and log1p(e) = 2 atanh(e / (2 + e)),
// whose argument is at most 1/3: eight terms of the series leave 2e-9.
GDN_INLINE Floats softplus(Floats x) {
    const Floats e = exp_bounded(-magnitude(x));
    const Floats s = quotient(e, e + 2.0f);
    const Floats square = s * s;
    Floats p = square * (1.0f / 15) + 1.0f / 13;
    p = p * square + 1.0f / 11;
    p = p * square + 1.0f / 9;
    p = p * square + 1.0f / 7;
    p = p * square + 1.0f / 5;
    p = p * square + 1.0f / 3;
    p = p * square + 1.0f;
    return (x < 0.0f ? Floats{} : x) + 2.0f * s * p;
}
