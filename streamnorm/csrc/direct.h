// The arguments of one call of a layer, and the passes over the data of some slots on the calling thread.
#pragma once
#include "columns.h"
#include "slots.h"

namespace {

// Runs passes over the data of some slots on the calling thread.
template <class K, class T> struct Direct {
    typedef A_<T> A;
    const Job<T> &J;
    const T *x, *dy;
    T *y, *dx;
    Work<A> w;
    Direct(const Job<T> &job, int64_t at) : J(job), x(job.x + at), dy(job.dy), y(job.y), dx(job.dx) {
        if (dy) dy += at;
        if (y) y += at;
        if (dx) dx += at;
    }
    void first(int64_t n, A *out) { K::first(J.p, x, n, out); }
    template <int P, bool map> void moments(int64_t n) {
        if (map && J.past) K::template moments_pass<P, map, map>(J.p, x, y, n, J.p.r0, w, w.s1, w.s2);
        else K::template moments_pass<P, map, false>(J.p, x, y, n, J.p.r0, w, w.s1, w.s2);
    }
    void map(int64_t n) {
        if (J.past) K::template map_pass<true>(J.p, x, y, n, J.p.r0, w);
        else K::template map_pass<false>(J.p, x, y, n, J.p.r0, w);
    }
    template <int p, bool sums> void grads(int64_t n) {
        if (p && J.past) K::template grads_pass<p, sums, p != 0>(J.p, x, dy, dx, n, J.p.r0, w, w.s1, w.s2);
        else K::template grads_pass<p, sums, false>(J.p, x, dy, dx, n, J.p.r0, w, w.s1, w.s2);
    }
};

int64_t elements(const sn_plan &p) { return p.k0 * p.k1 * p.r0 * p.r1 * p.L; }

template <class T> bool past_caches(const sn_plan &p, const T *out) {
    int64_t bytes = elements(p) * (int64_t)sizeof(T);
    if (sizeof(T) == 8 || bytes < (p.columns ? PAST_CACHES : PAST_CACHES_ROWS)) return false;
    return (uintptr_t)out % 64 == 0 && p.L * sizeof(T) % 64 == 0;
}

template <class T> Job<T> job(const sn_plan *p, const sn_memory *h, const void *x, const void *weight, A_<T> *saved) {
    Job<T> J{};
    J.p = *p;
    J.h = h;
    J.S = p->k1 * (p->columns ? p->L : 1);
    J.count = (A_<T>)(p->r0 * p->r1 * (p->columns ? 1 : p->L));
    J.x = (const T *)x;
    J.weight = (const A_<T> *)weight;
    int64_t K = p->k0 * J.S;
    J.mu = saved, J.sigma = saved + K, J.est_mu = saved + 2 * K, J.est_sigma = saved + 3 * K, J.tilt = saved + 4 * K;
    return J;
}

// saved: 5 tables (k0, S); scratch: (2, S).
template <class T>
Job<T> forward_job(const sn_plan *p, const sn_memory *h, const void *x, const void *weight, const void *bias, void *y,
                   A_<T> *saved, A_<T> *scratch) {
    Job<T> J = job<T>(p, h, x, weight, saved);
    J.bias = (const A_<T> *)bias;
    J.y = (T *)y;
    J.fresh = scratch;
    J.past = past_caches(*p, J.y);
    // A mean absolute deviation about the mini-batch's own mean needs that mean first.
    J.once = p->uses_estimate && ahead(h) && !(p->p == 1 && p->center == 0);
    return J;
}

// scratch: (4, S). dx, dweight, dbias may be null.
template <class T>
Job<T> backward_job(const sn_plan *p, const sn_memory *h, const void *x, const void *weight, const void *dy,
                    A_<T> *saved, A_<T> *scratch, void *dx, void *dweight, void *dbias) {
    Job<T> J = job<T>(p, h, x, weight, saved);
    J.dy = (const T *)dy;
    J.dx = (T *)dx;
    J.fresh = scratch;
    J.last = scratch + 2 * J.S;
    J.dweight = (A_<T> *)dweight;
    J.dbias = (A_<T> *)dbias;
    J.past = dx && past_caches(*p, J.dx);
    J.once = dx && ahead(h);
    return J;
}

}  // namespace
