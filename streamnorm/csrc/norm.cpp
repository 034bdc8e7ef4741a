// The exported kernels: a whole forward and a whole backward call, and the four functions they are made of.
#include "direct.h"
#include "rows.h"

#include <stdlib.h>

namespace {

// Runs passes over many rows of columns on all threads, a block of rows each; their sums are added in order.
template <class T> struct Blocks {
    typedef A_<T> A;
    typedef Columns<T> K;
    static constexpr int MOST = 64;
    Direct<K, T> one;
    Work<A> &w;
    int threads;
    int64_t rows, blocks, each;
    bool turned = false;  // the next pass runs in reverse, as the last data are still in the caches
    A *part;
    Blocks(const Job<T> &job, int64_t at, int n_threads, A *scratch)
        : one(job, at), w(one.w), threads(n_threads), rows(job.p.r0), part(scratch) {
        blocks = count(job.p);
        each = (rows + blocks - 1) / blocks;
    }
    static int64_t count(const sn_plan &p) {
        int64_t n = p.r0 * p.L * (int64_t)sizeof(T) / SLAB;
        return n < 1 ? 1 : n > MOST ? MOST : n;
    }
    template <class F> void all_blocks(const F &f) {
        bool back = turned;
        turned = !turned;
        parallel(blocks, threads, [&](int64_t task) {
            int64_t b = back ? blocks - 1 - task : task, begin = b * each, n = rows - begin < each ? rows - begin : each;
            if (n > 0) f(b, begin * one.J.p.xr0, n), one.J.past ? fence() : void();
            else memset(part + 2 * b * TILE, 0, 2 * TILE * sizeof(A));
        });
    }
    void add(int64_t n) {
        for (int64_t i = 0; i < n; i++) {
            double s = 0, q = 0;
            for (int64_t b = 0; b < blocks; b++) s += part[2 * b * TILE + i], q += part[(2 * b + 1) * TILE + i];
            w.s1[i] = (A)s, w.s2[i] = (A)q;
        }
    }
    void first(int64_t n, A *out) { one.first(n, out); }
    template <int P, bool map> void moments(int64_t n) {
        const sn_plan &p = one.J.p;
        all_blocks([&](int64_t b, int64_t at, int64_t rows_here) {
            A *s1 = part + 2 * b * TILE, *s2 = s1 + TILE;
            if (map && one.J.past) K::template moments_pass<P, map, map>(p, one.x + at, one.y + at, n, rows_here, w, s1, s2);
            else K::template moments_pass<P, map, false>(p, one.x + at, map ? one.y + at : nullptr, n, rows_here, w, s1, s2);
        });
        add(n);
    }
    void map(int64_t n) {
        const sn_plan &p = one.J.p;
        all_blocks([&](int64_t, int64_t at, int64_t rows_here) {
            if (one.J.past) K::template map_pass<true>(p, one.x + at, one.y + at, n, rows_here, w);
            else K::template map_pass<false>(p, one.x + at, one.y + at, n, rows_here, w);
        });
    }
    template <int m, bool sums> void grads(int64_t n) {
        const sn_plan &p = one.J.p;
        all_blocks([&](int64_t b, int64_t at, int64_t rows_here) {
            A *s1 = part + 2 * b * TILE, *s2 = s1 + TILE;
            T *dx = m ? one.dx + at : nullptr;
            if (m && one.J.past) K::template grads_pass<m, sums, m != 0>(p, one.x + at, one.dy + at, dx, n, rows_here, w, s1, s2);
            else K::template grads_pass<m, sums, false>(p, one.x + at, one.dy + at, dx, n, rows_here, w, s1, s2);
        });
        if (sums) add(n);
    }
};

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(arrival, first slot a, n slots, offset of their data within a step) over all slots, in parallel; the arrivals of a
// slot in order if they depend on each other.
template <class T, class F> void over_slots(const sn_plan &p, int threads, bool in_order, bool once, const F &f) {
    int64_t across = p.columns ? p.L : p.k1, groups = p.columns ? p.k1 : 1, width;
    if (elements(p) < SERIAL) threads = 1;
    if (p.columns) {
        // Short pieces of a row: hardware prefetches for one thread what another is about to write.
        constexpr int64_t PIECE = 512 / sizeof(T);
        width = least(TILE, ceil_div(ceil_div(across, threads), PIECE) * PIECE);
    } else {
        width = Rows<T>::width(p, threads, once);
    }
    int64_t tiles = ceil_div(across, width), parts = in_order ? 1 : least(p.k0, 4 * threads);
    int64_t steps = ceil_div(p.k0, parts);
    parallel(groups * tiles * parts, threads, [&](int64_t task) {
        int64_t part = task / (groups * tiles), tile = task % (groups * tiles), group = tile / tiles;
        int64_t from = tile % tiles * width, n = least(width, across - from);
        int64_t a = group * p.L * (p.columns ? 1 : 0) + from, at = p.columns ? group * p.xk1 + from : from * p.xk1;
        for (int64_t j = part * steps; j < least(p.k0, (part + 1) * steps); j++) f(j, a, n, at);
    });
}

template <class T> bool in_blocks(const sn_plan &p) {
    return p.columns && p.r0 * p.L * (int64_t)sizeof(T) >= 4 * SLAB && p.r0 >= 16 * 64;
}

// Runs step(arrival, j, a, n, executor) for everything; returns whether all statistics were finite.
template <class T, class F> bool run(const Job<T> &J, int threads, bool in_order, const F &step) {
    const sn_plan &p = J.p;
    if (in_blocks<T>(p)) {
        typedef A_<T> A;
        A *scratch = (A *)aligned_alloc(64, Blocks<T>::count(p) * 2 * TILE * sizeof(A));
        if (!scratch) return false;
        bool fine = true;
        for (int64_t i = 0; i < p.k0; i++)
            for (int64_t k = 0; k < p.k1; k++)
                for (int64_t from = 0; from < p.L; from += TILE) {
                    int64_t j = J.dy && p.reversed ? p.k0 - 1 - i : i;
                    Blocks<T> e(J, j * p.xk0 + k * p.xk1 + from, threads, scratch);
                    fine &= step(i, j, k * p.L + from, least(TILE, p.L - from), e);
                }
        free(scratch);
        return fine;
    }
    int wrong = 0;
    over_slots<T>(p, threads, in_order, J.once, [&](int64_t i, int64_t a, int64_t n, int64_t at) {
        bool fine;
        int64_t j = J.dy && p.reversed ? p.k0 - 1 - i : i;
        at += j * p.xk0;
        if (p.columns) {
            Direct<Columns<T>, T> e(J, at);
            fine = step(i, j, a, n, e);
        } else {
            Direct<Rows<T>, T> e(J, at);
            fine = step(i, j, a, n, e);
        }
        if (!fine) __atomic_store_n(&wrong, 1, __ATOMIC_RELAXED);
        if (J.past) fence();
    });
    return !wrong;
}

// saved: 5 tables (k0, S); scratch: (2, S). Returns 0, or 1 with the memory unchanged: a value was not finite or was
// extreme, or this is the memory's first call.
template <class T>
int forward(const sn_plan *p, const sn_memory *h, const void *x, const void *weight, const void *bias, void *y,
            A_<T> *saved, A_<T> *scratch, int threads) {
    if (h && h->begins()) return 1;
    Job<T> J = forward_job<T>(p, h, x, weight, bias, y, saved, scratch);
    if (!run<T>(J, threads, h != nullptr, [&](int64_t, int64_t j, int64_t a, int64_t n, auto &e) { return forward_step(J, j, a, n, e); }))
        return 1;
    int64_t end = (p->k0 - 1) * J.S;
    if (h) commit(*h, J.S, 0, J.S, J.fresh, J.est_mu + end, J.est_sigma + end), arrived(*h, p->k0, p->samples);
    return 0;
}

// scratch: (4, S). dx, dweight, dbias may be null.
template <class T>
int backward(const sn_plan *p, const sn_memory *h, const void *x, const void *weight, const void *dy, A_<T> *saved,
             A_<T> *scratch, void *dx, void *dweight, void *dbias, int threads) {
    Job<T> J = backward_job<T>(p, h, x, weight, dy, saved, scratch, dx, dweight, dbias);
    bool in_order = h || weight || dweight;
    if (!run<T>(J, threads, in_order, [&](int64_t i, int64_t j, int64_t a, int64_t n, auto &e) { return backward_step(J, i, j, a, n, e); }))
        return 1;
    if (h) commit(*h, J.S, 0, J.S, J.fresh, J.last, J.last + J.S), arrived(*h, p->k0, p->samples);
    return 0;
}

#define EVERY(call) run<T>(J, threads, false, [&](int64_t, int64_t j, int64_t a, int64_t n, auto &e) { return call; })

template <class T> int moments(const sn_plan *p, const void *x, const A_<T> *center, A_<T> *out, int threads) {
    Job<T> J = job<T>(p, nullptr, x, nullptr, nullptr);
    return !EVERY(moments_step(J, j, a, n, e, center, out));
}
template <class T> int map(const sn_plan *p, const void *x, const A_<T> *m, const A_<T> *scale, void *y, int threads) {
    Job<T> J = job<T>(p, nullptr, x, nullptr, nullptr);
    J.y = (T *)y;
    J.past = past_caches(*p, J.y);
    return !EVERY(map_step(J, j, a, n, e, m, scale));
}
template <class T>
int sums(const sn_plan *p, const void *x, const void *dy, const A_<T> *m, A_<T> *s1, A_<T> *s2, int threads) {
    Job<T> J = job<T>(p, nullptr, x, nullptr, nullptr);
    J.dy = (const T *)dy;
    return !EVERY(sums_step(J, j, a, n, e, m, s1, s2));
}
template <class T>
int input(const sn_plan *p, const void *x, const void *dy, const A_<T> *scale, const A_<T> *c, const A_<T> *gs,
          const A_<T> *gm, void *dx, int threads) {
    Job<T> J = job<T>(p, nullptr, x, nullptr, nullptr);
    J.dy = (const T *)dy;
    J.dx = (T *)dx;
    J.past = past_caches(*p, J.dx);
    return !EVERY(input_step(J, j, a, n, e, scale, c, gs, gm));
}

}  // namespace

// Tables and weights are of float, or of double for double.
#define KERNELS(T, name)                                                                                               \
    typedef A_<T> name##_a;                                                                                            \
    SN_EXPORT(int, forward_##name)                                                                                     \
    (const sn_plan *p, const sn_memory *h, const void *x, const void *weight, const void *bias, void *y,              \
     name##_a *saved, name##_a *scratch, int threads) {                                                                \
        return forward<T>(p, h, x, weight, bias, y, saved, scratch, threads);                                          \
    }                                                                                                                  \
    SN_EXPORT(int, backward_##name)                                                                                    \
    (const sn_plan *p, const sn_memory *h, const void *x, const void *weight, const void *dy, name##_a *saved,        \
     name##_a *scratch, void *dx, void *dweight, void *dbias, int threads) {                                           \
        return backward<T>(p, h, x, weight, dy, saved, scratch, dx, dweight, dbias, threads);                          \
    }                                                                                                                  \
    SN_EXPORT(int, moments_##name)(const sn_plan *p, const void *x, const name##_a *c, name##_a *out, int threads) {   \
        return moments<T>(p, x, c, out, threads);                                                                      \
    }                                                                                                                  \
    SN_EXPORT(int, map_##name)                                                                                         \
    (const sn_plan *p, const void *x, const name##_a *m, const name##_a *scale, void *y, int threads) {                \
        return map<T>(p, x, m, scale, y, threads);                                                                     \
    }                                                                                                                  \
    SN_EXPORT(int, sums_##name)                                                                                        \
    (const sn_plan *p, const void *x, const void *dy, const name##_a *m, name##_a *s1, name##_a *s2, int threads) {    \
        return sums<T>(p, x, dy, m, s1, s2, threads);                                                                  \
    }                                                                                                                  \
    SN_EXPORT(int, input_##name)                                                                                       \
    (const sn_plan *p, const void *x, const void *dy, const name##_a *scale, const name##_a *c, const name##_a *gs,    \
     const name##_a *gm, void *dx, int threads) {                                                                      \
        return input<T>(p, x, dy, scale, c, gs, gm, dx, threads);                                                      \
    }

KERNELS(float, f32)
KERNELS(double, f64)
KERNELS(bf16, bf16)
KERNELS(fp16, f16)

// The weight update of both memories of a layer, either of which may be null; keep: kappa 1 to 4.
template <class A> static void fold_both(const sn_memory *h1, const sn_memory *h2, int64_t S, const double *keep) {
    if (h1) fold<A>(*h1, S, keep[0], keep[1]);
    if (h2) fold<A>(*h2, S, keep[2], keep[3]);
}
SN_EXPORT(void, fold_f32)(const sn_memory *h1, const sn_memory *h2, int64_t S, const double *keep) {
    fold_both<float>(h1, h2, S, keep);
}
SN_EXPORT(void, fold_f64)(const sn_memory *h1, const sn_memory *h2, int64_t S, const double *keep) {
    fold_both<double>(h1, h2, S, keep);
}
