// A vector of 64 bytes of float or double, and loads and stores of float32, float64, bfloat16 and float16 through it.
// GCC's vector extension: one register with AVX-512, two with AVX2, four with SSE2 or NEON.
#pragma once
#include <math.h>
#include <string.h>

#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Nothing here may be shared between instruction sets by the linker.
namespace {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

template <class A> struct lanes;
template <> struct lanes<float> {
    typedef float type __attribute__((vector_size(64)));
    typedef int32_t mask __attribute__((vector_size(64)));
    static constexpr int W = 16;
};
template <> struct lanes<double> {
    typedef double type __attribute__((vector_size(64)));
    typedef int64_t mask __attribute__((vector_size(64)));
    static constexpr int W = 8;
};
template <class A> using vec = typename lanes<A>::type;
template <class A> using mask = typename lanes<A>::mask;
template <class T> struct accumulator { typedef float type; };
template <> struct accumulator<double> { typedef double type; };

template <class A> SN_INLINE vec<A> all(A value) { return value - vec<A>{}; }
template <class A> SN_INLINE vec<A> choose(mask<A> m, vec<A> a, vec<A> b) {
    return (vec<A>)(((mask<A>)a & m) | ((mask<A>)b & ~m));
}
template <class A> SN_INLINE vec<A> absolute(vec<A> v) {
    mask<A> sign = (mask<A>)(-vec<A>{});
    return (vec<A>)((mask<A>)v & ~sign);
}
template <class A> SN_INLINE vec<A> sign_of(vec<A> v) {  // -1, 0 (also of 0 and NaN), 1
    vec<A> one = all<A>(1), none{};
    return choose<A>((mask<A>)(v > none), one, choose<A>((mask<A>)(v < none), -one, none));
}
template <class A> SN_INLINE vec<A> root(vec<A> v) {
    vec<A> r;
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) r = (vec<A>)_mm512_sqrt_ps((__m512)v);
    else r = (vec<A>)_mm512_sqrt_pd((__m512d)v);
#else
    for (int i = 0; i < lanes<A>::W; i++) r[i] = sizeof(A) == 4 ? (A)sqrtf((float)v[i]) : (A)sqrt((double)v[i]);
#endif
    return r;
}
template <class A> SN_INLINE double total(vec<A> v) {  // pairwise, in double
    constexpr int W = lanes<A>::W;
    double part[W];
    for (int i = 0; i < W; i++) part[i] = (double)v[i];
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

// --- load: 16 (8 doubles) values, or the first k of them and `fill` for the rest ---
template <class T> struct io;
template <class A> struct io_wide {
    SN_INLINE vec<A> load(const A *p) { vec<A> v; memcpy(&v, p, 64); return v; }
    SN_INLINE void store(A *p, vec<A> v) { memcpy(p, &v, 64); }
    SN_INLINE void stream(A *p, vec<A> v) {  // p on a multiple of 64 bytes: past the caches
#if defined(__AVX512F__)
        _mm512_stream_si512((__m512i *)p, (__m512i)v);
#elif defined(__AVX__)
        __m256i half[2]; memcpy(half, &v, 64);
        _mm256_stream_si256((__m256i *)p, half[0]); _mm256_stream_si256((__m256i *)p + 1, half[1]);
#elif defined(__SSE2__)
        __m128i part[4]; memcpy(part, &v, 64);
        for (int i = 0; i < 4; i++) _mm_stream_si128((__m128i *)p + i, part[i]);
#else
        store(p, v);
#endif
    }
};
template <> struct io<float> : io_wide<float> {};
template <> struct io<double> : io_wide<double> {};

typedef uint16_t half16 __attribute__((vector_size(32)));
typedef uint32_t word16 __attribute__((vector_size(64)));
struct io_narrow {
    SN_INLINE void keep(void *p, half16 h) { memcpy(p, &h, 32); }
    SN_INLINE void pass(void *p, half16 h) {
#if defined(__AVX__)
        __m256i v; memcpy(&v, &h, 32); _mm256_stream_si256((__m256i *)p, v);
#elif defined(__SSE2__)
        __m128i part[2]; memcpy(part, &h, 32);
        _mm_stream_si128((__m128i *)p, part[0]); _mm_stream_si128((__m128i *)p + 1, part[1]);
#else
        keep(p, h);
#endif
    }
};
template <> struct io<bf16> {
    SN_INLINE vec<float> load(const bf16 *p) {
        half16 h; memcpy(&h, p, 32);
        return (vec<float>)(__builtin_convertvector(h, word16) << 16);
    }
    SN_INLINE half16 pack(vec<float> v) {  // to the nearest, ties to even; NaN stays NaN
        word16 w = (word16)v, rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
        word16 nan = (word16)(v != v);
        return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), half16);
    }
    SN_INLINE void store(bf16 *p, vec<float> v) { io_narrow::keep(p, pack(v)); }
    SN_INLINE void stream(bf16 *p, vec<float> v) { io_narrow::pass(p, pack(v)); }
};
template <> struct io<fp16> {
    SN_INLINE vec<float> load(const fp16 *p) {
#if defined(__AVX512F__)
        return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
        __m256 half[2] = {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1))};
        vec<float> v; memcpy(&v, half, 64); return v;
#else
        half16 h; memcpy(&h, p, 32);
        word16 w = __builtin_convertvector(h, word16), magnitude = w & 0x7fff;
        // The exponent moves from bias 15 to 127 by a product, which is right for subnormal numbers too.
        vec<float> v = (vec<float>)(magnitude << 13) * all<float>(0x1p112f);
        word16 special = (word16)(magnitude >= 0x7c00);
        return (vec<float>)((word16)v | (special & 0x7f800000) | ((w & 0x8000) << 16));
#endif
    }
    SN_INLINE half16 pack(vec<float> v) {
        half16 h;
#if defined(__AVX512F__)
        __m256i r = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
        memcpy(&h, &r, 32);
#elif defined(__F16C__)
        __m256 half[2]; memcpy(half, &v, 64);
        __m128i r[2] = {_mm256_cvtps_ph(half[0], 0), _mm256_cvtps_ph(half[1], 0)};
        memcpy(&h, r, 32);
#else
        word16 w = (word16)v, magnitude = w & 0x7fffffff;
        word16 normal = ((magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13) - (112u << 10);
        // Below 2^-14 adding 0.5 lets the float unit round at the right place.
        word16 small = (word16)((vec<float>)magnitude + all<float>(0.5f)) - 0x3f000000u;
        word16 is_small = (word16)(magnitude < 0x38800000u), is_big = (word16)(magnitude >= 0x477ff000u);
        word16 is_nan = (word16)(magnitude > 0x7f800000u);
        word16 bits = (small & is_small) | (normal & ~is_small);
        bits = (bits & ~is_big) | (0x7c00 & is_big);
        bits = (bits & ~is_nan) | (0x7e00 & is_nan);
        h = __builtin_convertvector(bits | ((w >> 16) & 0x8000), half16);
#endif
        return h;
    }
    SN_INLINE void store(fp16 *p, vec<float> v) { io_narrow::keep(p, pack(v)); }
    SN_INLINE void stream(fp16 *p, vec<float> v) { io_narrow::pass(p, pack(v)); }
};

template <class T> using acc = typename accumulator<T>::type;
template <class T> SN_INLINE vec<acc<T>> load(const T *p) { return io<T>::load(p); }
template <class T> SN_INLINE void store(T *p, vec<acc<T>> v) { io<T>::store(p, v); }
template <class T> SN_INLINE void stream(T *p, vec<acc<T>> v) { io<T>::stream(p, v); }
template <class A> SN_INLINE mask<A> before(int k) {  // the first k lanes
    mask<A> lane;
    for (int i = 0; i < lanes<A>::W; i++) lane[i] = i;
    return (mask<A>)(lane < k - mask<A>{});
}
template <class T> SN_INLINE vec<acc<T>> load_part(const T *p, int k) {  // zeros after the first k
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(T) == 8) return (vec<acc<T>>)_mm512_maskz_loadu_pd((__mmask8)((1u << k) - 1), p);
    if constexpr (sizeof(T) == 4) return (vec<acc<T>>)_mm512_maskz_loadu_ps((__mmask16)((1u << k) - 1), p);
#endif
    T part[lanes<acc<T>>::W] = {};
    memcpy(part, p, k * sizeof(T));
    return load(part);
}
template <class T> SN_INLINE void store_part(T *p, int k, vec<acc<T>> v) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, (__mmask8)((1u << k) - 1), (__m512d)v);
    if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, (__mmask16)((1u << k) - 1), (__m512)v);
#endif
    T part[lanes<acc<T>>::W];
    store(part, v);
    memcpy(p, part, k * sizeof(T));
}
SN_INLINE void fence() {  // after `stream`, before another thread may read
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace
