// Normalization of a tensor whose references are whole axes: shared by the passes over the data.
//
// Memory is a set of rows of L contiguous values. Rows are indexed by two kept indices (k0: steps of the stream or
// samples; k1) and two reduced ones (r0, r1). A *slot* is one statistic. There are two kinds of layout, which cover all
// references and memory formats:
//
//     Rows     a row belongs to one slot               maps of (n, c, x, y): BA1, SP1, SP2, groups; (n, c): SP2
//     Columns  element i of a row belongs to slot i    channels_last and (n, c): BA1, SP1; maps: SP5, BA6
//
// Computations on slots (statistics, F, G) are the same for both, in slots.h.
#pragma once
#include "parallel.h"
#include "rule.h"
#include "vec.h"

// Constant for a layer and a shape of input; mirrored by `Plan` in streamnorm/ops/cpu.py.
struct sn_plan {
    int64_t k0, k1, r0, r1, L;         // numbers of rows, length of a row
    int64_t xk0, xk1, xr0, xr1;        // from one row to the next, in elements
    int32_t columns;                   // the kind
    int32_t p, center;                 // the order of the moment, 1 or 2; Setting 0 = A, 1 = B, 2 = C
    int32_t uses_estimate, scale;      // normalize with F's estimate; N is x / sigma
    int32_t reversed;                  // backward, the steps arrive last to first
    double eps;
    double unit;                       // gradients are multiplied by it before G, and G's estimate is divided by it
    double samples;                    // in a step
    double trust;                      // factor on the gradients of gain and bias
};

// H1 or H2 with its rule. Tables (2, slots) of float, or double for double.
struct sn_memory {
    void *long_, *short_, *estimate;
    int64_t *count, *updates, *seen, *skipped;
    sn_rule rule;                      // POOLED: updates is held; RESIDUAL: long is theta, short the same, count is held

    bool has_short() const { return rule.kind == LONG_SHORT || rule.kind == POOLED; }
    bool counts_samples() const { return rule.kind == POOLED || rule.kind == RESIDUAL; }
    // Whether this is the very first arrival, and its estimate depends on more than its own slot.
    bool begins() const { return rule.kind == POOLED && rule.a[1] > 0 && *count == 0 && *updates == 0; }
};

namespace {

constexpr int TILE = 1024;             // slots that are processed together
constexpr int ROOM = TILE + 16;         // of arrays over them: a page apart they would evict each other from the cache
constexpr int64_t SLAB = 256 << 10;    // bytes that stay in a core's cache between two passes
constexpr int64_t PAST_CACHES = 6 << 20;  // from so many bytes on, outputs bypass the caches, by columns
constexpr int64_t PAST_CACHES_ROWS = 16 << 20;  // and by rows, which leave more of the caches to the output
constexpr int64_t SERIAL = 64 << 10;  // elements that one core has processed before a second one could start
constexpr int FLUSH = 4096;            // values that are summed in A before the sum goes on in double

template <class T> using A_ = acc<T>;

// How to treat a vector at the end of a row.
enum Span { FULL, LAST, PART };        // all lanes; the last k lanes are new; only the first k lanes exist

template <class T, int span> SN_INLINE vec<A_<T>> take(const T *p, int k) {
    return span == PART ? load_part(p, k) : load(p);
}
template <class T, int span, bool past> SN_INLINE void put(T *p, int k, vec<A_<T>> v) {
    if (span == PART) store_part(p, k, v);
    else if (past && span == FULL) stream(p, v);
    else store(p, v);
}
template <class A, int span> SN_INLINE vec<A> only(vec<A> v, int k) {  // zero where the lane is not a new value
    if (span == FULL) return v;
    mask<A> first = before<A>(span == PART ? k : lanes<A>::W - k);
    return (vec<A>)((mask<A>)v & (span == PART ? first : ~first));
}

// f<span, u>(i, k) over a row; u numbers the accumulator, four at a time so that additions overlap.
template <class A, class F> SN_INLINE void along(int64_t begin, int64_t end, bool is_last, int64_t L, const F &f) {
    constexpr int W = lanes<A>::W;
    int64_t i = begin;
    for (; i + 4 * W <= end; i += 4 * W) {
        f.template operator()<FULL, 0>(i, W);
        f.template operator()<FULL, 1>(i + W, W);
        f.template operator()<FULL, 2>(i + 2 * W, W);
        f.template operator()<FULL, 3>(i + 3 * W, W);
    }
    for (; i + W <= end; i += W) f.template operator()<FULL, 0>(i, W);
    if (is_last && i < L) {
        if (L >= W) f.template operator()<LAST, 0>(L - W, (int)(L - i));
        else f.template operator()<PART, 0>(i, (int)(L - i));
    }
}

// Exchanged between the passes and the slots: arrays over the current slots.
template <class A> struct Work {
    alignas(64) A s1[ROOM], s2[ROOM];              // sums
    alignas(64) A k1[ROOM], k2[ROOM];              // their centers
    alignas(64) A m[ROOM], a[ROOM], b[ROOM];       // y = (x - m) a + b;  dx = a dy + gs slope(x - c) + gm
    alignas(64) A c[ROOM], gs[ROOM], gm[ROOM];
};

// Sums over the data: of x - k1; and of 0, |x - k2|, (x - k2)^2, or |x - k2| with sign(x - k2) in place of x - k1.
enum Moment { MEAN_ONLY = 0, ABS = 1, SQUARE = 2, SIGN = 3 };

template <class A, int P> SN_INLINE void moments(vec<A> x, vec<A> k1, vec<A> k2, vec<A> &d1, vec<A> &d2) {
    vec<A> d = x - k2;
    d1 = P == SIGN ? sign_of<A>(d) : x - k1;
    d2 = P == SQUARE ? d * d : P == MEAN_ONLY ? vec<A>{} : absolute<A>(d);
}
template <class A, int p> SN_INLINE vec<A> slope(vec<A> d) { return p == 2 ? d : sign_of<A>(d); }

}  // namespace
