// The functions of one variable that gates and norms are made of, within 2 ulp of float32.
//
// Part of kernels.h. NaN in is NaN out.

// x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial in r that is off by 3e-9 at most.
GDN_INLINE Floats exp(Floats x) {
    x = x < -104.0f ? broadcast(-104.0f) : x;
    x = x > 89.0f ? broadcast(89.0f) : x;
    // Adding 1.5 * 2^23 rounds to an integer, which the sum's low bits then hold.
    const Floats shifted = x * 1.44269504f + 0x1.8p23f;
    const Floats n = shifted - 0x1.8p23f;
    const Floats r = (x - n * 0.693145751953125f) - n * 1.42860677e-6f;
    Floats p = r * 1.38144777e-3f + 8.36877991e-3f;
    p = p * r + 4.16683927e-2f;
    p = p * r + 1.66665196e-1f;
    p = p * r + 4.99999940e-1f;
    p = p * (r * r) + r + 1.0f;
    // Two factors, since 2^n itself need not be a normal number.
    const Ints whole = bit_cast<Ints>(shifted) - bit_cast<int32_t>(0x1.8p23f);
    const Ints half = whole >> 1;
    const Floats first = bit_cast<Floats>((half + 127) << 23);
    const Floats second = bit_cast<Floats>((whole - half + 127) << 23);
    return p * first * second;
}

GDN_INLINE Floats magnitude(Floats x) {
    return bit_cast<Floats>(bit_cast<Words>(x) & 0x7fffffff);
}

// exp(-|x|) overflows for no x.
GDN_INLINE Floats sigmoid(Floats x) {
    const Floats e = exp(-magnitude(x));
    return (x < 0.0f ? e : broadcast(1.0f)) / (e + 1.0f);
}

GDN_INLINE Floats silu(Floats x) { return x * sigmoid(x); }

// log(1 + exp(x)) = max(x, 0) + log1p(e) with e = exp(-|x|), and log1p(e) = 2 atanh(e / (2 + e)),
// whose argument is at most 1/3: eight terms of the series leave 2e-9.
GDN_INLINE Floats softplus(Floats x) {
    const Floats e = exp(-magnitude(x));
    const Floats s = e / (e + 2.0f);
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
