// A vector register of float or double, with loads and stores of float32, float64, bfloat16 and float16. Uses GCC's
// vector extension, exactly as wide as a register: GCC keeps wider vectors in memory.
#pragma once
#include <math.h>
#include <string.h>

#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Nothing here may be shared between instruction sets by the linker.
namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

template <class A> struct lanes;
template <> struct lanes<float> {
    typedef float type __attribute__((vector_size(BYTES)));
    typedef int32_t mask __attribute__((vector_size(BYTES)));
    static constexpr int W = BYTES / 4;
};
template <> struct lanes<double> {
    typedef double type __attribute__((vector_size(BYTES)));
    typedef int64_t mask __attribute__((vector_size(BYTES)));
    static constexpr int W = BYTES / 8;
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
#elif defined(__AVX__)
    if constexpr (sizeof(A) == 4) r = (vec<A>)_mm256_sqrt_ps((__m256)v);
    else r = (vec<A>)_mm256_sqrt_pd((__m256d)v);
#elif defined(__SSE2__)
    if constexpr (sizeof(A) == 4) r = (vec<A>)_mm_sqrt_ps((__m128)v);
    else r = (vec<A>)_mm_sqrt_pd((__m128d)v);
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

// --- W values in memory, or the first k of them ---
template <class T> struct io;
template <class A> struct io_wide {
    SN_INLINE vec<A> load(const A *p) { vec<A> v; memcpy(&v, p, BYTES); return v; }
    SN_INLINE void store(A *p, vec<A> v) { memcpy(p, &v, BYTES); }
    SN_INLINE void stream(A *p, vec<A> v) {  // bypasses the caches; p is aligned to BYTES
#if defined(__AVX512F__)
        _mm512_stream_si512((__m512i *)p, (__m512i)v);
#elif defined(__AVX__)
        _mm256_stream_si256((__m256i *)p, (__m256i)v);
#elif defined(__SSE2__)
        _mm_stream_si128((__m128i *)p, (__m128i)v);
#else
        store(p, v);
#endif
    }
};
template <> struct io<float> : io_wide<float> {};
template <> struct io<double> : io_wide<double> {};

typedef uint16_t halves __attribute__((vector_size(BYTES / 2)));
typedef uint32_t words __attribute__((vector_size(BYTES)));
struct io_narrow {
    SN_INLINE void keep(void *p, halves h) { memcpy(p, &h, sizeof h); }
    SN_INLINE void pass(void *p, halves h) {
#if defined(__AVX512F__)
        _mm256_stream_si256((__m256i *)p, (__m256i)h);
#elif defined(__AVX__)
        _mm_stream_si128((__m128i *)p, (__m128i)h);
#elif defined(__SSE2__)
        long long both; memcpy(&both, &h, sizeof both); _mm_stream_si64((long long *)p, both);
#else
        keep(p, h);
#endif
    }
};
template <> struct io<bf16> {
    SN_INLINE vec<float> load(const bf16 *p) {
        halves h; memcpy(&h, p, sizeof h);
        return (vec<float>)(__builtin_convertvector(h, words) << 16);
    }
    SN_INLINE halves pack(vec<float> v) {  // to the nearest, ties to even; NaN stays NaN
        words w = (words)v, rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
        words nan = (words)(v != v);
        return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), halves);
    }
    SN_INLINE void store(bf16 *p, vec<float> v) { io_narrow::keep(p, pack(v)); }
    SN_INLINE void stream(bf16 *p, vec<float> v) { io_narrow::pass(p, pack(v)); }
};
template <> struct io<fp16> {
    SN_INLINE vec<float> load(const fp16 *p) {
#if defined(__AVX512F__)
        return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
        return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
        halves h; memcpy(&h, p, sizeof h);
        words w = __builtin_convertvector(h, words), magnitude = w & 0x7fff;
        // A multiplication changes the exponent bias from 15 to 127, which is also right for subnormal numbers.
        vec<float> v = (vec<float>)(magnitude << 13) * all<float>(0x1p112f);
        words special = (words)(magnitude >= 0x7c00);
        return (vec<float>)((words)v | (special & 0x7f800000) | ((w & 0x8000) << 16));
#endif
    }
    SN_INLINE halves pack(vec<float> v) {
        halves h;
#if defined(__AVX512F__)
        h = (halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
        h = (halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
        words w = (words)v, magnitude = w & 0x7fffffff;
        words normal = ((magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13) - (112u << 10);
        // Below 2^-14, adding 0.5 makes the float unit round at the right place.
        words small = (words)((vec<float>)magnitude + all<float>(0.5f)) - 0x3f000000u;
        words is_small = (words)(magnitude < 0x38800000u), is_big = (words)(magnitude >= 0x477ff000u);
        words is_nan = (words)(magnitude > 0x7f800000u);
        words bits = (small & is_small) | (normal & ~is_small);
        bits = (bits & ~is_big) | (0x7c00 & is_big);
        bits = (bits & ~is_nan) | (0x7e00 & is_nan);
        h = __builtin_convertvector(bits | ((w >> 16) & 0x8000), halves);
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
