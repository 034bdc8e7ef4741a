// Passes over data whose rows hold one value of every slot.
#pragma once
#include "norm.h"

namespace {

template <class T> struct Columns {
    typedef A_<T> A;
    static constexpr int W = lanes<A>::W;
    static constexpr int64_t STRETCH = 64;  // rows that are summed in A before the sum goes on in double
    static constexpr int64_t FETCH = 8192 / sizeof(T);  // prefetch distance: hardware sees no pattern in rows abreast
    // Near the end do not prefetch beyond our data.
    SN_INLINE int64_t ahead(const sn_plan &p, int64_t rows) { return p.k0 * rows * p.xr0 > 2 * FETCH ? FETCH : 0; }
    static constexpr int ABREAST = 4;       // rows that are read together, so that sums are loaded once for all

    // f<span>(i, k) over n columns
    template <class F> SN_INLINE void across(int64_t n, const F &f) {
        int64_t i = 0;
        for (; i + W <= n; i += W) f.template operator()<FULL>(i, W);
        if (i < n) f.template operator()<PART>(i, (int)(n - i));
    }

    // g<rows>(first row) over the rows in stretches, with `flush` after each.
    template <class F, class G> SN_INLINE void down(int64_t rows, const F &f, const G &flush) {
        for (int64_t r = 0; r < rows;) {
            int64_t end = r + STRETCH < rows ? r + STRETCH : rows;
            for (; r + ABREAST <= end; r += ABREAST) f.template operator()<ABREAST>(r);
            for (; r < end; r++) f.template operator()<1>(r);
            flush(end == rows);
        }
    }

    // Sums in A over a stretch, in double over all of them.
    struct Sums {
        alignas(64) A s[ROOM], q[ROOM];
        double S[TILE], Q[TILE];
        bool many = false;
        void clear(int64_t n) {
            int64_t whole = (n + W - 1) / W * W;
            memset(s, 0, whole * sizeof(A));
            memset(q, 0, whole * sizeof(A));
        }
        void flush(int64_t n, bool last, A *s1, A *s2) {
            if (!many && last) {
                memcpy(s1, s, n * sizeof(A));
                memcpy(s2, q, n * sizeof(A));
                return;
            }
            if (!many) for (int64_t i = 0; i < n; i++) S[i] = s[i], Q[i] = q[i];
            else for (int64_t i = 0; i < n; i++) S[i] += s[i], Q[i] += q[i];
            many = true;
            if (last) for (int64_t i = 0; i < n; i++) s1[i] = (A)S[i], s2[i] = (A)Q[i];
            else clear(n);
        }
    };

    template <int P, bool map, bool past>
    static void moments_pass(const sn_plan &p, const T *x, T *y, int64_t n, int64_t rows, const Work<A> &w, A *s1,
                             A *s2) {
        Sums sums;
        sums.clear(n);
        const int64_t fetch = ahead(p, rows);
        auto some = [&]<int R>(int64_t r) {
            const T *in = x + r * p.xr0;
            T *out = y + r * p.xr0;
            across(n, [&]<int span>(int64_t i, int k) {
                vec<A> K1 = load(w.k1 + i), K2 = load(w.k2 + i), s = load(sums.s + i), q = load(sums.q + i), d1, d2;
                for (int u = 0; u < R; u++) {
                    __builtin_prefetch(in + u * p.xr0 + i + fetch);
                    vec<A> v = take<T, span>(in + u * p.xr0 + i, k);
                    moments<A, P>(v, K1, K2, d1, d2);
                    s += d1;
                    if (P != MEAN_ONLY) q += d2;
                    if (map) put<T, span, past>(out + u * p.xr0 + i, k, (v - load(w.m + i)) * load(w.a + i) + load(w.b + i));
                }
                store(sums.s + i, s);
                store(sums.q + i, q);
            });
        };
        down(rows, some, [&](bool last) { sums.flush(n, last, s1, s2); });
    }

    template <bool past>
    static void map_pass(const sn_plan &p, const T *x, T *y, int64_t n, int64_t rows, const Work<A> &w) {
        const int64_t fetch = ahead(p, rows);
        auto some = [&]<int R>(int64_t r) {
            const T *in = x + r * p.xr0;
            T *out = y + r * p.xr0;
            across(n, [&]<int span>(int64_t i, int k) {
                vec<A> M = load(w.m + i), Av = load(w.a + i), B = load(w.b + i);
                for (int u = 0; u < R; u++) {
                    __builtin_prefetch(in + u * p.xr0 + i + fetch);
                    put<T, span, past>(out + u * p.xr0 + i, k, (take<T, span>(in + u * p.xr0 + i, k) - M) * Av + B);
                }
            });
        };
        down(rows, some, [](bool) {});
    }

    template <int m, bool sums, bool past>
    static void grads_pass(const sn_plan &p, const T *x, const T *dy, T *dx, int64_t n, int64_t rows, const Work<A> &w, A *s1,
                             A *s2) {
        const int64_t fetch = ahead(p, rows);
        Sums total;
        if (sums) total.clear(n);
        auto some = [&]<int R>(int64_t r) {
            int64_t at = r * p.xr0;
            across(n, [&]<int span>(int64_t i, int k) {
                vec<A> M = load(w.m + i), s, q;
                if (sums) s = load(total.s + i), q = load(total.q + i);
                for (int u = 0; u < R; u++) {
                    int64_t here = at + u * p.xr0 + i;
                    __builtin_prefetch(x + here + fetch);
                    __builtin_prefetch(dy + here + fetch);
                    vec<A> v = take<T, span>(x + here, k), g = take<T, span>(dy + here, k);
                    if (sums) s += g, q += g * (v - M);
                    if constexpr (m != 0)
                        put<T, span, past>(dx + here, k, g * load(w.a + i) + (slope<A, m>(v - load(w.c + i)) * load(w.gs + i) + load(w.gm + i)));
                }
                if (sums) store(total.s + i, s), store(total.q + i, q);
            });
        };
        down(rows, some, [&](bool last) { if (sums) total.flush(n, last, s1, s2); });
    }

    static void first(const sn_plan &, const T *x, int64_t n, A *out) {
        across(n, [&]<int span>(int64_t i, int k) { store(out + i, take<T, span>(x + i, k)); });
    }
};

}  // namespace
