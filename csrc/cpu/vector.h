// Vectors of one instruction set: loads and stores of every element type, sums, transposes.
//
// Part of kernels.h. Arithmetic is the compiler's own on vector types (GCC and Clang); only what
// that lacks is spelt in intrinsics, with a plain form for any other machine.

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef float Quad __attribute__((vector_size(16)));

struct F16 {
    uint16_t bits;
};
struct Bf16 {
    uint16_t bits;
};

GDN_INLINE Floats broadcast(float x) {
    return x - Floats{};
}
GDN_INLINE Words broadcast(uint32_t x) {
    return x - Words{};
}

// Returns x from a register: the compiler would otherwise load or broadcast it for every use.
GDN_INLINE Floats in_register(Floats x) {
#if defined(__x86_64__)
    __asm__("" : "+v"(x));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x));
#endif
    return x;
}

template <class To, class From>
GDN_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "only the type changes");
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

template <class Vector, class T>
GDN_INLINE Vector load_raw(const T* from) {
    Vector to;
    __builtin_memcpy(&to, from, sizeof(to));
    return to;
}

#if GDN_CPU_LANES > 4

GDN_INLINE Floats widen_f16(Halves x) {
#if GDN_CPU_LANES == 16
    return bit_cast<Floats>(_mm512_cvtph_ps(bit_cast<__m256i>(x)));
#else
    return bit_cast<Floats>(_mm256_cvtph_ps(bit_cast<__m128i>(x)));
#endif
}

GDN_INLINE Halves narrow_f16(Floats x) {
#if GDN_CPU_LANES == 16
    return bit_cast<Halves>(_mm512_cvtps_ph(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#else
    return bit_cast<Halves>(_mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#endif
}

#else

GDN_INLINE Floats widen_f16(Halves x) {
    const Words word = __builtin_convertvector(x, Words);
    const Words magnitude = (word & 0x7fff) << 13;
    // The product moves the exponent's bias from 15 to 127 and makes subnormals normal.
    const Words scaled = bit_cast<Words>(bit_cast<Floats>(magnitude) * 0x1p112f);
    const Words special = magnitude | 0x7f800000;
    const Words finite = magnitude < 0x0f800000 ? scaled : special;
    return bit_cast<Floats>(finite | (word & 0x8000) << 16);
}

GDN_INLINE Halves narrow_f16(Floats x) {
    const Words word = bit_cast<Words>(x);
    const Words magnitude = word & 0x7fffffff;
    // Adding 1/2 puts the last bit of a subnormal result at the last bit of the sum.
    const Words small = bit_cast<Words>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000;
    const Words normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    Words half = magnitude < 0x38800000 ? small : normal;
    half = magnitude >= 0x477ff000 ? broadcast(0x7c00u) : half;
    half = magnitude > 0x7f800000 ? broadcast(0x7e00u) : half;
    return __builtin_convertvector(half | (word & 0x80000000) >> 16, Halves);
}

#endif

GDN_INLINE Floats widen_bf16(Halves x) {
    return bit_cast<Floats>(__builtin_convertvector(x, Words) << 16);
}

GDN_INLINE Halves narrow_bf16(Floats x) {
    const Words word = bit_cast<Words>(x);
    const Words rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    const Words quiet = word >> 16 | 0x40;
    const Words narrow = (word & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
#if GDN_CPU_LANES == 8
    const __m256i words = bit_cast<__m256i>(narrow);
    return bit_cast<Halves>(
        _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
    return __builtin_convertvector(narrow, Halves);
#endif
}

GDN_INLINE Floats load(const float* from) {
    return load_raw<Floats>(from);
}
GDN_INLINE Floats load(const F16* from) {
    return widen_f16(load_raw<Halves>(from));
}
GDN_INLINE Floats load(const Bf16* from) {
    return widen_bf16(load_raw<Halves>(from));
}

GDN_INLINE void store(float* to, Floats x) {
    __builtin_memcpy(to, &x, sizeof(x));
}
GDN_INLINE void store(F16* to, Floats x) {
    const Halves narrow = narrow_f16(x);
    __builtin_memcpy(to, &narrow, sizeof(narrow));
}
GDN_INLINE void store(Bf16* to, Floats x) {
    const Halves narrow = narrow_bf16(x);
    __builtin_memcpy(to, &narrow, sizeof(narrow));
}

// The first `count` lanes, 1 to kLanes; the others are zeros, and nothing is read for them.
template <class T>
GDN_INLINE Floats load(const T* from, int64_t count) {
    if (count >= kLanes) return load(from);
#if GDN_CPU_LANES == 16
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    if constexpr (sizeof(T) == sizeof(float)) {
        return bit_cast<Floats>(_mm512_maskz_loadu_ps(mask, from));
    } else {
        const Halves narrow = bit_cast<Halves>(_mm256_maskz_loadu_epi16(mask, from));
        return load(reinterpret_cast<const T*>(&narrow));
    }
#else
    T part[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) part[i] = from[i];
    return load(part);
#endif
}

// The first `count` lanes, 1 to kLanes; nothing is written for the others.
template <class T>
GDN_INLINE void store(T* to, Floats x, int64_t count) {
    if (count >= kLanes) return store(to, x);
#if GDN_CPU_LANES == 16
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    if constexpr (sizeof(T) == sizeof(float)) {
        _mm512_mask_storeu_ps(to, mask, bit_cast<__m512>(x));
    } else {
        Halves narrow;
        store(reinterpret_cast<T*>(&narrow), x);
        _mm256_mask_storeu_epi16(to, mask, bit_cast<__m256i>(narrow));
    }
#else
    T part[kLanes];
    store(part, x);
    for (int64_t i = 0; i < count; ++i) to[i] = part[i];
#endif
}

// The sums of a, b, c and d.
GDN_INLINE Quad sum4(Floats a, Floats b, Floats c, Floats d) {
#if GDN_CPU_LANES == 16
    const Floats ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    const Floats cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const Floats sums = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
    const __m256 half = _mm512_castps512_ps256(sums) + _mm512_extractf32x8_ps(sums, 1);
    return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
#elif GDN_CPU_LANES == 8
    const Floats ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
    const Floats cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
    const Floats sums = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
    return _mm256_castps256_ps128(sums) + _mm256_extractf128_ps(sums, 1);
#else
    const Floats ab =
        __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Floats cd =
        __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) +
           __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#endif
}

GDN_INLINE float sum(Floats x) {
    return sum4(x, x, x, x)[0];
}

#if GDN_CPU_LANES == 16
#define GDN_LOW_LANES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define GDN_HIGH_LANES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define GDN_EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define GDN_ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif GDN_CPU_LANES == 8
#define GDN_LOW_LANES 0, 8, 1, 9, 2, 10, 3, 11
#define GDN_HIGH_LANES 4, 12, 5, 13, 6, 14, 7, 15
#define GDN_EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14
#define GDN_ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15
#else
#define GDN_LOW_LANES 0, 4, 1, 5
#define GDN_HIGH_LANES 2, 6, 3, 7
#define GDN_EVEN_LANES 0, 2, 4, 6
#define GDN_ODD_LANES 1, 3, 5, 7
#endif

// Every second lane of a and then of b.
GDN_INLINE Floats even_lanes(Floats a, Floats b) {
    return __builtin_shufflevector(a, b, GDN_EVEN_LANES);
}
GDN_INLINE Floats odd_lanes(Floats a, Floats b) {
    return __builtin_shufflevector(a, b, GDN_ODD_LANES);
}

// Lane j of row i becomes lane i of row j. Each pass interleaves the first half of the rows with
// the second, which turns the bits of (row, lane) by one; log2(kLanes) turns exchange the two.
GDN_INLINE void transpose(Floats (&rows)[kLanes]) {
    GDN_UNROLL
    for (int pass = 1; pass < kLanes; pass *= 2) {
        Floats next[kLanes];
        GDN_UNROLL
        for (int i = 0; i < kLanes / 2; ++i) {
            const Floats a = rows[i], b = rows[i + kLanes / 2];
            next[2 * i] = __builtin_shufflevector(a, b, GDN_LOW_LANES);
            next[2 * i + 1] = __builtin_shufflevector(a, b, GDN_HIGH_LANES);
        }
        GDN_UNROLL
        for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
    }
}
