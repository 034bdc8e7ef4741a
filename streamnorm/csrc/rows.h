// Passes over data whose rows belong to one slot each.
#pragma once
#include "norm.h"

namespace {

template <class T> struct Rows {
    typedef A_<T> A;
    static constexpr int W = lanes<A>::W;

    static constexpr int MOST = 64;                // slots that are processed together

    // Calls f(slot, offset of the row, prefetch distance) for every row of n slots, in memory order if possible.
    template <class F> SN_INLINE void each(const sn_plan &p, int64_t n, const F &f) {
        for (int64_t r0 = 0; r0 < p.r0; r0++) {
            // From a row to that of the same slot in the next sample, which hardware does not prefetch.
            int64_t next = r0 + 1 < p.r0 ? p.xr0 : 0;
            for (int64_t t = 0; t < n; t++)
                for (int64_t r1 = 0; r1 < p.r1; r1++) f(t, r0 * p.xr0 + t * p.xk1 + r1 * p.xr1, next);
        }
    }

    // Slots to process together: so many that their data stay in the cache until the next pass, if there is one.
    static int64_t width(const sn_plan &p, int threads, bool once) {
        int64_t bytes = p.L * (int64_t)sizeof(T) * p.r1 * (once ? 1 : p.r0);
        int64_t n = SLAB / bytes, fair = (p.k1 + 4 * threads - 1) / (4 * threads);
        n = n < fair ? n : fair;
        n = n < MOST ? n : MOST;
        return n < 1 ? 1 : n;
    }

    // f<span, u, past>(i, k) along a row; `flush` is called every FLUSH values, not at the end.
    template <bool past, class F, class G> SN_INLINE void walk(int64_t L, const F &f, const G &flush) {
        auto body = [&]<int span, int u>(int64_t at, int k) { f.template operator()<span, u, past>(at, k); };
        for (int64_t i = 0; i < L;) {
            int64_t end = i + FLUSH < L ? i + FLUSH : L;
            along<A>(i, end, end == L, L, body);
            i = end;
            if (i < L) flush();
        }
    }

    // The two sums of each slot: in A over FLUSH values, in double over all of them.
    struct Sums {
        vec<A> s[MOST], q[MOST];
        double S[MOST], Q[MOST];
        int64_t since[MOST], n;
        Sums(int64_t slots) : n(slots) {
            for (int64_t t = 0; t < n; t++) s[t] = q[t] = vec<A>{}, S[t] = Q[t] = 0, since[t] = 0;
        }
        SN_MEMBER void flush(int64_t t, vec<A> *a, vec<A> *b) {  // within a row
            S[t] += total<A>((a[0] + a[1]) + (a[2] + a[3]));
            Q[t] += total<A>((b[0] + b[1]) + (b[2] + b[3]));
            for (int u = 0; u < 4; u++) a[u] = b[u] = vec<A>{};
        }
        SN_MEMBER void add(int64_t t, int64_t values, vec<A> *a, vec<A> *b) {  // at the end of a row
            s[t] += (a[0] + a[1]) + (a[2] + a[3]);
            q[t] += (b[0] + b[1]) + (b[2] + b[3]);
            if ((since[t] += values) >= FLUSH) drain(t);
        }
        void drain(int64_t t) {
            S[t] += total<A>(s[t]), Q[t] += total<A>(q[t]);
            s[t] = q[t] = vec<A>{}, since[t] = 0;
        }
        void finish(A *s1, A *s2) {
            for (int64_t t = 0; t < n; t++) drain(t), s1[t] = (A)S[t], s2[t] = (A)Q[t];
        }
    };

    // --- passes over n slots ---
    template <int P, bool map, bool past>
    static void moments_pass(const sn_plan &p, const T *x, T *y, int64_t n, int64_t, const Work<A> &w, A *s1, A *s2) {
        Sums sums(n);
        each(p, n, [&](int64_t t, int64_t at, int64_t next) {
            vec<A> K1 = all(w.k1[t]), K2 = all(w.k2[t]), M = all(w.m[t]), Av = all(w.a[t]), B = all(w.b[t]);
            vec<A> s[4] = {}, q[4] = {};
            const T *in = x + at;
            T *to = map ? y + at : nullptr;
            auto step = [&]<int span, int u, bool nt>(int64_t i, int k) {
                __builtin_prefetch(in + i + next);
                vec<A> v = take<T, span>(in + i, k), d1, d2;
                moments<A, P>(v, K1, K2, d1, d2);
                s[u] += only<A, span>(d1, k);
                if (P != MEAN_ONLY) q[u] += only<A, span>(d2, k);
                if (map) put<T, span, nt>(to + i, k, (v - M) * Av + B);
            };
            auto flush = [&] { sums.flush(t, s, q); };
            walk<past>(p.L, step, flush);
            sums.add(t, p.L, s, q);
        });
        sums.finish(s1, s2);
    }
    template <bool past> static void map_pass(const sn_plan &p, const T *x, T *y, int64_t n, int64_t, const Work<A> &w) {
        each(p, n, [&](int64_t t, int64_t at, int64_t) {
            vec<A> M = all(w.m[t]), Av = all(w.a[t]), B = all(w.b[t]);
            const T *in = x + at;
            T *to = y + at;
            auto step = [&]<int span, int u, bool nt>(int64_t i, int k) {
                put<T, span, nt>(to + i, k, (take<T, span>(in + i, k) - M) * Av + B);
            };
            walk<past>(p.L, step, [] {});
        });
    }
    // m = 0: only the sums; otherwise also dx, with the slope of that moment.
    template <int m, bool with_sums, bool past>
    static void grads_pass(const sn_plan &p, const T *x, const T *dy, T *dx, int64_t n, int64_t, const Work<A> &w, A *s1,
                           A *s2) {
        Sums sums(n);
        each(p, n, [&](int64_t t, int64_t at, int64_t next) {
            vec<A> M = all(w.m[t]), Av = all(w.a[t]), C = all(w.c[t]), GS = all(w.gs[t]), GM = all(w.gm[t]);
            vec<A> s[4] = {}, q[4] = {};
            const T *in = x + at, *grad = dy + at;
            T *to = m ? dx + at : nullptr;
            auto step = [&]<int span, int u, bool nt>(int64_t i, int k) {
                vec<A> v = take<T, span>(in + i, k), g = take<T, span>(grad + i, k);
                if (with_sums) {
                    __builtin_prefetch(in + i + next);
                    __builtin_prefetch(grad + i + next);
                    s[u] += only<A, span>(g, k);
                    q[u] += only<A, span>(g * (v - M), k);
                }
                if constexpr (m != 0) put<T, span, nt>(to + i, k, g * Av + (slope<A, m>(v - C) * GS + GM));
            };
            auto flush = [&] { if (with_sums) sums.flush(t, s, q); };
            walk<past>(p.L, step, flush);
            if (with_sums) sums.add(t, p.L, s, q);
        });
        if (with_sums) sums.finish(s1, s2);
    }
    // The first value of every slot.
    static void first(const sn_plan &p, const T *x, int64_t n, A *out) {
        for (int64_t t = 0; t < n; t++) out[t] = load_part(x + t * p.xk1, 1)[0];
    }
};

}  // namespace
